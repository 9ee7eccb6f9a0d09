"""make_shards: from clips, photo posts and every kind of fault to shards and a manifest."""

import datetime
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from clips import moving_square, write_clip
from PIL import Image
from servers import gcs_server, http_server, s3_server

from mmrec.data.media import FrameConfig, encode_jpeg, read_image, read_video, resize_shorter
from mmrec.data.preparation import _decoder
from mmrec.data.shards import open_shards
from mmrec.data.splits import SplitConfig, assign_splits
from mmrec.data.tables import write_tables
from mmrec.data.verification import verify_shards
from mmrec.errors import UserError
from mmrec.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
program = importlib.import_module("data_prep.make_shards")

Rows = list[dict[str, Any]]


def write_image(path: Path, seed: int, height: int = 40, width: int = 60) -> str:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height)).save(path)
    return f"media/{path.name}"


def scene(num_frames: int, seed: int) -> list[np.ndarray]:
    """A square that crosses a background of its own, so that no two scenes look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    background = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC))
    color = tuple(int(c) for c in rng.integers(0, 256, 3))
    square = np.array(color, dtype=np.uint8)
    frames = moving_square(num_frames, color=color)
    return [np.where((f == square).all(-1, keepdims=True), f, background) for f in frames]


def write_video(folder: Path, name: str, num_frames: int, seed: int | None = None) -> str:
    frames = scene(num_frames, num_frames if seed is None else seed)
    write_clip(folder / "media" / name, frames)
    return f"media/{name}"


class Catalogue:
    """Tables under construction: 4 products, 6 contents of which one is a photo post, and links."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "media").mkdir(parents=True)
        self.products: Rows = [
            {
                "product_id": f"p{i}",
                "title": f"Product {i}" if i else None,
                "images": [
                    write_image(folder / "media" / f"p{i}-{j}.png", 10 * i + j)
                    for j in range(1 + i)
                ],
                "price": float("nan") if i == 1 else 1.5 * i,
                "made": datetime.date(2024, 1, 1 + i),
            }
            for i in range(4)
        ]
        self.contents: Rows = [
            {
                "content_id": f"c{i}",
                "title": f"Content {i}",
                "video": write_video(folder, f"c{i}.mp4", 5 + i),
                "images": [],
                "likes": i,
            }
            for i in range(6)
        ]
        photos = [write_image(folder / "media" / f"photo{j}.png", 100 + j) for j in range(3)]
        self.contents[5] |= {"video": None, "images": photos}
        splits = ["train", "train", "val", "test", "train", "train"]
        self.links: Rows = [
            {"content_id": f"c{i}", "product_id": f"p{i % 3}", "weight": 1.0, "split": splits[i]}
            for i in range(6)
        ]

    def link(self, content_id: str, product_id: str, weight: float) -> None:
        split = next(r["split"] for r in self.links if r["content_id"] == content_id)
        self.links.append(
            {"content_id": content_id, "product_id": product_id, "weight": weight, "split": split}
        )

    def write(self) -> Path:
        write_tables(
            self.folder,
            products=self.products,
            contents=self.contents,
            links=self.links,
            config={},
            counts={},
        )
        return self.folder


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path / "tables")


def config_for(catalogue: Catalogue, **changes: Any) -> Any:
    tables = catalogue.write()
    settings = {"num_frames": 4, "size": 32, "num_workers": 1, "max_dropped": 0.5} | changes
    return program.MakeShardsConfig(tables=tables, out=tables.parent / "shards", **settings)


def make(catalogue: Catalogue, **changes: Any) -> Path:
    return program.main(config_for(catalogue, **changes))


def dropped(folder: Path) -> set[tuple[str, str, str]]:
    rows = pq.read_table(folder / "dropped.parquet").to_pylist()
    return {(row["kind"], row["id"], row["reason"]) for row in rows}


def break_file(catalogue: Catalogue, media: str, data: bytes = b"noise" * 50) -> None:
    (catalogue.folder / media).write_bytes(data)


# What is in the shards


def test_frames_are_those_of_the_clip(catalogue):
    folder = make(catalogue)
    reader = open_shards(folder, "contents", "train")
    assert reader.content_ids == ["c0", "c1", "c4", "c5"]  # the table's order
    row = reader.content_ids.index("c4")
    clip = read_video(catalogue.folder / "media/c4.mp4", FrameConfig(num_frames=4), size=32)
    members = reader.read(row)
    for t, frame in enumerate(clip.frames):
        assert members[f"f{t:02d}.jpg"] == encode_jpeg(frame, 90)
    assert reader.meta(row) == {
        "content_id": "c4",
        "title": "Content 4",
        "frame_times": [round(time, 3) for time in clip.times],
        "products": [{"product_id": "p1", "title": "Product 1", "weight": 1.0, "num_images": 2}],
        "attributes": {"likes": 4},
    }
    assert set(members) == {*(f"f0{t}.jpg" for t in range(4)), "p0.i0.jpg", "p0.i1.jpg", "json"}


