"""Turn tables and media into shards that training reads: decode once, read many times.

Input: a tables folder (mmrec/data/tables.py). Output: a shards folder (mmrec/data/shards.py) with
every product in `products/`, the contents of each split in `contents/`, what was left out in
`dropped.parquet`, and a manifest. The same tables give the same bytes with any number of workers.

    python data_prep/make_shards.py --tables runs/demo/tables --out runs/demo/shards

Takes about 10 s for 1,000 clips of 112 pixels on 2 cores; prints how many samples went where.
"""

import hashlib
import itertools
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from jaxtyping import UInt8
from tqdm import tqdm

from mmrec.cli import run_program
from mmrec.data.media import decode_video, encode_jpeg, read_image, resize_shorter
from mmrec.data.shards import (
    ShardReader,
    ShardSample,
    Split,
    frame_name,
    image_name,
    open_shards,
    product_image_name,
    shard_path,
    write_shard,
)
from mmrec.data.tables import SPLITS, TABLE_NAMES, Tables, read_tables
from mmrec.errors import MediaError, UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    check_output,
    fingerprint_of,
    hash_file,
    new_folder,
    relative_path,
    write_manifest,
)

NO_LINK = "no link"
NO_PRODUCT_LEFT = "no product left"
DROPPED_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "kind", "reason", "detail")])
MOST_LISTED = 1_000  # drops in the manifest; dropped.parquet has them all
SAMPLES_PER_TASK = 16  # half a second of decoding: far above the cost of passing a task around
TASKS_AHEAD = 4  # per worker: enough to keep them busy, few enough to hold in memory

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class MakeShardsConfig:
    """What goes into the shards."""

    tables: Path
    """Folder with the products, contents and links tables."""
    out: Path
    """Folder for the shards."""
    num_frames: int = 8
    """Frames kept of a clip, or images of a photo post; a shorter clip gives all it has."""
    size: int = 256
    """Shorter side of frames and product images, in pixels; smaller ones are not enlarged."""
    max_images_per_product: int = 4
    """Images kept of a product: the first ones that can be read."""
    max_products_per_content: int = 4
    """Linked products whose images a content carries: those of the largest weights."""
    samples_per_shard: int = 1_000
    """Samples in one tar; the last of a split may hold fewer."""
    val: float = 0.1
    """Share of contents for validation, by hash of their ids, where links have no split column."""
    test: float = 0.1
    """Share of contents for the test, likewise."""
    jpeg_quality: int = 90
    """Quality of stored JPEGs, from 1 to 100."""
    num_workers: int = 0
    """Processes that decode; 0 takes one per core."""
    max_dropped: float = 0.05
    """Largest share of products, or of linked contents, that may be dropped before this fails."""
    overwrite: bool = False
    """Replace an output folder that is there."""


@dataclass(frozen=True)
class Drop:
    """Something left out, and why."""

    id: str
    kind: str
    """product, content, or image: one picture of a product or content that stays."""
    reason: str
    """A short phrase, so that equal faults add up."""
    detail: str


@dataclass(frozen=True)
class Pictures:
    """What a worker made of one sample's media."""

    jpegs: list[bytes]
    times: list[float] = field(default_factory=list)
    """Seconds into the clip, one per JPEG; empty for still images."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """Reason and detail of what could not be read; without a JPEG the sample is lost."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """Where one sample's media lie: a clip, or still images."""

    video: str | None
    images: list[str]
    most: int
    """Frames or images to keep."""


Link = tuple[str, float]
"""A product's id and the link's weight."""
Sample = tuple[Mapping[str, bytes], Mapping[str, Any]]
"""JPEG bytes by member name, and what goes into the JSON member."""


