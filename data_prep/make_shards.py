"""Turn tables and media into shards that training reads: decode once, read many times.

Input: a tables folder (mmrec/data/tables.py). Output: a shards folder (mmrec/data/shards.py) with
every product in `products/`, the contents of each split in `contents/`, facts about every sample in
`samples.parquet`, what was left out in `dropped.parquet`, and a manifest. Either may be a URL. The same
tables give the same bytes with any number of workers, on one machine or on Ray.

    python data_prep/make_shards.py --tables runs/demo/tables --out runs/demo/shards

Work in progress lies beside the output, in `.NAME.unfinished` (for a URL in `NAME.unfinished`): the same
command run again after any kind of end goes on from there, and where all is done it says so. Takes about
10 s for 1,000 clips of 112 pixels on 2 cores; prints how many samples went where.
"""

import fcntl
import hashlib
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

import mmrec
from mmrec.bars import progress_bar
from mmrec.cli import run_program
from mmrec.data.duplicates import group_duplicates
from mmrec.data.engines import Engine, EngineName, open_engine
from mmrec.data.media import FrameConfig, FramePolicy
from mmrec.data.preparation import (
    DecodeConfig,
    DecodeTask,
    Media,
    Packed,
    PackTask,
    Stored,
    read_part,
)
from mmrec.data.shards import frame_name, image_name, product_image_name, shard_path
from mmrec.data.splits import (
    SPLITS,
    Split,
    SplitConfig,
    assign_splits,
    check_filled,
    check_splits,
    cold_products,
    held_out_from,
    make_claims,
    straddling,
)
from mmrec.data.storage import (
    Place,
    check_writable,
    is_file,
    is_remote,
    list_files,
    place,
    read_bytes,
    write_bytes_whole,
)
from mmrec.data.tables import TABLE_NAMES, Tables, read_tables
from mmrec.errors import UserError
from mmrec.manifest import (
    FILE_NAME,
    Manifest,
    Parent,
    check_output,
    fingerprint_of,
    read_manifest,
    refuse_other_settings,
    relative_path,
    write_manifest,
)

NO_LINK = "no link"
NO_PRODUCT_LEFT = "no product left"
LOOKS_LIKE_LATER = "near duplicate of a later split"
NO_FAULT = (NO_LINK, LOOKS_LIKE_LATER)  # left out by design: not held against --max-dropped
DROPPED_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "kind", "reason", "detail")),
        ("num_links", pa.int64()),  # lost with it; of a product, those of contents that stay
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # content or product
        ("id", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),  # in its split, over all shards
        ("width", pa.int32()),  # of the original
        ("height", pa.int32()),
        ("duration", pa.float64()),  # seconds; 0 for still images
        ("num_frames", pa.int64()),  # in the original
        ("num_pictures", pa.int32()),  # kept
        ("num_bytes", pa.int64()),  # of its own pictures
        ("has_title", pa.bool_()),
        ("num_links", pa.int32()),  # of a content; of a product, those that train
        ("group", pa.string()),  # of near duplicates: the id of its first content, null if alone
        ("cold", pa.bool_()),  # a product held out of training, or a content of one
    ]
)
MOST_LISTED = 1_000  # drops in the manifest; dropped.parquet has them all
SAMPLES_PER_PART = 64  # seconds of decoding: far above the cost of a task, and little to do again
PARTS_OF_A_TABLE = (
    256  # of fewer samples, if there are few, so that no core waits long for the last
)
SUBTITLES = "subtitles"  # a text column that is read from the media


@dataclass(frozen=True, kw_only=True)
class MakeShardsConfig(SplitConfig):
    """What goes into the shards."""

    tables: Path
    """Folder with the products, contents and links tables."""
    out: Path
    """Folder for the shards."""
    num_frames: int = 8
    """Most frames kept of a clip, or images of a photo post; a shorter clip gives all it has."""
    frame_policy: FramePolicy = "uniform"
    """Which frames: spread over the clip, keyframes alone (fast), or frames that differ (scenes)."""
    frames_per_second: float | None = None
    """Keep frames by rate instead of number, but never more than --num-frames."""
    size: int = 256
    """Shorter side of frames and product images, in pixels; smaller ones are not enlarged."""
    max_images_per_product: int = 4
    """Images kept of a product: the first ones that can be read."""
    max_products_per_content: int = 4
    """Linked products whose images a content carries: those of the largest weights."""
    text_columns: tuple[str, ...] = ("title",)
    """Columns of contents that make up a content's text, in order; `subtitles` stands for captions
    beside a clip (clip.srt, clip.vtt) or inside it."""
    samples_per_shard: int = 1_000
    """Samples in one tar; the last of a split may hold fewer."""
    jpeg_quality: int = 90
    """Quality of stored JPEGs, from 1 to 100."""
    timeout_s: float = 120.0
    """Longest time for decoding one sample; a decoder that takes longer is ended, the sample dropped."""
    memory_gb: float = 4.0
    """Most memory of the process that decodes, for one sample, in GiB, likewise. Each worker has one such
    process, and beside what it takes itself the worker holds no more than the JPEGs of one sample."""
    engine: EngineName = "local"
    """This machine, or a Ray cluster that reaches the same tables and output."""
    address: str | None = None
    """Address of the Ray cluster; None takes the one Ray finds, or starts one here."""
    num_workers: int = 0
    """Processes that decode; 0 takes one per core."""
    max_dropped: float = 0.05
    """Largest share of products, or of linked contents, that may be dropped before this fails."""
    restart: bool = False
    """Throw away the unfinished work of an earlier command."""
    overwrite: bool = False
    """Replace an output folder that is there."""


