"""Shards: written by us, read by us and by the webdataset library, and refused when damaged."""

import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from servers import http_server, s3_server

from mmrec.data import shards
from mmrec.data.shards import (
    INDEX_SCHEMA,
    META_COLUMN,
    TAR_PLACE,
    ShardSample,
    frame_name,
    image_name,
    index_path,
    index_shard,
    open_shards,
    product_image_name,
    scan_tar,
    shard_path,
    write_shard,
)
from mmrec.data.storage import place, write_bytes_whole
from mmrec.errors import UserError
from mmrec.manifest import Manifest, write_manifest

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


def test_an_index_of_another_tar_of_the_same_size(folder):
    path = shard_path(folder, "train", 0)
    data = path.read_bytes()
    # As if a small member had been put in front, and blocks taken from the tar's end.
    path.write_bytes((bytes(1024) + data)[: len(data)])
    with pytest.raises(UserError, match=r"train-000000\.tar: has no member of \d+ bytes at byte"):
        open_shards(folder, "contents", "train")


def rewrite(path: Path, samples: list[ShardSample]) -> None:
    """Another tar beside the index of the first."""
    index = index_path(path).read_bytes()
    size = path.stat().st_size
    write_shard(path, samples)
    assert path.stat().st_size == size
    index_path(path).write_bytes(index)


def some_contents(tmp_path: Path, count: int) -> tuple[Path, list[ShardSample]]:
    """A shard of contents whose members are all of one size."""
    samples = [
        ShardSample(f"{i:04d}", {frame_name(0): bytes(64)}, {**content(i).meta, "title": "same"})
        for i in range(10, 10 + count)
    ]
    path = shard_path(tmp_path, "train", 0)
    write_shard(path, samples)
    return path, samples


def test_an_index_of_a_tar_with_other_ids(tmp_path):
    path, samples = some_contents(tmp_path, 3)
    others = [
        ShardSample(
            s.key,
            s.members,
            {**s.meta, "products": [{**p, "product_id": "p99"} for p in s.meta["products"]]},
        )
        for s in samples
    ]
    rewrite(path, others)
    with pytest.raises(UserError, match=r"train-000000\.tar: sample '0010' has other ids than its"):
        open_shards(tmp_path, "contents", "train")


def test_an_index_of_a_tar_in_another_order(tmp_path):
    path, samples = some_contents(tmp_path, 20)
    samples[6], samples[7] = samples[7], samples[6]
    rewrite(path, samples)
    # Neither is among those that are looked at as the shard is opened.
    reader = open_shards(tmp_path, "contents", "train")
    assert reader.meta(8)["content_id"] == "c18"
    for row in (6, 7):
        with pytest.raises(
            UserError, match=rf"\.tar: sample '00{10 + row}' has other ids than its"
        ):
            reader.meta(row)
    samples.reverse()
    rewrite(path, samples)
    with pytest.raises(UserError, match=r"has member '0029\.json' where its index has .* '0010'"):
        open_shards(tmp_path, "contents", "train")


def test_a_member_that_is_no_json_is_another_samples(tmp_path):
    path, _ = some_contents(tmp_path, 20)
    reader = open_shards(tmp_path, "contents", "train")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"content_id": "c19"', b'\xff"content_id": "c19"'))
    with pytest.raises(UserError, match="sample '0019' has other ids than its index says"):
        reader.meta(9)


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
    for name, data, message in (
        ("a.jpg", b"pixels", "sample 'a' has no json that names its products"),
        ("a.json", b"{", r"member 'a\.json' is not that of a shard"),
        ("a.json", b'{"products": [{}]}', r"member 'a\.json'.*product_id"),
        ("a.json", b'{"products": []}', r"member 'a\.json'.*expected product ids"),
        ("a.json", b'{"product_id": 7}', r"member 'a\.json'.*as text"),
    ):
        with tarfile.open(path, "w") as archive:
            add(archive, name, data)
        with pytest.raises(UserError, match=rf"train-000000\.tar: {message}"):
            index_shard(path)


# Tars that are refused


def add(
    archive: tarfile.TarFile, name: str, data: bytes = b'{"product_id": "p"}', **fields: Any
) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def scanned(path: Path) -> dict[str, list[str]]:
    return {sample.key: list(sample.members) for sample in scan_tar(path)}