def main(config: MakeShardsConfig) -> Path:
    """Make the shards; returns their folder."""
    # Config and plan: every mistake that the tables can show is found before anything is decoded.
    _check_config(config)
    check_output(config.out, kind="shards", overwrite=config.overwrite, inputs=[config.tables])
    tables = read_tables(config.tables)
    links = _links_by_content(tables)
    splits = _assign_splits(config, tables, links)
    drops: list[Drop] = [
        Drop(content_id, "content", NO_LINK, "")
        for content_id in tables.contents["content_id"].to_pylist()
        if content_id not in links
    ]

    num_samples = len(tables.products) + len(links)
    with (
        new_folder(config.out, kind="shards", overwrite=config.overwrite) as folder,
        _Decoder(config, num_samples) as decoder,
    ):
        # Products first: a content without a product that can be shown teaches nothing.
        products = tables.products.to_pylist()
        pictures = decoder.decode(
            [_product_media(config, tables, row) for row in products], "products"
        )
        samples = _product_samples(products, pictures, drops)
        _write_split(folder, "catalog", samples, config.samples_per_shard)
        _check_dropped(config, "product", drops, len(products))
        catalog = open_shards(folder, "products", "catalog")
        links = _drop_dead_links(links, catalog, drops)

        # Contents, a split at a time, in the order of the table.
        rows = [row for row in tables.contents.to_pylist() if row["content_id"] in links]
        num_linked = len(splits)
        titles = {row["product_id"]: row["title"] for row in products}
        inline = _InlineProducts(catalog, titles, config.max_products_per_content)
        for split in sorted(set(splits.values()), key=SPLITS.index):
            chosen = [row for row in rows if splits[row["content_id"]] == split]
            pictures = decoder.decode(
                [_content_media(config, tables, row) for row in chosen], split
            )
            samples = _content_samples(chosen, pictures, links, inline, drops)
            num_shards = _write_split(folder, split, samples, config.samples_per_shard)
            _check_dropped(config, "content", drops, num_linked)
            if not num_shards:
                raise UserError(
                    f"split '{split}' is empty: all of its "
                    f"{list(splits.values()).count(split)} contents were dropped"
                )

        # Publish: what was left out, and the manifest.
        table = pa.Table.from_pylist([asdict(drop) for drop in drops], DROPPED_SCHEMA)
        pq.write_table(table, folder / "dropped.parquet")
        manifest = _describe(config, tables, folder, drops)
        write_manifest(folder, manifest)
    _print_summary(config, manifest)
    return config.out


# Config


def _check_config(config: MakeShardsConfig) -> None:
    checks = [
        (1 <= config.num_frames <= 100, "--num-frames", "from 1 to 100"),
        (config.size >= 16, "--size", "16 or more"),
        (config.max_images_per_product >= 1, "--max-images-per-product", "1 or more"),
        (config.max_products_per_content >= 1, "--max-products-per-content", "1 or more"),
        (config.samples_per_shard >= 1, "--samples-per-shard", "1 or more"),
        (1 <= config.jpeg_quality <= 100, "--jpeg-quality", "from 1 to 100"),
        (config.num_workers >= 0, "--num-workers", "0 or more"),
        (0 <= config.max_dropped <= 1, "--max-dropped", "from 0 to 1"),
        (config.val >= 0 and config.test >= 0, "--val and --test", "0 or more"),
        (config.val + config.test < 1, "--val and --test", "a sum below 1"),
    ]
    for holds, flag, expected in checks:
        if not holds:
            raise UserError(f"{flag}: expected {expected}")


# Plan


def _links_by_content(tables: Tables) -> dict[str, list[Link]]:
    """The products of every linked content with their weights, largest first."""
    links: dict[str, list[Link]] = {}
    for row in tables.links.select(["content_id", "product_id", "weight"]).to_pylist():
        links.setdefault(row["content_id"], []).append((row["product_id"], row["weight"]))
    # The sort is stable, so links of equal weight keep the order of the table.
    return {content: sorted(found, key=lambda link: -link[1]) for content, found in links.items()}


def _assign_splits(
    config: MakeShardsConfig, tables: Tables, linked: Iterable[str]
) -> dict[str, Split]:
    """The split of every linked content. Raises `UserError` for an expected split that is empty."""
    if "split" in tables.links.column_names:
        pairs = zip(
            tables.links["content_id"].to_pylist(), tables.links["split"].to_pylist(), strict=True
        )
        splits: dict[str, Split] = dict(pairs)
        wanted = {"train"}
        source = "the links table's split column"
    else:
        splits = {content: _split_of(content, config.val, config.test) for content in linked}
        wanted = {"train"} | {s for s in ("val", "test") if getattr(config, s) > 0}
        source = f"--val {config.val} and --test {config.test}"
    for split in sorted(wanted - set(splits.values())):
        raise UserError(
            f"split '{split}' is empty: {source} put none of {len(splits)} contents in it; "
            f"--{split} 0 goes without it, and a split column in links decides by hand"
            if split != "train"
            else f"split 'train' is empty: {source} put none of {len(splits)} contents in it"
        )
    return splits


