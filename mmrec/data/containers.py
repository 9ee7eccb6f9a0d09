"""What the first bytes and the header of a media file claim, read without a decoder.

A decoder believes a header: it reserves memory for a thousand million frames, or decodes a frame of a
gigabyte, before anybody can look at the figures. Here they are read first, from a few kilobytes, in
Python. `media.py` judges them, and applies the repairs that this module proposes.

Formats: ISO/IEC 14496-12 (MP4, MOV), RFC 9559 (Matroska, WebM), Microsoft's RIFF (AVI, WebP).
"""

import io
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mmrec.errors import MediaError

Kind = Literal["mp4", "matroska", "avi", "gif", "webp", "image", "audio", "text", "other"]

Opened = io.BufferedReader | io.BytesIO

BLOCK_BYTES = 1 << 20

MAX_HEADER_ITEMS = 100_000
"""A header of more boxes, elements or chunks is damaged, or made to be slow."""

MAX_TABLE_BYTES = 1 << 27
"""A table of frame durations that is larger is damaged: ten million frames need 80 MB at most."""


class Edit(NamedTuple):
    """Bytes `start` to `end` of a file make room for others."""

    start: int
    end: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a header claims; zero and None stand for what it does not say."""

    kind: Kind
    has_video: bool = True
    """False only where the header lists its streams and none of them is video."""
    has_text: bool = False
    """Whether a stream of subtitles is listed that is text, not pictures."""
    width: int = 0
    height: int = 0
    num_frames: int = 0
    pixel_aspect: float = 1.0
    """Width of a pixel over its height, before the picture is turned; of MP4 and Matroska."""
    shown_s: float | None = None
    """Where an edit list ends: frames from there on are in the file and never shown."""
    mirrored: int | None = None
    """The axis to mirror after the picture is turned: 0 swaps top and bottom, 1 left and right."""
    frame_s: float | None = None
    """The length of a frame where `edits` gives all of them the same."""
    edits: tuple[Edit, ...] = ()
    """What to change in the file so that a decoder can read it from the start."""


def read_header(file: Path | bytes) -> Header:
    """Tell what a file is by its content, and read what its header claims.

    A header that makes no sense gives what was understood of it. Raises `MediaError` where it is made to
    be slow.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        kind = sniff(stream.read(64))
        try:
            return _READERS[kind](stream) if kind in _READERS else Header(kind=kind)
        except (struct.error, LookupError, ValueError, OverflowError):
            return Header(kind=kind)


