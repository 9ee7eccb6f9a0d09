"""Shards: written by us, read by us and by the webdataset library, and refused when damaged."""

import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from mmrec.data import shards
from mmrec.data.shards import (
    INDEX_SCHEMA,
    ShardSample,
    frame_name,
    image_name,
    index_path,
    index_shard,
    open_shards,
    product_image_name,
    shard_path,
    write_shard,
)
from mmrec.errors import UserError

RNG = np.random.default_rng(0)


def content(number: int, num_frames: int = 2, num_products: int = 1) -> ShardSample:
    """A content with made-up bytes of many sizes, the empty one among them."""
    members = {frame_name(t): RNG.bytes(int(RNG.integers(0, 2_000))) for t in range(num_frames)}
    members |= {product_image_name(p, 0): b"" for p in range(num_products)}
    products = [
        {"product_id": f"p{number + p}", "title": None, "weight": 0.5 + p, "num_images": 1}
        for p in range(num_products)
    ]
    meta = {
        "content_id": f"c{number}",
        "title": f"Ünïcode {number}",
        "frame_times": [0.5 * t for t in range(num_frames)],
        "products": products,
        "attributes": {"likes": number},
    }
    return ShardSample(f"{number:09d}", members, meta)


def product(number: int, num_images: int = 2) -> ShardSample:
    members = {image_name(i): RNG.bytes(100 + i) for i in range(num_images)}
    meta = {"product_id": f"p{number}", "title": "Mug", "attributes": {}, "num_images": num_images}
    return ShardSample(f"{number:09d}", members, meta)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training shards of 4, 1 and 3 contents, and a catalog of 5 products."""
    numbers = iter(range(8))
    for shard, size in enumerate((4, 1, 3)):
        samples = [content(next(numbers), 1 + shard, 1 + shard) for _ in range(size)]
        write_shard(shard_path(tmp_path, "train", shard), samples)
    write_shard(shard_path(tmp_path, "catalog", 0), [product(i) for i in range(5)])
    return tmp_path


def test_member_names():
    assert [frame_name(0), frame_name(11), image_name(3)] == ["f00.jpg", "f11.jpg", "i3.jpg"]
    assert product_image_name(2, 1) == "p2.i1.jpg"


def test_paths():
    assert shard_path(Path("s"), "val", 3) == Path("s/contents/val-000003.tar")
    assert shard_path(Path("s"), "catalog", 0) == Path("s/products/catalog-000000.tar")
    assert index_path(Path("s/contents/val-000003.tar")) == Path("s/contents/val-000003.parquet")


def test_webdataset_reads_the_tars_and_sees_the_same_bytes(folder):
    reader = open_shards(folder, "contents", "train")
    urls = [str(path) for path in sorted((folder / "contents").glob("train-*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    seen = 0
    for row, sample in enumerate(dataset):
        members = {k: v for k, v in sample.items() if not k.startswith("__")}
        assert sample["__key__"] == reader.keys[row]
        assert list(members) == reader.names(row)
        assert reader.read(row) == members
        seen += 1
    assert seen == len(reader) == 8


def test_what_the_index_says(folder):
    reader = open_shards(folder, "contents", "train")
    assert reader.family == "contents"
    assert reader.shard_sizes == [4, 1, 3]
    assert reader.keys == [f"{i:09d}" for i in range(8)]
    assert reader.content_ids == [f"c{i}" for i in range(8)]
    assert reader.product_ids[0] == ["p0"]
    assert reader.product_ids[7] == ["p7", "p8", "p9"]
    assert reader.weights[7] == [0.5, 1.5, 2.5]
    assert reader.names(4) == ["f00.jpg", "f01.jpg", "json", "p0.i0.jpg", "p1.i0.jpg"]
    assert reader.meta(4)["title"] == "Ünïcode 4"
    assert reader.meta(4)["frame_times"] == [0.0, 0.5]


def test_a_catalog(folder):
    reader = open_shards(folder, "products", "catalog")
    assert reader.family == "products"
    assert reader.content_ids == [None] * 5
    assert reader.product_ids == [[f"p{i}"] for i in range(5)]
    assert reader.weights == [[1.0]] * 5
    assert len(reader.read(2, ["i1.jpg"])["i1.jpg"]) == 101


def test_only_the_named_members_are_read_in_the_order_asked_for(folder, monkeypatch):
    reader = open_shards(folder, "contents", "train")
    whole = reader.read(6)
    bytes_read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, o: bytes_read.append(n) or pread(fd, n, o))
    found = reader.read(6, ["p2.i0.jpg", "f01.jpg"])
    assert list(found.items()) == [(name, whole[name]) for name in ("p2.i0.jpg", "f01.jpg")]
    assert sum(bytes_read) == len(whole["f01.jpg"])
    assert reader.read(6, []) == {}


def test_rows_and_members_that_are_not_there(folder):
    reader = open_shards(folder, "contents", "train")
    for row in (-1, 8):
        with pytest.raises(IndexError, match="of 8"):
            reader.read(row)
    with pytest.raises(KeyError, match=r"no member 'f09\.jpg' among f00\.jpg"):
        reader.read(0, ["f09.jpg"])


def test_a_reader_pickles_after_use(folder):
    reader = open_shards(folder, "contents", "train")
    before = [reader.read(row) for row in range(8)]
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.read(row) for row in range(8)] == before
    assert (copy.shard_sizes, copy.product_ids) == (reader.shard_sizes, reader.product_ids)


def test_threads_share_a_reader_that_keeps_few_files_open(folder, monkeypatch):
    reader = open_shards(folder, "contents", "train")
    before = [reader.read(row) for row in range(8)]
    monkeypatch.setattr(shards, "_MOST_OPEN_FILES", 1)
    rows = [int(row) for row in np.random.default_rng(1).integers(0, 8, 400)]
    with ThreadPoolExecutor(4) as pool:
        for row, found in zip(rows, pool.map(reader.read, rows), strict=True):
            assert found == before[row]
    del reader
    names = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not any(str(folder) in name for name in names)


def test_a_forked_process_reads_beside_its_parent(folder):
    reader = open_shards(folder, "contents", "train")
    before = [reader.read(row) for row in range(8)]
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write_end, b"y" if [reader.read(row) for row in range(8)] == before else b"n")
        os._exit(0)
    assert [reader.read(row) for row in range(8)] == before
    os.waitpid(pid, 0)
    assert os.read(read_end, 1) == b"y"
    os.close(read_end)
    os.close(write_end)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    samples = [content(i) for i in range(5)]
    first, second = tmp_path / "a" / "train-000000.tar", tmp_path / "b" / "train-000000.tar"
    write_shard(first, samples)
    write_shard(second, samples)
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()
    with tarfile.open(first) as archive:
        assert {(m.mtime, m.uname, m.gname, m.uid) for m in archive} == {(0, "mmrec", "mmrec", 0)}


def test_the_index_is_that_of_a_scan(folder):
    for path in folder.glob("*/*.tar"):
        table = index_shard(path)
        assert table.schema.names == INDEX_SCHEMA.names
        assert table.equals(pq.read_table(index_path(path)))
        with open(path, "rb") as file:
            for row in table.to_pylist():
                with tarfile.open(path) as archive:
                    for name, offset, size in zip(
                        row["names"], row["offsets"], row["sizes"], strict=True
                    ):
                        file.seek(offset)
                        member = archive.extractfile(f"{row['key']}.{name}")
                        assert member is not None
                        assert file.read(size) == member.read()


def test_a_crash_leaves_nothing_behind(tmp_path):
    def samples() -> Iterator[ShardSample]:
        yield content(0)
        raise RuntimeError("power cut")

    path = shard_path(tmp_path, "train", 0)
    with pytest.raises(RuntimeError, match="power cut"):
        write_shard(path, samples())
    assert list(path.parent.iterdir()) == []
    write_shard(path, [content(0)])
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_shard(path, samples())
    assert path.read_bytes() == before
    assert {p.name for p in path.parent.iterdir()} == {"train-000000.tar", "train-000000.parquet"}


def test_a_tar_never_has_its_final_name_without_an_index(tmp_path, monkeypatch):
    def no_index(tar: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shards, "index_shard", no_index)
    with pytest.raises(OSError, match="disk full"):
        write_shard(shard_path(tmp_path, "train", 0), [content(0)])
    assert list((tmp_path / "contents").iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "a/b"])
def test_keys_that_webdataset_would_split(tmp_path, key):
    sample = content(0)
    with pytest.raises(ValueError, match="dot or a slash"):
        write_shard(tmp_path / "x.tar", [ShardSample(key, sample.members, sample.meta)])


# Folders and files that are refused


def test_a_split_that_is_not_there(folder, tmp_path):
    with pytest.raises(UserError, match="no contents shards of split 'val'; found train"):
        open_shards(folder, "contents", "val")
    with pytest.raises(UserError, match="no products shards of split 'catalog'; found none"):
        open_shards(tmp_path / "nowhere", "products", "catalog")
    with pytest.raises(ValueError, match="no split 'train' in family 'products'"):
        open_shards(folder, "products", "train")


def test_a_missing_index(folder):
    index_path(shard_path(folder, "train", 1)).unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar: has no index train-000001\.parquet"):
        open_shards(folder, "contents", "train")


@pytest.mark.parametrize("damage", ["noise", "other table"])
def test_a_damaged_index(folder, damage):
    path = index_path(shard_path(folder, "train", 0))
    if damage == "noise":
        path.write_bytes(b"noise" * 100)
    else:
        pq.write_table(pq.read_table(path).select(["key"]), path)
    with pytest.raises(UserError, match=r"train-000000\.parquet: not the index of a shard"):
        open_shards(folder, "contents", "train")


@pytest.mark.parametrize("change", [-1024, 512])
def test_an_index_of_another_tar(folder, change):
    path = shard_path(folder, "train", 2)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(UserError, match=f"has {len(data) + change} bytes, but its index was made"):
        open_shards(folder, "contents", "train")


def test_a_tar_cut_after_it_was_opened(folder):
    reader = open_shards(folder, "contents", "train")
    path = shard_path(folder, "train", 2)
    os.truncate(path, 512)
    with pytest.raises(UserError, match=r"train-000002\.tar: ends before byte"):
        reader.read(7)


def test_tars_that_are_no_shards(tmp_path):
    path = tmp_path / "train-000000.tar"
    path.write_bytes(b"noise" * 1_000)
    with pytest.raises(UserError, match="not a shard that mmrec reads"):
        index_shard(path)
    for name, data in (("a.jpg", b"pixels"), ("a.json", b"{"), ("a.json", b'{"products": [{}]}')):
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        with pytest.raises(UserError, match=r"train-000000\.tar"):
            index_shard(path)