# What may change between an interrupted command and the one that goes on with its work.
_FREE_ON_RESUME = (
    *("tables", "out", "engine", "address", "num_workers"),
    *("max_dropped", "restart", "overwrite"),
)


@dataclass(frozen=True)
class Drop:
    """Something left out, and why."""

    id: str
    kind: str
    """product, content, or image: one picture of a product or content that stays."""
    reason: str
    """A short phrase, so that equal faults add up."""
    detail: str
    num_links: int = 0
    """Links lost with it; of a product, those of contents that stay."""


Link = tuple[str, float]
"""A product's id and the link's weight."""
Row = dict[str, Any]
"""A row of a table."""


def main(config: MakeShardsConfig) -> Path:
    """Make the shards; returns their folder."""
    # Config: every mistake that the tables can show is found before anything is decoded.
    _check_config(config)
    tables = read_tables(place(config.tables))
    links = _links_by_content(tables)
    has_column = "split" in tables.links.column_names
    check_splits(config, has_column=has_column, columns=_further_columns(tables))
    _check_text_columns(config, tables)
    _check_filled_before(config, tables, links)

    with _unfinished(config, tables) as (work, manifest):
        if manifest is None:
            manifest = _make(config, tables, links, work)
        else:
            print(f"{work.out}: made before, of the same tables; --overwrite makes it anew")
    _print_summary(config, manifest)
    return config.out


def _make(
    config: MakeShardsConfig, tables: Tables, links: Mapping[str, list[Link]], work: "_Work"
) -> Manifest:
    with open_engine(
        config.engine, num_workers=config.num_workers, address=config.address
    ) as engine:
        # Decode: parts in any order, on any machine.
        parts = _decode_tasks(config, tables, links, work)
        _decode(config, engine, parts, len(tables.products), len(links))
        products = _Survey("product", parts["product"])
        contents = _Survey("content", parts["content"])

        # Plan: who stays, and in which split.
        plan = _plan(config, tables, links, products, contents)

        # Pack and publish.
        work.clear_output()
        hashes = _pack(config, engine, plan, work)
        facts = _write_facts(config, work.folder, plan)
        manifest = _describe(config, tables, plan, hashes, facts)
        work.publish(manifest)
    return manifest


# Config


def _check_config(config: MakeShardsConfig) -> None:
    rate = config.frames_per_second
    checks = [
        (1 <= config.num_frames <= 100, "--num-frames", "from 1 to 100"),
        (rate is None or 0 < rate <= 1000, "--frames-per-second", "above 0"),
        (config.size >= 16, "--size", "16 or more"),
        (config.max_images_per_product >= 1, "--max-images-per-product", "1 or more"),
        (config.max_products_per_content >= 1, "--max-products-per-content", "1 or more"),
        (config.samples_per_shard >= 1, "--samples-per-shard", "1 or more"),
        (1 <= config.jpeg_quality <= 100, "--jpeg-quality", "from 1 to 100"),
        (config.timeout_s > 0, "--timeout-s", "above 0"),
        (config.memory_gb >= 0.1, "--memory-gb", "0.1 or more"),
        (config.num_workers >= 0, "--num-workers", "0 or more"),
        (0 <= config.max_dropped <= 1, "--max-dropped", "from 0 to 1"),
    ]
    for holds, flag, expected in checks:
        if not holds:
            raise UserError(f"{flag}: expected {expected}")


def _further_columns(tables: Tables) -> list[str]:
    known = ("content_id", "title", "video", "images")
    return [name for name in tables.contents.column_names if name not in known]


def _check_text_columns(config: MakeShardsConfig, tables: Tables) -> None:
    known = ["title", SUBTITLES, *_further_columns(tables)]
    for name in config.text_columns:
        if name not in known:
            raise UserError(
                f"--text-columns {name}: contents have no such column; expected some of "
                f"{', '.join(dict.fromkeys(known))}"
            )


def _check_filled_before(
    config: MakeShardsConfig, tables: Tables, links: Mapping[str, list[Link]]
) -> None:
    """Raise `UserError` for a split that stays empty even if nothing is dropped or moved."""
    given = _given_splits(tables)
    if given is not None:
        check_filled(given, config, has_column=True)
        return
    rows = _linked(tables, links)
    ids = rows["content_id"].to_pylist()
    cold = cold_products(config, tables.products["product_id"].to_pylist())
    found = assign_splits(
        config,
        ids,
        groups=range(len(ids)),
        barred=[any(product in cold for product, _ in links[c]) for c in ids],
        values=rows[config.split_by].to_pylist() if config.split_by else None,
    )
    check_filled(dict(zip(ids, found, strict=True)), config, has_column=False)


