"""make_shards: from clips, photo posts and every kind of fault to shards and a manifest."""

import datetime
import importlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from clips import moving_square, write_clip
from PIL import Image

from mmrec.data.media import decode_video, encode_jpeg, read_image, resize_shorter
from mmrec.data.shards import open_shards
from mmrec.data.tables import write_tables
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


def write_video(folder: Path, name: str, num_frames: int) -> str:
    color = tuple(int(c) for c in np.random.default_rng(num_frames).integers(0, 256, 3))
    write_clip(folder / "media" / name, moving_square(num_frames, color=color))
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
    frames, times = decode_video(catalogue.folder / "media/c4.mp4", num_frames=4)
    members = reader.read(row)
    for t, frame in enumerate(frames):
        assert members[f"f{t:02d}.jpg"] == encode_jpeg(resize_shorter(frame, 32), 90)
    assert reader.meta(row) == {
        "content_id": "c4",
        "title": "Content 4",
        "frame_times": [round(time, 3) for time in times],
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


@pytest.mark.parametrize("samples_per_task", [1, 16])
def test_bytes_do_not_depend_on_the_number_of_workers(catalogue, monkeypatch, samples_per_task):
    monkeypatch.setattr(program, "SAMPLES_PER_TASK", samples_per_task)
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


def test_splits_by_hash_are_stable_and_of_the_right_size(catalogue):
    names = [f"content-{i}" for i in range(5_000)]
    splits = {name: program._split_of(name, 0.1, 0.2) for name in names}
    shares = {split: count / 5_000 for split, count in Counter(splits.values()).items()}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.02)
    assert splits == {name: program._split_of(name, 0.1, 0.2) for name in reversed(names)}


def test_tables_without_a_split_column_are_split_by_hash(catalogue):
    for row in catalogue.links:
        del row["split"]
    folder = make(catalogue, val=0.3, test=0.0)
    expected = {
        r["content_id"]: program._split_of(r["content_id"], 0.3, 0.0) for r in catalogue.contents
    }
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
    with pytest.raises(UserError, match="split 'val' is empty: all of its 1 contents were dropped"):
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
        ("content", "c0", "cannot open video"),
        ("content", "c1", "empty file"),
        ("image", "p1", "cannot open image"),
        ("image", "p3", "file not found"),
        ("image", "c5", "cannot open image"),
    }
    assert manifest.counts["dropped"] == {"cannot open video": 1, "empty file": 1}
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
    assert table.schema.names == ["id", "kind", "reason", "detail"]
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
    assert "cannot open" in str(caught.value)
    assert f"'{files[0][:2]}'" in str(caught.value)
    assert [path.name for path in config.out.parent.iterdir()] == ["tables"]


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


def test_an_output_that_is_there(catalogue):
    folder = make(catalogue)
    with pytest.raises(UserError, match="already exists"):
        make(catalogue)
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
    assert again.returncode == 1
    assert len(again.stderr.splitlines()) == 1
    assert "already exists" in again.stderr
