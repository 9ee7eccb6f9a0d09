"""Tars in the layouts of img2dataset, plain webdataset and video2dataset, indexed where they lie."""

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import load_program
from PIL import Image
from servers import http_server

from mmrec import cli
from mmrec.data import foreign
from mmrec.data.foreign import ForeignMapping, expand_tars
from mmrec.data.media import encode_jpeg
from mmrec.data.shards import open_shards
from mmrec.data.verification import verify_shards
from mmrec.errors import UserError
from mmrec.manifest import Manifest, read_manifest, write_manifest
from mmrec.retrieval.evaluation_config import EvaluationConfig

COLORS = ("red", "green", "blue", "black", "white", "orange")
Members = Mapping[str, bytes]
# Processes take longer to start than these tars to read.
index_tars = partial(foreign.index_tars, num_workers=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A picture of one colour with a bright corner whose size tells its number."""
    image = Image.new("RGB", (48, 40), COLORS[number % len(COLORS)])
    image.paste("yellow", (0, 0, 4 + number % 40, 4 + number % 30))
    if kind == "JPEG":
        return encode_jpeg(np.asarray(image), 90)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def img2dataset_sample(number: int, shard: int = 0, **fields: Any) -> dict[str, bytes]:
    """What img2dataset writes of one row of its table."""
    key = f"{shard:05d}{number:04d}"
    caption = f"a {COLORS[number % len(COLORS)]} thing, number {number}"
    meta = {
        "caption": caption,
        "url": f"https://host/{number}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 48,
        "height": 40,
        "exif": "{}",
        **fields,
    }
    return {
        f"{key}.jpg": picture(number),
        f"{key}.json": json.dumps(meta, indent=4).encode(),
        f"{key}.txt": caption.encode(),
    }


def shop_sample(number: int, shard: int = 0, *, sku: int | None = None) -> dict[str, bytes]:
    """The same with a product's picture, and the product's title and id in the JSON."""
    sku = number % 5 if sku is None else sku
    fields = {"uid": f"u{shard}-{number}", "product": {"sku": sku, "title": f"Product {sku}"}}
    members = img2dataset_sample(number, shard, **fields)
    key = next(iter(members)).split(".")[0]
    return members | {f"{key}.p.jpg": picture(sku + 100)}


SHOP = ForeignMapping(
    title="txt",
    content_id="json:uid",
    product_id="json:product.sku",
    product_images="p.jpg",
    product_title="json:product.title",
)


def joined(*samples: Members) -> dict[str, bytes]:
    return {name: data for sample in samples for name, data in sample.items()}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars as img2dataset leaves them, 6 and 4 samples."""
    for shard, count in enumerate((6, 4)):
        samples = [img2dataset_sample(i, shard) for i in range(count)]
        write_tar(tmp_path / "laion" / f"{shard:05d}.tar", joined(*samples))
    return tmp_path / "laion"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Two tars of 8 samples that lead to 5 products."""
    for shard in range(2):
        samples = [shop_sample(i, shard) for i in range(8)]
        write_tar(tmp_path / "shop" / f"{shard:05d}.tar", joined(*samples))
    return tmp_path / "shop"


# Mappings


def test_an_image_and_its_caption_are_a_pair_unless_told_otherwise(
    tars: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    out = tmp_path / "set"
    manifest = index_tars([f"{tars}/{{00000..00001}}.tar"], out, split="train")
    reader = open_shards(out, "contents", "train")
    assert reader.shard_sizes == [6, 4]
    assert reader.content_ids[7] == "000010001"
    assert reader.product_ids[7] == ["000010001"]
    assert reader.names(7) == ["f00.jpg"]
    assert reader.read(7) == {"f00.jpg": picture(1)}
    assert reader.meta(7) == {
        "content_id": "000010001",
        "title": None,
        "frame_times": [],
        "products": [
            {
                "product_id": "000010001",
                "title": "a green thing, number 1",
                "weight": 1.0,
                "num_images": 0,
            }
        ],
        "attributes": {},
    }
    catalog = open_shards(out, "products", "catalog")
    assert catalog.product_ids == reader.product_ids
    assert catalog.meta(7)["title"] == "a green thing, number 1"
    assert catalog.meta(7)["num_images"] == 0
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    assert manifest == read_manifest(out, "shards")
    assert manifest.counts == {
        "in": {"samples": 10},
        "out": {"products": 10, "contents": 10, "links": 10},
        "dropped": {},
        "images_skipped": {},
    }
    assert manifest.details["files"] == [
        "contents/train-000000.tar",
        "contents/train-000001.tar",
        "products/catalog-000000.tar",
    ]
    checks = verify_shards(out)
    assert [check.line() for check in checks if check.holds is False] == []


def test_fields_of_the_json_and_product_pictures(shop: Path, tmp_path: Path) -> None:
    index_tars([f"{shop}/*.tar"], tmp_path / "set", split="train", mapping=SHOP)
    reader = open_shards(tmp_path / "set", "contents", "train")
    assert reader.content_ids[9] == "u1-1"
    assert reader.product_ids[9] == ["1"]
    assert reader.read(9) == {"f00.jpg": picture(1), "p0.i0.jpg": picture(101)}
    assert reader.meta(9)["title"] == "a green thing, number 1"
    assert reader.meta(9)["products"] == [
        {"product_id": "1", "title": "Product 1", "weight": 1.0, "num_images": 1}
    ]
    catalog = open_shards(tmp_path / "set", "products", "catalog")
    assert catalog.product_ids == [["0"], ["1"], ["2"], ["3"], ["4"]]
    assert catalog.read(3, ["i0.jpg"]) == {"i0.jpg": picture(103)}
    assert catalog.meta(3)["title"] == "Product 3"


def test_patterns_of_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    frames = {f"a.frame_{t}.JPG": picture(t) for t in (10, 9, 1)}
    tar = write_tar(tmp_path / "x.tar", frames | {"a.p.jpg": picture(50), "a.txt": b"a"})
    mapping = ForeignMapping(frames="png,frame_*.jpg,*.jpg", product_images="p*.jpg")
    index_tars([str(tar)], tmp_path / "set", split="train", mapping=mapping)
    reader = open_shards(tmp_path / "set", "contents", "train")
    found = reader.read(0)
    assert list(found) == ["f00.jpg", "f01.jpg", "f02.jpg", "p0.i0.jpg"]
    assert list(found.values()) == [picture(t) for t in (1, 9, 10, 50)]
    every = ForeignMapping(frames="*jpg", product_images="p.jpg")
    index_tars([str(tar)], tmp_path / "every", split="train", mapping=every)
    assert open_shards(tmp_path / "every", "contents", "train").names(0)[2:] == [
        "f02.jpg",
        "p0.i0.jpg",
    ]


def test_the_first_place_that_holds_something_counts(tmp_path: Path) -> None:
    rows = (
        {
            "a/0.png": picture(0, "PNG"),
            "a/0.txt": b"  ",
            "a/0.json": rb'{"caption": "from json \ud83d"}',
        },
        {"a/1.webp": picture(1, "WEBP"), "a/1.txt": b" from txt \n"},
    )
    tar = write_tar(tmp_path / "x.tar", joined(*rows))
    index_tars([str(tar)], tmp_path / "set", split="train")
    reader = open_shards(tmp_path / "set", "contents", "train")
    assert reader.keys == reader.content_ids == ["a/0", "a/1"]
    titles = [reader.meta(row)["products"][0]["title"] for row in range(2)]
    assert titles == ["from json ?", "from txt"]
    assert reader.read(1) == {"f00.jpg": picture(1, "WEBP")}


def test_one_text_may_not_be_both_titles(shop: Path, tmp_path: Path) -> None:
    both = ForeignMapping(title="txt", product_title="json:x,txt")
    with pytest.raises(UserError, match="take the same text, which gives away every answer"):
        index_tars([f"{shop}/*.tar"], tmp_path / "set", split="train", mapping=both)
    caption = ForeignMapping(product_title="txt", product_images="p.jpg").with_defaults()
    assert caption.title == ""
    assert ForeignMapping(product_images="p.jpg").with_defaults().title == "txt,json:caption"
    assert ForeignMapping(title="", product_title="json:x").with_defaults().title == ""


# What is left out


def test_samples_without_what_the_mapping_names_are_counted(tmp_path: Path) -> None:
    good = [shop_sample(i) for i in range(4)]
    bad = {
        "no frames": {"b0.json": b"{}", "b0.p.jpg": picture(0)},
        "no content id": {"b1.jpg": picture(0), "b1.json": b"{}"},
        "no product id": {"b2.jpg": picture(0), "b2.json": b'{"uid": 7}'},
        "product has neither images nor title": {
            "b3.jpg": picture(0),
            "b3.json": b'{"uid": 8, "product": {"sku": "s"}}',
        },
        "json is not JSON": {"b4.jpg": picture(0), "b4.json": b"{"},
        "txt is not UTF-8": {
            **shop_sample(5),
            f"{5:09d}.txt": b"\xff",
        },
        "json:uid is neither text nor a whole number": {
            "b6.jpg": picture(0),
            "b6.json": b'{"uid": [1]}',
        },
    }
    tar = write_tar(tmp_path / "x.tar", joined(*good, *bad.values()))
    with pytest.raises(UserError, match=r"7 of 11 samples dropped, .*the first is 'b0': no frames"):
        index_tars([str(tar)], tmp_path / "set", split="train", mapping=SHOP)
    assert not (tmp_path / "set").exists()
    manifest = index_tars(
        [str(tar)], tmp_path / "set", split="train", mapping=SHOP, max_dropped=0.7
    )
    assert manifest.counts["dropped"] == dict.fromkeys(bad, 1)
    assert manifest.details["dropped"][0] == {
        "split": "train",
        "id": "b0",
        "reason": "no frames",
        "detail": "json, p.jpg",
        "kind": "content",
    }
    assert len(open_shards(tmp_path / "set", "contents", "train")) == 4


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    frames = {"a.f0.jpg": picture(0), "a.f1.jpg": b"<html>", "a.f2.jpg": b"", "a.txt": b"a"}
    broken = {"b.f0.jpg": picture(0)[:200], "b.txt": b"b"}
    tar = write_tar(tmp_path / "x.tar", frames | broken | {"c.f0.jpg": b"GIF", "c.txt": b"c"})
    options: dict[str, Any] = {"split": "train", "max_dropped": 0.9}
    mapping = ForeignMapping(frames="f*.jpg")
    by_start = index_tars([str(tar)], tmp_path / "a", mapping=mapping, **options)
    assert by_start.counts["dropped"] == {"no frames": 1}
    assert by_start.counts["images_skipped"] == {"not a JPEG, PNG or WebP": 1, "empty file": 1}
    assert open_shards(tmp_path / "a", "contents", "train").names(0) == ["f00.jpg"]
    decoded = index_tars([str(tar)], tmp_path / "b", mapping=mapping, decode=True, **options)
    assert decoded.counts["dropped"] == {"no frames": 2}


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", joined(*(img2dataset_sample(i) for i in range(3))))
    with pytest.raises(UserError, match=r"id occurs twice \(3\).*--content-id json:uid"):
        index_tars([f"{tmp_path}/{{0,1}}.tar"], tmp_path / "set", split="train")
    manifest = index_tars(
        [f"{tmp_path}/{{0,1}}.tar"], tmp_path / "set", split="train", max_dropped=0.5
    )
    assert manifest.counts["dropped"] == {"id occurs twice": 3}
    assert open_shards(tmp_path / "set", "contents", "train").shard_sizes == [3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../0.jpg", r"member '\.\./0\.jpg' is refused: its name climbs up"),
        ("/0.jpg", "its name is absolute"),
    ],
)
def test_tars_that_are_refused(tmp_path: Path, name: str, message: str) -> None:
    tar = write_tar(tmp_path / "x.tar", {name: picture(0)})
    with pytest.raises(UserError, match=rf"x\.tar: .*{message}"):
        index_tars([str(tar)], tmp_path / "set", split="train")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["x.tar"]


def test_tars_joined_end_to_end_are_refused(tars: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.tar"
    first = (tars / "00000.tar").read_bytes()
    both.write_bytes(first + (tars / "00001.tar").read_bytes())
    with pytest.raises(
        UserError, match=f"both.tar: .* byte {len(first)}, after the mark of its end"
    ):
        index_tars([str(both)], tmp_path / "set", split="train")
    # Writers fill up with zeros, some of them by a lot.
    both.write_bytes(first + bytes(3 << 20))
    manifest = index_tars([str(both)], tmp_path / "set", split="train")
    assert manifest.counts["out"]["contents"] == 6


def test_videos_are_sent_elsewhere(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"0.mp4": b"video", "0.txt": b"a", "0.json": b"{}"})
    with pytest.raises(UserError, match=r"holds videos and no frames; .*webdataset_tars\.py"):
        index_tars([str(tar)], tmp_path / "set", split="train")


def test_tars_that_are_not_there(tmp_path: Path, tars: Path) -> None:
    for patterns, message in (
        ((f"{tmp_path}/no-*.tar",), "no such tars"),
        ((f"{tmp_path}/no.tar",), r"no\.tar: no such tar"),
        ((f"{tars}/{{0.tar",), "a brace is not closed"),
        ((f"{tars}/00000.tar", f"{tars}/*.tar"), "more than once"),
        ((), "expected paths"),
    ):
        with pytest.raises(UserError, match=message):
            index_tars(patterns, tmp_path / "set", split="train")
    odd = write_tar(tmp_path / "[a].tar", img2dataset_sample(0))
    assert expand_tars([str(odd)]) == [odd]
    assert [path.name for path in expand_tars([f"{tmp_path}/*/0000[1].tar"])] == ["00001.tar"]


# The folder


def test_splits_are_added_and_replaced(tmp_path: Path) -> None:
    out = tmp_path / "set"
    train = write_tar(tmp_path / "a.tar", joined(*(shop_sample(i, sku=i % 3) for i in range(4))))
    test = write_tar(tmp_path / "b.tar", joined(*(shop_sample(i, sku=i) for i in range(2, 6))))
    index_tars([str(train)], out, split="train", mapping=SHOP)
    first = read_manifest(out)
    before = (out / "products/catalog-000000.tar").read_bytes()
    index_tars([str(test)], out, split="test", mapping=SHOP, max_dropped=0.5)
    manifest = read_manifest(out)
    assert manifest.counts["dropped"] == {"id is in another split": 2}
    assert manifest.counts["in"] == {"samples": 8}
    assert open_shards(out, "contents", "test").content_ids == ["u0-4", "u0-5"]
    assert open_shards(out, "products", "catalog").product_ids == [
        [str(i)] for i in (0, 1, 2, 4, 5)
    ]
    assert (out / "products/catalog-000000.tar").read_bytes() == before
    assert (manifest.details["warm_products"], manifest.details["cold_products"]) == (3, 2)
    assert set(manifest.config["splits"]) == {"train", "test"}
    assert manifest.fingerprint != first.fingerprint
    with pytest.raises(UserError, match="has a split 'test' already; --overwrite"):
        index_tars([str(test)], out, split="test", mapping=SHOP)
    (tmp_path / "new").mkdir()
    again = write_tar(tmp_path / "new/b.tar", shop_sample(9, sku=7))
    index_tars([str(again)], out, split="test", mapping=SHOP, overwrite=True)
    assert open_shards(out, "contents", "test").content_ids == ["u0-9"]
    assert open_shards(out, "products", "catalog").product_ids[-1] == ["7"]
    assert read_manifest(out).details["catalog"] == 4


def test_folders_of_another_kind_are_left_alone(tars: Path, tmp_path: Path) -> None:
    ours = Manifest(kind="shards", config={}, counts={}, fingerprint="1", details={"splits": {}})
    (tmp_path / "ours").mkdir()
    write_manifest(tmp_path / "ours", ours)
    with pytest.raises(UserError, match="shards that data_prep/make_shards"):
        index_tars([f"{tars}/*.tar"], tmp_path / "ours", split="train", overwrite=True)
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        index_tars([f"{tars}/*.tar"], tars, split="train", overwrite=True)
    out = tmp_path / "set"
    index_tars([f"{tars}/00000.tar"], out, split="train")
    shutil.move(tars / "00001.tar", out / "contents" / "x.tar")
    with pytest.raises(UserError, match="holds the input"):
        index_tars([f"{out}/contents/x.tar"], out, split="test")


def test_the_fingerprint_is_of_content_not_of_places(tars: Path, tmp_path: Path) -> None:
    shutil.copytree(tars, tmp_path / "deep" / "er")
    fingerprints = [
        index_tars([f"{folder}/*.tar"], tmp_path / name, split="train", num_workers=n).fingerprint
        for folder, name, n in ((tars, "a", 1), (tmp_path / "deep" / "er", "b/c", 2))
    ]
    assert fingerprints[0] == fingerprints[1]
    write_tar(tars / "00001.tar", img2dataset_sample(3, 1, caption="another"))
    other = index_tars([f"{tars}/*.tar"], tmp_path / "d", split="train")
    assert other.fingerprint != fingerprints[0]


def test_the_whole_tree_can_be_moved_and_a_lost_tar_is_named(tars: Path, tmp_path: Path) -> None:
    index_tars([f"{tars}/*.tar"], tmp_path / "sets" / "one", split="train")
    (tmp_path / "moved").mkdir()
    for name in ("laion", "sets"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    out = tmp_path / "moved" / "sets" / "one"
    assert open_shards(out, "contents", "train").read(0) == {"f00.jpg": picture(0)}
    (tmp_path / "moved/laion/00001.tar").unlink()
    with pytest.raises(UserError, match=r"is the index of .*00001\.tar, which is not there"):
        open_shards(out, "contents", "train")
    write_tar(tmp_path / "moved/laion/00001.tar", img2dataset_sample(0))
    with pytest.raises(UserError, match="its index was made for a tar of"):
        open_shards(out, "contents", "train")


@pytest.fixture
def served_set(shop: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An index of tars behind HTTP, served by the same server."""
    with http_server(tmp_path) as server:
        urls = f"{server.url}/shop/{{00000..00001}}.tar"
        index_tars([urls], tmp_path / "set", split="train", mapping=SHOP)
        yield server.url, tmp_path / "set"


def test_tars_behind_urls(served_set: tuple[str, Path], tmp_path: Path) -> None:
    url, local = served_set
    for folder in (local, f"{url}/set"):
        reader = open_shards(folder, "contents", "train")
        assert [str(path) for path in reader.paths] == [f"{url}/shop/0000{i}.tar" for i in (0, 1)]
        assert reader.read(9) == {"f00.jpg": picture(1), "p0.i0.jpg": picture(101)}
        assert reader.meta(9)["title"] == "a green thing, number 1"
    assert len(open_shards(f"{url}/set", "products", "catalog")) == 5


def test_a_folder_in_a_bucket_leads_back_to_local_tars(tars: Path, tmp_path: Path) -> None:
    out = f"memory://{tmp_path.name}/set"
    index_tars([f"{tars}/00000.tar"], out, split="train")
    index_tars([f"{tars}/00001.tar"], out, split="test")
    assert open_shards(out, "contents", "train").read(0) == {"f00.jpg": picture(0)}
    assert open_shards(out, "contents", "test").content_ids[0] == "000010000"
    assert len(open_shards(out, "products", "catalog")) == 10


# The command


@pytest.fixture
def train(fresh_accelerate: None) -> Callable[[Path, Path, int], None]:
    """Train two steps of tiny towers, in this process: to start another takes longer than to train."""
    program = load_program("train/contrastive.py")

    def run_training(shards: Path, out: Path, batch_size: int) -> None:
        flags = "--encoder.image-size 32 --epochs 1 --num-workers 0 --cpu-threads 1"
        paths = f"--shards {shards} --out {out} --sampler.batch-size {batch_size}"
        program.main(program.parse(["demo", *paths.split(), *flags.split()]))
        assert read_manifest(out).counts["steps"] == 2

    return run_training


def test_training_embedding_and_evaluation_run_on_foreign_tars(
    shop: Path,
    tmp_path: Path,
    train: Callable[[Path, Path, int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, run_folder = tmp_path / "set", tmp_path / "train"
    flags = (
        f"--tars {shop}/00000.tar --out {out} --split train --content-id json:uid "
        "--product-id json:product.sku --product-images p.jpg "
        "--product-title json:product.title"
    )
    monkeypatch.setattr(sys, "argv", ["mmrec", "shards", "index", *flags.split()])
    cli.main()
    assert "8 contents of split train in 1 tars\n  catalog: 5 products" in capsys.readouterr().out
    index_tars([f"{shop}/00001.tar"], out, split="test", mapping=SHOP)
    train(out, run_folder, 4)
    config = EvaluationConfig(
        encoder=run_folder / "encoder", shards=out, out=tmp_path / "report", untrained=False
    )
    cli.evaluate(config=config)
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert (metrics["gallery"], metrics["queries"]) == (5, 8)


def test_images_and_their_captions_train(
    tars: Path, tmp_path: Path, train: Callable[[Path, Path, int], None]
) -> None:
    out = tmp_path / "set"
    index_tars([f"{tars}/*.tar"], out, split="train")
    train(out, tmp_path / "train", 5)
    cli.embed(encoder=tmp_path / "train/encoder", shards=out, out=tmp_path / "embeddings")
    assert read_manifest(tmp_path / "embeddings").counts["out"] == 10