# Unfinished work


class _Work:
    """The folder of unfinished work. What lies in it, in the order in which it comes to be:

    plan.json       the settings that the work is of
    parts/          what was decoded
    output.json     (of an output at a URL) that it is this work's to write, and whether it is empty
    packed/         a record of each shard that is whole, with its hash: no other shard is trusted
    shards/         (of a local output) the shards, until they get their place
    published.json  the fingerprint of what is given its place now
    """

    def __init__(self, config: MakeShardsConfig, tables: Tables) -> None:
        self.out = place(config.out)
        self._config = config
        settings = {name: v for name, v in asdict(config).items() if name not in _FREE_ON_RESUME}
        settings |= {"tables": tables.fingerprint, "mmrec": mmrec.__version__}
        self._settings: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        if is_remote(self.out):
            # Stores of objects cannot rename a folder: shards go where they will stay, and the manifest,
            # without which nobody reads them, comes last.
            self.root: Place = place(f"{self.out}.unfinished")
            self.folder: Place = self.out
        else:
            self.root = self.out.with_name(f".{self.out.name}.unfinished")
            self.folder = self.root / "shards"

    def find_made(self) -> Manifest | None:
        """The manifest of the output where it is what this command makes: all was done but tidying up."""
        if not isinstance(self.out, Path):
            check_writable(self.out)
        try:
            manifest = read_manifest(self.out, "shards")
        except UserError:
            return None
        parent = manifest.parent("tables")
        settings = {n: v for n, v in manifest.config.items() if n not in _FREE_ON_RESUME}
        settings |= {"tables": parent and parent.fingerprint, "mmrec": manifest.mmrec_version}
        if settings != self._settings or not self._is_whole(manifest):
            return None
        published = self._read("published.json")
        is_mine = published is not None and published["fingerprint"] == manifest.fingerprint
        if self._config.overwrite and (self._config.restart or not is_mine):
            return None
        return manifest

    def _is_whole(self, manifest: Manifest) -> bool:
        tars = {
            f"{family}/{path.name}"
            for family in ("products", "contents")
            for path in list_files(self.out / family, "*.tar")
        }
        return set(manifest.details.get("files", ())) <= tars

    def check_output(self) -> None:
        """Raise `UserError` for an output that must not be written, unless this work has begun to."""
        if not self._owns_output():
            config = self._config
            check_output(
                self.out, kind="shards", overwrite=config.overwrite, inputs=[place(config.tables)]
            )

    def _owns_output(self) -> bool:
        """Whether this work has begun to write at a URL, where nobody has published since."""
        return self._read("output.json") is not None and not is_file(self.out / FILE_NAME)

    def start(self) -> None:
        """Begin, or go on where the same settings left off. Raises `UserError` for other settings."""
        earlier = self._read("plan.json")
        if earlier is None or self._config.restart:
            self._start_anew()
            return
        refuse_other_settings(self.root, earlier, self._settings)

    def _start_anew(self) -> None:
        # The plan goes first: whatever lies here without one is thrown away at the next start.
        for name in ("plan.json", "published.json", "packed", "parts", "shards"):
            _remove(self.root / name)
        if self._read("output.json") is not None:
            self._write("output.json", {"is_empty": False})
        self._write("plan.json", self._settings)

    def clear_output(self) -> None:
        """Remove what is at a URL, so that every shard found there afterwards is of this work.

        That it is under way is on record before anything goes, so that the next command goes on with it.
        """
        if not is_remote(self.out):
            return
        record = self._read("output.json")
        if self._owns_output() and record is not None and record["is_empty"]:
            return
        self.check_output()  # once more: decoding may have taken the night
        self._write("output.json", {"is_empty": False})
        _remove(self.root / "packed")
        # The manifest first: without it nobody takes half of the old shards for shards.
        _remove(self.out / FILE_NAME)
        _remove(self.out)
        self._write("output.json", {"is_empty": True})

    def receipt(self, name: str) -> Place:
        """The record of a shard, by its path in the folder of shards."""
        return self.root / "packed" / f"{name}.json"

    def publish(self, manifest: Manifest) -> None:
        """Give the shards their final place, and remove the rest."""
        self._write("published.json", {"fingerprint": manifest.fingerprint})
        if isinstance(self.folder, Path):
            # What a process that was killed was writing.
            for leftover in self.folder.rglob(".*.tmp-*"):
                leftover.unlink()
        write_manifest(self.folder, manifest)
        if isinstance(self.folder, Path) and isinstance(self.out, Path):
            _remove(self._old(self.out))
            if self.out.exists():
                self.out.rename(self._old(self.out))
            self.folder.rename(self.out)
        self.remove()

    def tidy(self) -> None:
        """Remove what a command that was killed after publishing left, but no other command's work."""
        if self._read("plan.json") in (None, self._settings):
            self.remove()

    def remove(self) -> None:
        """Remove all unfinished work, and the output that was replaced."""
        if isinstance(self.out, Path):
            _remove(self._old(self.out))
        # The record of what was published last, since it tells the next command that no more is to do.
        for name in ("plan.json", "packed", "parts", "shards", "output.json", "published.json"):
            _remove(self.root / name)
        _remove(self.root)

    @staticmethod
    def _old(out: Path) -> Path:
        return out.with_name(f".{out.name}.old")

    def _read(self, name: str) -> dict[str, Any] | None:
        with suppress(FileNotFoundError, NotADirectoryError):
            return json.loads(read_bytes(self.root / name))
        return None

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        write_bytes_whole(self.root / name, json.dumps(record, indent=2).encode())


