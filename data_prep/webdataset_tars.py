"""Turn webdataset tars of videos, such as video2dataset's, into tables that point into the tars.

Input: tars of samples `<key>.mp4`, `<key>.txt`, `<key>.json`. Output: a tables folder
(mmrec/data/tables.py) in which a video or picture is a stretch of a tar (`clips.tar#512+48213`: offset and
size in bytes), so that nothing is unpacked: data_prep/make_shards.py reads just those bytes, from a
local tar or by a range request.

    python data_prep/webdataset_tars.py --tars 'clips/{00000..00009}.tar' --out my/tables \
        --product-id json:sku --products my/products.parquet
    python data_prep/make_shards.py --tables my/tables --out my/shards

The products are those of a table that you have (`--products`), or are made of the samples
(`--product-images p.jpg --product-title json:product_title`). Reads headers, texts and JSON alone, about
16,000 members a second of a local tar; a remote one is fetched into the cache for that. Tars of pictures
need none of this: `mmrec shards index` reads them in place.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from mmrec.bars import progress_bar
from mmrec.cli import run_program
from mmrec.data.foreign import (
    TWICE,
    VIDEO_NAMES,
    ForeignMapping,
    ForeignSample,
    expand_tars,
    fetched,
    scan_samples,
)
from mmrec.data.storage import Place, Slice, is_file, media_address, place
from mmrec.data.tables import SPLITS, Tables, read_products, write_tables
from mmrec.errors import MediaError, UserError
from mmrec.manifest import check_output, new_folder, relative_path

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class WebdatasetTarsConfig:
    """Where the tars are, and which of their members and JSON fields are which.

    A place of text is a member's name after the key (txt), a field of a JSON member (json:uid,
    json:meta.uid), or key; a place of pictures or videos is a name or a pattern (p_*.jpg). Of several with
    commas between, the first that holds something counts.
    """

    tars: tuple[str, ...]
    """Paths or URLs, with braces ({00000..00099}) and wildcards."""
    out: Path
    """Folder for the tables."""
    video: str = VIDEO_NAMES
    """Places of the video."""
    title: str | None = None
    """Place of a content's title; left out, txt or json:caption unless the product's title is there."""
    content_id: str = "key"
    """Place of the content's id, which occurs once."""
    product_id: str = "key"
    """Place of the id of the product that the content leads to."""
    products: Path | None = None
    """A products table to link to (Parquet, CSV or JSONL), instead of products made of the samples."""
    product_images: str | None = None
    """Places of the product's pictures."""
    product_title: str | None = None
    """Place of the product's title."""
    split: str | None = None
    """The split of all these contents: train, val or test; left out, make_shards decides by hash."""
    max_dropped: float = 0.05
    """Largest share of samples that may be dropped before this fails."""
    overwrite: bool = False
    """Replace an output folder that is there."""


@dataclass
class Found:
    """What the tars hold."""

    contents: list[Row] = field(default_factory=list)
    products: dict[str, Row] = field(default_factory=dict)
    """By id; the first sample of a product says what it is."""
    links: list[Row] = field(default_factory=list)
    content_ids: set[str] = field(default_factory=set)
    dropped: list[tuple[str, MediaError]] = field(default_factory=list)
    """Key and fault of samples that were left out."""


def main(config: WebdatasetTarsConfig) -> Tables:
    """Write the tables and return them."""
    # Config: what the flags alone can show.
    inputs = [path for path in expand_tars(config.tars) if isinstance(path, Path)]
    check_output(config.out, kind="tables", overwrite=config.overwrite, inputs=inputs)
    if (config.products is None) == (config.product_images is None):
        raise UserError(
            "expected either --products, a table of products, or --product-images, where samples hold "
            "pictures of theirs: a product is found by its pictures"
        )
    if config.split not in (None, *SPLITS):
        raise UserError(f"--split {config.split}: expected train, val or test")

    # Samples to rows.
    given = _read_given(config)
    found = _scan(config, None if given is None else {row["product_id"] for row in given})
    _check_dropped(found, config.max_dropped)

    # Tables.
    reasons = Counter(error.reason for _, error in found.dropped).most_common()
    with new_folder(config.out, kind="tables", overwrite=config.overwrite) as folder:
        tables = write_tables(
            folder,
            products=list(found.products.values()) if given is None else given,
            contents=found.contents,
            links=found.links,
            config=asdict(config),
            counts={
                "in": {"samples": len(found.contents) + len(found.dropped)},
                "out": {"contents": len(found.contents), "links": len(found.links)},
                "dropped": dict(reasons),
            },
        )
    print(f"{config.out}: {len(found.contents):,} contents, {len(tables.products):,} products")
    for reason, count in reasons:
        print(f"  dropped: {reason}: {count:,}")
    return tables


