"""Five hundred damaged files and bombs through the whole preparation: each gives frames or a reason."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_media import MemoryWatch, bombs, damaged, good_files
from clips import moving_square, write_clip
from PIL import Image

from mmrec.data.media import FrameConfig, read_video
from mmrec.data.shards import open_shards
from mmrec.data.tables import write_tables
from mmrec.errors import MediaError

ROOT = Path(__file__).resolve().parents[2]
NUM_DAMAGED = 500
MEMORY_GB = 0.75


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
