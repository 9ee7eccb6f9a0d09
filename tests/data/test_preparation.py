"""Tasks that decode parts and pack shards: what they hold in memory, and what they trust."""

import json
import tracemalloc
from pathlib import Path

import pytest

from mmrec.data import preparation
from mmrec.data.media import FrameConfig
from mmrec.data.preparation import (
    DecodeConfig,
    DecodeTask,
    Media,
    Packed,
    PackTask,
    Pictures,
    Stored,
    read_part,
)
from mmrec.data.shards import ShardReader
from mmrec.errors import MediaError
from mmrec.manifest import hash_file

CONFIG = DecodeConfig(
    frames=FrameConfig(num_frames=4),
    size=32,
    jpeg_quality=90,
    subtitles=False,
    timeout_s=10.0,
    memory_gb=1.0,
)
MEGABYTE = 1 << 20


def part_of(names: list[str], folder: str) -> DecodeTask:
    media = [Media(id=name, video=f"{name}.mp4", images=[], most=4) for name in names]
    return DecodeTask(f"{folder}/part", media, CONFIG)


@pytest.mark.parametrize("remote", [False, True])
def test_a_part_takes_the_memory_of_one_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    def decode_large(item: tuple[DecodeConfig, Media]) -> Pictures:
        if item[1].id == "3":
            raise MediaError("truncated")
        return Pictures(jpegs=[item[1].id.encode() * MEGABYTE] * 2, times=[0.0, 1.0])

    monkeypatch.setattr(preparation, "_decoder", lambda *_: decode_large)
    folder = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    task = part_of([str(i) for i in range(9)], folder)
    if not remote:  # the store of a test is in memory itself
        tracemalloc.start()
    task.run()
    if not remote:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 5 * MEGABYTE  # of 16 MiB in all
    table = read_part(task.part)
    assert table["id"].to_pylist() == [str(i) for i in range(9)]
    for row in table.to_pylist():
        jpegs = Stored(task.part, row["offset"], row["sizes"]).read()
        kept = [] if row["id"] == "3" else [row["id"].encode() * MEGABYTE] * 2
        assert jpegs == kept


def test_a_part_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> Pictures:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_decoder", lambda *_: interrupt)
    with pytest.raises(KeyboardInterrupt):
        part_of(["0"], str(tmp_path)).run()
    assert list(tmp_path.iterdir()) == []


def test_only_a_shard_with_a_receipt_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "part.bin").write_bytes(b"jpeg")
    stored = Stored(str(tmp_path / "part"), 0, [4])
    sample = Packed([(stored, ["i0.jpg"])], {"product_id": "p", "title": None, "num_images": 1})
    tar, receipt = tmp_path / "catalog-000000.tar", tmp_path / "packed" / "catalog.json"
    task = PackTask(str(tar), str(receipt), 0, [sample])
    tar.write_bytes(b"of another work")
    digest = task.run()
    assert digest == hash_file(tar)
    assert json.loads(receipt.read_text()) == {"sha256": digest}
    assert ShardReader([tar], "products").read(0)["i0.jpg"] == b"jpeg"
    before = tar.stat().st_mtime_ns
    assert task.run() == digest
    assert tar.stat().st_mtime_ns == before
    tar.unlink()  # a receipt of a tar that is gone is worth nothing either
    assert task.run() == digest
    assert tar.is_file()
