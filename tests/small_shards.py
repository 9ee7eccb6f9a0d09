"""Small shards made by data_prep/make_shards.py of tables with every case: see `make_small_shards`."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from clips import moving_square, write_clip
from conftest import load_program
from PIL import Image

from mmrec.data.tables import write_tables

NUM_CONTENTS = 14
COPIES = ("c3", "c9", "c12")
"""Contents that show one scene."""


def make_small_shards(folder: Path, **settings: Any) -> Path:
    """Tables of six products and fourteen contents, and shards of them; returns the shards' folder.

    c3, c9 and c12 are near duplicates, c5 has no title, c6 is a photo post, c7 is damaged, c8 has no
    link; p0 has no title, of p4 one image is damaged, and of p15 all. `day` and `level` are columns
    of dates and decimals in the order of contents. With `cold_products=0.3` p3 and p15 are held out.
    """
    (folder / "tables" / "media").mkdir(parents=True)
    products = [_product(folder / "tables", i) for i in (0, 1, 2, 3, 4, 15)]
    contents = [_content(folder / "tables", i) for i in range(NUM_CONTENTS)]
    links = [
        {"content_id": f"c{i}", "product_id": f"p{i % 4}", "weight": 1.0 + i}
        for i in range(NUM_CONTENTS)
        if i != 8
    ]
    links.append({"content_id": "c0", "product_id": "p3", "weight": 0.5})
    write_tables(
        folder / "tables", products=products, contents=contents, links=links, config={}, counts={}
    )
    program = load_program("data_prep/make_shards.py")
    config = {"num_frames": 4, "size": 48, "num_workers": 1, "max_dropped": 0.5} | settings
    config |= {"tables": folder / "tables", "out": folder / "shards"}
    return program.main(program.MakeShardsConfig(**config))


def _product(folder: Path, number: int) -> dict[str, Any]:
    names = [f"media/p{number}-{image}.png" for image in range(2 if number == 4 else 1)]
    for image, name in enumerate(names):
        _background(1000 + 10 * number + image).save(folder / name)
    if number in (4, 15):
        (folder / names[0]).write_bytes(b"noise" * 50)
    title = f"Product <{number}>" if number else None
    return {"product_id": f"p{number}", "title": title, "images": names, "price": 1.5 * number}


def _content(folder: Path, number: int) -> dict[str, Any]:
    row = {"content_id": f"c{number}", "title": f"Content {number}", "video": None, "images": []}
    row["day"] = datetime.date(2024, 1, 1 + number)
    row["level"] = Decimal(number) + Decimal("0.5")
    if number == 5:
        row["title"] = None
    if number == 6:
        row["images"] = [f"media/photo{image}.png" for image in range(2)]
        for image, name in enumerate(row["images"]):
            _background(2000 + image).save(folder / name)
        return row
    row["video"] = f"media/c{number}.mp4"
    seed = 99 if f"c{number}" in COPIES else number
    write_clip(folder / row["video"], _scene(5 + number, seed))
    if number == 7:
        (folder / row["video"]).write_bytes(b"noise" * 50)
    return row


def _scene(num_frames: int, seed: int) -> list[np.ndarray]:
    """A square that crosses a background of its own."""
    background = np.asarray(_background(seed))
    square = np.array((200, 40, 60), dtype=np.uint8)
    frames = moving_square(num_frames, color=(200, 40, 60))
    return [np.where((f == square).all(-1, keepdims=True), f, background) for f in frames]


def _background(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
