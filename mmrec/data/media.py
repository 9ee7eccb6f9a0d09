"""Bytes to pixels and back: the only place that decodes videos and images.

Every fault of a file is a `MediaError` with a short reason; nothing is printed.

Shape letters: N frames of a clip, C candidates, P values of a thumbnail, H height, W width; images
are RGB.
"""

import bisect
import io
import math
import os
import re
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image, ImageOps

from mmrec.data.captions import join_cues, parse_captions
from mmrec.data.containers import (
    Header,
    read_header,
    read_key_times,
    repaired,
    webp_durations,
)
from mmrec.data.sources import Source, copied, local_file, remote_exists, summary
from mmrec.data.storage import find_slice
from mmrec.errors import MediaError, UserError

if TYPE_CHECKING:
    from torch import Tensor

FramePolicy = Literal["uniform", "keyframes", "scenes"]

MAX_VIDEO_PIXELS = 8192 * 8192
"""A larger frame is refused before it is decoded: at this size one takes a gigabyte to decode."""

MAX_VIDEO_FRAMES = 10_000_000
"""Two days at 60 frames a second; decord reserves memory for as many as a header claims."""

MAX_CAPTION_BYTES = 16 << 20

MAX_CONFIG_FRAMES = 100

SCENE_CANDIDATES = 64
"""Frames that the policy "scenes" chooses from: what a clip costs at most."""

SCENE_DIFFERENCE = 2.0
"""Mean difference of two thumbnails, of 255, below which they show the same."""

