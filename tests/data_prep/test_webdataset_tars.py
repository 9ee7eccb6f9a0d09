"""Tars in video2dataset's layout become tables whose videos are stretches of the tars."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import moving_square, write_clip
from conftest import load_program
from servers import http_server

from mmrec.data.media import encode_jpeg
from mmrec.data.shards import open_shards
from mmrec.data.storage import find_slice, read_slice
from mmrec.data.tables import read_tables, write_tables
from mmrec.errors import UserError
from mmrec.manifest import read_manifest

program = load_program("data_prep/webdataset_tars.py")
PICTURE = encode_jpeg(np.full((40, 40, 3), 90, np.uint8), 90)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("clips")
    colors = ((200, 40, 60), (40, 200, 60), (60, 40, 200), (200, 200, 60))
    return [
        write_clip(folder / f"{i}.mp4", moving_square(4, color=color)).read_bytes()
        for i, color in enumerate(colors)
    ]


def write_tar(path: Path, clips: list[bytes], *, shard: int = 0, **fields: Any) -> Path:
    """What video2dataset writes, with a product's id and picture in every sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i, clip in enumerate(clips):
            key = f"{shard:05d}_{i:05d}"
            meta = {"key": key, "caption": f"clip {i}", "sku": i % 2, "name": f"Product {i % 2}"}
            members = {
                "mp4": clip,
                "txt": f"clip {i}".encode(),
                "json": json.dumps(meta | fields).encode(),
                "p.jpg": PICTURE,
            }
            for name, data in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def config(folder: Path, **changes: Any) -> Any:
    defaults = {
        "tars": (f"{folder}/clips/*.tar",),
        "out": folder / "tables",
        "product_id": "json:sku",
        "product_images": "p.jpg",
        "product_title": "json:name",
    }
    return program.WebdatasetTarsConfig(**(defaults | changes))


@pytest.fixture
def folder(tmp_path: Path, clips: list[bytes]) -> Path:
    for shard in range(2):
        write_tar(tmp_path / "clips" / f"{shard:05d}.tar", clips, shard=shard)
    return tmp_path


def test_tables_point_into_the_tars(folder: Path, clips: list[bytes]) -> None:
    # A link keeps its own name: what it leads to may have one that says nothing.
    (folder / "clips/00000.tar").rename(folder / "blob")
    (folder / "clips/00000.tar").symlink_to(folder / "blob")
    program.main(config(folder))
    tables = read_tables(folder / "tables")
    videos = tables.contents["video"].to_pylist()
    assert videos[0] == f"../clips/00000.tar#512+{len(clips[0])}"
    for i, video in enumerate(videos):
        part = find_slice(tables.path_of(video))
        assert part is not None
        assert read_slice(part) == clips[i % 4]
    assert tables.contents["content_id"].to_pylist()[4] == "00001_00000"
    assert tables.contents["title"].to_pylist()[5] == "clip 1"
    assert tables.products.select(["product_id", "title"]).to_pylist() == [
        {"product_id": "0", "title": "Product 0"},
        {"product_id": "1", "title": "Product 1"},
    ]
    image = find_slice(tables.path_of(tables.products["images"][1][0].as_py()))
    assert image is not None
    assert read_slice(image) == PICTURE
    assert tables.links["product_id"].to_pylist() == ["0", "1"] * 4
    assert read_manifest(folder / "tables", "tables").counts == {
        "in": {"samples": 8},
        "out": {"contents": 8, "links": 8},
        "dropped": {},
    }


def test_a_table_of_products(folder: Path) -> None:
    products = [{"product_id": str(i), "images": [f"{i}.jpg"], "price": i} for i in (0, 7)]
    (folder / "shop").mkdir()
    contents = [{"content_id": "c", "video": "c.mp4"}]
    links = [{"content_id": "c", "product_id": "7"}]
    write_tables(
        folder / "shop", products=products, contents=contents, links=links, config={}, counts={}
    )
    given = {"product_images": None, "products": folder / "shop/products.parquet"}
    with pytest.raises(UserError, match=r"4 of 8 samples dropped, .*product is not in --products"):
        program.main(config(folder, **given))
    program.main(config(folder, **given, max_dropped=0.5, split="val"))
    tables = read_tables(folder / "tables")
    assert [row["price"] for row in tables.products.to_pylist()] == [0, 7]
    assert tables.products["images"].to_pylist() == [["../shop/0.jpg"], ["../shop/7.jpg"]]
    assert set(tables.links["product_id"].to_pylist()) == {"0"}
    assert set(tables.links["split"].to_pylist()) == {"val"}


def test_what_is_left_out_is_counted(tmp_path: Path, clips: list[bytes]) -> None:
    write_tar(tmp_path / "clips/0.tar", clips)
    write_tar(tmp_path / "clips/1.tar", clips)
    write_tar(tmp_path / "clips/2.tar", clips[:1], shard=2, sku=None)
    with pytest.raises(UserError, match=r"5 of 9 samples dropped, .*id occurs twice \(4\)"):
        program.main(config(tmp_path))
    assert not (tmp_path / "tables").exists()
    program.main(config(tmp_path, max_dropped=0.6))
    dropped = read_manifest(tmp_path / "tables").counts["dropped"]
    assert dropped == {"id occurs twice": 4, "no product id": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"product_images": None}, "expected either --products"),
        ({"products": Path("p.csv")}, "expected either --products"),
        ({"products": Path("p.csv"), "product_images": None}, r"p\.csv: no such file"),
        ({"split": "all"}, "--split all: expected train, val or test"),
        ({"tars": ("no/*.tar",)}, "no such tars"),
        ({"title": "json:name"}, "gives away every answer"),
    ],
)
def test_flags_that_cannot_work(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        program.main(config(folder, **changes))
    assert not (folder / "tables").exists()


def test_tars_behind_a_url(
    folder: Path, clips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMREC_CACHE", str(folder / "cache"))
    with http_server(folder) as server:
        program.main(config(folder, tars=(f"{server.url}/clips/{{00000..00001}}.tar",)))
        tables = read_tables(folder / "tables")
        address = tables.path_of(tables.contents["video"][5].as_py())
        part = find_slice(address)
        assert address.startswith(f"{server.url}/clips/00001.tar#")
        assert part is not None
        assert read_slice(part) == clips[1]


def test_shards_are_made_of_them(folder: Path) -> None:
    program.main(config(folder))
    make_shards = load_program("data_prep/make_shards.py")
    flags = {"tables": folder / "tables", "out": folder / "shards", "val": 0.0, "test": 0.0}
    make_shards.main(make_shards.MakeShardsConfig(**flags, num_workers=1))
    reader = open_shards(folder / "shards", "contents", "train")
    assert len(reader) == 8
    assert {"f00.jpg", "f03.jpg", "p0.i0.jpg"} <= set(reader.names(0))
