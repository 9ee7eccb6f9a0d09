"""Damaged media, decompression bombs, and a watch over the memory of what decodes them."""

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import psutil
from clips import MOVIE_TABLES, moving_square, resized, write_clip
from PIL import Image


def good_files(folder: Path) -> dict[str, bytes]:
    """A small valid file of each kind."""
    files = {}
    for name, codec in (
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx"),
        ("a.avi", "mpeg4"),
    ):
        files[name] = write_clip(folder / name, moving_square(16), codec=codec).read_bytes()
    pictures = [Image.fromarray(frame) for frame in moving_square(6)]
    for name in ("a.jpeg", "a.png", "a.webp"):
        stream = io.BytesIO()
        pictures[0].save(stream, name.split(".")[1])
        files[name] = stream.getvalue()
    for name in ("b.gif", "b.webp"):
        stream = io.BytesIO()
        kind = name.split(".")[1]
        pictures[0].save(stream, kind, save_all=True, append_images=pictures[1:], duration=100)
        files[name] = stream.getvalue()
    return files


def damaged(files: dict[str, bytes], number: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """A file's name and bytes, spoilt in the way that its number says."""
    name = sorted(files)[number % len(files)]
    data = files[name]
    way = number // len(files) % 5
    if way == 0:  # truncated
        return name, data[: rng.integers(1, len(data))]
    if way in (1, 2):  # a few bits turned, or many
        noisy = np.frombuffer(data, np.uint8).copy()
        count = int(rng.integers(1, 4 if way == 1 else 200))
        noisy[rng.integers(0, len(data), count)] ^= np.uint8(1) << rng.integers(0, 8, count).astype(
            np.uint8
        )
        return name, noisy.tobytes()
    if way == 3:  # another suffix, and a hole of zeros
        start = int(rng.integers(0, len(data)))
        other = sorted(files)[rng.integers(len(files))]
        return other, data[:start] + bytes(min(300, len(data) - start)) + data[start + 300 :]
    return name, b"" if rng.random() < 0.3 else rng.bytes(rng.integers(1, 2_000))


def one_colour_png(side: int, *, bits: int, kind: int, row: bytes) -> bytes:
    """A valid PNG of side x side pixels, all rows the same: a file of a thousandth of its pixels' bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    packer = zlib.compressobj(1)
    rows = [packer.compress((b"\0" + row) * 100) for _ in range(side // 100)]
    rows = b"".join([*rows, packer.flush()])
    head = struct.pack(">IIBBBBB", side, side, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_png(side: int) -> bytes:
    """Black and white: its size is more than is decoded at all."""
    return one_colour_png(side, bits=1, kind=0, row=b"\xff" * (side // 8))


def heavy_png() -> bytes:
    """Half transparent, and of as many pixels as are allowed: decoding it takes 1.5 GB."""
    return one_colour_png(9_400, bits=8, kind=6, row=b"\xff\x80\x40\x80" * 9_400)


def long_gif(num_frames: int) -> bytes:
    """A valid GIF of many frames of one pixel in 1,000 x 1,000."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1000, 1000, 0xF0, 0, 0) + bytes(3) + b"\xff\xff\xff"
    frame = b"!\xf9\4\4\5\0\0\0," + struct.pack("<HHHHB", 5, 5, 1, 1, 0) + b"\2\2\x4c\1\0"
    return head + frame * num_frames + b";"


def bombs(files: dict[str, bytes]) -> dict[str, bytes]:
    """Small files that are large once they are decoded, or say that they are; from `good_files`."""
    mp4 = files["a.mp4"]
    many = 10**9
    return {
        "huge.png": huge_png(50_000),
        "heavy.png": heavy_png(),
        "long.gif": long_gif(100_000),
        "times.mp4": resized(mp4, (*MOVIE_TABLES, b"stts"), struct.pack(">IIII", 0, 1, many, 1)),
        "sizes.mp4": resized(mp4, (*MOVIE_TABLES, b"stsz"), struct.pack(">III", 0, 1, many)),
    }


class MemoryWatch(threading.Thread):
    """Looks at the largest of a process's descendants, but those that it has now, until it ends or `stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.largest = 0
        self._others = set(self.process.children(recursive=True))
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look twenty times a second."""
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            for child in set(self.process.children(recursive=True)) - self._others:
                try:
                    self.largest = max(self.largest, child.memory_info().rss)
                except psutil.Error:
                    continue
            if self._stopped.wait(0.05):
                return

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()
        self.join()