def read_key_times(file: Path | bytes) -> np.ndarray | None:
    """Seconds from the first frame of a video to each of its keyframes, as they are shown.

    None where the file does not say. An index of Matroska may leave keyframes out.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        kind = sniff(stream.read(64))
        try:
            if kind == "mp4":
                videos = [track for track in _tracks(stream)[0] if track.handler == b"vide"]
                return videos[0].key_times() if len(videos) == 1 else None
            return _cue_times(stream) if kind == "matroska" else None
        except (struct.error, LookupError, ValueError, OverflowError):
            return None


def repaired(file: Path | bytes, edits: tuple[Edit, ...]) -> Iterator[bytes]:
    """The blocks of a file with its edits made; these are in order and do not overlap."""
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        for edit in edits:
            yield from _blocks(stream, edit.start - stream.tell())
            yield edit.data
            stream.seek(edit.end)
        yield from _blocks(stream, sys.maxsize)


def _blocks(file: Opened, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, BLOCK_BYTES))):
        size -= len(block)
        yield block


# What a file is

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
_AUDIO = (b"ID3", b"fLaC", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9")
_MP4_BOXES = b"ftyp moov mdat free skip wide pnot moof styp sidx uuid".split()
_IMAGE_BRANDS = b"avif avis heic heix hevc hevx mif1 msf1".split()
_RIFF: dict[bytes, Kind] = {b"AVI ": "avi", b"WEBP": "webp", b"WAVE": "audio"}
_CONTROL = bytes(set(range(32)) - set(b"\t\n\f\r"))


def sniff(head: bytes) -> Kind:
    """Tell what a file is by its first 64 bytes.

    "text" is told apart because FFmpeg takes play lists for videos and would open what they name.
    """
    if head[4:8] in _MP4_BOXES:
        return "image" if head[8:12] in _IMAGE_BRANDS else "mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(_IMAGES):
        return "image"
    if head.startswith(_AUDIO):
        return "audio"
    return "other" if head.translate(None, _CONTROL) != head else "text"


def _items(items: Iterator[tuple[bytes, int, int]]) -> Iterator[tuple[bytes, int, int]]:
    """The parts of a header (name, start, end), as long as they are not too many."""
    yield from islice(items, MAX_HEADER_ITEMS)
    if next(items, None) is not None:
        raise MediaError("damaged header", f"it has more than {MAX_HEADER_ITEMS} parts")


def _read(file: Opened, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _size(file: Opened) -> int:
    return file.seek(0, io.SEEK_END)


# MP4 and MOV

_PARENTS = {b"mdia", b"minf", b"stbl", b"edts"}


def _boxes(file: Opened, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        head = _read(file, start, 16)
        size, inside = int.from_bytes(head[:4], "big"), start + 8
        if size == 1:
            size, inside = int.from_bytes(head[8:16], "big"), start + 16
        elif size == 0:
            size = end - start
        if start + size < inside:
            return
        yield head[4:8], inside, min(start + size, end)
        start += size


def _mp4(file: Opened) -> Header:
    tracks, scale = _tracks(file)
    videos = [track for track in tracks if track.handler == b"vide"]
    header = Header(
        kind="mp4",
        has_video=bool(videos) or not tracks,
        has_text=any(track.handler in (b"text", b"sbtl", b"subt") for track in tracks),
        width=max((video.width for video in videos), default=0),
        height=max((video.height for video in videos), default=0),
        num_frames=max((video.num_frames for video in videos), default=0),
    )
    return videos[0].complete(header, scale) if len(videos) == 1 else header


def _tracks(file: Opened) -> "tuple[list[_Track], int]":
    """The tracks of a movie, and its units of time in a second."""
    movie = {kind: (start, end) for kind, start, end in _items(_boxes(file, 0, _size(file)))}
    tracks, scale = [], 1000
    for kind, start, end in _items(_boxes(file, *movie.get(b"moov", (0, 0)))):
        if kind == b"trak":
            tracks.append(_Track(file, start, end))
        elif kind == b"mvhd":
            scale = _long_or_short(file, start, (20, 12))
    return tracks, scale


def _long_or_short(file: Opened, start: int, places: tuple[int, int], size: int = 4) -> int:
    """A number of a box that comes in two versions, with 64-bit times or with 32-bit ones."""
    long = _read(file, start, 1) == b"\1"
    return int.from_bytes(_read(file, start + places[0 if long else 1], size), "big")


class _Track:
    """One track of a movie: where its boxes lie, and what they say."""

    def __init__(self, file: Opened, start: int, end: int) -> None:
        self._file = file
        self._boxes: dict[bytes, tuple[int, int]] = {}
        self._find(start, end, depth=4)
        self.handler = self._field(b"hdlr", 8, 4)
        self.width = int.from_bytes(self._field(b"stsd", 40, 2), "big")
        self.height = int.from_bytes(self._field(b"stsd", 42, 2), "big")
        # Rows of a number of frames and the length of each.
        self.durations = self._table(b"stts" if self.handler == b"vide" else b"", 2)
        claimed = int.from_bytes(self._field(b"stsz", 8, 4), "big")
        self.num_frames = max(claimed, int(self.durations[:, 0].sum()))

    def _find(self, start: int, end: int, depth: int) -> None:
        for kind, inside, after in _items(_boxes(self._file, start, end)):
            if kind in _PARENTS and depth:
                self._find(inside, after, depth - 1)
            else:
                self._boxes.setdefault(kind, (inside, after))

    def _field(self, box: bytes, place: int, size: int) -> bytes:
        start, end = self._boxes.get(box, (0, 0))
        return _read(self._file, start + place, size) if start + place + size <= end else b""

    def _table(self, box: bytes, columns: int) -> np.ndarray:
        """The rows of a table of 32-bit numbers."""
        start, end = self._boxes.get(box, (0, 0))
        claimed = int.from_bytes(self._field(box, 4, 4), "big")
        num_rows = max(0, min(claimed, (end - start - 8) // (4 * columns)))
        if num_rows * 4 * columns > MAX_TABLE_BYTES:
            raise MediaError("damaged header", f"a table of it has {num_rows} rows")
        rows = np.frombuffer(self._field(box, 8, num_rows * 4 * columns), ">u4")
        return rows.astype(np.int64).reshape(-1, columns)

    def key_times(self) -> np.ndarray | None:
        """Seconds from the first frame to each keyframe; None where every frame is one."""
        shifts, keys = self._table(b"ctts", 2), self._table(b"stss", 1)[:, 0] - 1
        counts = self.durations[:, 0]
        if not len(keys) or max(counts.sum(), shifts[:, 0].sum()) > MAX_TABLE_BYTES // 8:
            return None
        ends = np.cumsum(np.repeat(self.durations[:, 1], counts))
        shift = np.repeat(shifts[:, 1].astype(np.int32), shifts[:, 0])  # They may be negative.
        total = min(len(ends), len(shift)) if len(shift) else len(ends)
        shown = np.concatenate([[0], ends])[:total] + (shift[:total] if len(shift) else 0)
        return (shown[keys] - shown.min()) / self._scale()

    def complete(self, header: Header, movie_scale: int) -> Header:
        """Add what only the one video track of a movie can say."""
        edits = self._timing_edits(movie_scale)
        return replace(
            header,
            shown_s=None if edits else self._shown_s(movie_scale),
            mirrored=self._mirrored(),
            pixel_aspect=self._pixel_aspect(),
            frame_s=self._frame_length() / self._scale() if edits else None,
            edits=edits,
        )

    def _scale(self) -> int:
        """The units of time in a second."""
        start = self._boxes[b"mdhd"][0]
        return max(1, _long_or_short(self._file, start, (20, 12)))

    def _mirrored(self) -> int | None:
        """A display matrix takes x to (a, b) and y to (c, d); decord looks at the first alone."""
        place = 52 if self._field(b"tkhd", 0, 1) == b"\1" else 40
        matrix = self._field(b"tkhd", place, 36)
        a, b, _, c, d, *_ = struct.unpack(">9i", matrix) if matrix else (0,) * 9
        if a * d - b * c >= 0:
            return None
        return 0 if abs(a) > abs(b) else 1

    def _pixel_aspect(self) -> float:
        """What the box `pasp` after the fixed fields of the description of the pictures says."""
        start, end = self._boxes.get(b"stsd", (0, 0))
        for kind, inside, _ in _items(_boxes(self._file, start + 94, end)):
            if kind == b"pasp":
                return _ratio(*struct.unpack(">II", _read(self._file, inside, 8)))
        return 1.0

    def _edit(self) -> tuple[int, int, int] | None:
        """Place, size and value of the length of the only edit that shows something."""
        start, end = self._boxes.get(b"elst", (0, 0))
        long = self._field(b"elst", 0, 1) == b"\1"
        row, width = (20, 8) if long else (12, 4)
        num_rows = min(int.from_bytes(self._field(b"elst", 4, 4), "big"), (end - start - 8) // row)
        found = None
        for place in islice(range(start + 8, start + 8 + num_rows * row, row), 1000):
            values = _read(self._file, place, 2 * width)
            if int.from_bytes(values[width:], "big", signed=True) == -1:
                continue  # an empty edit: nothing is shown for a while
            if found:
                return None
            found = place, width, int.from_bytes(values[:width], "big")
        return found

    def _shown_s(self, movie_scale: int) -> float | None:
        edit = self._edit()
        return edit[2] / movie_scale if edit and edit[2] and movie_scale else None

    def _frame_length(self) -> int:
        """The length that most of the frames with a length have; 0 where none has one."""
        lengths = self.durations[self.durations[:, 1] > 0]
        return int(lengths[lengths[:, 0].argmax(), 1]) if len(lengths) else 0

    def _timing_edits(self, movie_scale: int) -> tuple[Edit, ...]:
        """Give every frame the same length where more than half have none.

        Some cutting programs write such tables. A decoder that seeks by time is lost in them.
        """
        length, total = self._frame_length(), int(self.durations[:, 0].sum())
        timeless = int(self.durations[self.durations[:, 1] == 0, 0].sum())
        if not length or 2 * timeless <= total:
            return ()
        rows = self.durations.copy()
        rows[:, 1] = length
        place = self._boxes[b"stts"][0] + 8
        edits = [Edit(place, place + rows.size * 4, rows.astype(">u4").tobytes())]
        if edit := self._edit():  # It ends where the table did, and would hide the frames after.
            place, width, _ = edit
            whole = math.ceil(total * length * movie_scale / self._scale())
            whole = min(whole, (1 << (8 * width - 1)) - 1)
            edits.append(Edit(place, place + width, whole.to_bytes(width, "big")))
        return tuple(sorted(edits))


def _ratio(above: int, below: int) -> float:
    """A pixel's width over its height; 1 for what no camera or disc has ever had."""
    return above / below if above and below and 1 / 8 < above / below < 8 else 1.0


