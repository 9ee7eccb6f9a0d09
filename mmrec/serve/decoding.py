"""Media of requests to pixels, in processes with limits on time and memory.

Decoder processes import this module and start anew after each file that ends one, so torch is not imported
here, and pictures are brought to the encoder's size where they are decoded: what is sent back is small.

Shape letters: T frames or pictures, H height and W width of one, S side of the encoder's input.
"""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmrec.data.containers import Kind, read_header, sniff
from mmrec.data.isolation import Isolated
from mmrec.data.media import FrameConfig, encode_jpeg, read_image, read_video, resize_shorter
from mmrec.errors import MediaError
from mmrec.serve.config import MEGABYTE
from mmrec.serve.refusals import Refused, busy

What = Literal["video", "images"]

_TAKEN: dict[What, tuple[Kind, ...]] = {
    "video": ("mp4", "matroska", "avi", "gif", "webp", "image"),
    "images": ("image", "gif", "webp"),
}
_NAMES: dict[What, str] = {
    "video": "MP4, MOV, WebM, Matroska, AVI, GIF or WebP",
    "images": "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF",
}
FRAME_SIDE, PRODUCT_SIDE = 192, 384
"""Shorter sides of what is shown of a query's frames, and kept of a product's picture."""


@dataclass(frozen=True, kw_only=True)
class DecodeTask:
    """The media of one request: a video, or pictures."""

    what: What
    files: tuple[bytes, ...] = ()
    num_frames: int
    size: int
    """S."""
    interpolation: Literal["bilinear", "bicubic"]
    resize: Literal["shortest", "squash"]
    """As in `Preprocess`."""
    max_pixels: int
    max_total_pixels: int
    """Of all pictures together; of a video the encoder says how many frames are looked at."""
    max_frames: int
    thumbnails: int
    """The shorter side of JPEGs of the frames, in pixels; 0 where none are wanted."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What the encoder needs of media, and what a person wants to see of them."""

    pixels: UInt8[np.ndarray, "T 3 S S"]
    thumbnails: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A file that gives no pixels. A value: an exception would cost the process that found it."""

    place: int
    reason: str


def check_kind(what: What, head: bytes, place: int) -> None:
    """Refuse what the first 64 bytes of a file say is something else; its name and type do not count."""
    kind = sniff(head)
    if kind not in _TAKEN[what]:
        name = what if what == "video" else f"images[{place}]"
        found = "nothing" if not head else "something else" if kind == "other" else kind
        raise Refused(
            415,
            "media type",
            f"{name}: expected {_NAMES[what]}, by its content; found {found}",
            field=what,
        )


def decode(task: DecodeTask) -> Decoded | Unreadable:
    """Read, check and prepare the media of one request; runs in a decoder process."""
    Image.MAX_IMAGE_PIXELS = task.max_pixels
    prepared: list[np.ndarray] = []
    thumbnails: list[bytes] = []
    place, left = 0, task.max_total_pixels
    try:
        for file in task.files:
            if task.what == "video":
                pictures = _read_video(file, task)
            else:
                pictures = [read_image(file)]
                left -= pictures[0].shape[0] * pictures[0].shape[1]
                if left < 0:
                    most = task.max_total_pixels / 1e6
                    raise MediaError(f"more than {most:g} megapixels with those before it")
            # What is large goes before the next is read.
            prepared += [_prepared(picture, task) for picture in pictures]
            shown = pictures if task.thumbnails else []
            thumbnails += [_thumbnail(picture, task.thumbnails) for picture in shown]
            place += 1
        return Decoded(pixels=np.stack(prepared), thumbnails=tuple(thumbnails))
    except MediaError as error:
        return Unreadable(place, error.reason)


def _prepared(picture: UInt8[np.ndarray, "H W 3"], task: DecodeTask) -> UInt8[np.ndarray, "3 S S"]:
    """What `Preprocess` makes of a picture, but for rounding: torch's resizing of bytes follows Pillow's."""
    size = task.size
    height, width = picture.shape[:2]
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    if task.resize == "squash":
        shape, box = (size, size), (0, 0, width, height)
    else:
        shorter = min(height, width)
        whole = (int(size * width / shorter), int(size * height / shorter))
        # Only what is kept is computed: of a long strip that is little.
        left, top = (round((side - size) / 2) for side in whole)
        across, down = width / whole[0], height / whole[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        shape = (size, size)
    resized = Image.fromarray(picture).resize(shape, mode[task.interpolation], box=box)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def _read_video(file: bytes, task: DecodeTask) -> list[np.ndarray]:
    header = read_header(file)
    _check_size(header.width * header.height, header.num_frames, task)
    clip = read_video(file, FrameConfig(num_frames=task.num_frames))
    _check_size(clip.width * clip.height, clip.num_frames, task)
    return clip.frames


def _check_size(pixels: int, num_frames: int, task: DecodeTask) -> None:
    if pixels > task.max_pixels:
        raise MediaError(f"more than {task.max_pixels / 1e6:g} megapixels a frame")
    if num_frames > task.max_frames:
        raise MediaError(f"more than {task.max_frames} frames")


def _thumbnail(picture: np.ndarray, side: int) -> bytes:
    # A side may be too long for a JPEG where the other is a few pixels.
    return encode_jpeg(resize_shorter(picture, side), 80)


class Decoders:
    """A pool of decoder processes, each behind a thread of its own."""

    def __init__(self, count: int, *, timeout_s: float, memory_mb: int, max_waiting: int) -> None:
        """Make the pool; a process starts when it is first needed, or at `warm_up`."""
        self._limits = {"timeout_s": timeout_s, "memory_bytes": memory_mb * MEGABYTE}
        self._count, self._max_waiting = count, max_waiting
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="mmrec-decoder")
        self._own = threading.local()
        self._all: list[Isolated[DecodeTask, Decoded | Unreadable]] = []
        self.waiting = 0
        """Requests whose media are being decoded, or wait for it."""

    async def warm_up(self, task: DecodeTask, file: bytes) -> None:
        """Start all processes, by a task for each of them."""
        together = threading.Barrier(self._count)

        def first() -> None:
            together.wait()
            self._isolated()(replace(task, files=(file,)))

        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(loop.run_in_executor(self._threads, first) for _ in range(self._count))
        )

    async def decode(self, task: DecodeTask, files: Sequence[IO[bytes]]) -> Decoded:
        """Decode the media of one request: `files` are those of the task. Raises `Refused`."""
        if self.waiting >= self._max_waiting:
            raise busy(f"{self.waiting} requests wait for their media to be decoded already")
        self.waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._decode, task, files
            )
        finally:
            self.waiting -= 1
        if isinstance(found, Unreadable):
            raise _unreadable(task.what, found)
        return found

    def close(self) -> None:
        """End the processes; nothing is to be under way."""
        self._threads.shutdown(cancel_futures=True)
        for isolated in self._all:
            isolated.close()

    def _decode(self, task: DecodeTask, files: Sequence[IO[bytes]]) -> Decoded | Unreadable:
        # Read only now: of the requests that wait, files may be on the disk.
        read = []
        for file in files[: task.num_frames]:
            file.seek(0)
            read.append(file.read())
        try:
            return self._isolated()(replace(task, files=tuple(read)))
        except MediaError as error:
            # Which of several pictures it was nobody knows any more.
            return Unreadable(-1, error.reason)

    def _isolated(self) -> Isolated[DecodeTask, Decoded | Unreadable]:
        if not hasattr(self._own, "isolated"):
            self._own.isolated = Isolated(decode, **self._limits)
            self._all.append(self._own.isolated)
        return self._own.isolated


def _unreadable(what: What, found: Unreadable) -> Refused:
    name = what if what == "video" or found.place < 0 else f"images[{found.place}]"
    return Refused(422, "unreadable media", f"{name}: {found.reason}", field=what)
