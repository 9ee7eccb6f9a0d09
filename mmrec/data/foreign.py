"""Tars that others wrote, read where they lie: indexes that give their members our names.

img2dataset writes `<key>.jpg`, `<key>.txt` and `<key>.json`; a plain webdataset tar has whatever its
maker chose. A `ForeignMapping` says which member or JSON field is which. `index_tars` makes a folder
that training, embed and evaluate read like one of data_prep/make_shards.py: an index for every tar,
a catalogue of the products, and a manifest. The tars themselves are neither moved nor written anew.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmrec.bars import progress_bar
from mmrec.data.media import decode_jpeg
from mmrec.data.shards import (
    FAMILY_SPLITS,
    INDEX_SCHEMA,
    META_COLUMN,
    TAR_BYTES,
    TAR_PLACE,
    ShardReader,
    ShardSample,
    Split,
    TarSample,
    frame_name,
    image_name,
    index_path,
    product_image_name,
    scan_tar,
    shard_path,
    write_shard,
)
from mmrec.data.storage import Place, list_files, local_copy, place
from mmrec.errors import MediaError, UserError
from mmrec.manifest import (
    Manifest,
    fingerprint_of,
    hash_file,
    new_folder,
    read_manifest,
    relative_path,
    write_manifest,
)

CAPTION = "txt,json:caption"
"""Where img2dataset and video2dataset keep the text of a sample."""
VIDEO_NAMES = "mp4,webm,mov,mkv,avi,m4v"
TWICE = "id occurs twice"
ELSEWHERE = "id is in another split"

_KIND = "foreign"  # the mark of such a folder, in its manifest's details
_SIGNATURES = {b"\xff\xd8\xff": 0, b"\x89PNG\r\n\x1a\n": 0, b"WEBP": 8}  # and where they stand
_PRODUCTS_PER_SHARD = 10_000
_MOST_LISTED = 1_000


@dataclass(frozen=True, kw_only=True)
class ForeignMapping:
    """Where foreign samples keep what ours have.

    Each is one place, or several of which the first that holds something counts, with commas
    between. A place of text is a member's name after the key (`txt`), a field of a JSON member
    (`json:uid`, `json:meta.uid`), or `key`. A place of pictures is a name or a pattern (`frame_*.jpg`),
    all of whose matches are taken, in the order of the numbers in them.
    """

    frames: str = "jpg,jpeg,png,webp"
    """The pictures of a content."""
    title: str | None = None
    """A content's title. None takes `txt`, or `caption` in `json`, unless the product's title does; ''
    leaves it out."""
    content_id: str = "key"
    product_id: str = "key"
    product_images: str | None = None
    product_title: str | None = None
    """Without this and product images the caption is the product: an image is matched to its text."""

    def with_defaults(self) -> "ForeignMapping":
        """The same with what None stands for. Raises `UserError` for a text that gives away the answer."""
        product_title = self.product_title
        if product_title is None and self.product_images is None:
            product_title = CAPTION
        title = self.title
        if title is None:
            title = "" if _share_a_place(CAPTION, product_title) else CAPTION
        if _share_a_place(title, product_title):
            raise UserError(
                f"--title {title} and --product-title {product_title} take the same text, which gives "
                f"away every answer; take one of them from elsewhere, or leave --title out"
            )
        return replace(self, title=title, product_title=product_title)


def _share_a_place(one: str | None, other: str | None) -> bool:
    return bool(set(_places(one)) & set(_places(other)))


def _places(alternatives: str | None) -> list[str]:
    return [part.strip() for part in (alternatives or "").split(",") if part.strip()]


# Samples


class ForeignSample:
    """One sample of an open foreign tar, asked for texts and pictures by the places of a mapping."""

    def __init__(self, sample: TarSample, descriptor: int) -> None:
        self.key = sample.key
        self.members: Mapping[str, tuple[int, int]] = sample.members
        """Offset and size in bytes by name."""
        self._descriptor = descriptor
        self._parsed: dict[str, Any] = {}

    def read(self, name: str, most: int | None = None) -> bytes:
        """A member's bytes, or the first `most` of them."""
        offset, size = self.members[name]
        return os.pread(self._descriptor, size if most is None else min(size, most), offset)

    def text(self, alternatives: str | None) -> str | None:
        """The first of these places that holds more than blanks. Raises `MediaError` for broken members."""
        for where in _places(alternatives):
            value = self.key if where == "key" else self._value(where)
            if value and value.strip():
                return value.strip()
        return None

    def matching(self, alternatives: str | None) -> list[str]:
        """The names that the first of these patterns to match anything matches, numbers in order."""
        for pattern in _places(alternatives):
            found = [name for name in self.members if fnmatchcase(name, pattern.lower())]
            if found:
                return sorted(found, key=_natural)
        return []

    def _value(self, where: str) -> str | None:
        name, is_field, path = where.partition(":")
        if name not in self.members:
            return None
        if not is_field:
            return self._decoded(name)
        value = self._json(name)
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None:
            return None
        if isinstance(value, str):
            # JSON can escape half a character, which is no text in UTF-8.
            return value.encode(errors="replace").decode()
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise MediaError(f"{where} is neither text nor a whole number", repr(value)[:100])

    def _json(self, name: str) -> Any:
        if name not in self._parsed:
            try:
                self._parsed[name] = json.loads(self._decoded(name))
            except ValueError as error:
                raise MediaError(f"{name} is not JSON", str(error)) from None
        return self._parsed[name]

    def _decoded(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise MediaError(f"{name} is not UTF-8", str(error)) from None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def scan_samples(tar: Path) -> Iterator[ForeignSample]:
    """The samples of a tar in order. Raises `UserError` as `scan_tar` does."""
    if not tar.is_file():
        raise UserError(f"{tar}: no such tar")
    with open(tar, "rb") as file:
        for sample in scan_tar(tar):
            yield ForeignSample(sample, file.fileno())


def expand_tars(patterns: Sequence[str]) -> list[Place]:
    """The tars that paths and URLs with braces (`{00..09}`) and wildcards name, in order.

    Raises `UserError` where one names nothing, or two name the same tar.
    """
    from braceexpand import braceexpand

    tars: list[Place] = []
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"--tars {pattern}: a brace is not closed") from None
        for name in names:
            tars += _matching_files(name)
    twice = next((tar for tar, count in Counter(map(str, tars)).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"--tars names {twice} more than once")
    if not tars:
        raise UserError("--tars: expected paths or URLs of tars")
    return tars


def _matching_files(name: str) -> list[Place]:
    path = place(name)
    wild = re.search(r"[^/]*[*?[]", name)
    # A question mark in an HTTP URL begins its query, and HTTP lists no files anyway.
    is_exact = path.exists() if isinstance(path, Path) else name.startswith("http")
    if wild is None or is_exact:
        return [path]
    found = list_files(place(name[: wild.start()] or "."), name[wild.start() :])
    if not found:
        raise UserError(f"--tars {name}: no such tars")
    return found


def fetched(tar: Place) -> Path:
    """A local copy of a tar. Raises `UserError` where there is no such tar."""
    try:
        return local_copy(tar)
    except FileNotFoundError:
        raise UserError(f"{tar}: no such tar") from None


# Indexes


@dataclass(frozen=True)
class Dropped:
    """A sample left out, and why."""

    id: str
    """Its key."""
    reason: str
    """A short phrase, so that equal faults add up."""
    detail: str
    kind: str = "content"


@dataclass
class TarIndex:
    """What became of the samples of one foreign tar."""

    table: pa.Table
    """Rows as in `INDEX_SCHEMA`, and what the JSON member would hold."""
    num_samples: int = 0
    dropped: list[Dropped] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Pictures left out of samples that stay, by reason."""
    num_videos: int = 0
    """Samples with a video and no frame."""


def index_tar(tar: Place, mapping: ForeignMapping, *, decode: bool = False) -> TarIndex:
    """Index one foreign tar; samples that lack what the mapping names are dropped.

    Pictures are known by their first bytes, or by decoding them whole where `decode` says so. Raises
    `UserError` for a tar that `scan_tar` refuses.
    """
    copy = fetched(tar)
    rows: list[dict[str, Any]] = []
    found = TarIndex(pa.table({}))
    for sample in scan_samples(copy):
        found.num_samples += 1
        try:
            rows.append(_row(sample, mapping, found.skipped, decode=decode))
        except MediaError as error:
            found.dropped.append(Dropped(sample.key, error.reason, error.detail))
            found.num_videos += bool(sample.matching(VIDEO_NAMES))
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA.append(META_COLUMN))
    found.table = table.replace_schema_metadata({TAR_BYTES: str(copy.stat().st_size)})
    return found


def _row(
    sample: ForeignSample, mapping: ForeignMapping, skipped: Counter[str], *, decode: bool
) -> dict[str, Any]:
    images = sample.matching(mapping.product_images)
    frames = [name for name in sample.matching(mapping.frames) if name not in images]
    faults: list[str] = []
    frames = _sound(sample, frames, faults, decode=decode)
    images = _sound(sample, images, faults, decode=decode)
    if not frames:
        raise MediaError("no frames", faults[0] if faults else ", ".join(sample.members))
    content_id, product_id = sample.text(mapping.content_id), sample.text(mapping.product_id)
    if content_id is None or product_id is None:
        raise MediaError("no content id" if content_id is None else "no product id")
    product_title = sample.text(mapping.product_title)
    if not images and product_title is None:
        raise MediaError("product has neither images nor title")
    skipped.update(faults)
    product = {"product_id": product_id, "title": product_title, "weight": 1.0}
    meta = {
        "content_id": content_id,
        "title": sample.text(mapping.title),
        "frame_times": [],
        "products": [product | {"num_images": len(images)}],
        "attributes": {},
    }
    places = [sample.members[name] for name in (*frames, *images)]
    return {
        "key": sample.key,
        "content_id": content_id,
        "product_ids": [product_id],
        "weights": [1.0],
        "names": [frame_name(t) for t in range(len(frames))]
        + [product_image_name(0, i) for i in range(len(images))],
        "offsets": [offset for offset, _ in places],
        "sizes": [size for _, size in places],
        META_COLUMN.name: json.dumps(meta, ensure_ascii=False),
    }


def _sound(
    sample: ForeignSample, names: Iterable[str], faults: list[str], *, decode: bool
) -> list[str]:
    """The names whose bytes are those of a picture; the reasons of the others join `faults`."""
    sound = []
    for name in names:
        start = sample.read(name, 16)
        known = (start[at : at + len(mark)] == mark for mark, at in _SIGNATURES.items())
        if not any(known):
            faults.append("not a JPEG, PNG or WebP" if start else "empty file")
            continue
        try:
            if decode:
                decode_jpeg(sample.read(name))
            sound.append(name)
        except MediaError as error:
            faults.append(error.reason)
    return sound


# The folder


def index_tars(
    tars: Sequence[str],
    out: Place | str,
    *,
    split: Split,
    mapping: ForeignMapping | None = None,
    decode: bool = False,
    num_workers: int = 0,
    max_dropped: float = 0.05,
    overwrite: bool = False,
) -> Manifest:
    """Make a shards' folder of foreign tars, or add a split to one; returns its manifest.

    Raises `UserError` for tars that are refused or hold videos, when more than the share
    `max_dropped` of the samples is dropped, or the folder is not of this kind or has the split already.
    """
    mapping = (mapping or ForeignMapping()).with_defaults()
    if split not in FAMILY_SPLITS["contents"]:
        raise ValueError(f"no split '{split}' of contents")
    if num_workers < 0 or not 0 <= max_dropped <= 1:
        raise UserError("expected --num-workers of 0 or more, and --max-dropped from 0 to 1")
    out = place(out)
    paths = expand_tars(tars)
    old = _old_manifest(out, split, overwrite=overwrite)
    inputs = [tar for tar in paths if isinstance(tar, Path)]
    with new_folder(out, kind="shards", overwrite=True, inputs=inputs) as folder:
        (folder / "contents").mkdir()
        (folder / "products").mkdir()
        if old is not None:
            _take_over(out, folder, old, without=split)
        # A relative path leads from the finished folder to its tars; a local one has the temporary
        # folder beside it.
        seen_from = (folder if isinstance(out, Path) else out) / "contents"
        tasks = [
            _Task(
                tar=tar,
                mapping=mapping,
                decode=decode,
                index=index_path(shard_path(folder, split, number)),
                where=relative_path(seen_from, tar),
            )
            for number, tar in enumerate(paths)
        ]
        found = _run_all(tasks, num_workers)
        by_key = "key" in _places(mapping.product_id)
        found += _drop_twice(tasks, _ids_elsewhere(folder, split), by_key=by_key)
        _check_dropped(found, max_dropped)
        catalog = _write_catalog(folder)
        config = {"tars": list(tars), **asdict(mapping), "decode": decode}
        manifest = _describe(folder, old, split, config, found, catalog)
        write_manifest(folder, manifest)
    return manifest


def _old_manifest(out: Place, split: Split, *, overwrite: bool) -> Manifest | None:
    """The manifest of the folder that a split is added to, or None where a new one is made."""
    if isinstance(out, Path) and not (out.is_dir() and any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out, "shards")
    except UserError:
        if not isinstance(out, Path) and not list_files(out, "*"):
            return None
        raise
    if not manifest.details.get(_KIND):
        raise UserError(
            f"{out}: holds shards that data_prep/make_shards.py made; give another --out"
        )
    if split in manifest.details["splits"] and not overwrite:
        raise UserError(f"{out}: has a split '{split}' already; --overwrite replaces it")
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Task:
    tar: Place
    mapping: ForeignMapping
    decode: bool
    index: Path
    """The file to write."""
    where: str
    """The tar as seen from that file when its folder is in place."""


def _run_all(tasks: Sequence[_Task], num_workers: int) -> list[TarIndex]:
    """What became of the samples of every tar; the tables lie on disk, since all of them are many."""
    num_workers = min(num_workers or os.cpu_count() or 1, len(tasks))
    if num_workers == 1:
        return list(_with_bar(map(_run, tasks), len(tasks)))
    # Not fork: the parent has threads of pyarrow by now.
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        return list(_with_bar(pool.map(_run, tasks), len(tasks)))


def _with_bar(results: Iterable[TarIndex], total: int) -> Iterator[TarIndex]:
    yield from progress_bar(results, total=total, desc="index", unit="tar")


def _run(task: _Task) -> TarIndex:
    found = index_tar(task.tar, task.mapping, decode=task.decode)
    if found.num_videos and not len(found.table):
        raise UserError(
            f"{task.tar}: holds videos and no frames; make tables of it with `python "
            f"data_prep/webdataset_tars.py --tars {task.tar} --out TABLES`, and shards of those with "
            f"data_prep/make_shards.py"
        )
    if len(found.table):
        metadata = {**found.table.schema.metadata, TAR_PLACE: task.where.encode()}
        pq.write_table(found.table.replace_schema_metadata(metadata), task.index)
    return replace(found, table=pa.table({}))


def _ids_elsewhere(folder: Path, split: Split) -> set[str]:
    paths = [path for path in (folder / "contents").iterdir() if _split_name(path) != split]
    return {i for path in paths for i in pq.read_table(path, columns=["content_id"])[0].to_pylist()}


def _drop_twice(tasks: Sequence[_Task], elsewhere: set[str], *, by_key: bool) -> list[TarIndex]:
    """Keep the first content of an id, and none that another split has.

    Where a product's id is the key, the same key in two tars would make one product of two.
    """
    seen: set[str] = set()
    seen_keys: set[str] = set()
    lost = TarIndex(pa.table({}))
    for task in tasks:
        if not task.index.exists():
            continue
        table = pq.read_table(task.index)
        kept = []
        for row, (key, content_id) in enumerate(
            zip(table["key"].to_pylist(), table["content_id"].to_pylist(), strict=True)
        ):
            is_twice = content_id in seen or (by_key and key in seen_keys)
            if is_twice or content_id in elsewhere:
                lost.dropped.append(Dropped(key, TWICE if is_twice else ELSEWHERE, content_id))
                continue
            kept.append(row)
            seen.add(content_id)
            seen_keys.add(key)
        if not kept:
            task.index.unlink()
        elif len(kept) < len(table):
            pq.write_table(table.take(kept), task.index)
    return [lost]


def _check_dropped(found: Sequence[TarIndex], max_dropped: float) -> None:
    total = sum(index.num_samples for index in found)
    dropped = [drop for index in found for drop in index.dropped]
    if total > len(dropped) and len(dropped) <= max_dropped * total:
        return
    if not total:
        raise UserError("the tars hold no samples: no member has a name of the form key.suffix")
    reasons = Counter(drop.reason for drop in dropped).most_common(3)
    told = ", ".join(f"{reason} ({count})" for reason, count in reasons)
    allowed = "none is left" if total == len(dropped) else f"--max-dropped allows {max_dropped:g}"
    first = f"the first is '{dropped[0].id}': {dropped[0].reason}: {dropped[0].detail}"
    hint = "; ids of their own, such as --content-id json:uid, tell tars apart that count alike"
    raise UserError(
        f"{len(dropped)} of {total} samples dropped, and {allowed}: {told}; {first}"
        + (hint if reasons[0][0] in (TWICE, ELSEWHERE) else "")
    )


def _take_over(out: Place, folder: Path, old: Manifest, *, without: Split) -> None:
    """Bring the files of the old folder into the new one, a split and the manifest excepted."""
    # The catalogue of a split that is replaced may have other titles and pictures.
    families = ("contents",) if without in old.details["splits"] else tuple(FAMILY_SPLITS)
    for family in families:
        for path in list_files(out / family, "*"):
            if _split_name(path) != without:
                _link_or_copy(local_copy(path), folder / family / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _write_catalog(folder: Path) -> ShardReader:
    """Add the products that the catalogue does not have yet; those it has stay as they are."""
    shards = sorted((folder / "products").glob("catalog-*.tar"))
    seen = {ids[0] for ids in ShardReader(shards, "products").product_ids} if shards else set()
    contents = ShardReader(_tars_by_split(folder), "contents")
    samples = _new_products(contents, seen)
    number = len(shards)
    while first := next(samples, None):
        part = chain([first], islice(samples, _PRODUCTS_PER_SHARD - 1))
        write_shard(shard_path(folder, "catalog", number), part)
        number += 1
    shards = sorted((folder / "products").glob("catalog-*.tar"))
    return ShardReader(shards, "products")


def _tars_by_split(folder: Path) -> list[Path]:
    """What would be the tars of the indexes: train first, then val and test."""
    tars = [path.with_suffix(".tar") for path in folder.glob("contents/*.parquet")]
    order = FAMILY_SPLITS["contents"]
    return sorted(tars, key=lambda tar: (order.index(_split_name(tar)), tar.name))


def _new_products(contents: ShardReader, seen: set[str]) -> Iterator[ShardSample]:
    for row, (product_id,) in enumerate(contents.product_ids):
        if product_id in seen:
            continue
        product = contents.meta(row)["products"][0]
        names = [product_image_name(0, i) for i in range(product["num_images"])]
        images = list(contents.read(row, names).values())
        meta = {
            "product_id": product_id,
            "title": product["title"],
            "attributes": {},
            "num_images": len(images),
        }
        members = {image_name(i): image for i, image in enumerate(images)}
        yield ShardSample(f"{len(seen):09d}", members, meta)
        seen.add(product_id)


def _describe(
    folder: Path,
    old: Manifest | None,
    split: Split,
    config: Mapping[str, Any],
    found: Sequence[TarIndex],
    catalog: ShardReader,
) -> Manifest:
    details = old.details if old else {"splits": {}, "dropped": []}
    tars = _tars_by_split(folder)
    names = dict.fromkeys(_split_name(tar) for tar in tars)
    readers = {n: ShardReader([t for t in tars if _split_name(t) == n], "contents") for n in names}
    dropped = [drop for index in found for drop in index.dropped]
    splits = {name: part for name, part in details["splits"].items() if name in readers}
    splits[split] = _describe_split(readers[split]) | {
        "in": sum(index.num_samples for index in found),
        "dropped": dict(Counter(drop.reason for drop in dropped).most_common()),
        "images_skipped": dict(sum((index.skipped for index in found), Counter())),
    }
    listed = [drop for drop in details["dropped"] if drop["split"] != split]
    listed += [{"split": split, **asdict(drop)} for drop in dropped[:_MOST_LISTED]]
    warm = {p for ids in readers["train"].product_ids for p in ids} if "train" in readers else set()
    files = [*tars, *sorted(folder.glob("products/*.tar"))]
    return Manifest(
        kind="shards",
        config={
            # Training asks how many of a content's products have their images inline.
            "max_products_per_content": 1,
            "splits": {**(old.config["splits"] if old else {}), split: config},
        },
        counts={
            "in": {"samples": sum(part["in"] for part in splits.values())},
            "out": {
                "products": len(catalog),
                "contents": sum(part["contents"] for part in splits.values()),
                "links": sum(part["links"] for part in splits.values()),
            },
            "dropped": _added(part["dropped"] for part in splits.values()),
            "images_skipped": _added(part["images_skipped"] for part in splits.values()),
        },
        fingerprint=_fingerprint(folder),
        details={
            "splits": splits,
            "catalog": len(catalog),
            "warm_products": len(warm),
            "cold_products": len(catalog) - len(warm),
            "files": [file.relative_to(folder).as_posix() for file in files],
            "dropped": listed,
            _KIND: True,
        },
    )


def _describe_split(reader: ShardReader) -> dict[str, int]:
    return {
        "contents": len(reader),
        "links": len(reader),
        "products": len({ids[0] for ids in reader.product_ids}),
        "shards": len(reader.shard_sizes),
    }


def _split_name(file: Place) -> str:
    return file.name.rsplit("-", 1)[0]


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum((Counter(part) for part in counts), Counter[str]()))


def _fingerprint(folder: Path) -> str:
    """A hash of the indexes, the tars' sizes and the catalogue: to read terabytes of tars is not on."""
    parts: dict[str, str | bytes] = {}
    for path in folder.glob("contents/*.parquet"):
        table = pq.read_table(path)
        digest = hashlib.sha256(table.schema.metadata[TAR_BYTES])
        # The rows' values, since the bytes of Parquet depend on its version and on where the tar lies.
        for batch in table.to_batches(max_chunksize=10_000):
            digest.update(json.dumps(batch.to_pylist()).encode())
        parts[path.name] = digest.hexdigest()
    parts |= {path.name: hash_file(path) for path in folder.glob("products/*.tar")}
    return fingerprint_of(parts)
