"""Five hundred damaged files and bombs through the whole preparation: each gives frames or a reason."""

import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from clips import MOVIE_TABLES, moving_square, resized, write_clip
from PIL import Image

from mmrec.data.media import FrameConfig, read_video
from mmrec.data.shards import open_shards
from mmrec.data.tables import write_tables
from mmrec.errors import MediaError

ROOT = Path(__file__).resolve().parents[2]
NUM_DAMAGED = 500
MEMORY_GB = 0.75


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
    """Looks at the largest of a process's descendants until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.largest = 0

    def run(self) -> None:
        """Look twenty times a second."""
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            for child in self.process.children(recursive=True):
                try:
                    self.largest = max(self.largest, child.memory_info().rss)
                except psutil.Error:
                    continue
            time.sleep(0.05)


def test_a_clip_cut_off_in_its_first_frame_has_a_reason(tmp_path: Path) -> None:
    data = write_clip(tmp_path / "a.webm", moving_square(16), codec="libvpx").read_bytes()
    first_frame = data.index(b"\x1f\x43\xb6\x75")  # the ID of a Matroska cluster
    clip = tmp_path / "cut.webm"
    clip.write_bytes(data[: first_frame + 100])
    with pytest.raises(MediaError, match="cannot decode video"):
        read_video(clip, FrameConfig(num_frames=4), size=32)


def test_each_of_five_hundred_damaged_files_gives_frames_or_a_reason(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = tmp_path / "tables"
    (tables / "media").mkdir(parents=True)
    files = good_files(tmp_path)
    spoilt = [damaged(files, number, rng) for number in range(NUM_DAMAGED)]
    spoilt += list(bombs(files).items())
    spoilt += [(name, files[name]) for name in sorted(files)]  # and each kind whole
    contents = []
    for number, (name, data) in enumerate(spoilt):
        path = tables / "media" / f"{number:03d}-{name}"
        path.write_bytes(data)
        contents.append({"content_id": f"{number:03d}-{name}", "video": f"media/{path.name}"})
    product = tables / "media" / "product.png"
    Image.fromarray(moving_square(1)[0]).save(product)
    write_tables(
        tables,
        products=[{"product_id": "p", "title": "a square", "images": ["media/product.png"]}],
        contents=contents,
        links=[
            {"content_id": row["content_id"], "product_id": "p", "split": "train"}
            for row in contents
        ],
        config={},
        counts={},
    )
    command = [sys.executable, ROOT / "data_prep/make_shards.py", "--tables", tables]
    command += ["--out", tmp_path / "shards", "--memory-gb", MEMORY_GB, "--num-workers", 2]
    flags = "--size 32 --num-frames 4 --max-dropped 1 --timeout-s 20 --near-duplicates allow"
    process = subprocess.Popen(
        [*map(str, command), *flags.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = MemoryWatch(process.pid)
    watch.start()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert stderr == ""

    kept = set(open_shards(tmp_path / "shards", "contents", "train").content_ids)
    rows = pq.read_table(tmp_path / "shards" / "dropped.parquet").to_pylist()
    lost = {row["id"]: row["reason"] for row in rows if row["kind"] == "content"}
    everything = {row["content_id"] for row in contents}
    assert kept | set(lost) == everything
    assert kept.isdisjoint(lost)
    assert all(lost.values())
    # That reason is what our own faults get.
    ours = [row["detail"] for row in rows if row["reason"] == "decoder failed"]
    assert ours == []
    whole = {row["content_id"] for row in contents[-len(files) :]}
    assert whole <= kept
    assert NUM_DAMAGED * 0.2 < len(lost) < NUM_DAMAGED * 0.95  # some can be read, some cannot
    by_bomb = {key.split("-", 1)[1]: lost.get(key) for key in everything}
    assert by_bomb["huge.png"] == "image too large"
    # By which of its two limits is a matter of time.
    assert by_bomb["heavy.png"] in ("not enough memory", "decoder ran out of memory")
    assert (
        by_bomb["long.gif"] is None
    )  # kept: its frames are counted, and only those wanted decoded
    assert by_bomb["times.mp4"] == by_bomb["sizes.mp4"] == "too many frames"
    # A child starts at about 0.15 GB, and is looked at every 0.02 s.
    assert watch.largest < (MEMORY_GB + 0.3) * 2**30
    print(Counter(lost.values()), f"{watch.largest / 2**30:.2f} GiB at most")
