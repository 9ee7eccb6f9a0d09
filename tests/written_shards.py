"""Shards written straight from random pictures: quicker to make than tables and clips, and of any shape."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrec.data.shards import (
    ShardSample,
    frame_name,
    image_name,
    product_image_name,
    shard_path,
    write_shard,
)
from mmrec.manifest import Manifest, fingerprint_of, write_manifest

CATEGORIES = ("mug", "shoe", "lamp")
TINY_VIT: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
"""Towers without batch normalisation, in open_clip's format."""


def write_shards(
    folder: Path,
    *,
    num_contents: int = 24,
    num_val: int = 4,
    num_products: int = 7,
    per_shard: int = 5,
    first_product: int = 0,
    prefix: str = "c",
) -> Path:
    """A folder of shards with splits train and val: contents of up to three frames, linked to one or
    two products of `first_product` and up; every fifth content has no title, every seventh no frames.
    """
    rng = np.random.default_rng(first_product + num_contents)
    pictures = [[_jpeg(rng) for _ in range(1 + p % 2)] for p in range(num_products)]
    entries = [
        {
            "product_id": f"p{first_product + p:02d}",
            "title": f"product {first_product + p}" if p != 3 else None,
            "attributes": {"category": CATEGORIES[p % 3] if p != 5 else None},
            "num_images": len(pictures[p]),
        }
        for p in range(num_products)
    ]
    contents = [
        _content(f"{prefix}{i:02d}", i, entries, pictures, rng)
        for i in range(num_contents + num_val)
    ]
    catalog = [
        ShardSample(
            key=f"{p:06d}",
            members={image_name(i): data for i, data in enumerate(pictures[p])},
            meta=entry,
        )
        for p, entry in enumerate(entries)
    ]
    splits = {
        "train": contents[:num_contents],
        "val": contents[num_contents:],
        "catalog": catalog,
    }
    for split, samples in splits.items():
        for number, start in enumerate(range(0, len(samples), per_shard)):
            write_shard(shard_path(folder, split, number), samples[start : start + per_shard])
    counts = {name: {"contents": len(splits[name])} for name in ("train", "val") if splits[name]}
    write_manifest(
        folder,
        Manifest(
            kind="shards",
            config={"max_products_per_content": 4},
            counts={},
            fingerprint=fingerprint_of({"name": f"{prefix} {num_contents} {first_product}"}),
            details={"catalog": len(catalog), "splits": counts},
        ),
    )
    return folder


def _content(
    name: str,
    number: int,
    entries: list[dict[str, Any]],
    pictures: list[list[bytes]],
    rng: np.random.Generator,
) -> ShardSample:
    linked = sorted({number % len(entries), (number * number) % len(entries)})
    frames = [] if number % 7 == 6 else [_jpeg(rng) for _ in range(1 + number % 3)]
    members = {frame_name(t): data for t, data in enumerate(frames)}
    products = []
    for p, product in enumerate(linked):
        members |= {product_image_name(p, i): data for i, data in enumerate(pictures[product])}
        known = {k: entries[product][k] for k in ("product_id", "title", "num_images")}
        products.append(known | {"weight": 1.0 + p})
    return ShardSample(
        key=f"{number:06d}",
        members=members,
        meta={
            "content_id": name,
            "title": None if number % 5 == 4 and frames else f"content {number}",
            "frame_times": [float(t) for t in range(len(frames))],
            "products": products,
            "attributes": {},
        },
    )


def _jpeg(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((40, 40), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()