def test_the_catalog_holds_every_product_once(catalogue):
    reader = open_shards(make(catalogue, max_images_per_product=3), "products", "catalog")
    assert reader.product_ids == [["p0"], ["p1"], ["p2"], ["p3"]]  # p3 has no link and stays
    assert [reader.meta(row)["num_images"] for row in range(4)] == [1, 2, 3, 3]
    assert reader.names(3) == ["i0.jpg", "i1.jpg", "i2.jpg", "json"]
    pixels = resize_shorter(read_image(catalogue.folder / "media/p3-2.png"), 32)
    assert pixels.shape == (32, 48, 3)
    assert reader.read(3, ["i2.jpg"])["i2.jpg"] == encode_jpeg(pixels, 90)
    assert reader.meta(0)["title"] is None
    assert reader.meta(1)["attributes"] == {"price": None, "made": "2024-01-02"}
    assert reader.meta(2)["attributes"] == {"price": 3.0, "made": "2024-01-03"}


def test_inline_products_are_the_catalogs_bytes(catalogue):
    folder = make(catalogue)
    catalog = open_shards(folder, "products", "catalog")
    rows = {ids[0]: row for row, ids in enumerate(catalog.product_ids)}
    for split in ("train", "val", "test"):
        reader = open_shards(folder, "contents", split)
        for row in range(len(reader)):
            members = reader.read(row)
            for p, product in enumerate(reader.meta(row)["products"]):
                original = catalog.read(rows[product["product_id"]])
                assert product["num_images"] == len(original) - 1
                for i in range(product["num_images"]):
                    assert members[f"p{p}.i{i}.jpg"] == original[f"i{i}.jpg"]


def test_all_links_are_named_and_the_heaviest_are_inline(catalogue):
    for product_id, weight in (("p1", 0.5), ("p2", 3.0), ("p3", 1.0)):
        catalogue.link("c0", product_id, weight)  # beside p0 with weight 1
    reader = open_shards(make(catalogue, max_products_per_content=2), "contents", "train")
    assert reader.product_ids[0] == ["p2", "p0", "p3", "p1"]
    assert reader.weights[0] == [3.0, 1.0, 1.0, 0.5]
    assert [p["num_images"] for p in reader.meta(0)["products"]] == [3, 1, 0, 0]
    inline = [name for name in reader.names(0) if name.startswith("p")]
    assert inline == ["p0.i0.jpg", "p0.i1.jpg", "p0.i2.jpg", "p1.i0.jpg"]


def test_a_photo_post_has_images_for_frames_and_no_times(catalogue):
    reader = open_shards(make(catalogue, num_frames=2), "contents", "train")
    row = reader.content_ids.index("c5")
    assert reader.meta(row)["frame_times"] == []
    assert [name for name in reader.names(row) if name[0] == "f"] == ["f00.jpg", "f01.jpg"]
    pixels = resize_shorter(read_image(catalogue.folder / "media/photo1.png"), 32)
    assert reader.read(row)["f01.jpg"] == encode_jpeg(pixels, 90)


def test_a_clip_with_a_cover_is_a_clip(catalogue):
    catalogue.contents[0]["images"] = ["media/photo0.png"]
    reader = open_shards(make(catalogue), "contents", "train")
    assert len(reader.meta(0)["frame_times"]) == 4


def test_a_short_clip_gives_what_it_has(catalogue):
    reader = open_shards(make(catalogue, num_frames=7), "contents", "train")
    counts = [sum(name[0] == "f" for name in reader.names(row)) for row in range(3)]
    assert counts == [5, 6, 7]  # clips of 5, 6 and 9 frames


def test_shards_are_full_but_the_last(catalogue):
    folder = make(catalogue, samples_per_shard=3)
    assert open_shards(folder, "contents", "train").shard_sizes == [3, 1]
    assert open_shards(folder, "products", "catalog").shard_sizes == [3, 1]
    keys = open_shards(folder, "contents", "train").keys
    assert keys == [f"{i:09d}" for i in range(4)]


@pytest.mark.parametrize("samples_per_part", [1, 64])
def test_bytes_do_not_depend_on_the_number_of_workers(catalogue, monkeypatch, samples_per_part):
    monkeypatch.setattr(program, "SAMPLES_PER_PART", samples_per_part)
    break_file(catalogue, "media/c1.mp4")
    break_file(catalogue, "media/p3-0.png")
    config = config_for(catalogue, samples_per_shard=2)
    folders = []
    for num_workers in (1, 3):
        out = config.out.with_name(f"shards{num_workers}")
        folders.append(program.main(replace(config, out=out, num_workers=num_workers)))
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*.*")
            if path.name != "manifest.json" and path.is_file()
        }
        for folder in folders
    ]
    assert files[0] == files[1]
    assert len(files[0]) > 8
    fingerprints = {read_manifest(folder).fingerprint for folder in folders}
    assert len(fingerprints) == 1


# Splits


def test_tables_without_a_split_column_are_split_by_hash(catalogue):
    for row in catalogue.links:
        del row["split"]
    folder = make(catalogue, val=0.3, test=0.0)
    ids = [row["content_id"] for row in catalogue.contents]
    rule = SplitConfig(val=0.3, test=0.0)
    found = assign_splits(rule, ids, groups=ids, barred=[False] * len(ids))
    expected = dict(zip(ids, found, strict=True))
    assert set(expected.values()) == {"train", "val"}
    for split in ("train", "val"):
        wanted = [content_id for content_id, s in expected.items() if s == split]
        assert open_shards(folder, "contents", split).content_ids == wanted