REFUSED: dict[str, tuple[list[tuple[str, dict[str, Any]]], str]] = {
    "absolute": ([("/etc/a.json", {})], "'/etc/a.json' is refused: its name is absolute"),
    "climbing": ([("a.json", {}), ("b/../../c.json", {})], "'b/../../c.json' .* climbs up"),
    "climbing folder": ([("..", {"type": tarfile.DIRTYPE})], "'..' is refused: .* climbs up"),
    "symbolic link": (
        [("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})],
        "'a.jpg' is refused: it is a link to '/etc/passwd'",
    ),
    "hard link": (
        [("a.json", {}), ("b.json", {"type": tarfile.LNKTYPE, "linkname": "a.json"})],
        "'b.json' is refused: it is a link to 'a.json'",
    ),
    "device": ([("a.jpg", {"type": tarfile.CHRTYPE})], "neither a file nor a folder"),
    "pipe": ([("a.jpg", {"type": tarfile.FIFOTYPE})], "neither a file nor a folder"),
    "twice": ([("a.jpg", {}), ("a.json", {}), ("a.jpg", {})], "'a.jpg' .* occurs twice"),
    "twice but for case": ([("a.jpg", {}), ("a.JPG", {})], "'a.JPG' .* occurs twice"),
    "not together": (
        [("a.json", {}), ("b.json", {}), ("a.jpg", {})],
        "'a.jpg' is refused: sample 'a' has ended before it",
    ),
    "a name of several lines": ([("../a\nb.jpg", {})], r"member '\.\./a\\nb\.jpg' is refused"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_tars_with_bad_members_are_refused_in_one_line(tmp_path, fault):
    members, message = REFUSED[fault]
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as archive:
        for name, fields in members:
            add(archive, name, **({"data": b""} if "type" in fields else {}), **fields)
    for read in (scanned, index_shard):
        with pytest.raises(UserError, match=rf"train-000000\.tar: .*{message}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_sparse_files_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a.jpg",
        "GNU.sparse.realsize": "1048576",
    }
    sparse_map = b"1\n1048064\n512\n".ljust(512, b"\0")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "GNUSparseFile.0/a.jpg", sparse_map + bytes(512), pax_headers=headers)
    with pytest.raises(UserError, match=r"member 'a\.jpg' is refused: it is a sparse file"):
        scanned(path)


def test_names_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "a\udcff.jpg")
    with pytest.raises(UserError, match="its name is not UTF-8"):
        scanned(path)


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members", "at the mark"])
def test_tars_that_were_cut_are_refused(tmp_path, cut):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            add(archive, name, bytes(700))
    # Two members of a header and two blocks each, and then the mark.
    place = {
        "in a member": 2_500,
        "in a header": 1_700,
        "between members": 1_536,
        "at the mark": 3_072,
    }
    os.truncate(path, place[cut])
    with pytest.raises(UserError, match=r"x\.tar: not a shard that mmrec reads: .*"):
        scanned(path)


def test_a_tar_damaged_in_the_middle_is_not_taken_for_a_short_one(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            add(archive, name)
    data = bytearray(path.read_bytes())
    data[1_024 + 148] ^= 1  # the checksum in b's header
    path.write_bytes(data)
    with pytest.raises(UserError, match="cut off or damaged at byte 1024"):
        scanned(path)


def test_a_negative_size_does_not_hang_the_reader(tmp_path):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = -512
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(UserError, match=r"member 'a\.jpg' has a negative size"):
        scanned(path)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        add(archive, "a.jpg")
    with pytest.raises(UserError, match="not a shard that mmrec reads"):
        scanned(tmp_path / "x.tar")


def test_keys_and_names_are_those_of_webdataset(tmp_path):
    path = tmp_path / "x.tar"
    names = ("./a/b/000.jpg", "./a/b/000.P.json", "v1.0/001.tar.gz", "a.JPG", "__meta__/x.json")
    with tarfile.open(path, "w") as archive:
        add(archive, "a", b"", type=tarfile.DIRTYPE)
        for name in (*names, "README", "__x__"):
            add(archive, name)
    theirs = {
        sample["__key__"]: [name for name in sample if not name.startswith("__")]
        for sample in webdataset.WebDataset([str(path)], shardshuffle=False)
    }
    assert scanned(path) == theirs
    assert theirs == {
        "./a/b/000": ["jpg", "p.json"],
        "v1.0/001": ["tar.gz"],
        "a": ["jpg"],
    }


# Reading from elsewhere


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def describe(folder: Path, *, with_files: bool) -> None:
    """A manifest as data_prep/make_shards.py writes it."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.tar"))
    details: dict[str, Any] = {"splits": {"train": {"contents": 8}}, "catalog": 5}
    details |= {"files": files} if with_files else {}
    write_manifest(
        folder, Manifest(kind="shards", config={}, counts={}, fingerprint="1", details=details)
    )


@pytest.mark.usefixtures("cache")
def test_shards_behind_http_need_no_listing(folder):
    describe(folder, with_files=True)
    local = open_shards(folder, "contents", "train")
    with http_server(folder) as server:
        reader = open_shards(server.url, "contents", "train")
        assert reader.keys == local.keys
        assert reader.paths[2] == place(f"{server.url}/contents/train-000002.tar")
        assert [path for _, path in server.requests if path.endswith(".tar")] == []
        assert reader.read(4) == local.read(4)
        assert reader.meta(7) == local.meta(7)
        assert server.count("GET", "train-000001.tar") == 1
        assert server.count("GET", "train-000000.tar") == 0
        copy = pickle.loads(pickle.dumps(reader))
        assert [copy.read(row) for row in range(8)] == [local.read(row) for row in range(8)]
        assert [server.count("GET", f"train-00000{i}.tar") for i in range(3)] == [1, 1, 1]
        assert len(open_shards(server.url, "products", "catalog")) == 5
        with pytest.raises(UserError, match="no contents shards of split 'val'; found train"):
            open_shards(server.url, "contents", "val")


@pytest.mark.usefixtures("cache")
def test_a_forked_process_fetches_by_itself(folder):
    describe(folder, with_files=True)
    before = [open_shards(folder, "contents", "train").read(row) for row in range(8)]
    with http_server(folder) as server:
        reader = open_shards(server.url, "contents", "train")
        assert reader.read(0) == before[0]
        pid = os.fork()
        if pid == 0:
            os._exit(int([reader.read(row) for row in range(8)] != before))
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.usefixtures("cache")
def test_a_remote_tar_that_is_not_that_of_its_index(folder):
    describe(folder, with_files=True)
    with http_server(folder) as server:
        reader = open_shards(server.url, "contents", "train")
        os.truncate(shard_path(folder, "train", 1), 512)
        with pytest.raises(UserError, match="has 512 bytes, but its index was made"):
            reader.read(4)
        shard_path(folder, "train", 2).unlink()
        with pytest.raises(UserError, match=r"train-000002\.tar: no longer there"):
            reader.read(7)
        index_path(shard_path(folder, "train", 2)).unlink()
        with pytest.raises(UserError, match=r"train-000002\.tar: has no index"):
            open_shards(server.url, "contents", "train")


def test_a_tar_that_leaves_the_cache_while_it_is_open_stays_readable(folder, cache):
    describe(folder, with_files=True)
    with http_server(folder) as server:
        reader = open_shards(server.url, "contents", "train")
        before = reader.read(0)
        for path in cache.iterdir():
            path.unlink()
        assert reader.read(0) == before
        assert server.count("GET", "train-000000.tar") == 1
        reader = open_shards(server.url, "contents", "train")
        assert reader.read(0) == before
        assert server.count("GET", "train-000000.tar") == 2


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("with_files", [True, False])
def test_shards_in_a_bucket(folder, tmp_path, with_files):
    describe(folder, with_files=with_files)
    local = open_shards(folder, "contents", "train")
    with s3_server(tmp_path / "log") as bucket:
        for path in (*folder.glob("*/*"), folder / "manifest.json"):
            write_bytes_whole(place(bucket) / "set" / path.relative_to(folder).as_posix(), path)
        # A flag that is read as a path arrives with the slashes of its URL folded.
        for given in (f"{bucket}/set", Path(f"{bucket}/set")):
            reader = open_shards(given, "contents", "train")
            assert [reader.read(row) for row in range(8)] == [local.read(row) for row in range(8)]
        with pytest.raises(UserError, match="no contents shards of split 'test'; found train"):
            open_shards(f"{bucket}/set", "contents", "test")


def test_an_index_without_its_tar_is_passed_over_unless_it_says_where_that_is(folder):
    tar, elsewhere = shard_path(folder, "train", 2), folder / "elsewhere.tar"
    before = open_shards(folder, "contents", "train").read(7)
    tar.rename(elsewhere)
    (folder / "contents" / "notes.parquet").write_bytes(b"noise")
    assert len(open_shards(folder, "contents", "train")) == 5
    table = pq.read_table(index_path(tar))
    metadata = {**(table.schema.metadata or {}), TAR_PLACE: b"../elsewhere.tar"}
    pq.write_table(table.replace_schema_metadata(metadata), index_path(tar))
    reader = open_shards(folder, "contents", "train")
    assert reader.read(7) == before
    assert reader.paths[2] == elsewhere.resolve()
    elsewhere.unlink()
    with pytest.raises(UserError, match=r"is the index of .*elsewhere\.tar, which is not there"):
        open_shards(folder, "contents", "train")


def test_an_index_may_hold_what_the_tar_does_not(folder):
    path = index_path(shard_path(folder, "train", 0))
    table = pq.read_table(path)
    texts = pa.array(['{"title": "mine"}', *[None] * 3], META_COLUMN.type)
    pq.write_table(table.append_column(META_COLUMN, texts), path)
    reader = open_shards(folder, "contents", "train")
    assert reader.meta(0) == {"title": "mine"}
    assert [reader.meta(row)["title"] for row in (1, 7)] == ["Ünïcode 1", "Ünïcode 7"]
    assert pickle.loads(pickle.dumps(reader)).meta(0) == {"title": "mine"}
    for row in (-1, 8):
        with pytest.raises(IndexError, match="of 8"):
            reader.meta(row)