_TIME_SLACK_S = 1e-3  # Matroska rounds times to milliseconds.
_KEPT_BYTES = 128 << 20  # Candidates that fit are decoded once, others a second time when chosen.


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """Which frames of a clip are kept."""

    policy: FramePolicy = "uniform"
    """uniform: spread evenly over time. keyframes: those that a decoder can start at, which is fastest.
    scenes: those that differ most, of 64 that are spread evenly; fewer where fewer differ."""

    num_frames: int = 8
    """The most frames of a clip, 1 to 100."""

    frames_per_second: float | None = None
    """Keep one frame every 1 / rate seconds instead; spread out further where that would be more than
    `num_frames`."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_frames <= MAX_CONFIG_FRAMES:
            raise UserError(
                f"num_frames: expected 1 to {MAX_CONFIG_FRAMES}, found {self.num_frames}; "
                f"give --frames.num-frames 8"
            )
        rate = self.frames_per_second
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise UserError(
                f"frames_per_second: expected a rate above 0, found {rate}; leave it out to choose "
                f"frames by number"
            )


@dataclass(frozen=True)
class Clip:
    """Frames of a video, upright, and when they are shown."""

    frames: list[UInt8[np.ndarray, "H W 3"]]
    times: list[float]
    """Seconds from the start of the video, one a frame, increasing."""
    duration: float
    """Seconds; 0 for a still image."""
    width: int
    """As shown, in the file: frames that were asked for smaller are smaller than this."""
    height: int
    num_frames: int
    """In the file."""


def read_video(source: Source, config: FrameConfig, *, size: int | None = None) -> Clip:
    """Read the frames of a video, an animation or a still image that a policy chooses.

    What the file is shows in its content, not in its name. Frames are turned and mirrored as the file
    asks, and pixels that are not square become so; the alpha of images, GIFs and WebPs is laid over
    white, and that of other videos left out. With `size` each frame's shorter side is brought down to so
    many pixels by the decoder, which is faster and takes less memory.

    Uniform: the clip's time is cut into `num_frames` equal spans, and the frame shown in the middle of
    each is taken, once. A clip with fewer frames gives every one of them; so does one with fewer
    keyframes for the policy "keyframes", and an animation, which has none, is treated as uniform.
    Of a damaged clip the groups of pictures that hold a fault are left out, where others do not.

    Raises `MediaError` where there is no frame to give, and `UserError` where a URL cannot be opened
    for want of a package.
    """
    with local_file(source) as file:
        header = _checked_header(file)
        webp = webp_durations(file) if header.kind == "webp" else []
        if header.kind == "image" or (header.kind == "webp" and len(webp) < 2):
            return _still_clip(read_image(file), size)
        with _on_disk(file, header) as path, _VIDEO_STDERR.silenced(), _memory_faults():
            reel = _WebpReel(path, webp, size) if webp else _VideoReel(path, header, size)
            frames = _choose_frames(reel, config)
    if not frames:
        raise MediaError("cannot decode video", reel.fault)
    return Clip(
        frames=list(frames.values()),
        times=[float(reel.starts[i]) for i in frames],
        duration=reel.duration,
        width=reel.width,
        height=reel.height,
        num_frames=len(reel.starts),
    )


def _checked_header(file: Path | bytes) -> Header:
    """Read a header, and refuse what it says is no video or would be too much for a decoder."""
    header = read_header(file)
    if header.kind == "text":
        raise MediaError("not a video or image", "it is a text")
    if header.kind == "audio" or not header.has_video:
        raise MediaError("no video stream")
    _check_size(header.width, header.height)
    if header.num_frames > MAX_VIDEO_FRAMES:
        raise MediaError("too many frames", f"the header claims {header.num_frames}")
    return header


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_VIDEO_PIXELS:
        raise MediaError("video too large", f"{width} x {height} pixels")


def _still_clip(image: UInt8[np.ndarray, "H W 3"], size: int | None) -> Clip:
    height, width = image.shape[:2]
    return Clip([_shrink(image, size)], [0.0], 0.0, width, height, 1)


def _shrink(image: UInt8[np.ndarray, "H W 3"], size: int | None) -> UInt8[np.ndarray, "h w 3"]:
    return image if size is None else resize_shorter(image, size)


# Which frames


Frames = Iterator[tuple[int, UInt8[np.ndarray, "_ _ 3"]]]
"""Positions and frames, these at the size that was asked for."""


class _Reel(ABC):
    """The frames of a file in the order in which they are shown."""

    starts: Float64[np.ndarray, " N"]  # seconds
    duration: float
    width: int  # in the file
    height: int
    fault: str  # what was wrong with the last frame that could not be decoded

    def key_positions(self) -> list[int]:
        """Where keyframes are; none where the format has no such thing."""
        return []

    @abstractmethod
    def frames(self, wanted: Sequence[int]) -> Frames:
        """Decode the frames at these increasing positions, without those that cannot be."""


def _choose_frames(reel: _Reel, config: FrameConfig) -> dict[int, UInt8[np.ndarray, "_ _ 3"]]:
    """The chosen frames by position, in order."""
    if config.policy == "scenes":
        return _scenes(reel, config)
    keys = reel.key_positions() if config.policy == "keyframes" else []
    if keys:
        wanted = _spread_keys(reel.starts, keys, config)
    else:
        wanted = _spread_evenly(reel, config.num_frames, config.frames_per_second)
    return dict(reel.frames(wanted))


def _num_by_rate(reel: _Reel, rate: float) -> int:
    """How many spans of 1 / rate seconds have their middle in the clip; at least 1."""
    return max(1, math.ceil(min(reel.duration * rate, MAX_VIDEO_FRAMES) - 0.5))


def _spread_evenly(reel: _Reel, num_frames: int, rate: float | None) -> list[int]:
    """Positions of the frames shown in the middles of equal spans of time."""
    starts, total = reel.starts, len(reel.starts)
    if rate is not None and (count := _num_by_rate(reel, rate)) <= num_frames:
        return _shown_at(starts, (np.arange(count) + 0.5) * min(1 / rate, reel.duration))
    count = min(num_frames, total)
    if count == total or _is_even(starts):
        return [(2 * i + 1) * total // (2 * count) for i in range(count)]
    return _shown_at(starts, (np.arange(count) + 0.5) * reel.duration / count)


def _is_even(starts: Float64[np.ndarray, " N"]) -> bool:
    """Whether frames follow each other at one rate, but for rounding."""
    grid, step = np.linspace(starts[0], starts[-1], len(starts), retstep=True)
    return bool(np.abs(starts - grid).max() <= 0.5 * step)


def _shown_at(starts: Float64[np.ndarray, " N"], moments: Float64[np.ndarray, " M"]) -> list[int]:
    """Positions of the frames shown at moments, in seconds from the first frame, each once."""
    after = np.searchsorted(starts, starts[0] + moments + _TIME_SLACK_S, side="right")
    return [int(i) for i in np.unique(np.maximum(after - 1, 0))]


def _spread_keys(
    starts: Float64[np.ndarray, " N"], keys: list[int], config: FrameConfig
) -> list[int]:
    if config.frames_per_second is not None:
        gap = 1 / config.frames_per_second - _TIME_SLACK_S
        apart = keys[:1]
        for key in keys[1:]:
            if starts[key] - starts[apart[-1]] >= gap:
                apart.append(key)
        keys = apart
    count = min(config.num_frames, len(keys))
    return [keys[(2 * i + 1) * len(keys) // (2 * count)] for i in range(count)]


def _scenes(reel: _Reel, config: FrameConfig) -> dict[int, UInt8[np.ndarray, "_ _ 3"]]:
    """Frames that differ, of a number of candidates that are spread evenly."""
    count = config.num_frames
    if config.frames_per_second is not None:
        count = min(count, _num_by_rate(reel, config.frames_per_second))
    thumbnails, kept = {}, {}
    for i, frame in reel.frames(_spread_evenly(reel, SCENE_CANDIDATES, None)):
        thumbnails[i] = _thumbnail(frame)
        if frame.nbytes * SCENE_CANDIDATES <= _KEPT_BYTES:
            kept[i] = frame
    if not thumbnails:
        return {}
    positions = list(thumbnails)
    chosen = [positions[i] for i in _farthest(np.stack(list(thumbnails.values())), count)]
    if len(kept) == len(thumbnails):
        return {i: kept[i] for i in chosen}
    return dict(reel.frames(chosen))


def _thumbnail(frame: UInt8[np.ndarray, "H W 3"]) -> Float32[np.ndarray, " P"]:
    small = Image.fromarray(frame).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def _farthest(thumbnails: Float32[np.ndarray, "C P"], count: int) -> list[int]:
    """The first thumbnail, then each time the one farthest from all chosen; in order.

    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    chosen = [0]
    distance = np.abs(thumbnails - thumbnails[0]).mean(1)  # (C,)
    while len(chosen) < count and distance.max() >= SCENE_DIFFERENCE:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(thumbnails - thumbnails[chosen[-1]]).mean(1))
    return sorted(chosen)