def test_a_split_that_the_fractions_leave_empty(catalogue):
    for row in catalogue.links:
        del row["split"]
    config = config_for(catalogue, val=1e-9, test=0.0)
    with pytest.raises(UserError, match=r"split 'val' is empty: --val 1e-09 and --test 0\.0"):
        program.main(config)
    assert not config.out.exists()


def test_a_split_column_without_training(catalogue):
    for row in catalogue.links:
        row["split"] = "test"
    with pytest.raises(UserError, match="split 'train' is empty: the links table's split column"):
        make(catalogue)


def test_a_split_that_lost_all_its_contents(catalogue):
    break_file(catalogue, "media/c2.mp4")
    config = config_for(catalogue)
    with pytest.raises(
        UserError, match="split 'val' is empty: all of its 1 contents were dropped or moved"
    ):
        program.main(config)
    assert not config.out.exists()


# What is left out


def test_bad_media_are_counted_listed_and_left_out(catalogue):
    break_file(catalogue, "media/c0.mp4")
    break_file(catalogue, "media/c1.mp4", b"")
    break_file(catalogue, "media/p1-0.png")  # p1 has another image
    break_file(catalogue, "media/photo0.png")  # c5 has others
    (catalogue.folder / "media/p3-0.png").unlink()
    folder = make(catalogue)
    manifest = read_manifest(folder, "shards")
    assert open_shards(folder, "contents", "train").content_ids == ["c4", "c5"]
    catalog = open_shards(folder, "products", "catalog")
    assert [catalog.meta(row)["num_images"] for row in range(4)] == [1, 1, 3, 3]
    assert dropped(folder) == {
        ("content", "c0", "not a video or image"),
        ("content", "c1", "empty file"),
        ("image", "p1", "cannot open image"),
        ("image", "p3", "file not found"),
        ("image", "c5", "cannot open image"),
    }
    assert manifest.counts["dropped"] == {"not a video or image": 1, "empty file": 1}
    assert manifest.counts["images_skipped"] == {"cannot open image": 2, "file not found": 1}
    assert manifest.counts["in"] == {"products": 4, "contents": 6, "links": 6}
    assert manifest.counts["out"] == {"products": 4, "contents": 4, "links": 4}
    listed = {(d["kind"], d["id"], d["reason"]) for d in manifest.details["dropped"]}
    assert listed == dropped(folder)
    assert all(d["detail"] for d in manifest.details["dropped"])


def test_a_product_without_an_image_takes_its_links_along(catalogue):
    catalogue.link("c4", "p3", 2.0)  # beside p1
    break_file(catalogue, "media/p1-0.png")
    break_file(catalogue, "media/p1-1.png")
    folder = make(catalogue)
    assert dropped(folder) == {
        ("product", "p1", "cannot open image"),
        ("content", "c1", "no product left"),
    }
    reader = open_shards(folder, "contents", "train")
    assert reader.content_ids == ["c0", "c4", "c5"]
    assert reader.product_ids[1] == ["p3"]
    assert open_shards(folder, "products", "catalog").product_ids == [["p0"], ["p2"], ["p3"]]


def test_contents_without_a_link_are_no_fault(catalogue):
    catalogue.links = [row for row in catalogue.links if row["content_id"] not in ("c0", "c1")]
    folder = make(catalogue, max_dropped=0.0)
    assert dropped(folder) == {("content", "c0", "no link"), ("content", "c1", "no link")}
    assert read_manifest(folder).counts["dropped"] == {"no link": 2}


def test_nothing_dropped_still_leaves_a_table(catalogue):
    folder = make(catalogue)
    table = pq.read_table(folder / "dropped.parquet")
    assert table.schema.names == ["id", "kind", "reason", "detail", "num_links"]
    assert len(table) == 0


@pytest.mark.parametrize(
    ("files", "max_dropped", "message"),
    [
        (["p1-0.png", "p1-1.png"], 0.2, "1 of 4 products dropped, more than --max-dropped 0.2"),
        (["c0.mp4", "c4.mp4"], 0.3, "2 of 6 contents dropped, more than --max-dropped 0.3"),
    ],
)
def test_too_many_drops_publish_nothing(catalogue, files, max_dropped, message):
    for name in files:
        break_file(catalogue, f"media/{name}")
    config = config_for(catalogue, max_dropped=max_dropped)
    with pytest.raises(UserError) as caught:
        program.main(config)
    assert message in str(caught.value)
    assert re.search(r"allows: [a-z ]+ \(\d\)", str(caught.value))
    assert f"'{files[0][:2]}'" in str(caught.value)
    assert not config.out.exists()
    # The work is kept: with more drops allowed the same command goes on from there.
    program.main(replace(config, max_dropped=0.6))
    assert sorted(path.name for path in config.out.parent.iterdir()) == ["shards", "tables"]


# Manifest, flags, and the program as it is run