def _remove(path: Place) -> None:
    """Remove a file or folder, if it is there."""
    if not isinstance(path, Path):
        if path.fs.exists(path.path):
            path.fs.rm(path.path, recursive=True)
    elif path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _unfinished(
    config: MakeShardsConfig, tables: Tables
) -> Iterator[tuple[_Work, Manifest | None]]:
    """The folder of unfinished work, held by this process alone; it stays when the block fails.

    With the manifest of the output where nothing is left to do.
    """
    work = _Work(config, tables)
    made = work.find_made()
    if made is None:
        work.check_output()
    with _only_one(work):
        if made is None:
            work.start()
        else:
            work.tidy()
        yield work, made


@contextmanager
def _only_one(work: _Work) -> Iterator[None]:
    """Refuse a second process on the same output of this machine."""
    if not isinstance(work.root, Path):
        yield
        return
    work.root.parent.mkdir(parents=True, exist_ok=True)
    lock = work.root.with_name(f"{work.root.name}.lock")
    with open(lock, "w") as file:
        try:
            # The kernel lets go of it when the process ends, in whatever way.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{work.out}: another process is making these shards") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


# Decoding


def _links_by_content(tables: Tables) -> dict[str, list[Link]]:
    """The products of every linked content with their weights, largest first."""
    links: dict[str, list[Link]] = {}
    columns = [tables.links[name].to_pylist() for name in ("content_id", "product_id", "weight")]
    for content, product, weight in zip(*columns, strict=True):
        links.setdefault(content, []).append((product, weight))
    # The sort is stable, so links of equal weight keep the order of the table.
    return {content: sorted(found, key=lambda link: -link[1]) for content, found in links.items()}


def _linked(tables: Tables, links: Mapping[str, list[Link]]) -> pa.Table:
    """The contents that have a link, in the order of the table."""
    return tables.contents.filter([c in links for c in tables.contents["content_id"].to_pylist()])


def _decode_tasks(
    config: MakeShardsConfig, tables: Tables, links: Mapping[str, list[Link]], work: _Work
) -> dict[str, list[DecodeTask]]:
    """Parts of products and of linked contents: slices of the tables, whoever decodes them."""
    decoding = DecodeConfig(
        frames=FrameConfig(
            policy=config.frame_policy,
            num_frames=config.num_frames,
            frames_per_second=config.frames_per_second,
        ),
        size=config.size,
        jpeg_quality=config.jpeg_quality,
        subtitles=SUBTITLES in config.text_columns
        and SUBTITLES not in tables.contents.column_names,
        timeout_s=config.timeout_s,
        memory_gb=config.memory_gb,
    )
    tasks: dict[str, list[DecodeTask]] = {}
    for kind, table, most in (
        ("product", tables.products, config.max_images_per_product),
        ("content", _linked(tables, links), config.num_frames),
    ):
        size = min(SAMPLES_PER_PART, max(8, math.ceil(len(table) / PARTS_OF_A_TABLE)))
        tasks[kind] = [
            DecodeTask(
                str(work.root / "parts" / f"{kind}s-{start // size:06d}"),
                _media(tables, kind, table.slice(start, size), most),
                decoding,
            )
            for start in range(0, len(table), size)
        ]
    return tasks


def _media(tables: Tables, kind: str, rows: pa.Table, most: int) -> list[Media]:
    """A content with a video is a clip, whatever images it has beside it (a cover, say)."""
    videos = rows["video"].to_pylist() if kind == "content" else [None] * len(rows)
    columns = (rows[f"{kind}_id"].to_pylist(), videos, rows["images"].to_pylist())
    return [
        Media(
            id=sample_id,
            video=tables.path_of(video) if video else None,
            images=[] if video else [tables.path_of(image) for image in images],
            most=most,
        )
        for sample_id, video, images in zip(*columns, strict=True)
    ]


def _decode(
    config: MakeShardsConfig,
    engine: Engine,
    parts: Mapping[str, Sequence[DecodeTask]],
    num_products: int,
    num_contents: int,
) -> None:
    """Make all parts, and stop as soon as too much is lost."""
    # Products first, for they are few: a catalogue with a wrong path fails in seconds.
    tasks = [*parts["product"], *parts["content"]]
    totals = {"product": num_products, "content": num_contents}
    lost = Counter[str]()
    with progress_bar(total=sum(totals.values()), desc="decode", unit="sample") as progress:
        for number, report in engine.run(tasks):
            progress.update(report.num_samples)
            kind = "product" if number < len(parts["product"]) else "content"
            lost[kind] += report.num_lost
            if lost[kind] > config.max_dropped * totals[kind]:
                done = [task for task in parts[kind] if is_file(place(f"{task.part}.parquet"))]
                _check_dropped(config, kind, _Survey(kind, done).drops(), totals[kind])