# Videos

_ATTEMPTS = 3
_MAX_LEAD = 16  # frames that come after a keyframe and are shown before it: the most of any codec


class _VideoReel(_Reel):
    """A video or a GIF, read by decord.

    decord numbers frames by their times and seeks by them, and gives wrong frames without a word where
    either does not work out. So a seek to a keyframe is checked. Where it fails, what the file says
    about its keyframes is looked up; where that is not enough, or the file is of a kind in which seeks
    go astray, the frames are read one after another.
    """

    def __init__(self, file: Path, header: Header, size: int | None) -> None:
        self._file = file
        self._header = header
        self._shape = (-1, -1)
        self._reader = self._open()
        height, width = (int(side) for side in self._reader.get_batch([]).shape[1:3])
        self.height, self.width = _with_square_pixels(height, width, header)
        _check_size(self.width, self.height)
        self._shape = _shorter_shape(self.height, self.width, size)
        if self._shape != (height, width):
            self._reader = self._open()
        self.fault = ""
        self._failed = False
        self._set_times()
        # Keyframes by the numbers that decord gives them, and by those under which they are shown.
        self._keys = sorted({int(key) for key in self._reader.get_key_indices()} | {0})
        self._shown_keys = self._keys
        self._listed_keys: list[int] = []  # what the file says of them, where decord says otherwise
        self._position = int(self._numbers[0])  # the number of the frame that comes next
        self._landed = 0  # the last keyframe that a seek has found

    def key_positions(self) -> list[int]:
        if self._header.kind == "gif":
            return []
        if not self._in_order:
            self._look_up_keys()
        first, last = int(self._numbers[0]), int(self._numbers[-1])
        keys = self._listed_keys or self._shown_keys
        return sorted({max(key - first, 0) for key in keys if key <= last})

    def _open(self) -> Any:
        decord = _import_decord()
        decord.logging.set_level(decord.logging.QUIET)
        height, width = self._shape
        try:
            return decord.VideoReader(
                # An absolute path: FFmpeg takes what stands before a colon for a protocol.
                os.path.abspath(self._file),
                ctx=decord.cpu(0),
                width=width,
                height=height,
                num_threads=1,  # make_shards already runs one process a core
                # A share of the frames: the first that is missing is an error, not a repetition.
                fault_tol=1e-9,  # pyright: ignore[reportArgumentType]
            )
        except MemoryError:
            raise
        except Exception as error:
            if "cannot find video stream" in str(error):
                raise MediaError("no video stream") from None
            raise MediaError("cannot open video", self._words(error)) from None

    def _words(self, error: BaseException) -> str:
        """What an error says, but for the name of the file, which may be a passing copy."""
        name = os.path.abspath(self._file)
        return summary(error, f"[{name}] ", f"[{name}]", name)

    def _set_times(self) -> None:
        total = len(self._reader)
        try:
            spans = self._reader.get_frame_timestamp(np.arange(total)).astype(np.float64)
        except IndexError:  # A header that counts frames, and none of them in what follows.
            raise MediaError("cannot decode video", "no frame is found") from None
        starts, ends = spans[:, 0], spans[:, 1]
        has_times = bool(np.abs(starts).max() < 1e9 and 2 * len(np.unique(starts)) > total)
        by_rate = self._header.frame_s is not None or not has_times
        # A seek by time does not work out, or cannot be relied on.
        self._in_order = self._without_seeks = by_rate or self._header.kind == "other"
        # Nor is the first frame that comes then the first of the file, unless the times were repaired.
        self._check_end = self._without_seeks and self._header.frame_s is None
        # decord tells frames that it passes over by their times, and counts from the first of the file.
        self._can_skip = (
            self._in_order and not self._check_end and bool((np.diff(starts) > 0).all())
        )
        if by_rate:
            frame_s = self._header.frame_s or _frame_length(self._reader, ends - starts)
            starts, ends = np.arange(total) * frame_s, np.arange(1, total + 1) * frame_s
        until = math.inf if self._header.shown_s is None else self._header.shown_s
        shown = (starts >= -_TIME_SLACK_S) & (starts < max(until - _TIME_SLACK_S, _TIME_SLACK_S))
        if not shown.any():
            raise MediaError("no frame is shown")
        self._numbers = np.flatnonzero(shown)
        self._can_skip = self._can_skip and self._numbers[0] == 0
        self.starts = starts[shown]
        self.duration = _end(self.starts, ends[shown]) - float(self.starts[0])

    def frames(self, wanted: Sequence[int]) -> Frames:
        if not self._check_end:
            yield from self._read_groups(wanted)
            return
        try:
            found = list(self._read_groups(wanted))
            self._read_to_the_end()
        except MediaError:
            found = self._rescue(wanted)
            if not found:
                raise
        yield from found

    def _read_groups(self, wanted: Sequence[int]) -> Frames:
        groups = groupby(wanted, lambda i: self._key_of(int(self._numbers[i])))
        for group in [list(group) for _, group in groups]:
            found = self._read_group(group)
            if self._failed and self._without_seeks:
                rescued = self._rescue([i for i in wanted if i >= group[0]])
                if rescued is None or self._check_end:
                    raise MediaError("cannot decode video", self.fault)
                yield from rescued
                return
            if self._failed:
                self._in_order = False  # If a seek went astray here, it was because of the fault.
                found = self._rescue(group) or []
            yield from found

    def _read_group(self, group: Iterable[int]) -> list[tuple[int, UInt8[np.ndarray, "_ _ 3"]]]:
        """Decode the wanted frames of one group of pictures: all of them or none."""
        found = []
        for i in group:
            frame = self._try_to_read(int(self._numbers[i]))
            if frame is None:
                return []
            found.append((i, self._pixels(frame)))
        return found

    def _key_of(self, number: int) -> int:
        return self._shown_keys[bisect.bisect_right(self._shown_keys, number) - 1]

    def _try_to_read(self, number: int) -> Any:
        """Decode a frame, or give None where that fails again and again.

        decord decodes ahead in a thread, and a fault that the thread finds spoils good frames before it.
        Whether it does is a matter of time: so one failure says little, and after several the whole
        group of pictures is given up for `_rescue`, so that the same file gives the same frames.
        """
        for _ in range(_ATTEMPTS):
            try:
                return self._read(number)
            except MemoryError:
                raise
            except Exception as error:  # decord has an exception class for every layer below it
                self.fault = self._words(error)
                self._failed = True
        return None

    def _read(self, number: int) -> Any:
        if not self._in_order:
            self._seek(number)
        if self._in_order:
            self._go_on_to(number)
        frame = self._reader.next()
        if len(frame.shape) < 3:  # Its time was not its own, and it was passed over with others.
            self._can_skip = False
            self._land_on(0)
            return self._read(number)
        self._position = number + 1
        return frame

    def _seek(self, number: int) -> None:
        """Bring the reader to a frame through its keyframe; or find that in order it must be."""
        key = self._key_of(number)
        if (self._failed or not key <= self._position <= number) and not self._land_on(key):
            if self._look_up_keys():
                self._land_on(key := self._key_of(number))
            else:
                self._in_order = True
                if not self._land_on(self._landed):
                    self._land_on(0)
                return
        self._landed = key
        # decord skips up to what it takes for the next keyframe. It cannot skip where an edit list cuts
        # off the first frames: they count for it, but do not come.
        after = bisect.bisect_right(self._keys, self._position)
        limit = self._keys[after] - 1 if after < len(self._keys) else number
        limit = 0 if key == 0 and self._numbers[0] > 0 else min(limit, number)
        if self._position == key < limit:
            self._go_on_to(
                key + 1
            )  # decord holds a keyframe that it was sent to ready, and gives it next.
        if self._position < limit:
            self._reader.seek_accurate(limit)
            self._position = limit
        self._go_on_to(number)

    def _land_on(self, key: int) -> bool:
        """Go to a keyframe; tells whether the frame that comes next is that one.

        It is another one where groups of pictures are open: frames shown before a keyframe come after
        it in the file, and decord counts keyframes as they come.
        """
        self._failed = False
        if key == 0:
            self._reader = self._open()
            self._position = int(self._numbers[0])
            return True
        if self._shown_keys is not self._keys:
            self._reader.seek(len(self._reader) - 1)  # It then seeks backwards, and by time alone.
            self._reader.seek(key)
            self._position = key
            return True
        self._reader.seek_accurate(key)
        # decord looks at the frame it has landed on, and counts it only if its time is right.
        landed = _num_read(self._reader) == key + 1
        self._position = key
        return landed

    def _look_up_keys(self) -> bool:
        """Look up when keyframes are shown; tells whether that is not when decord thinks."""
        times = None if self._numbers[0] > 0 else read_key_times(self._file)
        if self._shown_keys is not self._keys or times is None:
            return False
        shown, listed = {0}, {0}
        for number in np.searchsorted(self.starts, times + self.starts[0] - 2 * _TIME_SLACK_S):
            at = bisect.bisect_right(self._keys, int(number)) - 1
            lead = int(number) - self._keys[at]
            after = self._keys[at + 1] if at + 1 < len(self._keys) else math.inf
            listed.add(int(number))
            # Where keyframes are few frames apart, a seek might find the next one: such are read in order.
            if lead <= _MAX_LEAD and self._keys[at] + lead + _MAX_LEAD < after:
                shown.add(int(number))
        if listed <= set(self._keys):
            return False
        self._listed_keys = sorted(listed)
        if shown <= set(self._keys):
            return False
        self._shown_keys = sorted(shown)
        return True

    def _go_on_to(self, number: int) -> None:
        if self._position > number or self._failed:
            self._land_on(0)
        while self._position < number:
            count = self._num_skippable(number)
            if count > 1:
                self._reader.skip_frames(count)
            else:
                self._reader.next()
            self._position += count

    def _num_skippable(self, number: int) -> int:
        """How many frames to go on by: several if decord can pass them without scaling them, else one.

        It seeks when it passes a keyframe, so the frame before one is read.
        """
        if not self._can_skip:
            return 1
        after = bisect.bisect_right(self._keys, self._position)
        limit = self._keys[after] - 1 if after < len(self._keys) else number
        return max(1, min(limit, number) - self._position)

    def _read_to_the_end(self) -> None:
        """Find out whether all frames were there: decord misses the first ones where it starts late."""
        try:
            while self._position < len(self._reader):
                self._reader.next()
                self._position += 1
        except Exception as error:
            raise MediaError("broken video timestamps", self._words(error)) from None

    def _rescue(self, wanted: Sequence[int]) -> list[tuple[int, UInt8[np.ndarray, "_ _ 3"]]] | None:
        """Decode frames of a damaged clip with PyAV, up to the fault; None where it is not installed.

        It decodes in one thread, so that what it gives does not depend on time; and it gives the same
        pixels as decord, so that it does not matter when decord came upon the fault.
        """
        if find_spec("av") is None:
            return None
        numbers = {int(self._numbers[i]): i for i in wanted}
        key = 0 if self._in_order else self._key_of(min(numbers))
        first = int(self._numbers[0])
        start_s = float(self.starts[key - first]) if key > first else None
        found = {}
        for count, (time, pixels) in enumerate(_decode_to_fault(self._file, start_s, self._shape)):
            number = first + count if self._in_order else self._number_at(time)
            if number in numbers:
                found[numbers[number]] = self._mirror(pixels)
            if number >= max(numbers):
                break
        return sorted(found.items(), key=lambda item: item[0])

    def _number_at(self, time: float) -> int:
        """The number of the frame that is shown from a moment on, in seconds; -1 where none is."""
        at = int(np.searchsorted(self.starts, time - _TIME_SLACK_S))
        near = at < len(self.starts) and self.starts[at] <= time + _TIME_SLACK_S
        return int(self._numbers[at]) if near else -1

    def _pixels(self, frame: Any) -> UInt8[np.ndarray, "H W 3"]:
        pixels = frame.asnumpy()
        if pixels.shape[-1] != 3:  # decord takes the padding of narrow rows for further channels.
            height, width = self._shape
            pixels = pixels.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        return self._mirror(pixels)

    def _mirror(self, pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        if self._header.mirrored is None:
            return pixels
        return np.flip(pixels, self._header.mirrored).copy()


@lru_cache(maxsize=1)
def _import_decord() -> Any:
    """Import decord without the CUDA libraries that it would load for its GPU builds.

    Where torch came with them, decord would load all, 600 MB and half a second a process, though its
    CPU build calls none. They are hidden from it; a build that does need them gets them.
    """
    modules = cast("dict[str, Any]", sys.modules)
    hidden = modules.pop("nvidia", None)
    modules["nvidia"] = None
    with suppress(OSError):
        import decord
    del modules["nvidia"]
    if hidden is not None:
        modules["nvidia"] = hidden
    import decord

    return decord


def _decode_to_fault(
    file: Path, start_s: float | None, shape: tuple[int, int]
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Times and frames of a video from a keyframe on, as PyAV decodes them and decord scales them."""
    import av
    from av.error import FFmpegError

    with (
        suppress(FFmpegError),
        av.open(os.path.abspath(file), "r", metadata_errors="replace") as container,
    ):
        stream: Any = container.streams.best("video")
        stream.codec_context.thread_count = 1
        first = stream.start_time or 0
        if start_s is not None:
            container.seek(first + round(start_s / stream.time_base), stream=stream)
        graph = None
        for frame in container.decode(stream):
            graph = graph or _scaling_graph(stream, -frame.rotation % 360, shape)
            graph.push(frame)
            time = float((frame.pts - first) * stream.time_base) if frame.pts is not None else 0.0
            yield time, graph.pull().to_ndarray()


def _scaling_graph(stream: Any, turn: int, shape: tuple[int, int]) -> Any:
    """The filters that decord sends frames through."""
    from av.filter import Graph

    graph = Graph()
    turns = {90: ["1"], 180: ["1", "1"], 270: ["2"]}.get(turn, [])
    nodes = [
        graph.add_buffer(template=stream),
        *(graph.add("transpose", direction) for direction in turns),
        graph.add("scale", f"{shape[1]}:{shape[0]}"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph


def _with_square_pixels(height: int, width: int, header: Header) -> tuple[int, int]:
    """The size of a turned picture once its pixels are as wide as high: one side changes, as in players."""
    was_turned = (width, height) == (header.height, header.width) and width != height
    if was_turned:
        return max(1, round(height * header.pixel_aspect)), width
    return height, max(1, round(width * header.pixel_aspect))


def _num_read(reader: Any) -> int:
    """The number of frames before the next one, as decord counts."""
    video_reader = _import_decord().video_reader
    return video_reader._CAPI_VideoReaderGetCurrentPosition(reader._handle)  # pyright: ignore


def _frame_length(reader: Any, lengths: Float64[np.ndarray, " N"]) -> float:
    """Seconds a frame of a file without times, as the file or its stream tells; else a guess."""
    length, rate = float(np.median(lengths)), float(reader.get_avg_fps())
    if 0 < length < 10:
        return length
    return 1 / rate if 0.1 < rate < 1000 else 0.04


def _end(starts: Float64[np.ndarray, " N"], ends: Float64[np.ndarray, " N"]) -> float:
    """When a clip ends. A last frame longer than every other is a fault more often than not."""
    if len(starts) == 1:
        return float(ends[0]) if 0 < ends[0] - starts[0] < 60 else float(starts[0])
    gaps = np.diff(starts)
    last = float(ends[-1] - starts[-1])
    return float(starts[-1]) + (last if 0 < last <= gaps.max() else float(np.median(gaps)))


class _WebpReel(_Reel):
    """An animated WebP, read by Pillow one picture after another."""

    def __init__(self, file: Path, durations: list[float], size: int | None) -> None:
        with _image_faults():
            self._image = Image.open(file, formats=["WEBP"])
        self.width, self.height = self._image.size
        _check_size(self.width, self.height)
        durations = durations[: getattr(self._image, "n_frames", 1)]
        self.starts = np.concatenate([[0.0], np.cumsum(durations)[:-1]])
        self.duration = float(sum(durations))
        self.fault = ""
        self._size = size

    def frames(self, wanted: Sequence[int]) -> Frames:
        for i in wanted:
            with _image_faults():
                self._image.seek(i)
                pixels = np.asarray(_to_rgb(self._image.copy()))
            yield i, _shrink(pixels, self._size)


# Images

_MAX_JPEG_SIDE = 65_500


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """Pillow knows more formats; some of them run other programs. AVIF not every build of it knows."""
    Image.init()
    known = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")
    return [name for name in known if name in Image.OPEN]


def read_image(source: Source) -> UInt8[np.ndarray, "H W 3"]:
    """Read an image of any mode as RGB, turned as its EXIF orientation says, alpha laid over white.

    Of an animation the first picture is read. Raises `MediaError`, and `UserError` where a URL cannot be
    opened for want of a package.
    """
    with (
        local_file(source) as file,
        _image_faults(),
        Image.open(_stream(file), formats=_formats()) as image,
    ):
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


@contextmanager
def _image_faults() -> Iterator[None]:
    """Turn whatever Pillow meets in a file into a `MediaError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise MediaError("image too large", summary(error)) from None
        except Image.UnidentifiedImageError:
            raise MediaError("cannot open image", "unknown format") from None
        except MemoryError:
            raise MediaError("not enough memory") from None
        except Exception as error:  # a damaged file raises whatever its decoder met
            raise MediaError("cannot decode image", summary(error)) from None


@contextmanager
def _memory_faults() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise MediaError("not enough memory") from None


def _stream(file: Path | bytes) -> io.BytesIO | Path:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits or more as 8; Pillow would clip it at 255, which turns a picture white."""
    grey = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I;16") or grey.max(initial=0) > 255:
        grey = grey / 257
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))


def resize_shorter(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Bring the shorter side down to `size` pixels, antialiased; a smaller image stays as it is."""
    height, width = _shorter_shape(image.shape[0], image.shape[1], size)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _shorter_shape(height: int, width: int, size: int | None) -> tuple[int, int]:
    if size is None or size >= min(height, width):
        return height, width
    scale = size / min(height, width)
    return max(size, round(height * scale)), max(size, round(width * scale))


def encode_jpeg(image: UInt8[np.ndarray, "H W 3"], quality: int) -> bytes:
    """Encode as a baseline JPEG; the same image and quality give the same bytes.

    Raises `MediaError` for a side longer than the format can hold.
    """
    if max(image.shape) > _MAX_JPEG_SIDE:
        height, width = image.shape[:2]
        raise MediaError("image too long for a JPEG", f"{width} x {height} pixels")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def decode_jpeg(data: bytes) -> "UInt8[Tensor, '3 H W']":
    """Decode a JPEG into a tensor, as the loader does for every frame. Raises `MediaError`.

    Tars that others wrote may hold PNG and WebP instead, which take longer.
    """
    import simplejpeg
    import torch

    if not data:
        raise MediaError("empty file")
    if not data.startswith(b"\xff\xd8\xff"):
        return torch.from_numpy(np.array(read_image(data))).permute(2, 0, 1).contiguous()
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except ValueError as error:
        raise MediaError("cannot decode image", summary(error)) from None


# Captions

_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
_CAPTION_SUFFIXES = (".srt", ".vtt")
_TEXT_CODECS = ("subrip", "srt", "text", "webvtt", "mov_text", "ass", "ssa")


def read_subtitles(source: Source) -> str | None:
    """The text of the captions beside a video or inside it; None where there are none.

    Beside means clip.srt, clip.vtt, or, in a local folder, clip.en.vtt and other languages. English is
    taken before another language, and a file before a stream. Tags, numbers and times are taken
    off; the lines of rolling captions are said once; a line of a caption is a line of the text.

    Raises `MediaError` for damaged captions, and `UserError` where a stream of captions is to be read and
    PyAV is not installed.
    """
    beside = _captions_beside(source)
    if beside is not None:
        with local_file(beside) as file:
            return parse_captions(_caption_bytes(file))
    with local_file(source) as file:
        return _captions_inside(file) if read_header(file).has_text else None


def _caption_bytes(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        return file
    if file.stat().st_size > MAX_CAPTION_BYTES:
        raise MediaError("captions too large", str(file))
    return file.read_bytes()


def _captions_beside(source: Source) -> str | Path | None:
    if isinstance(source, bytes) or find_slice(str(source)) is not None:
        return None
    if isinstance(source, str) and "://" in source:
        return _captions_beside_url(source)
    path = Path(source)
    for suffix in _CAPTION_SUFFIXES:
        if path.with_suffix(suffix).is_file():
            return path.with_suffix(suffix)
    try:
        names = _translations(path.parent, path.parent.stat().st_mtime_ns).get(path.stem)
    except OSError:
        return None
    return path.with_name(names[0]) if names else None


def _captions_beside_url(url: str) -> str | None:
    """Two names are tried: a listing of a bucket may be a million names long."""
    first, *outer = url.split("::")
    stem, dot, suffix = first.rpartition(".")
    if not dot or "/" in suffix or "?" in first:
        return None
    for suffix in _CAPTION_SUFFIXES:
        other = "::".join([stem + suffix, *outer])
        if remote_exists(other):
            return other
    return None


@lru_cache(maxsize=16)
def _translations(folder: Path, changed_ns: int) -> dict[str, list[str]]:
    """Caption files of a folder with a language in their names, by the rest; the best comes first.

    `changed_ns` makes the cache forget: folders of a million clips are listed once, not once a clip.
    """
    found: dict[str, list[tuple[bool, str]]] = {}
    with os.scandir(folder) as entries:
        for name in (entry.name for entry in entries):
            stem, suffix = os.path.splitext(name)
            clip, _, language = stem.rpartition(".")
            if suffix in _CAPTION_SUFFIXES and clip and _LANGUAGE.fullmatch(language):
                found.setdefault(clip, []).append((not language.lower().startswith("en"), name))
    return {clip: [name for _, name in sorted(names)] for clip, names in found.items()}


def _captions_inside(file: Path | bytes) -> str | None:
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise UserError(
            "the captions inside a video are read with PyAV, which is not installed; "
            "`pip install 'mmrec[data-prep]'`, or do without subtitles"
        ) from None
    try:
        opened = io.BytesIO(file) if isinstance(file, bytes) else os.path.abspath(file)
        with av.open(opened, "r", metadata_errors="replace") as container:
            streams = [
                s for s in container.streams.subtitles if s.codec_context.name in _TEXT_CODECS
            ]
            if not streams:
                return None
            stream = min(streams, key=lambda s: (s.language or "") not in ("eng", "en"))
            packets = (bytes(packet) for packet in container.demux(stream))
            return join_cues(_stream_cues(packets, stream.codec_context.name))
    except (FFmpegError, UnicodeDecodeError) as error:
        raise MediaError("damaged captions", summary(error)) from None


def _stream_cues(packets: Iterator[bytes], codec: str) -> Iterator[list[str]]:
    size = 0
    for packet in packets:
        size += len(packet)
        if size > MAX_CAPTION_BYTES:
            raise MediaError("captions too large")
        if packet:
            yield _packet_lines(packet, codec)


def _packet_lines(packet: bytes, codec: str) -> list[str]:
    """The lines of one caption, as its codec packs them."""
    if codec == "mov_text":  # its length in two bytes, the text, and how it is set
        packet = packet[2 : 2 + int.from_bytes(packet[:2], "big")]
        wide = packet.startswith((b"\xff\xfe", b"\xfe\xff"))
        return packet.decode("utf-16" if wide else "utf-8").splitlines()
    text = packet.decode("utf-8")
    if codec in ("ass", "ssa"):  # eight fields before the text, which breaks its lines with \N
        text = re.sub(r"\\[Nn]", "\n", text.split(",", 8)[-1]).replace(r"\h", " ")
    return text.splitlines()


@contextmanager
def _on_disk(file: Path | bytes, header: Header) -> Iterator[Path]:
    """A file on disk and repaired. decord reads bytes too, but damaged ones lead it past their end."""
    if isinstance(file, Path) and not header.edits:
        yield file
        return
    with copied(repaired(file, header.edits)) as path:
        yield path


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