# Matroska and WebM

_SEGMENT, _INFO, _TRACKS, _CLUSTER = (
    bytes.fromhex(name) for name in ("18538067", "1549a966", "1654ae6b", "1f43b675")
)
_TIMESTAMP_SCALE, _DURATION = bytes.fromhex("2ad7b1"), bytes.fromhex("4489")
_TRACK, _TRACK_TYPE, _CODEC, _FRAME_NS = (
    bytes.fromhex(name) for name in ("ae", "83", "86", "23e383")
)
_VIDEO, _PIXEL_WIDTH, _PIXEL_HEIGHT = (bytes.fromhex(name) for name in ("e0", "b0", "ba"))
_SHOWN_WIDTH, _SHOWN_HEIGHT = bytes.fromhex("54b0"), bytes.fromhex("54ba")
_CUES, _CUE = bytes.fromhex("1c53bb6b"), b"\xbb"
_CUE_TIME, _CUE_PLACE, _CUE_TRACK, _TRACK_NUMBER = b"\xb3", b"\xb7", b"\xf7", b"\xd7"
_ASSUMED_RATE = 60
"""Frames a second of a stream that does not say: the most that is usual."""


def _elements(file: Opened, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start < end:
        head = _read(file, start, 12)
        name = head[: _length(head)]
        size = head[len(name) : len(name) + _length(head[len(name) :])]
        if not name or not size:
            return
        inside = start + len(name) + len(size)
        value = int.from_bytes(size, "big") & ((1 << 7 * len(size)) - 1)
        unknown = value == (1 << 7 * len(size)) - 1  # A live stream: to the end of what is there.
        after = end if unknown else min(inside + value, end)
        yield name, inside, after
        start = after


def _length(number: bytes) -> int:
    """Bytes in a number of variable length: one more than its leading zero bits."""
    return 9 - number[0].bit_length() if number and number[0] else 0


def _children(file: Opened, start: int, end: int) -> dict[bytes, bytes]:
    """The values of an element's small children."""
    return {
        name: _read(file, inside, after - inside)
        for name, inside, after in _items(_elements(file, start, end))
        if after - inside <= 256
    }


def _segment(file: Opened) -> tuple[int, int]:
    """Where the contents of a file's first segment start and end."""
    for name, inside, after in _items(_elements(file, 0, _size(file))):
        if name == _SEGMENT:
            return inside, after
    return 0, 0


def _matroska(file: Opened) -> Header:
    places: dict[bytes, tuple[int, int]] = {}
    starts: dict[bytes, int] = {}
    place, end = _segment(file)
    for name, inside, after in _items(_elements(file, place, end)):
        if name == _CLUSTER:
            break
        places.setdefault(name, (inside, after))
        starts.setdefault(name, place)
        place = after
    if _TRACKS not in places:
        return Header(kind="matroska")
    tracks = [
        _children(file, inside, after) | _video_size(file, inside, after)
        for name, inside, after in _items(_elements(file, *places[_TRACKS]))
        if name == _TRACK
    ]
    videos = [track for track in tracks if track.get(_TRACK_TYPE) == b"\1"]
    info = _children(file, *places[_INFO]) if _INFO in places else {}
    return Header(
        kind="matroska",
        has_video=bool(videos),
        has_text=any(_is_text(track) for track in tracks),
        width=max((_number(video.get(_PIXEL_WIDTH)) for video in videos), default=0),
        height=max((_number(video.get(_PIXEL_HEIGHT)) for video in videos), default=0),
        num_frames=max((_claimed_frames(info, video) for video in videos), default=0),
        pixel_aspect=_matroska_aspect(videos[0]) if len(videos) == 1 else 1.0,
        edits=_duration_edits(starts[_INFO], *places[_INFO])
        if _INFO in places and not _duration(info)
        else (),
    )


def _matroska_aspect(video: dict[bytes, bytes]) -> float:
    width, height = _number(video.get(_PIXEL_WIDTH)), _number(video.get(_PIXEL_HEIGHT))
    shown = _number(video.get(_SHOWN_WIDTH)), _number(video.get(_SHOWN_HEIGHT))
    return _ratio(shown[0] * height, shown[1] * width)


def _cue_times(file: Opened) -> np.ndarray | None:
    """What the index of a file says about its one video track."""
    parts = {
        name: (inside, after)
        for name, inside, after in _items(_elements(file, *_segment(file)))
        if name in (_INFO, _TRACKS, _CUES)
    }
    tracks = [
        _children(file, inside, after)
        for name, inside, after in _items(_elements(file, *parts[_TRACKS]))
        if name == _TRACK
    ]
    videos = [track.get(_TRACK_NUMBER) for track in tracks if track.get(_TRACK_TYPE) == b"\1"]
    times = []
    for name, inside, after in _items(_elements(file, *parts[_CUES])):
        if name == _CUE and len(videos) == 1:
            cue = _children(file, inside, after)
            seen = next(_elements_of(cue.get(_CUE_PLACE, b""), _CUE_TRACK), None)
            if seen == videos[0]:
                times.append(_number(cue.get(_CUE_TIME)))
    scale = _number(_children(file, *parts[_INFO]).get(_TIMESTAMP_SCALE)) or 1_000_000
    return (np.array(times) - min(times)) * scale / 1e9 if times else None


def _elements_of(data: bytes, wanted: bytes) -> Iterator[bytes]:
    """The values of the elements of one name in a few bytes."""
    for name, inside, after in _elements(io.BytesIO(data), 0, len(data)):
        if name == wanted:
            yield data[inside:after]


def _video_size(file: Opened, start: int, end: int) -> dict[bytes, bytes]:
    video = next((e for e in _items(_elements(file, start, end)) if e[0] == _VIDEO), None)
    return _children(file, *video[1:]) if video else {}


def _is_text(track: dict[bytes, bytes]) -> bool:
    return track.get(_CODEC, b"").startswith((b"S_TEXT", b"D_WEBVTT"))


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "big")