# Planning


class _Survey:
    """What the parts of a kind hold, a row per sample, in the order of the table they were made from."""

    def __init__(self, kind: str, tasks: Sequence[DecodeTask]) -> None:
        tables = [read_part(task.part) for task in tasks]
        self.kind = kind
        self.table = pa.concat_tables(tables)
        self.ids: list[str] = self.table["id"].to_pylist()
        self._sizes: list[list[int]] = self.table["sizes"].to_pylist()
        self._offsets: list[int] = self.table["offset"].to_pylist()
        counts = [len(table) for table in tables]
        self._part_of = np.repeat(np.arange(len(tasks)), counts)
        self._parts = [task.part for task in tasks]
        self.place = {sample_id: number for number, sample_id in enumerate(self.ids)}

    def num_pictures(self, number: int) -> int:
        """How many pictures of a sample were kept."""
        return len(self._sizes[number])

    def num_bytes(self, number: int) -> int:
        """And their size."""
        return sum(self._sizes[number])

    def stored(self, number: int) -> Stored:
        """Where they are."""
        part = self._parts[self._part_of[number]]
        return Stored(part, self._offsets[number], self._sizes[number])

    def drops(self) -> list[Drop]:
        """Samples without a picture, and single pictures that were lost."""
        found = []
        for number, faults in enumerate(self.table["faults"].to_pylist()):
            kept = self.num_pictures(number) > 0
            for fault in faults if kept else faults[:1]:
                kind = "image" if kept else self.kind
                found.append(Drop(self.ids[number], kind, fault["reason"], fault["detail"]))
        return found


@dataclass(frozen=True)
class _Plan:
    """Everything that was decided before packing."""

    products: _Survey
    contents: _Survey
    catalog: list[int]
    """Numbers of the products that are kept."""
    splits: dict[Split, list[int]]
    """Numbers of the contents of each split."""
    links: Mapping[str, list[Link]]
    groups: Mapping[str, str]
    """Contents that have near duplicates, and the first content of their group."""
    cold: set[str]
    """Products held out of training on purpose."""
    drops: list[Drop]
    claims: dict[str, Any]
    product_rows: pa.Table
    content_rows: pa.Table


def _plan(
    config: MakeShardsConfig,
    tables: Tables,
    links: Mapping[str, list[Link]],
    products: _Survey,
    contents: _Survey,
) -> _Plan:
    linked = _linked(tables, links)
    unlinked = set(tables.contents["content_id"].to_pylist()) - set(links)
    drops = [
        Drop(content_id, "content", NO_LINK, "")
        for content_id in tables.contents["content_id"].to_pylist()
        if content_id in unlinked
    ]
    # A content without a product that can be shown teaches nothing.
    drops += products.drops()
    _check_dropped(config, "product", drops, len(products.ids))
    catalog = [n for n in range(len(products.ids)) if products.num_pictures(n)]
    links, dead = _without_dead_links(links, {products.ids[n] for n in catalog})
    gone = {drop.id for drop in dead}
    drops += dead + [d for d in contents.drops() if d.kind != "content" or d.id not in gone]
    _check_dropped(config, "content", drops, len(contents.ids))
    kept = [
        number
        for number, content_id in enumerate(contents.ids)
        if content_id in links and contents.num_pictures(number)
    ]
    cold = cold_products(config, products.ids)
    kept, groups, splits, copies = _split_apart(config, tables, linked, contents, kept, links, cold)
    drops += copies
    rows = _take(linked, kept)
    _check_none_lost(config, tables, splits, len(links))
    by_split: dict[Split, list[int]] = {split: [] for split in SPLITS if split in set(splits)}
    for number, split in zip(kept, splits, strict=True):
        by_split[split].append(number)
    values = rows[config.split_by].to_pylist() if config.split_by else None
    claims = make_claims(
        rows["content_id"].to_pylist(),
        splits,
        groups=groups,
        links=links,
        cold=cold,
        cold_asked=config.cold_products,
        values=values,
        held_out_from=held_out_from(config, values) if values else None,
    )
    sizes = Counter(groups)
    return _Plan(
        products=products,
        contents=contents,
        product_rows=tables.products,
        content_rows=linked,
        catalog=catalog,
        splits=by_split,
        links=links,
        groups={contents.ids[n]: g for n, g in zip(kept, groups, strict=True) if sizes[g] > 1},
        cold=cold,
        drops=_with_links(drops, {contents.ids[number] for number in kept}, tables),
        claims=claims,
    )


def _take(table: pa.Table, numbers: Sequence[int]) -> pa.Table:
    """These rows of a table; of no numbers pyarrow would not know that they are numbers."""
    return table.take(pa.array(numbers, pa.int64()))