def test_the_manifest(catalogue):
    catalogue.link("c3", "p3", 1.0)
    folder = make(catalogue)
    manifest = read_manifest(folder, "shards")
    assert manifest.details["splits"] == {
        "train": {"contents": 4, "links": 4, "products": 3, "shards": 1},
        "val": {"contents": 1, "links": 1, "products": 1, "shards": 1},
        "test": {"contents": 1, "links": 2, "products": 2, "shards": 1},
    }
    assert manifest.details["catalog"] == 4
    assert (manifest.details["warm_products"], manifest.details["cold_products"]) == (3, 1)
    assert manifest.config["size"] == 32
    parent = manifest.parent("tables")
    assert parent is not None
    assert parent.fingerprint == read_manifest(catalogue.folder).fingerprint
    assert parent.path == "../tables"


def test_the_fingerprint_is_of_the_tars(catalogue):
    config = config_for(catalogue)
    first = read_manifest(program.main(config)).fingerprint
    again = replace(config, out=config.out.with_name("again"), samples_per_shard=50)
    other = replace(config, out=config.out.with_name("other"), jpeg_quality=80)
    assert read_manifest(program.main(again)).fingerprint == first
    assert read_manifest(program.main(other)).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "--num-frames: expected from 1 to 100"),
        ({"jpeg_quality": 101}, "--jpeg-quality: expected from 1 to 100"),
        ({"val": 0.6, "test": 0.5}, "--val and --test: expected a sum below 1"),
        ({"max_dropped": 2.0}, "--max-dropped: expected from 0 to 1"),
        ({"samples_per_shard": 0}, "--samples-per-shard: expected 1 or more"),
    ],
)
def test_flags_out_of_range(catalogue, changes, message):
    with pytest.raises(UserError, match=message):
        make(catalogue, **changes)