def _duration(info: dict[bytes, bytes]) -> float:
    """The length of the file in its own units of time; 0 where it says none."""
    value = info.get(_DURATION, b"")
    form = {4: ">f", 8: ">d"}.get(len(value))
    return struct.unpack(form, value)[0] if form else 0.0


def _claimed_frames(info: dict[bytes, bytes], video: dict[bytes, bytes]) -> int:
    seconds = _duration(info) * (_number(info.get(_TIMESTAMP_SCALE)) or 1_000_000) / 1e9
    frame_ns = _number(video.get(_FRAME_NS))
    frames = seconds * max(_ASSUMED_RATE, 1e9 / frame_ns if frame_ns else 0)
    return int(min(frames, 1e18)) if frames > 0 else 0


def _duration_edits(name_at: int, start: int, end: int) -> tuple[Edit, ...]:
    """Say a duration of one second in a file that says none, as recordings of a browser do.

    decord refuses to open a file without one, and does not use it after.
    """
    second = _DURATION + b"\x88" + struct.pack(">d", 1000.0)
    size = (end - start + len(second)) | 1 << 56
    return (Edit(name_at, start, _INFO + size.to_bytes(8, "big")), Edit(end, end, second))


# AVI and WebP


def _chunks(file: Opened, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        head = _read(file, start, 8)
        size = int.from_bytes(head[4:], "little")
        yield head[:4], start + 8, min(start + 8 + size, end)
        start += 8 + size + size % 2


def _avi(file: Opened) -> Header:
    streams = []
    for name, start, end in _items(_chunks(file, 12, _size(file))):
        if name == b"LIST" and _read(file, start, 4) == b"hdrl":
            streams = [
                _avi_stream(file, inside + 4, after)
                for kind, inside, after in _items(_chunks(file, start + 4, end))
                if kind == b"LIST"
            ]
            break
    videos = [stream for stream in streams if stream[0] == b"vids"]
    return Header(
        kind="avi",
        has_video=bool(videos) or not streams,
        num_frames=max((video[1] for video in videos), default=0),
        width=max((video[2] for video in videos), default=0),
        height=max((video[3] for video in videos), default=0),
    )


def _avi_stream(file: Opened, start: int, end: int) -> tuple[bytes, int, int, int]:
    """Kind, number of frames, width and height of a stream."""
    chunks = {
        name: _read(file, inside, min(after - inside, 64))
        for name, inside, after in _items(_chunks(file, start, end))
    }
    head, picture = chunks.get(b"strh", b""), chunks.get(b"strf", b"")
    num_frames = int.from_bytes(head[32:36], "little")
    width, height = struct.unpack_from("<ii", picture, 4) if len(picture) >= 12 else (0, 0)
    return head[:4], num_frames, abs(width), abs(height)  # A negative height: upside down.


def webp_durations(file: Path | bytes) -> list[float]:
    """Seconds that each picture of a WebP is shown; empty for a still one.

    A picture that is shown for no time is given a tenth of a second, as browsers do.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        return [
            int.from_bytes(_read(stream, start + 12, 3), "little") / 1000 or 0.1
            for name, start, _ in _chunks(stream, 12, _size(stream))
            if name == b"ANMF"
        ]


def _gif(file: Opened) -> Header:
    return Header(
        kind="gif",
        width=int.from_bytes(_read(file, 6, 2), "little"),
        height=int.from_bytes(_read(file, 8, 2), "little"),
    )


_READERS = {"mp4": _mp4, "matroska": _matroska, "avi": _avi, "gif": _gif}
