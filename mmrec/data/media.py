"""Bytes to pixels and back: the only place that decodes videos and images.

Every fault of a file is a `MediaError` with a short reason; nothing is printed.

Shape letters: H height, W width; images are RGB.
"""

import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from mmrec.errors import MediaError

if TYPE_CHECKING:
    from torch import Tensor

Source = str | Path | bytes
"""A path, a URL, or the bytes of a file."""


def decode_video(
    source: Source, *, num_frames: int
) -> tuple[list[UInt8[np.ndarray, "H W 3"]], list[float]]:
    """Decode frames spread evenly over a clip, with their times in seconds.

    The clip's frames are cut into `num_frames` equal spans, and the middle frame of each is taken;
    a clip with fewer frames gives every one of them. Raises `MediaError`.
    """
    file = _open_source(source)
    with _VIDEO_STDERR.silenced():
        reader = _open_video(file)
        total = len(reader)
        count = min(num_frames, total)
        wanted = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        try:
            spans = np.asarray(reader.get_frame_timestamp(range(total)), dtype=np.float64)
            starts = np.sort(spans[:, 0])
            if np.all(np.diff(starts) > 0):
                # In streams with open groups of pictures a seek may land one or two frames late,
                # which does not matter here; reading all frames instead would cost five times more.
                frames = list(reader.get_batch(wanted).asnumpy())
            else:
                frames = _decode_in_order(file, set(wanted))
                starts = np.arange(total) * np.median(spans[:, 1] - spans[:, 0])
        except MediaError:
            raise
        except Exception as error:  # decord has an exception class for every layer below it
            raise MediaError("cannot decode video", _summary(error)) from None
    return frames, [float(starts[i]) for i in wanted]


def _open_video(file: Path | bytes, *, fault_tolerance: float = -1) -> Any:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        # One thread: make_shards and the loader already run one process a core.
        return decord.VideoReader(
            io.BytesIO(file) if isinstance(file, bytes) else str(file),
            ctx=decord.cpu(0),
            num_threads=1,
            fault_tol=fault_tolerance,  # pyright: ignore[reportArgumentType] a share or a count
        )
    except Exception as error:
        raise MediaError("cannot open video", _summary(error)) from None


def _decode_in_order(file: Path | bytes, wanted: set[int]) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Decode a clip whose timestamps do not increase, by reading it from end to end.

    decord seeks by timestamp, and even its first rewind may then land in the middle of the clip. It
    shows at the end, where frames are missing and decord repeats others: a tolerance next to none
    makes that an error.
    """
    import decord

    reader = _open_video(file, fault_tolerance=1e-9)
    frames = []
    try:
        for position in range(len(reader)):
            frame = reader.next()
            if position in wanted:
                frames.append(frame.asnumpy())
    except decord.DECORDLimitReachedError as error:
        raise MediaError("broken video timestamps", _summary(error)) from None
    return frames


def read_image(source: Source) -> UInt8[np.ndarray, "H W 3"]:
    """Read an image of any mode as RGB, turned as its EXIF orientation says, alpha laid over white.

    Of an animation the first picture is read. Raises `MediaError`.
    """
    file = _open_source(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise MediaError("image too large", _summary(error)) from None
        except Image.UnidentifiedImageError as error:
            raise MediaError("cannot open image", _summary(error)) from None
        except Exception as error:  # a damaged file raises whatever its decoder met
            raise MediaError("cannot decode image", _summary(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips deep greys at 255, which turns a 16-bit picture white.
        grey = np.asarray(image).astype(np.float64)
        grey = grey / 257 if grey.max() > 255 else grey
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def resize_shorter(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Bring the shorter side down to `size` pixels, antialiased; a smaller image stays as it is."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    if scale >= 1:
        return image
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def encode_jpeg(image: UInt8[np.ndarray, "H W 3"], quality: int) -> bytes:
    """Encode as a baseline JPEG; the same image and quality give the same bytes."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def decode_jpeg(data: bytes) -> "UInt8[Tensor, '3 H W']":
    """Decode a JPEG into a tensor, as the loader does for every frame. Raises `MediaError`."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    if not data:
        raise MediaError("empty file")
    try:
        # bytearray: torch warns about memory that it may not write to.
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return cast("Tensor", decode_jpeg(encoded, mode=ImageReadMode.RGB))
    except RuntimeError as error:
        raise MediaError("cannot decode image", _summary(error)) from None


def _open_source(source: Source) -> Path | bytes:
    """Check that a source is there and holds something; fetch it where it is a URL."""
    if isinstance(source, str) and "://" in source:
        source = _fetch(source)
    if isinstance(source, bytes):
        if not source:
            raise MediaError("empty file")
        return source
    path = Path(source)
    if not path.exists():
        raise MediaError("file not found", str(path))
    if not path.is_file():
        raise MediaError("not a file", str(path))
    if not os.access(path, os.R_OK):
        raise MediaError("no permission to read", str(path))
    if not path.stat().st_size:
        raise MediaError("empty file", str(path))
    return path


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except FileNotFoundError:
        raise MediaError("file not found", url) from None
    except Exception as error:  # each protocol has its own family of exceptions
        raise MediaError("cannot fetch", f"{url}: {_summary(error)}") from None


def _summary(error: BaseException) -> str:
    """The first line of an error, short and printable: decord quotes the bytes it was given.

    decord's time of day is taken off, so that the same file gives the same words.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = re.sub(r"\[\d\d:\d\d:\d\d\] ", "", lines[0])
    return "".join(c if c.isprintable() else "?" for c in line)[:200]


class _StderrGate:
    """Sends file descriptor 2 to nowhere while anybody is inside.

    decord's C++ code writes the name of a clip that it cannot open (for a stream: its bytes)
    straight to the descriptor, and has no setting against it. Threads share the gate: the first one
    in closes it, the last one out opens it. What other threads write to stderr meanwhile is lost.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = -1

    @contextmanager
    def silenced(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._close()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    os.dup2(self._saved, 2)
                    os.close(self._saved)

    def _close(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()
        self._saved = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


_VIDEO_STDERR = _StderrGate()