def _read_given(config: WebdatasetTarsConfig) -> list[Row] | None:
    """The rows of the table of products, their media as seen from the new tables' folder."""
    if config.products is None:
        return None
    path = place(config.products)
    if not is_file(path):
        raise UserError(f"--products {path}: no such file; expected a Parquet, CSV or JSONL table")
    rows = read_products(path).to_pylist()
    folder = place(relative_path(config.out, path.parent))
    return [row | {"images": [media_address(folder, i) for i in row["images"]]} for row in rows]


def _scan(config: WebdatasetTarsConfig, known: set[str] | None) -> Found:
    """The rows that the samples of all tars make; `known` are the ids of the table of products."""
    mapping = ForeignMapping(
        title=config.title,
        content_id=config.content_id,
        product_id=config.product_id,
        product_images=config.product_images or "",
        product_title=config.product_title or "",
    ).with_defaults()
    found = Found()
    for tar in progress_bar(expand_tars(config.tars), desc="scan", unit="tar"):
        address = _address(config.out, tar)
        for sample in scan_samples(fetched(tar)):
            try:
                _add_sample(found, sample, address, mapping, config, known)
            except MediaError as error:
                found.dropped.append((sample.key, error))
    return found


def _address(out: Path, tar: Place) -> str:
    """A tar as seen from the tables' folder, under its own name even where that is a link."""
    if not tar.name.endswith(".tar"):
        raise UserError(f"{tar}: expected a name that ends in .tar")
    folder = relative_path(out, tar.parent)
    return f"{folder}/{tar.name}"


def _add_sample(
    found: Found,
    sample: ForeignSample,
    address: str,
    mapping: ForeignMapping,
    config: WebdatasetTarsConfig,
    known: set[str] | None,
) -> None:
    """Add a sample's content, link and product. Raises `MediaError` for one that lacks a part."""
    videos = sample.matching(config.video)
    if not videos:
        raise MediaError("no video", ", ".join(sample.members))
    content_id, product_id = sample.text(mapping.content_id), sample.text(mapping.product_id)
    if content_id is None or product_id is None:
        raise MediaError("no content id" if content_id is None else "no product id")
    if content_id in found.content_ids:
        raise MediaError(TWICE, content_id)
    title = sample.text(mapping.title)
    if known is None:
        if product_id not in found.products:
            found.products[product_id] = _product(sample, address, product_id, mapping)
    elif product_id not in known:
        raise MediaError("product is not in --products", product_id)
    found.content_ids.add(content_id)
    video = str(Slice(address, *sample.members[videos[0]]))
    found.contents.append({"content_id": content_id, "title": title, "video": video})
    link = {"content_id": content_id, "product_id": product_id}
    found.links.append(link | ({"split": config.split} if config.split else {}))


def _product(sample: ForeignSample, address: str, product_id: str, mapping: ForeignMapping) -> Row:
    names = sample.matching(mapping.product_images)
    if not names:
        raise MediaError("no product images", ", ".join(sample.members))
    return {
        "product_id": product_id,
        "title": sample.text(mapping.product_title),
        "images": [str(Slice(address, *sample.members[name])) for name in names],
    }


def _check_dropped(found: Found, max_dropped: float) -> None:
    """Raise `UserError` where too many samples were dropped, or all."""
    dropped, total = found.dropped, len(found.contents) + len(found.dropped)
    if not total:
        raise UserError("the tars hold no samples: no member has a name of the form key.suffix")
    if found.contents and len(dropped) <= max_dropped * total:
        return
    reasons = Counter(error.reason for _, error in dropped).most_common(3)
    told = ", ".join(f"{reason} ({count})" for reason, count in reasons)
    key, error = dropped[0]
    raise UserError(
        f"{len(dropped)} of {total} samples dropped, more than --max-dropped {max_dropped:g} allows: "
        f"{told}; the first is '{key}': {error}"
    )


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(WebdatasetTarsConfig)))