def _with_links(drops: Sequence[Drop], kept: set[str], tables: Tables) -> list[Drop]:
    """The drops with the number of links that went with each: together, all that are missing."""
    columns = [tables.links[name].to_pylist() for name in ("content_id", "product_id")]
    lost = Counter(
        ("product", product) if content in kept else ("content", content)
        for content, product in zip(*columns, strict=True)
    )
    return [replace(drop, num_links=lost[drop.kind, drop.id]) for drop in drops]


def _without_dead_links(
    links: Mapping[str, list[Link]], alive: set[str]
) -> tuple[dict[str, list[Link]], list[Drop]]:
    """Only links to products that are kept, and the contents that have none of those."""
    kept: dict[str, list[Link]] = {}
    drops = []
    for content_id, found in links.items():
        left = [link for link in found if link[0] in alive]
        if left:
            kept[content_id] = left
        else:
            lost = ", ".join(product_id for product_id, _ in found)
            drops.append(Drop(content_id, "content", NO_PRODUCT_LEFT, lost))
    return kept, drops


def _split_apart(
    config: MakeShardsConfig,
    tables: Tables,
    linked: pa.Table,
    contents: _Survey,
    kept: list[int],
    links: Mapping[str, list[Link]],
    cold: set[str],
) -> tuple[list[int], list[str], list[Split], list[Drop]]:
    """Contents with their groups and splits, without the copies that a split column leaves in two."""
    drops: list[Drop] = []
    while True:
        groups = _group(contents, kept)
        splits = _split(config, tables, _take(linked, kept), groups, links, cold)
        later = straddling(groups, splits) if config.near_duplicates == "together" else []
        if not later:
            return kept, groups, splits, drops
        drops += [
            Drop(contents.ids[kept[i]], "content", LOOKS_LIKE_LATER, f"group of {groups[i]}")
            for i in later
        ]
        # Once more: two that were alike only through a third that is dropped are no group any longer.
        gone = set(later)
        kept = [number for i, number in enumerate(kept) if i not in gone]


def _group(contents: _Survey, kept: Sequence[int]) -> list[str]:
    """The group of near duplicates of each content that is kept, by the first id of those in it."""
    # In the order of ids, which shards keep: whoever takes the groups again finds the same.
    order = sorted(range(len(kept)), key=lambda i: contents.ids[kept[i]])
    numbers = [kept[i] for i in order]
    hashes = _take(contents.table.select(["hashes"]), numbers)["hashes"]
    found = group_duplicates(hashes.to_pylist())
    groups = [""] * len(kept)
    for i, first in zip(order, found, strict=True):
        groups[i] = contents.ids[numbers[first]]
    return groups


def _split(
    config: MakeShardsConfig,
    tables: Tables,
    rows: pa.Table,
    groups: Sequence[str],
    links: Mapping[str, list[Link]],
    cold: set[str],
) -> list[Split]:
    """The split of each of these contents, from the links table or by the config's rules."""
    ids = rows["content_id"].to_pylist()
    given = _given_splits(tables)
    if given is not None:
        return [given[content_id] for content_id in ids]
    return assign_splits(
        config,
        ids,
        groups=groups,
        barred=[any(product in cold for product, _ in links[c]) for c in ids],
        values=rows[config.split_by].to_pylist() if config.split_by else None,
    )


def _given_splits(tables: Tables) -> dict[str, Split] | None:
    if "split" not in tables.links.column_names:
        return None
    columns = [tables.links[name].to_pylist() for name in ("content_id", "split")]
    return dict(zip(*columns, strict=True))


def _check_none_lost(
    config: MakeShardsConfig, tables: Tables, splits: Sequence[Split], num_contents: int
) -> None:
    """Raise `UserError` for a split that had contents and has none left."""
    given = _given_splits(tables)
    if given is None:
        wanted = {s for s in SPLITS if s == "train" or getattr(config, s) > 0}
    else:
        wanted = set(given.values())
    for split in sorted(wanted - set(splits), key=SPLITS.index):
        before = num_contents if given is None else sum(found == split for found in given.values())
        which = "all of its" if given is not None else "none is left for it of"
        raise UserError(
            f"split '{split}' is empty: {which} {before} contents were dropped or moved"
        )


def _check_dropped(config: MakeShardsConfig, kind: str, drops: Sequence[Drop], total: int) -> None:
    """Raise `UserError` where too many products, or linked contents, were dropped so far."""
    lost = [drop for drop in drops if drop.kind == kind and drop.reason not in NO_FAULT]
    if len(lost) <= config.max_dropped * total:
        return
    reasons = ", ".join(f"{reason} ({n})" for reason, n in _by_reason(lost)[:3])
    raise UserError(
        f"{place(config.tables)}: {len(lost)} of {total} {kind}s dropped, more than --max-dropped "
        f"{config.max_dropped:g} allows: {reasons}; the first is {kind} '{lost[0].id}': "
        f"{lost[0].reason}: {lost[0].detail} (a larger --max-dropped goes on from here)"
    )


def _by_reason(drops: Iterable[Drop]) -> list[tuple[str, int]]:
    """Reasons with their counts, the commonest first."""
    return Counter(drop.reason for drop in drops).most_common()


# Packing