def _split_of(content_id: str, val: float, test: float) -> Split:
    """A split by hash, so that a content keeps its split when the tables grow."""
    digest = hashlib.sha256(content_id.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "val" if place < test + val else "train"


# Samples


def _product_media(config: MakeShardsConfig, tables: Tables, row: Mapping[str, Any]) -> Media:
    images = [tables.path_of(image) for image in row["images"]]
    return Media(video=None, images=images, most=config.max_images_per_product)


def _content_media(config: MakeShardsConfig, tables: Tables, row: Mapping[str, Any]) -> Media:
    """A content with a video is a clip, whatever images it has beside it (a cover, say)."""
    if row["video"]:
        return Media(video=tables.path_of(row["video"]), images=[], most=config.num_frames)
    images = [tables.path_of(image) for image in row["images"]]
    return Media(video=None, images=images, most=config.num_frames)


def _product_samples(
    rows: Sequence[Mapping[str, Any]], decoded: Iterable[Pictures], drops: list[Drop]
) -> Iterator[Sample]:
    known = ("product_id", "title", "images")
    for row, pictures in _surviving("product", rows, decoded, drops):
        meta = {
            "product_id": row["product_id"],
            "title": row["title"],
            "attributes": _attributes(row, known),
            "num_images": len(pictures.jpegs),
        }
        yield {image_name(i): jpeg for i, jpeg in enumerate(pictures.jpegs)}, meta


def _content_samples(
    rows: Sequence[Mapping[str, Any]],
    decoded: Iterable[Pictures],
    links: Mapping[str, list[Link]],
    inline: "_InlineProducts",
    drops: list[Drop],
) -> Iterator[Sample]:
    known = ("content_id", "title", "video", "images")
    for row, pictures in _surviving("content", rows, decoded, drops):
        members, products = inline.read(links[row["content_id"]])
        meta = {
            "content_id": row["content_id"],
            "title": row["title"],
            "frame_times": [round(time, 3) for time in pictures.times],
            "products": products,
            "attributes": _attributes(row, known),
        }
        frames = {frame_name(t): jpeg for t, jpeg in enumerate(pictures.jpegs)}
        yield frames | members, meta


def _surviving(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    decoded: Iterable[Pictures],
    drops: list[Drop],
) -> Iterator[tuple[Mapping[str, Any], Pictures]]:
    """Rows that have at least one picture; the others, and lost pictures, are added to `drops`."""
    for row, pictures in zip(rows, decoded, strict=True):
        sample_id = row[f"{kind}_id"]
        if pictures.jpegs:
            drops.extend(Drop(sample_id, "image", *fault) for fault in pictures.faults)
            yield row, pictures
        else:
            drops.append(Drop(sample_id, kind, *pictures.faults[0]))


def _attributes(row: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    return {name: _plain(value) for name, value in row.items() if name not in known}


def _plain(value: Any) -> Any:
    """A table's value as JSON can hold it: dates and decimals as text, NaN as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return str(value)


def _drop_dead_links(
    links: Mapping[str, list[Link]], catalog: ShardReader, drops: list[Drop]
) -> dict[str, list[Link]]:
    """Leave only links to products of the catalog, and contents that keep one."""
    alive = {ids[0] for ids in catalog.product_ids}
    kept: dict[str, list[Link]] = {}
    for content_id, found in links.items():
        left = [link for link in found if link[0] in alive]
        if left:
            kept[content_id] = left
        else:
            lost = ", ".join(product_id for product_id, _ in found)
            drops.append(Drop(content_id, "content", NO_PRODUCT_LEFT, lost))
    return kept


class _InlineProducts:
    """Copies products from the catalog into contents: the same JPEG bytes, never encoded twice."""

    def __init__(
        self, catalog: ShardReader, titles: Mapping[str, str | None], max_products: int
    ) -> None:
        self._catalog = catalog
        self._rows = {ids[0]: row for row, ids in enumerate(catalog.product_ids)}
        self._titles = titles
        self._max_products = max_products

    def read(self, links: Sequence[Link]) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        """The members and the `products` entry of a content with these links.

        All links are named, so that none is taken for a wrong answer; `num_images` counts what is
        inline, and is 0 beyond the first `max_products`.
        """
        members: dict[str, bytes] = {}
        products = []
        for p, (product_id, weight) in enumerate(links):
            images = self._images(product_id) if p < self._max_products else []
            members |= {product_image_name(p, i): jpeg for i, jpeg in enumerate(images)}
            products.append(
                {
                    "product_id": product_id,
                    "title": self._titles[product_id],
                    "weight": weight,
                    "num_images": len(images),
                }
            )
        return members, products

    def _images(self, product_id: str) -> list[bytes]:
        row = self._rows[product_id]
        names = {name for name in self._catalog.names(row) if name.startswith("i")}
        found = self._catalog.read(row, [image_name(i) for i in range(len(names))])
        return list(found.values())


# Decoding


class _Decoder:
    """Decodes and encodes media in worker processes, and gives results in order."""

    def __init__(self, config: MakeShardsConfig, num_samples: int) -> None:
        self._config = config
        num_tasks = math.ceil(num_samples / SAMPLES_PER_TASK)
        self._num_workers = min(config.num_workers or os.cpu_count() or 1, num_tasks)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Decoder":
        if self._num_workers > 1:
            # Not fork: the parent has threads of pyarrow by now.
            self._pool = ProcessPoolExecutor(self._num_workers, get_context("spawn"))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def decode(self, media: Sequence[Media], what: str) -> Iterator[Pictures]:
        """Pictures of every sample, in order, behind a progress bar."""
        starts = range(0, len(media), SAMPLES_PER_TASK)
        tasks = [(self._config, media[i : i + SAMPLES_PER_TASK]) for i in starts]
        with tqdm(total=len(media), desc=what, unit="sample", disable=None) as progress:
            for results in self._map(_decode_task, tasks):
                progress.update(len(results))
                yield from results

    def _map(self, function: Callable[[Item], Result], tasks: Sequence[Item]) -> Iterator[Result]:
        """Like Executor.map, which would start every task and hold all results of a slow reader."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        ahead: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                ahead.append(self._pool.submit(function, task))
                if len(ahead) >= TASKS_AHEAD * self._num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a decoding process died, out of memory or on a damaged file; "
                "--num-workers 1 shows which one"
            ) from None


def _decode_task(task: tuple[MakeShardsConfig, Sequence[Media]]) -> list[Pictures]:
    config, samples = task
    return [
        _decode_images(config, media) if media.video is None else _decode_clip(config, media)
        for media in samples
    ]


def _decode_clip(config: MakeShardsConfig, media: Media) -> Pictures:
    assert media.video is not None
    try:
        frames, times = decode_video(media.video, num_frames=media.most)
    except MediaError as error:
        return Pictures([], faults=[(error.reason, error.detail or media.video)])
    return Pictures([_encode(config, frame) for frame in frames], times)


def _decode_images(config: MakeShardsConfig, media: Media) -> Pictures:
    pictures = Pictures([])
    for path in media.images:
        if len(pictures.jpegs) == media.most:
            break
        try:
            pictures.jpegs.append(_encode(config, read_image(path)))
        except MediaError as error:
            pictures.faults.append((error.reason, error.detail or path))
    return pictures


def _encode(config: MakeShardsConfig, image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    return encode_jpeg(resize_shorter(image, config.size), config.jpeg_quality)


# Writing


def _write_split(folder: Path, split: Split, samples: Iterator[Sample], per_shard: int) -> int:
    """Write samples into full shards, the last one excepted; returns the number of shards.

    Shards are filled with what survived, so their bytes depend on neither workers nor tasks.
    """
    keyed = (
        ShardSample(f"{number:09d}", members, meta)
        for number, (members, meta) in enumerate(samples)
    )
    num_shards = 0
    while first := next(keyed, None):
        shard = itertools.chain([first], itertools.islice(keyed, per_shard - 1))
        write_shard(shard_path(folder, split, num_shards), shard)
        num_shards += 1
    return num_shards


def _check_dropped(config: MakeShardsConfig, kind: str, drops: Sequence[Drop], total: int) -> None:
    """Raise `UserError` where too many products, or linked contents, were dropped so far."""
    lost = [drop for drop in drops if drop.kind == kind and drop.reason != NO_LINK]
    if len(lost) <= config.max_dropped * total:
        return
    reasons = ", ".join(f"{reason} ({n})" for reason, n in _by_reason(lost)[:3])
    raise UserError(
        f"{config.tables}: {len(lost)} of {total} {kind}s dropped, more than --max-dropped "
        f"{config.max_dropped:g} allows: {reasons}; the first is {kind} '{lost[0].id}': "
        f"{lost[0].reason}: {lost[0].detail}"
    )


def _by_reason(drops: Iterable[Drop]) -> list[tuple[str, int]]:
    """Reasons with their counts, the commonest first."""
    return Counter(drop.reason for drop in drops).most_common()


def _describe(
    config: MakeShardsConfig, tables: Tables, folder: Path, drops: Sequence[Drop]
) -> Manifest:
    tars = sorted(folder.glob("*/*.tar"))
    splits: dict[str, ShardReader] = {
        split: open_shards(folder, "contents", split)
        for split in SPLITS
        if shard_path(folder, split, 0).exists()
    }
    catalog_size = len(open_shards(folder, "products", "catalog"))
    num_warm = len({p for ids in splits["train"].product_ids for p in ids})
    samples = [drop for drop in drops if drop.kind != "image"]
    return Manifest(
        kind="shards",
        config=asdict(config),
        counts={
            "in": {name: len(getattr(tables, name)) for name in TABLE_NAMES},
            "out": {
                "products": catalog_size,
                "contents": sum(len(reader) for reader in splits.values()),
                "links": sum(_num_links(reader) for reader in splits.values()),
            },
            # A content without a link is no fault, and is not held against --max-dropped.
            "dropped": dict(_by_reason(samples)),
            "images_skipped": dict(_by_reason(drop for drop in drops if drop.kind == "image")),
        },
        fingerprint=fingerprint_of({f"{t.parent.name}/{t.name}": hash_file(t) for t in tars}),
        parents=[
            Parent(
                kind="tables",
                fingerprint=tables.fingerprint,
                path=relative_path(config.out, config.tables),
            )
        ],
        details={
            "splits": {split: _describe_split(reader) for split, reader in splits.items()},
            "catalog": catalog_size,
            "warm_products": num_warm,
            "cold_products": catalog_size - num_warm,
            "dropped": [asdict(drop) for drop in drops[:MOST_LISTED]],
        },
    )


def _describe_split(reader: ShardReader) -> dict[str, int]:
    return {
        "contents": len(reader),
        "links": _num_links(reader),
        "products": len({p for ids in reader.product_ids for p in ids}),
        "shards": len(reader.shard_sizes),
    }


def _num_links(reader: ShardReader) -> int:
    return sum(len(ids) for ids in reader.product_ids)


def _print_summary(config: MakeShardsConfig, manifest: Manifest) -> None:
    details, counts = manifest.details, manifest.counts
    print(f"{config.out}:")
    for split, found in details["splits"].items():
        print(f"  {split:<8}{found['contents']:>9,} contents, {found['links']:,} links")
    warm, cold = details["warm_products"], details["cold_products"]
    print(f"  {'catalog':<8}{details['catalog']:>9,} products: {warm:,} warm, {cold:,} cold")
    for what, reasons in (("dropped", "dropped"), ("images skipped", "images_skipped")):
        listed = ", ".join(f"{reason} {n:,}" for reason, n in counts[reasons].items())
        if listed:
            print(f"  {what}: {listed} (listed in {config.out / 'dropped.parquet'})")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(MakeShardsConfig)))
