"""Small real videos for tests."""

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8


def moving_square(
    num_frames: int, *, size: int = 64, color: tuple[int, int, int] = (200, 40, 60)
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """A coloured square that crosses a gradient; its place tells the frame's number."""
    ramp = np.linspace(30, 220, size).astype(np.uint8)
    frames = []
    for t in range(num_frames):
        frame = np.stack([np.broadcast_to(ramp, (size, size))] * 3, axis=-1).copy()
        left = t * (size - size // 4) // max(1, num_frames - 1)
        frame[size // 4 : size // 2, left : left + size // 4] = color
        frames.append(frame)
    return frames


def numbered(
    num_frames: int, *, height: int = 64, width: int = 64
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Frames that carry their number (below 256) as eight bars, one a bit, the lowest on top.

    What a codec loses does not change the number, so a test can ask which frame it was given.
    """
    frames = []
    for number in range(num_frames):
        bits = [number >> bit & 1 for bit in range(8)]
        rows = np.repeat(np.array(bits, np.uint8) * 120 + 60, -(-height // 8))[:height]
        frames.append(np.broadcast_to(rows[:, None, None], (height, width, 3)).copy())
    return frames


def frame_number(pixels: UInt8[np.ndarray, "H W 3"]) -> int:
    """The number that a frame of `numbered` carries."""
    height = -(-pixels.shape[0] // 8)
    middles = pixels[height // 2 :: height].astype(np.float64).mean((1, 2))
    return sum(int(value > 120) << bit for bit, value in enumerate(middles))


def write_clip(
    path: Path,
    frames: Sequence[UInt8[np.ndarray, "H W 3"]],
    fps: int = 8,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    options: Mapping[str, str] | None = None,
    container_options: Mapping[str, str] | None = None,
) -> Path:
    """Encode frames (even sides) as a clip; the suffix decides the container.

    `times_ms` gives the frames' times where they are not evenly spaced, `aspect` a pixel's width over its
    height.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", options=dict(container_options or {})) as container:
        stream = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for t, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = times_ms[t] if times_ms else round(1000 * t / fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_clip(path: Path) -> tuple[list[UInt8[np.ndarray, "H W 3"]], list[float]]:
    """All frames of a clip and their times in seconds, by PyAV: an opinion besides decord's."""
    with av.open(str(path)) as container:
        found = [
            (f.to_ndarray(format="rgb24"), float(f.time or 0)) for f in container.decode(video=0)
        ]
    return [pixels for pixels, _ in found], [time for _, time in found]


def write_captions(path: Path, codec: str, packets: Sequence[bytes], language: str = "") -> Path:
    """A clip of a second with captions inside, half a second each, as packets of a subtitle codec."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8, options={"threads": "1"})
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        captions = container.add_mux_stream(codec)
        captions.time_base = Fraction(1, 1000)
        if language:
            captions.metadata["language"] = language
        for t, pixels in enumerate(moving_square(8)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, 8)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = 500 * number
            packet.duration, packet.time_base, packet.stream = 500, Fraction(1, 1000), captions
            container.mux(packet)
    return path


def write_sound(path: Path) -> Path:
    """A file of sound alone, half a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8_000), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


MOVIE_TABLES = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
"""Where the tables of an MP4's samples lie."""


def box(data: bytes, *path: bytes) -> tuple[int, int]:
    """Start and end of what is inside an MP4 box, by the names of the boxes around it and its own."""
    start, end = 0, len(data)
    for name in path:
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
            assert start < end, f"no box {name!r}"
        start, end = start + 8, start + int.from_bytes(data[start : start + 4], "big")
    return start, end


def overwritten(data: bytes, place: int, new: bytes) -> bytes:
    """The same bytes with some of them replaced."""
    return data[:place] + new + data[place + len(new) :]


def displayed(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 that is to be shown through a display matrix (a, b, c, d) of whole numbers."""
    start, _ = box(data, b"moov", b"trak", b"tkhd")
    a, b, c, d = (value << 16 for value in matrix)
    return overwritten(data, start + 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def timeless(data: bytes) -> bytes:
    """An MP4 whose table of times gives a length to the last frame alone, as some cutters write it."""
    start, _ = box(data, *MOVIE_TABLES, b"stts")
    rows, num_frames, length = struct.unpack(">III", data[start + 4 : start + 16])
    assert rows == 1
    table = struct.pack(">IIIII", 2, num_frames - 1, 0, 1, length)
    return resized(data, (*MOVIE_TABLES, b"stts"), data[start : start + 4] + table)


def resized(data: bytes, path: tuple[bytes, ...], inside: bytes) -> bytes:
    """An MP4 with other bytes inside a box; the boxes around it grow with it.

    The media data must come before, as they do in what `write_clip` writes: their places stay.
    """
    start, end = box(data, *path)
    grown = len(inside) - (end - start)
    changed = data[:start] + inside + data[end:]
    for depth in range(1, len(path) + 1):
        place = box(data, *path[:depth])[0] - 8
        size = int.from_bytes(data[place : place + 4], "big") + grown
        changed = overwritten(changed, place, size.to_bytes(4, "big"))
    return changed