def test_an_output_that_is_there(catalogue, capsys):
    folder = make(catalogue)
    before = files_of(folder), (folder / "manifest.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="already exists"):
        make(catalogue, num_frames=2)
    capsys.readouterr()
    # The same command has nothing to do, on any number of workers.
    make(catalogue, num_workers=2)
    assert "made before, of the same tables; --overwrite makes it anew" in capsys.readouterr().out
    assert (files_of(folder), (folder / "manifest.json").stat().st_mtime_ns) == before
    catalogue.contents[0]["title"] = "Another"
    with pytest.raises(UserError, match="already exists"):
        make(catalogue)
    catalogue.contents[0]["title"] = "Content 0"
    (folder / "contents" / "val-000000.tar").unlink()
    with pytest.raises(UserError, match="already exists"):
        make(catalogue)
    make(catalogue, overwrite=True)
    assert files_of(folder) == before[0]
    make(catalogue, overwrite=True, num_frames=2)
    assert read_manifest(folder).config["num_frames"] == 2


def test_the_command(catalogue):
    tables = catalogue.write()
    command = [sys.executable, str(ROOT / "data_prep" / "make_shards.py"), "--tables", str(tables)]
    command += ["--out", "shards", "--size", "32", "--num-workers", "2"]
    done = subprocess.run(command, cwd=tables.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train" in done.stdout
    assert "4 products: 3 warm, 1 cold" in done.stdout
    assert json.loads((tables.parent / "shards" / "manifest.json").read_text())["kind"] == "shards"
    again = subprocess.run(command, cwd=tables.parent, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.endswith(done.stdout)
    other = subprocess.run(
        [*command, "--num-frames", "2"],
        cwd=tables.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 1
    assert len(other.stderr.splitlines()) == 1
    assert "already exists" in other.stderr


# Splits that keep their word


def without_splits(catalogue: Catalogue) -> Catalogue:
    for row in catalogue.links:
        del row["split"]
    return catalogue


def split_of(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder / "samples.parquet").to_pylist()
    return {row["id"]: row["split"] for row in table if row["kind"] == "content"}


def test_contents_that_look_alike_share_a_split(catalogue):
    without_splits(catalogue)
    for copy in range(12):  # the same scene at another length, quality and name
        name = f"copy{copy}.mp4"
        write_video(catalogue.folder, name, 9 + copy, seed=99)
        catalogue.contents.append(
            {"content_id": f"x{copy}", "title": None, "video": f"media/{name}", "images": []}
        )
        catalogue.links.append({"content_id": f"x{copy}", "product_id": "p0", "weight": 1.0})
    folder = make(catalogue, val=0.0, test=0.3)
    found = split_of(folder)
    assert len(found) == 18
    assert {found[f"x{copy}"] for copy in range(12)} == {"test"}
    claims = read_manifest(folder).details["claims"]
    assert claims["near_duplicates"] == {"groups": 1, "contents": 12, "straddling": 0}
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert {row["id"] for row in rows if row["group"] == "x0"} == {f"x{i}" for i in range(12)}
    apart = make(catalogue, val=0.0, test=0.3, near_duplicates="allow", overwrite=True)
    assert len({split_of(apart)[f"x{copy}"] for copy in range(12)}) == 2
    assert read_manifest(apart).details["claims"]["near_duplicates"]["straddling"] > 0


def test_training_copies_of_what_a_split_column_tests_are_dropped(catalogue):
    write_video(catalogue.folder, "c0.mp4", 6, seed=8)  # c3, with 8 frames, is in the test
    folder = make(catalogue, max_dropped=0.0)
    assert dropped(folder) == {("content", "c0", "near duplicate of a later split")}
    assert "c0" not in split_of(folder)
    assert [check.line() for check in verify_shards(folder) if check.holds is False] == []
    kept = make(catalogue, near_duplicates="allow", overwrite=True)
    assert split_of(kept)["c0"] == "train"
    assert read_manifest(kept).details["claims"]["near_duplicates"]["straddling"] == 1


def test_cold_products_are_held_out_of_training(catalogue):
    without_splits(catalogue)
    folder = make(catalogue, val=0.0, test=0.2, cold_products=0.4)
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    cold = {row["id"] for row in rows if row["kind"] == "product" and row["cold"]}
    claims = read_manifest(folder).details["claims"]["cold_products"]
    assert claims == {"asked": 0.4, "held_out": 2, "linked_in_training": 0}
    assert len(cold) == 2
    trained = {p for ids in open_shards(folder, "contents", "train").product_ids for p in ids}
    assert trained.isdisjoint(cold)
    tested = {p for ids in open_shards(folder, "contents", "test").product_ids for p in ids}
    assert tested & cold


def test_splits_in_order_of_a_column(catalogue, capsys):
    without_splits(catalogue)
    folder = make(catalogue, val=0.17, test=0.33, split_by="likes")
    expected = dict.fromkeys(["c0", "c1", "c2"], "train") | {
        "c3": "val",
        "c4": "test",
        "c5": "test",
    }
    assert split_of(folder) == expected
    claims = read_manifest(folder).details["claims"]["split_by"]
    spans = {"train": [0, 2], "val": [3, 3], "test": [4, 5]}
    assert claims == {"held_out_from": 3, "too_late": 0, "spans": spans}
    assert "  test by likes: 4 to 5\n" in capsys.readouterr().out


def test_splits_by_a_column_with_gaps_or_dates_that_do_not_sort(catalogue):
    without_splits(catalogue)
    catalogue.contents[2]["price"] = float("nan")
    for number, row in enumerate(catalogue.contents):
        row["price"] = row.get("price", float(number))
        row["date"] = f"{number + 1}/2022"
    for column, message in (("price", "content 'c2' has no value"), ("date", "has '1/2022', and")):
        config = config_for(catalogue, split_by=column, val=0.2, test=0.2)
        with pytest.raises(UserError, match=message):
            program.main(config)
        assert not config.out.with_name(".shards.unfinished").exists()


@pytest.mark.parametrize("column", [True, False])
def test_nothing_left_is_an_error_in_words(catalogue, column):
    if not column:
        without_splits(catalogue)
    for path in (catalogue.folder / "media").iterdir():
        path.write_bytes(b"noise" * 50)
    with pytest.raises(UserError, match="split 'train' is empty"):
        make(catalogue, max_dropped=1.0, val=0.3, test=0.0)


def test_a_content_that_lost_its_product_and_its_clip_is_dropped_once(catalogue):
    for name in ("p1-0.png", "p1-1.png", "c1.mp4"):
        break_file(catalogue, f"media/{name}")
    folder = make(catalogue)
    assert read_manifest(folder).counts["dropped"] == {
        "cannot open image": 1,
        "no product left": 2,  # c1 and c4
    }
    rows = pq.read_table(folder / "dropped.parquet").to_pylist()
    assert {row["id"]: row["num_links"] for row in rows} == {"p1": 0, "c1": 1, "c4": 1}


def test_links_lost_are_counted_with_what_they_were_lost_with(catalogue):
    catalogue.link("c4", "p3", 2.0)  # beside p1
    break_file(catalogue, "media/p1-0.png")
    break_file(catalogue, "media/p1-1.png")
    folder = make(catalogue)
    rows = pq.read_table(folder / "dropped.parquet").to_pylist()
    assert {row["id"]: row["num_links"] for row in rows} == {"p1": 1, "c1": 1}
    counts = read_manifest(folder).counts
    assert counts["in"]["links"] == counts["out"]["links"] + 2
    assert [check.line() for check in verify_shards(folder) if check.holds is False] == []


def test_text_columns_become_the_contents_text(catalogue):
    for row in catalogue.contents:
        row["transcript"] = f"we look at number {row['likes']} " if row["likes"] else None
    (catalogue.folder / "media" / "c4.srt").write_text(
        "1\n00:00:00,000 --> 00:00:01,000\n<i>Hello</i> there\n"
    )
    folder = make(catalogue, text_columns=("title", "transcript", "subtitles"))
    reader = open_shards(folder, "contents", "train")
    titles = [reader.meta(row)["title"] for row in range(len(reader))]
    assert titles == [
        "Content 0",
        "Content 1 we look at number 1",
        "Content 4 we look at number 4 Hello there",
        "Content 5 we look at number 5",
    ]
    with pytest.raises(UserError, match="--text-columns script: contents have no such column"):
        make(catalogue, text_columns=("script",), overwrite=True)


def test_facts_of_every_sample(catalogue):
    folder = make(catalogue)
    rows = {row["id"]: row for row in pq.read_table(folder / "samples.parquet").to_pylist()}
    assert len(rows) == 10
    clip = rows["c4"]
    assert (clip["kind"], clip["split"], clip["shard"], clip["row"]) == ("content", "train", 0, 2)
    assert (clip["width"], clip["height"], clip["num_frames"]) == (64, 64, 9)
    assert (clip["num_pictures"], clip["has_title"], clip["num_links"]) == (4, True, 1)
    assert clip["duration"] == pytest.approx(9 / 8, abs=0.01)
    members = open_shards(folder, "contents", "train").read(2)
    assert clip["num_bytes"] == sum(len(v) for k, v in members.items() if k.startswith("f"))
    product = rows["p0"]
    assert (product["width"], product["height"], product["has_title"]) == (60, 40, False)
    assert (product["num_links"], product["duration"]) == (1, 0.0)


# Work that was broken off


def files_of(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def program_command(config: Any) -> list[str]:
    flags = {"tables": config.tables, "out": config.out, "num-frames": config.num_frames}
    flags |= {"size": config.size, "max-dropped": config.max_dropped, "num-workers": 2}
    flags |= {"samples-per-shard": config.samples_per_shard}
    parts = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    return [sys.executable, str(ROOT / "tests" / "small_parts.py"), *parts]


def test_kills_at_any_moment_leave_the_same_bytes(catalogue, request):
    config = config_for(catalogue, samples_per_shard=2)
    whole = replace(config, out=config.out.with_name("whole"))
    program.main(whole)
    expected = files_of(whole.out)
    command = program_command(config)
    rng = np.random.default_rng(0)
    kills, rounds = 0, 0
    while kills < request.config.getoption("--kills"):
        # Killed with all its processes at a random moment, again and again, until it comes through.
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        try:
            _, stderr = process.communicate(timeout=float(rng.uniform(0.8, 4.0)))
            assert process.returncode == 0, stderr
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        if config.out.exists():
            assert files_of(config.out) == expected
            # Killed after publishing or not, the same command finds nothing to do but to tidy up.
            subprocess.run(command, check=True, capture_output=True)
            assert files_of(config.out) == expected
            left = sorted(path.name for path in config.out.parent.iterdir())
            assert left == ["shards", "tables", "whole"]
            shutil.rmtree(config.out)
            rounds += 1
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(config.out) == expected
    assert read_manifest(config.out).fingerprint == read_manifest(whole.out).fingerprint
    left = sorted(path.name for path in config.out.parent.iterdir())
    assert left == ["shards", "tables", "whole"]
    print(f"{kills} kills, {rounds + 1} times whole with the same bytes")


def test_what_is_finished_is_not_done_again(catalogue, monkeypatch):
    monkeypatch.setattr(program, "SAMPLES_PER_PART", 2)
    break_file(catalogue, "media/c4.mp4")
    config = config_for(catalogue, max_dropped=0.0)
    with pytest.raises(UserError, match="dropped, more than --max-dropped 0 allows"):
        program.main(config)
    parts = config.out.with_name(".shards.unfinished") / "parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    assert len(before) > 4
    kept = []
    monkeypatch.setattr(program._Work, "remove", lambda work: kept.extend(parts.iterdir()))
    program.main(replace(config, max_dropped=0.5))
    after = {path.name: path.stat().st_mtime_ns for path in kept}
    assert {name: after[name] for name in before} == before


class KilledError(BaseException):
    """Ends a run where it stands, as a kill does: nothing catches it."""


def kill(*_: object) -> None:
    """Stand in for the step at which a run is killed."""
    raise KilledError


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_tidying_up_leaves_nothing_to_do(catalogue, monkeypatch, overwrite):
    config = config_for(catalogue, overwrite=overwrite)
    if overwrite:
        make(catalogue, num_frames=2)
    expected = files_of(program.main(replace(config, out=config.out.with_name("whole"))))
    remove, decode, last = program._remove, program._decode, 0
    while True:
        # Killed at the first removal after publishing, at the second, and so on.
        steps = []

        def step(path, last=last, steps=steps):
            if (config.out / "manifest.json").is_file():
                steps.append(path)
            if len(steps) > last:
                raise KilledError
            remove(path)

        shutil.rmtree(config.out, ignore_errors=True)
        monkeypatch.setattr(program, "_remove", step)
        try:
            program.main(config)
            break
        except KilledError:
            last += 1
        assert files_of(config.out) == expected
        monkeypatch.setattr(program, "_remove", remove)
        # Nothing is decoded again, unless the very last trace has gone of what --overwrite asked for.
        if (
            not overwrite
            or (config.out.with_name(".shards.unfinished") / "published.json").exists()
        ):
            monkeypatch.setattr(program, "_decode", kill)
        program.main(config)
        monkeypatch.setattr(program, "_decode", decode)
        left = sorted(path.name for path in config.out.parent.iterdir())
        assert left == ["shards", "tables", "whole"]
    assert last >= 5


def test_unfinished_work_of_another_command_stays(catalogue, monkeypatch):
    config = config_for(catalogue)
    program.main(config)
    with monkeypatch.context() as patch:
        patch.setattr(program._Work, "publish", kill)
        with pytest.raises(KilledError):
            program.main(replace(config, num_frames=2, overwrite=True))
    program.main(config)
    assert (config.out.with_name(".shards.unfinished") / "plan.json").is_file()
    program.main(replace(config, num_frames=2, overwrite=True))
    assert read_manifest(config.out).config["num_frames"] == 2


def test_work_that_was_half_thrown_away_is_not_trusted(catalogue, monkeypatch):
    config = config_for(catalogue)
    expected = files_of(program.main(replace(config, out=config.out.with_name("whole"))))
    root = config.out.with_name(".shards.unfinished")
    with monkeypatch.context() as patch:
        patch.setattr(program._Work, "publish", kill)
        with pytest.raises(KilledError):
            program.main(config)
    remove = program._remove

    def remove_some(path):
        if path.name == "parts":
            for part in path.glob("*.bin"):
                part.write_bytes(b"other bytes")
            raise KilledError
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(program, "_remove", remove_some)
        with pytest.raises(KilledError):
            program.main(replace(config, restart=True))
    assert (root / "parts").is_dir()
    program.main(config)
    assert files_of(config.out) == expected


def test_unfinished_work_of_other_settings_is_not_mixed_in(catalogue):
    break_file(catalogue, "media/c4.mp4")
    config = config_for(catalogue, max_dropped=0.0)
    with pytest.raises(UserError, match="dropped"):
        program.main(config)
    other = replace(config, num_frames=3, max_dropped=0.5)
    with pytest.raises(UserError, match=r"num_frames was 4, is 3.*--restart throws it away"):
        program.main(other)
    program.main(replace(other, restart=True))
    assert not config.out.with_name(".shards.unfinished").exists()


def test_two_at_once_on_one_output_are_refused(catalogue):
    config = config_for(catalogue)
    tables = program.read_tables(config.tables)
    with (
        program._unfinished(config, tables),
        pytest.raises(UserError, match="another process is making these shards"),
    ):
        program.main(config)


def test_ray_makes_the_same_bytes(catalogue, local_ray, monkeypatch):
    monkeypatch.setattr(program, "SAMPLES_PER_PART", 2)
    config = config_for(catalogue, samples_per_shard=2)
    program.main(config)
    on_ray = replace(config, out=config.out.with_name("ray"), engine="ray", num_workers=2)
    program.main(on_ray)
    assert files_of(on_ray.out) == files_of(config.out)


class RayWorkerKiller(threading.Thread):
    """Kills one of this process's Ray workers in the middle of a task, once the first part is there."""

    def __init__(self, parts: Path) -> None:
        super().__init__(daemon=True)
        self.parts = parts
        self.killed: psutil.Process | None = None
        self.parts_before = 0

    def run(self) -> None:
        """Look at the workers until one is killed."""
        workers: list[psutil.Process] = []
        while self.killed is None:
            self.parts_before = len(list(self.parts.glob("*.parquet")))
            if self.parts_before == 0:
                found = psutil.Process().children(recursive=True)
                workers = [process for process in found if self.title(process)]
                time.sleep(0.05)
            elif busy := [process for process in workers if self.title(process) == "ray::_run"]:
                # Stopped first: it may have finished its task since its title was read.
                busy[0].suspend()
                if self.title(busy[0]) == "ray::_run":
                    self.killed = busy[0]
                os.kill(busy[0].pid, signal.SIGKILL if self.killed else signal.SIGCONT)

    @staticmethod
    def title(process: psutil.Process) -> str:
        """The title of a Ray worker, which says what it runs; nothing for another process."""
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            return ""
        return line.split()[0] if line.startswith("ray::") else ""


def test_a_ray_worker_is_killed_and_the_bytes_are_the_same(catalogue, local_ray, monkeypatch):
    monkeypatch.setattr(program, "SAMPLES_PER_PART", 1)
    config = config_for(catalogue, samples_per_shard=2)
    program.main(config)
    on_ray = replace(config, out=config.out.with_name("ray"), engine="ray", num_workers=2)
    killer = RayWorkerKiller(on_ray.out.with_name(".ray.unfinished") / "parts")
    killer.start()
    program.main(on_ray)
    killer.join(timeout=10)
    assert killer.killed is not None
    assert not killer.killed.is_running()
    assert 1 <= killer.parts_before < 10  # of 4 products and 6 contents
    assert files_of(on_ray.out) == files_of(config.out)


# Elsewhere than on this disk


def files_at(url: str, folder: Path) -> dict[Path, bytes]:
    """The files of a folder in a bucket, which are fetched into one on this disk."""
    import fsspec

    files = fsspec.filesystem(url.split(":")[0])
    files.invalidate_cache()
    files.get(f"{url}/", str(folder), recursive=True)
    return files_of(folder)


def make_in(bucket: str, catalogue: Catalogue, local: Path) -> Any:
    """Tables and media in a bucket become the shards there that `local` holds; returns the config."""
    import fsspec

    _decoder.cache_clear()  # one that runs already does not know the server
    files = fsspec.filesystem(bucket.split(":")[0])
    files.put(f"{catalogue.folder}/", f"{bucket}/tables/", recursive=True)
    config = replace(
        config_for(catalogue, samples_per_shard=3),
        tables=Path(f"{bucket}/tables"),
        out=Path(f"{bucket}/made/shards"),
    )
    program.main(config)
    assert files_at(f"{bucket}/made/shards", local.parent / "fetched") == files_of(local)
    assert open_shards(f"{bucket}/made/shards", "contents", "train").shard_sizes == [3, 1]
    with pytest.raises(UserError, match="already exists"):
        program.main(replace(config, num_frames=2))
    return config


def test_tables_media_and_shards_on_s3(catalogue, tmp_path):
    local = make(catalogue, samples_per_shard=3)
    with s3_server(tmp_path / "s3.log") as bucket:
        import fsspec

        files = fsspec.filesystem("s3")
        config = make_in(bucket, catalogue, local)
        assert [name.split("/")[-1] for name in files.ls(f"{bucket}/made")] == ["shards"]
        program.main(config)  # nothing to do

        # Broken off after the first shard: it goes on, and ends with the same bytes.
        again = replace(config, out=Path(f"{bucket}/again"))
        tasks_run = []

        class BreaksOff:
            def run(self, tasks):
                for number, task in enumerate(tasks):
                    tasks_run.append(number)
                    if len(tasks_run) == 5:
                        raise KeyboardInterrupt
                    yield number, task.run()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program, "open_engine", lambda *_, **__: nullcontext(BreaksOff()))
            with pytest.raises(KeyboardInterrupt):
                program.main(again)
        assert not files.exists(f"{bucket}/again/manifest.json")
        # A tar that is not on record is not trusted.
        files.pipe_file(f"{bucket}/again/contents/val-000000.tar", b"not of this work")
        program.main(again)
        assert files_at(f"{bucket}/again", tmp_path / "again") == files_of(local)
        assert [name.split("/")[-1] for name in files.ls(bucket)] == ["again", "made", "tables"]


def test_an_output_at_a_url_is_replaced_whole_whenever_it_is_killed(
    catalogue, tmp_path, monkeypatch
):
    local = make(catalogue, samples_per_shard=3)
    with s3_server(tmp_path / "s3.log") as bucket:
        import fsspec

        files = fsspec.filesystem("s3")
        out = f"{bucket}/shards"
        config = replace(config_for(catalogue, samples_per_shard=3), out=Path(out))
        old = replace(config, samples_per_shard=1, num_frames=2, overwrite=True)
        remove = program._remove

        def before(path):
            """Killed when the manifest has gone, and no tar."""
            if str(path) == out:
                raise KilledError
            remove(path)

        def during(path):
            """Killed when half of all objects have gone."""
            if str(path) == out:
                for name in files.find(out)[::2]:
                    files.rm_file(name)
                raise KilledError
            remove(path)

        for step, resumed in (
            (before, replace(config, overwrite=True)),
            (during, config),
            (during, replace(config, overwrite=True, restart=True, timeout_s=99.0)),
        ):
            program.main(old)
            files.invalidate_cache()
            assert len(files.find(out)) > len(files_of(local)) + 5
            with monkeypatch.context() as patch:
                patch.setattr(program, "_remove", step)
                with pytest.raises(KilledError):
                    program.main(replace(config, overwrite=True))
            files.invalidate_cache()
            assert not files.exists(f"{out}/manifest.json")
            assert len(files.find(out)) > 5
            program.main(resumed)
            fetched = tmp_path / f"{step.__name__}-{resumed.overwrite}-{resumed.restart}"
            assert files_at(out, fetched) == files_of(local)
            assert not files.exists(f"{out}.unfinished")
            program._remove(program.place(out))


def test_an_output_at_a_url_is_asked_for_again_before_it_is_removed(
    catalogue, tmp_path, monkeypatch
):
    with s3_server(tmp_path / "s3.log") as bucket:
        import fsspec

        files = fsspec.filesystem("s3")
        config = replace(config_for(catalogue), out=Path(f"{bucket}/shards"))
        decode = program._decode

        def while_somebody_writes(*arguments):
            files.pipe_file(f"{bucket}/shards/thesis.txt", b"mine")
            decode(*arguments)

        monkeypatch.setattr(program, "_decode", while_somebody_writes)
        with pytest.raises(UserError, match="already exists"):
            program.main(config)
        assert files.cat_file(f"{bucket}/shards/thesis.txt") == b"mine"


def test_tables_media_and_shards_on_google_cloud_storage(catalogue, tmp_path):
    local = make(catalogue, samples_per_shard=3)
    with gcs_server(tmp_path / "gcs.log") as bucket:
        config = make_in(bucket, catalogue, local)
        program.main(replace(config, overwrite=True, num_frames=2, samples_per_shard=4))
        expected = make(catalogue, num_frames=2, samples_per_shard=4, overwrite=True)
        assert files_at(f"{bucket}/made/shards", tmp_path / "again") == files_of(expected)


def test_tables_and_media_over_http(catalogue, tmp_path):
    local = make(catalogue)
    with http_server(catalogue.folder) as server:
        config = replace(config_for(catalogue), tables=Path(server.url), out=tmp_path / "fetched")
        program.main(config)
    assert files_of(tmp_path / "fetched") == files_of(local)