class _Shards(Sequence[PackTask]):
    """The shards to write; each is put together when it is asked for, since it names all its samples."""

    def __init__(self, config: MakeShardsConfig, plan: _Plan, work: _Work) -> None:
        self._config = config
        self._plan = plan
        self._work = work
        self._titles = dict(
            zip(
                *(plan.product_rows[name].to_pylist() for name in ("product_id", "title")),
                strict=True,
            )
        )
        numbers: dict[str, list[int]] = {"catalog": plan.catalog, **plan.splits}
        self._slices = [
            (split, start, chosen[start : start + config.samples_per_shard])
            for split, chosen in numbers.items()
            for start in range(0, len(chosen), config.samples_per_shard)
        ]
        self.names = [
            str(shard_path(Path(), split, start // config.samples_per_shard))
            for split, start, _ in self._slices
        ]

    def __len__(self) -> int:
        return len(self._slices)

    @overload
    def __getitem__(self, number: int) -> PackTask: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[PackTask]: ...
    def __getitem__(self, number: int | slice) -> PackTask | Sequence[PackTask]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        split, first, chosen = self._slices[number]
        pack = self._product if split == "catalog" else self._content
        table = self._plan.product_rows if split == "catalog" else self._plan.content_rows
        rows = table.take(chosen).to_pylist()
        samples = [pack(n, row) for n, row in zip(chosen, rows, strict=True)]
        name = self.names[number]
        return PackTask(
            str(self._work.folder / name), str(self._work.receipt(name)), first, samples
        )

    def num_samples(self, number: int) -> int:
        """How many samples a shard has."""
        return len(self._slices[number][2])

    def _product(self, number: int, row: Row) -> Packed:
        count = self._plan.products.num_pictures(number)
        meta = {
            "product_id": row["product_id"],
            "title": row["title"],
            "attributes": _attributes(row, ("product_id", "title", "images")),
            "num_images": count,
        }
        stored = self._plan.products.stored(number)
        return Packed([(stored, [image_name(i) for i in range(count)])], meta)

    def _content(self, number: int, row: Row) -> Packed:
        contents, products = self._plan.contents, self._plan.products
        facts = contents.table.slice(number, 1).to_pylist()[0]
        count = contents.num_pictures(number)
        pictures = [(contents.stored(number), [frame_name(t) for t in range(count)])]
        entries = []
        # All links are named, so that none is taken for a wrong answer; the heaviest bring images.
        for p, (product_id, weight) in enumerate(self._plan.links[row["content_id"]]):
            inline = 0
            if p < self._config.max_products_per_content:
                stored = products.stored(products.place[product_id])
                inline = len(stored.sizes)
                pictures.append((stored, [product_image_name(p, i) for i in range(inline)]))
            entries.append(
                {
                    "product_id": product_id,
                    "title": self._titles[product_id],
                    "weight": weight,
                    "num_images": inline,
                }
            )
        meta = {
            "content_id": row["content_id"],
            "title": _text(self._config, row, facts["subtitles"]),
            "frame_times": [round(time, 3) for time in facts["times"]],
            "products": entries,
            "attributes": _attributes(row, ("content_id", "title", "video", "images")),
        }
        return Packed(pictures, meta)


def _text(config: MakeShardsConfig, row: Row, subtitles: str | None) -> str | None:
    """A content's text: its text columns, one after another."""
    found = {SUBTITLES: subtitles, **row}
    parts = [
        str(found[name]).strip() for name in config.text_columns if found.get(name) is not None
    ]
    return " ".join(part for part in parts if part) or None


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


def _pack(config: MakeShardsConfig, engine: Engine, plan: _Plan, work: _Work) -> dict[str, str]:
    """Write all shards; returns the hash of each by its path in the folder."""
    shards = _Shards(config, plan, work)
    hashes: dict[str, str] = {}
    total = sum(shards.num_samples(n) for n in range(len(shards)))
    with progress_bar(total=total, desc="pack", unit="sample") as progress:
        for number, digest in engine.run(shards):
            hashes[shards.names[number]] = digest
            progress.update(shards.num_samples(number))
    return hashes


# Publishing


def _write_facts(config: MakeShardsConfig, folder: Place, plan: _Plan) -> dict[str, str]:
    """Write what is known of every sample, and what was left out; returns the hash of each file."""
    hashes = {}
    rows = [*_product_facts(plan, config.samples_per_shard), *_content_facts(plan, config)]
    samples = pa.Table.from_pylist(rows, SAMPLES_SCHEMA)
    dropped = pa.Table.from_pylist([asdict(drop) for drop in plan.drops], DROPPED_SCHEMA)
    for name, table in (("samples", samples), ("dropped", dropped)):
        stream = io.BytesIO()
        pq.write_table(table, stream)
        write_bytes_whole(folder / f"{name}.parquet", stream.getvalue())
        hashes[f"{name}.parquet"] = hashlib.sha256(stream.getvalue()).hexdigest()
    return hashes


def _product_facts(plan: _Plan, per_shard: int) -> Iterator[Row]:
    titles = plan.product_rows["title"].to_pylist()
    links = Counter(
        product
        for number in plan.splits["train"]
        for product, _ in plan.links[plan.contents.ids[number]]
    )
    for row, number, facts in _facts(plan.products, plan.catalog, per_shard):
        product_id = plan.products.ids[number]
        yield facts | {
            "kind": "product",
            "split": "catalog",
            "row": row,
            "has_title": titles[number] is not None,
            "num_links": links[product_id],
            "cold": product_id in plan.cold,
        }


def _content_facts(plan: _Plan, config: MakeShardsConfig) -> Iterator[Row]:
    per_shard = config.samples_per_shard
    names = [n for n in config.text_columns if n in plan.content_rows.column_names]
    texts = plan.content_rows.select(names)
    for split, chosen in plan.splits.items():
        for row, number, facts in _facts(plan.contents, chosen, per_shard):
            content_id = plan.contents.ids[number]
            links = plan.links[content_id]
            text = _text(config, texts.slice(number, 1).to_pylist()[0], facts.pop("subtitles"))
            yield facts | {
                "kind": "content",
                "split": split,
                "row": row,
                "has_title": text is not None,
                "num_links": len(links),
                "group": plan.groups.get(content_id),
                "cold": any(product in plan.cold for product, _ in links),
            }


def _facts(
    survey: _Survey, chosen: Sequence[int], per_shard: int
) -> Iterator[tuple[int, int, Row]]:
    names = ["width", "height", "duration", "num_frames", "subtitles"]
    columns = survey.table.select(names).take(chosen).to_pylist()
    for row, (number, facts) in enumerate(zip(chosen, columns, strict=True)):
        facts["id"] = survey.ids[number]
        facts["shard"] = row // per_shard
        facts["num_pictures"] = survey.num_pictures(number)
        facts["num_bytes"] = survey.num_bytes(number)
        yield row, number, facts


def _describe(
    config: MakeShardsConfig,
    tables: Tables,
    plan: _Plan,
    hashes: Mapping[str, str],
    facts: Mapping[str, str],
) -> Manifest:
    linked = {
        split: [[product for product, _ in plan.links[plan.contents.ids[n]]] for n in chosen]
        for split, chosen in plan.splits.items()
    }
    num_warm = len({product for found in linked["train"] for product in found})
    samples = [drop for drop in plan.drops if drop.kind != "image"]
    return Manifest(
        kind="shards",
        config=asdict(config)
        | {"tables": str(place(config.tables)), "out": str(place(config.out))},
        counts={
            "in": {name: len(getattr(tables, name)) for name in TABLE_NAMES},
            "out": {
                "products": len(plan.catalog),
                "contents": sum(len(found) for found in linked.values()),
                "links": sum(len(ids) for found in linked.values() for ids in found),
            },
            # A content without a link is no fault, and is not held against --max-dropped.
            "dropped": dict(_by_reason(samples)),
            "images_skipped": dict(_by_reason(d for d in plan.drops if d.kind == "image")),
        },
        fingerprint=fingerprint_of(hashes),
        parents=[
            Parent(
                kind="tables",
                fingerprint=tables.fingerprint,
                path=relative_path(config.out, config.tables),
            )
        ],
        details={
            "splits": {
                split: {
                    "contents": len(found),
                    "links": sum(len(ids) for ids in found),
                    "products": len({product for ids in found for product in ids}),
                    "shards": math.ceil(len(found) / config.samples_per_shard),
                }
                for split, found in linked.items()
            },
            "catalog": len(plan.catalog),
            "warm_products": num_warm,
            "cold_products": len(plan.catalog) - num_warm,
            "claims": plan.claims,
            "dropped": [asdict(drop) for drop in plan.drops[:MOST_LISTED]],
            "files": sorted(hashes),
            "facts": facts,
        },
    )


def _print_summary(config: MakeShardsConfig, manifest: Manifest) -> None:
    details, counts = manifest.details, manifest.counts
    out = place(config.out)
    print(f"{out}:")
    for split, found in details["splits"].items():
        print(f"  {split:<8}{found['contents']:>9,} contents, {found['links']:,} links")
    warm, cold = details["warm_products"], details["cold_products"]
    print(f"  {'catalog':<8}{details['catalog']:>9,} products: {warm:,} warm, {cold:,} cold")
    held_out = details["claims"]["cold_products"]["held_out"]
    if held_out:
        print(f"  held out of training: {held_out:,} products (--cold-products)")
    for split, (first, last) in details["claims"].get("split_by", {}).get("spans", {}).items():
        print(f"  {split} by {config.split_by}: {first} to {last}")
    alike = details["claims"]["near_duplicates"]
    if alike["contents"]:
        print(
            f"  near duplicates: {alike['contents']:,} contents in {alike['groups']:,} groups, "
            f"{alike['straddling']:,} of them in two splits"
        )
    for what, reasons in (("dropped", "dropped"), ("images skipped", "images_skipped")):
        listed = ", ".join(f"{reason} {n:,}" for reason, n in counts[reasons].items())
        if listed:
            print(f"  {what}: {listed} (listed in {out / 'dropped.parquet'})")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(MakeShardsConfig)))
