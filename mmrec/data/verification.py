"""Everything that a shards' manifest claims, taken again from the tars.

Each tar is read once from end to end: hashed, scanned, every picture decoded. What is found is held
against the manifest, the indexes and samples.parquet. The columns of samples.parquet about the media as
they were (width, height, duration, num_frames) cannot be taken from shards, and are not checked.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mmrec.bars import progress_bar
from mmrec.data import foreign
from mmrec.data.duplicates import HASH_BYTES, group_duplicates, hash_jpeg
from mmrec.data.inspection import own_pictures, read_dropped
from mmrec.data.shards import (
    INDEX_SCHEMA,
    META_NAME,
    TAR_BYTES,
    ShardReader,
    Split,
    index_path,
    index_shard,
    product_image_name,
    scan_tar,
)
from mmrec.data.splits import SPLITS, SplitConfig, cold_products, held_out_from, make_claims
from mmrec.data.splits import Split as ContentSplit
from mmrec.data.storage import Place, is_file, is_remote, list_files, local_copy, place
from mmrec.errors import UserError
from mmrec.manifest import Manifest, fingerprint_of, hash_file, read_manifest

_ORDER: tuple[Split, ...] = ("catalog", *SPLITS)  # products first: contents are held against them
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Check:
    """One claim, and whether it holds."""

    claim: str
    holds: bool | None
    """None where the manifest does not claim it."""
    detail: str
    """What was found; where the claim does not hold, what differs."""

    def line(self) -> str:
        """The check as the command line prints it."""
        state = {True: "ok", False: "DIFFERS", None: "-"}[self.holds]
        # A name or a decoder's words in it may hold line breaks.
        return f"{state:<8}{self.claim}: {' '.join(self.detail.split())}"


def verify_shards(folder: Place | str) -> list[Check]:
    """Check every claim of a shards' folder; a progress bar is shown on a terminal's stderr.

    What is damaged or missing makes its claims differ; `UserError` is for a folder without a
    manifest of shards, or that cannot be reached.
    """
    folder = place(folder)
    manifest = read_manifest(folder, "shards")
    shards = _Shards(folder, manifest)
    shards.read()
    checks = [check(shards) for check in _CHECKS]
    return [*checks, *_check_counts(shards), *_check_claims(shards)]


# Reading


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is kept of a sample; a million of them fit in memory."""

    split: Split
    shard: int
    row: int
    key: str
    id: str
    product_ids: tuple[str, ...]
    weights: tuple[float, ...]
    has_title: bool
    num_pictures: int
    num_bytes: int
    hashes: bytes
    """Of those frames that are not flat, one after another."""
    value: Any
    """Of the column that the split goes by."""


@dataclass(frozen=True)
class _Product:
    title: str | None
    images: list[bytes]
    """Digests of its pictures."""


@dataclass
class _Shards:
    """What the tars of a folder hold, and what is wrong with them."""

    folder: Place
    manifest: Manifest
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each tar by its path in the folder."""
    products: list[_Sample] = field(default_factory=list)
    contents: list[_Sample] = field(default_factory=list)
    catalog: dict[str, _Product] = field(default_factory=dict)
    num_pictures: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """What is wrong, by the claim that it breaks."""

    def __post_init__(self) -> None:
        self.is_foreign = bool(self.manifest.details.get("foreign"))
        # What make_shards wrote, and so promised claims and facts, whatever became of them.
        self.is_ours = not self.is_foreign and "near_duplicates" in self.manifest.config
        self._names = _find_tars(self.folder, self.manifest)

    @property
    def names(self) -> list[str]:
        """Paths in the folder of the tars that are there, or whose indexes are."""
        return [name for names in self._names.values() for name in names]

    def read(self) -> None:
        """Read all tars."""
        out = self.manifest.counts["out"]
        total = out["products"] + out["contents"]
        with progress_bar(total=total, desc="verify", unit="sample") as progress:
            for split, names in self._names.items():
                row = 0
                for number, name in enumerate(names):
                    for sample in self._read_tar(split, number, name, row):
                        if sample is not None:
                            (self.products if split == "catalog" else self.contents).append(sample)
                        row += 1
                        progress.update()

    def _read_tar(self, split: Split, shard: int, name: str, row: int) -> Iterator[_Sample | None]:
        """The samples of a tar; None for one that cannot be understood."""
        try:
            for number, (key, members) in enumerate(self._members(split, name), row):
                try:
                    yield self._take(split, shard, number, key, members, name)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    fault = f"{name}: sample '{key}' has a JSON member of another kind: {error!r}"
                    self.faults["samples"].append(fault)
                    yield None
        except UserError as error:
            self.faults["files"].append(str(error))

    def _members(self, split: Split, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a tar: key and members, the JSON member among them."""
        tar = self.folder / name
        if self.is_foreign and split != "catalog":
            yield from self._foreign_members(tar, name)
            return
        try:
            copy = local_copy(tar)
            self.hashes[name] = _hash_file(copy)
        except FileNotFoundError:
            raise UserError(f"{name} is not there") from None
        table = index_shard(copy)
        self.faults["indexes"] += _differing_index(tar, name, table)
        with open(copy, "rb") as file:
            for key, parts in _places(table):
                descriptor = file.fileno()
                yield key, {n: os.pread(descriptor, size, at) for n, (at, size) in parts.items()}

    def _foreign_members(self, tar: Place, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """By the index, which is the only one to know; that its members are members is checked."""
        reader = ShardReader([tar], "contents")
        index = pq.read_table(local_copy(index_path(tar)))
        scanned = {
            sample.key: set(sample.members.values())
            for sample in scan_tar(local_copy(reader.paths[0]))
        }
        for row, (key, parts) in enumerate(_places(index)):
            if not set(parts.values()) <= scanned.get(key, set()):
                self.faults["indexes"].append(f"{name}: no such members of sample '{key}'")
                continue
            yield key, {META_NAME: json.dumps(reader.meta(row)).encode(), **reader.read(row)}

    def _take(
        self, split: Split, shard: int, row: int, key: str, members: dict[str, bytes], name: str
    ) -> _Sample:
        meta = json.loads(members[META_NAME])
        is_product = split == "catalog"
        products = [meta] if is_product else meta["products"]
        pictures = own_pictures(split, members)
        where = f"{name}: sample '{key}'"
        self.faults["samples"] += [
            f"{where}: {fault}" for fault in _incomplete(split, meta, members, pictures)
        ]
        sample_id = meta["product_id" if is_product else "content_id"]
        digests = [_digest(members[picture]) for picture in pictures]
        if is_product:
            self.catalog.setdefault(sample_id, _Product(meta.get("title"), digests))
        elif not self.is_foreign:
            self._compare_inline(where, products, members)
        by = self.manifest.config.get("split_by")
        return _Sample(
            split=split,
            shard=shard,
            row=row,
            key=key,
            id=str(sample_id),
            product_ids=tuple(product["product_id"] for product in products),
            weights=tuple(float(product.get("weight", 1.0)) for product in products),
            has_title=meta.get("title") is not None,
            num_pictures=len(pictures),
            num_bytes=sum(len(members[picture]) for picture in pictures),
            hashes=self._decode(where, {n: d for n, d in members.items() if n != META_NAME}, split),
            value=meta.get("attributes", {}).get(by) if by else None,
        )

    def _decode(self, where: str, pictures: Mapping[str, bytes], split: Split) -> bytes:
        """Decode every picture that is not known from the catalogue; returns the frames' hashes."""
        own = set(own_pictures(split, pictures))
        found = []
        for name, data in pictures.items():
            self.num_pictures += 1
            if name not in own and not self.is_foreign:
                continue  # an inline image: equal to the catalogue's, which was decoded, or a fault
            try:
                picture_hash = hash_jpeg(data)
            except Exception as error:  # a decoder may raise anything on damaged bytes
                self.faults["pictures"].append(f"{where}: {name} does not decode ({error})")
                continue
            if picture_hash is not None and name in own:
                found.append(picture_hash)
        return b"".join(found)

    def _compare_inline(
        self, where: str, products: Sequence[Mapping[str, Any]], members: Mapping[str, bytes]
    ) -> None:
        most = self.manifest.config.get("max_products_per_content", len(products))
        for p, product in enumerate(products):
            known = self.catalog.get(product["product_id"])
            if known is None:
                self.faults["links"].append(
                    f"{where}: product '{product['product_id']}' is not in the catalogue"
                )
                continue
            names = [product_image_name(p, i) for i in range(product["num_images"])]
            digests = [_digest(members[name]) for name in names if name in members]
            if digests != (known.images if p < most else []):
                self.faults["inline"].append(
                    f"{where}: images of product '{product['product_id']}' are not the catalogue's"
                )
            if product.get("title") != known.title:
                self.faults["inline"].append(
                    f"{where}: title of product '{product['product_id']}' is not the catalogue's"
                )


def _find_tars(folder: Place, manifest: Manifest) -> dict[Split, list[str]]:
    """The tars by split, in order: those in the folder, or where it cannot be listed the manifest's own."""
    found: set[str] = set()
    for family in ("products", "contents"):
        for pattern in ("*.tar", "*.parquet"):
            for path in list_files(folder / family, pattern):
                found.add(f"{family}/{path.with_suffix('.tar').name}")
    if is_remote(folder) and not found:
        found = set(manifest.details.get("files", ()))
    by_split: dict[Split, list[str]] = {split: [] for split in _ORDER}
    for name in sorted(found):
        split = name.split("/")[1].rsplit("-", 1)[0]
        if split in by_split:
            by_split[cast("Split", split)].append(name)
    return by_split


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _places(table: pa.Table) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key, and offset and size by member name, of each row of an index."""
    for batch in table.to_batches(max_chunksize=1_000):
        for row in batch.to_pylist():
            places = zip(row["offsets"], row["sizes"], strict=True)
            yield row["key"], dict(zip(row["names"], places, strict=True))


def _differing_index(tar: Place, name: str, scanned: pa.Table) -> list[str]:
    """What an index says that its tar does not."""
    try:
        stored = pq.read_table(local_copy(index_path(tar)))
    except FileNotFoundError:
        return [f"{name} has no index"]
    except (pa.ArrowException, OSError) as error:
        return [f"the index of {name} cannot be read ({error})"]
    missing = [column for column in INDEX_SCHEMA.names if column not in stored.column_names]
    if missing:
        return [f"the index of {name} has no column {', '.join(missing)}"]
    if (stored.schema.metadata or {}).get(TAR_BYTES) != scanned.schema.metadata[TAR_BYTES]:
        return [f"the index of {name} was made for a tar of another size"]
    if len(stored) != len(scanned):
        return [f"the index of {name} has {len(stored)} samples, and the tar {len(scanned)}"]
    for column in INDEX_SCHEMA.names:
        columns = (stored[column].to_pylist(), scanned[column].to_pylist())
        for key, said, found in zip(scanned["key"].to_pylist(), *columns, strict=True):
            if said != found:
                return [f"the index of {name} has other {column} than the tar for sample '{key}'"]
    return []


def _incomplete(
    split: Split, meta: Mapping[str, Any], members: Collection[str], pictures: Sequence[str]
) -> Iterator[str]:
    """Where a sample's members are not those that its JSON member speaks of."""
    if not pictures and not (split == "catalog" and meta.get("num_images") == 0):
        yield "has no picture of its own"
    expected = {META_NAME, *pictures}
    if split == "catalog":
        if meta.get("num_images", len(pictures)) != len(pictures):
            yield f"says {meta['num_images']} images and has {len(pictures)}"
    else:
        if not isinstance(meta.get("content_id"), str):
            yield "has no content id"
        for p, product in enumerate(meta["products"]):
            expected |= {product_image_name(p, i) for i in range(product["num_images"])}
        times = meta.get("frame_times") or []
        if len(times) not in (0, len(pictures)):
            yield f"has {len(pictures)} frames and {len(times)} times"
        if any(later < earlier for earlier, later in pairwise(times)):
            yield "has frames that are not in order of time"
    if differing := expected ^ set(members):
        yield f"members differ from what it names: {', '.join(sorted(differing))}"


# Checks of the files


def _of_faults(claim: str, faults: Sequence[str], detail: str) -> Check:
    """That a claim holds, with a detail, unless there are faults."""
    if not faults:
        return Check(claim, True, detail)
    more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
    return Check(claim, False, faults[0] + more)


def _check_files(shards: _Shards) -> Check:
    faults = list(shards.faults["files"])
    listed = shards.manifest.details.get("files")
    if listed is not None:
        faults += [f"{name} is not there" for name in sorted(set(listed) - set(shards.names))]
        faults += [f"{name} is not listed" for name in sorted(set(shards.names) - set(listed))]
    return _of_faults("tars", faults, f"{len(shards.names):,}, all whole")


def _check_fingerprint(shards: _Shards) -> Check:
    claimed = shards.manifest.fingerprint
    if not shards.is_foreign:
        found = fingerprint_of(shards.hashes)
    elif isinstance(shards.folder, Path):
        try:
            found = foreign._fingerprint(shards.folder)
        except (OSError, KeyError, TypeError, pa.ArrowException) as error:
            return Check("fingerprint", False, f"cannot be taken ({error})")
    else:
        return Check("fingerprint", None, "of foreign tars is taken of a local folder alone")
    detail = found if found == claimed else f"the manifest says {claimed}, the tars give {found}"
    return Check("fingerprint", found == claimed, detail)


def _check_indexes(shards: _Shards) -> Check:
    return _of_faults("indexes", shards.faults["indexes"], "as scanned from the tars")


def _check_samples(shards: _Shards) -> Check:
    number = len(shards.products) + len(shards.contents)
    return _of_faults("samples", shards.faults["samples"], f"{number:,}, each with what it names")


def _check_pictures(shards: _Shards) -> Check:
    return _of_faults("pictures", shards.faults["pictures"], f"{shards.num_pictures:,}, all decode")


def _check_keys(shards: _Shards) -> Check:
    # The keys of foreign tars are their makers' affair, as long as ids tell samples apart.
    if shards.is_foreign:
        return Check("keys", None, "of foreign tars are theirs")
    seen = Counter((sample.split, sample.key) for sample in (*shards.products, *shards.contents))
    twice = [f"'{key}' occurs {n} times in {split}" for (split, key), n in seen.items() if n > 1]
    return _of_faults("keys", twice, "unique in each split")


def _check_catalog(shards: _Shards) -> Check:
    seen = Counter(product.id for product in shards.products)
    twice = [f"product '{name}' occurs {n} times" for name, n in seen.items() if n > 1]
    return _of_faults("catalogue", twice, f"{len(seen):,} products, each once")


def _check_links(shards: _Shards) -> Check:
    faults = list(shards.faults["links"])
    for sample in shards.contents:
        if shards.is_foreign:
            faults += [
                f"content '{sample.id}': product '{product}' is not in the catalogue"
                for product in sample.product_ids
                if product not in shards.catalog
            ]
        if len(set(sample.product_ids)) < len(sample.product_ids):
            faults.append(f"content '{sample.id}' links to a product twice")
        if any(not weight > 0 for weight in sample.weights):
            faults.append(f"content '{sample.id}' has a link of weight 0 or below")
    return _of_faults("links", faults, "all to products of the catalogue")


def _check_inline(shards: _Shards) -> Check:
    if shards.is_foreign:
        return Check("inline products", None, "of foreign tars are those of each sample")
    return _of_faults("inline products", shards.faults["inline"], "are the catalogue's")


def _check_drops(shards: _Shards) -> Check:
    counts = shards.manifest.counts
    faults = _differing_facts(shards, "dropped.parquet")
    dropped, skipped = Counter(counts.get("dropped", {})), counts.get("images_skipped", {})
    if is_file(shards.folder / "dropped.parquet"):
        listed = read_dropped(shards.folder, shards.manifest)
        for name, counted, found in (
            ("dropped", dropped, Counter(d["reason"] for d in listed if d["kind"] != "image")),
            (
                "images skipped",
                skipped,
                Counter(d["reason"] for d in listed if d["kind"] == "image"),
            ),
        ):
            if dict(counted) != dict(found):
                faults.append(
                    f"{name}: the manifest counts {_listed(counted)}, dropped.parquet {_listed(found)}"
                )
        if shards.is_ours:
            faults += _unbalanced(counts, listed)
    came, went = counts["in"], counts["out"]
    before = came["samples"] if shards.is_foreign else came["contents"] + came["products"]
    after = went["contents"] + (0 if shards.is_foreign else went["products"])
    if before != after + dropped.total():
        faults.append(
            f"{before:,} came in, {after:,} went out, and {dropped.total():,} were dropped"
        )
    return _of_faults("drops", faults, f"{before:,} in, {dropped.total():,} dropped, {after:,} out")


def _unbalanced(
    counts: Mapping[str, Mapping[str, int]], listed: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Of products, contents and links, those where what came in is not what went out and what was lost."""
    lost = Counter(f"{drop['kind']}s" for drop in listed)
    lost["links"] = sum(drop.get("num_links", 0) for drop in listed)
    for name in ("products", "contents", "links"):
        came, went = counts["in"][name], counts["out"][name]
        if came != went + lost[name]:
            yield f"{name}: {came:,} came in, {went:,} went out, and {lost[name]:,} were lost"


def _differing_facts(shards: _Shards, name: str) -> list[str]:
    """Whether a table beside the tars is gone, or is not the one whose hash the manifest has."""
    claimed = shards.manifest.details.get("facts", {}).get(name)
    path = shards.folder / name
    if not is_file(path):
        return [f"{name} is not there"] if shards.is_ours else []
    if claimed is None:
        return [f"the manifest has no hash of {name}"] if shards.is_ours else []
    return [] if hash_file(path) == claimed else [f"{name} is not the one that was written"]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "none"


_RECORDED = ("kind", "id", "shard", "num_pictures", "num_bytes", "has_title", "num_links")


def _check_recorded(shards: _Shards) -> Check:
    """Whether samples.parquet is about the samples of the tars."""
    claim, path = "samples.parquet", shards.folder / "samples.parquet"
    altered = _differing_facts(shards, claim)
    if not is_file(path):
        return Check(claim, False if altered else None, "is not there")
    try:
        rows = pq.read_table(local_copy(path), columns=["split", "row", *_RECORDED]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        return Check(claim, False, f"cannot be read ({error})")
    found = {(row["split"], row["row"]): row for row in rows}
    links = Counter(p for c in shards.contents if c.split == "train" for p in c.product_ids)
    faults: list[str] = []
    if len(rows) != len(shards.products) + len(shards.contents):
        number = len(shards.products) + len(shards.contents)
        faults.append(f"has {len(rows):,} rows for {number:,} samples")
    for sample in (*shards.products, *shards.contents):
        expected = _recorded(sample, links)
        row = found.get((sample.split, sample.row))
        if row is None:
            faults.append(f"has no row {sample.row} of {sample.split}")
            continue
        faults += [
            f"row {sample.row} of {sample.split} has {name} {row[name]}, and the tar {expected[name]}"
            for name in _RECORDED
            if row[name] != expected[name]
        ][:1]
    # What differs from the tars says more than that something does.
    faults += altered
    return _of_faults(claim, faults, f"{len(rows):,} rows that agree with the tars")


def _recorded(sample: _Sample, links: Mapping[str, int]) -> dict[str, Any]:
    is_product = sample.split == "catalog"
    return {
        "kind": "product" if is_product else "content",
        "id": sample.id,
        "shard": sample.shard,
        "num_pictures": sample.num_pictures,
        "num_bytes": sample.num_bytes,
        "has_title": sample.has_title,
        "num_links": links[sample.id] if is_product else len(sample.product_ids),
    }


_CHECKS: tuple[Callable[[_Shards], Check], ...] = (
    _check_files,
    _check_fingerprint,
    _check_indexes,
    _check_samples,
    _check_pictures,
    _check_keys,
    _check_catalog,
    _check_links,
    _check_inline,
    _check_recorded,
    _check_drops,
)


# Counts


def _check_counts(shards: _Shards) -> Iterator[Check]:
    details = shards.manifest.details
    claimed: Mapping[str, Mapping[str, int]] = details["splits"]
    found = _count_splits(shards)
    for split in sorted({*claimed, *found}, key=_ORDER.index):
        said = {name: claimed.get(split, {}).get(name, 0) for name in _COUNTED}
        yield _compare(f"split {split}", said, found.get(split, dict.fromkeys(_COUNTED, 0)))
    trained = {p for c in shards.contents if c.split == "train" for p in c.product_ids}
    yield _compare(
        "products",
        {name: details[name] for name in ("catalog", "warm_products", "cold_products")},
        {
            "catalog": len(shards.products),
            "warm_products": len(trained),
            "cold_products": len(shards.products) - len(trained),
        },
    )
    yield _compare(
        "totals",
        shards.manifest.counts["out"],
        {
            "products": len(shards.products),
            "contents": len(shards.contents),
            "links": sum(len(content.product_ids) for content in shards.contents),
        },
    )


_COUNTED = ("contents", "links", "products", "shards")


def _count_splits(shards: _Shards) -> dict[str, dict[str, int]]:
    by_split: dict[str, list[_Sample]] = defaultdict(list)
    for content in shards.contents:
        by_split[content.split].append(content)
    return {
        split: {
            "contents": len(contents),
            "links": sum(len(content.product_ids) for content in contents),
            "products": len({p for content in contents for p in content.product_ids}),
            "shards": len({content.shard for content in contents}),
        }
        for split, contents in by_split.items()
    }


def _compare(claim: str, said: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    """Whether the manifest's figures are those that were counted."""
    if dict(said) == dict(found):
        return Check(claim, True, _figures(found))
    names = [name for name in {**found, **said} if said.get(name) != found.get(name)]
    parts = [f"the manifest says {_name(n)} {said.get(n)}, the tars {found.get(n)}" for n in names]
    return Check(claim, False, "; ".join(parts))


def _figures(found: Mapping[str, Any]) -> str:
    shown = {_name(n): f"{v:,}" if isinstance(v, int) else v for n, v in found.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _name(name: str) -> str:
    return name.replace("_", " ")


# Claims about the splits


def _check_claims(shards: _Shards) -> Iterator[Check]:
    """The claims that `make_claims` made, made again."""
    claimed = shards.manifest.details.get("claims")
    config = _split_config(shards.manifest)
    if claimed is None:
        yield _check_disjoint(shards, 0)
        # Claims that the settings promise are missed; earlier versions, and foreign tars, made none.
        missed = False if shards.is_ours else None
        yield Check("near duplicates", missed, "not claimed")
        yield Check("cold products", missed, "not claimed")
        if config.split_by:
            yield Check(f"split by {config.split_by}", missed, "not claimed")
        return
    # In the order of ids, since that of the tables is not kept: groups depend on it only where more
    # contents share a frame than are compared with one another.
    contents = sorted(shards.contents, key=lambda content: content.id)
    groups = group_duplicates([_split_hashes(c.hashes) for c in contents]).tolist()
    cold = cold_products(config, _known_products(shards))
    found = make_claims(
        [content.id for content in contents],
        [cast("ContentSplit", content.split) for content in contents],
        groups=groups,
        links={c.id: list(zip(c.product_ids, c.weights, strict=True)) for c in contents},
        cold=cold,
        cold_asked=config.cold_products,
    )
    recorded = _read_recorded(shards)
    yield _check_disjoint(shards, claimed.get("contents", {}).get("in_two_splits"))
    yield _check_groups(config, claimed, found, _differing_groups(recorded, contents, groups))
    yield _check_cold(claimed, found, _differing_cold(recorded, shards, cold))
    if config.split_by and (config.val or config.test):
        yield _check_order(shards, config, claimed.get("split_by", {}))


def _check_disjoint(shards: _Shards, claimed: int | None) -> Check:
    """No content occurs twice, be it in two splits or in one."""
    splits: dict[str, list[Split]] = defaultdict(list)
    for content in shards.contents:
        splits[content.id].append(content.split)
    faults = [f"content '{i}' is in {' and '.join(s)}" for i, s in splits.items() if len(s) > 1]
    if not faults and claimed != 0:
        faults = [f"the manifest says {claimed} in two splits, the tars 0"]
    return _of_faults("contents", faults, f"{len(splits):,}, each in one split, once")


def _check_groups(
    config: SplitConfig, claimed: Mapping[str, Any], found: Mapping[str, Any], differing: list[str]
) -> Check:
    claim = "near_duplicates"
    check = _compare(_name(claim), claimed.get(claim, {}), found[claim])
    straddling = found[claim]["straddling"]
    if straddling and config.near_duplicates == "together":
        return Check(check.claim, False, f"{straddling} contents look like one of a later split")
    return _of_faults(check.claim, differing, check.detail) if check.holds else check


def _check_cold(
    claimed: Mapping[str, Any], found: Mapping[str, Any], differing: list[str]
) -> Check:
    claim = "cold_products"
    check = _compare(_name(claim), claimed.get(claim, {}), found[claim])
    linked = found[claim]["linked_in_training"]
    if linked:
        return Check(check.claim, False, f"{linked} training links lead to products held out")
    return _of_faults(check.claim, differing, check.detail) if check.holds else check


def _split_config(manifest: Manifest) -> SplitConfig:
    names = [part.name for part in fields(SplitConfig)]
    return SplitConfig(**{name: manifest.config[name] for name in names if name in manifest.config})


def _split_hashes(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def _known_products(shards: _Shards) -> list[str]:
    """Products of the catalogue, and those that were dropped: the rule holds out of both."""
    lost = read_dropped(shards.folder, shards.manifest)
    dropped = [drop["id"] for drop in lost if drop["kind"] == "product"]
    return [*{product.id for product in shards.products}, *dropped]


def _read_recorded(shards: _Shards) -> list[dict[str, Any]]:
    """Kind, id, group and whether cold, as samples.parquet has them; nothing where it has not."""
    path = shards.folder / "samples.parquet"
    try:
        return pq.read_table(local_copy(path), columns=["kind", "id", "group", "cold"]).to_pylist()
    except (pa.ArrowException, OSError):
        return []  # a claim of its own, which was checked


def _differing_groups(
    recorded: Sequence[Mapping[str, Any]], contents: Sequence[_Sample], groups: Sequence[int]
) -> list[str]:
    """Contents that samples.parquet puts with others than those that look like them."""
    said = {row["id"]: row["group"] for row in recorded if row["kind"] == "content"}
    if not said:
        return []
    sizes = Counter(groups)
    # As make_shards names groups: by the first id in it, and those alone not at all.
    named = {
        content.id: contents[group].id if sizes[group] > 1 else None
        for content, group in zip(contents, groups, strict=True)
    }
    return [
        f"samples.parquet has content '{name}' in group {said.get(name)}, its pictures in {group}"
        for name, group in named.items()
        if said.get(name) != group
    ]


def _differing_cold(
    recorded: Sequence[Mapping[str, Any]], shards: _Shards, cold: Collection[str]
) -> list[str]:
    said = {(row["kind"], row["id"]): row["cold"] for row in recorded}
    expected = {("product", product.id): product.id in cold for product in shards.products}
    expected |= {("content", c.id): any(p in cold for p in c.product_ids) for c in shards.contents}
    return [
        f"samples.parquet says otherwise of {kind} '{name}'"
        for (kind, name), is_cold in expected.items()
        if said.get((kind, name), is_cold) != is_cold
    ]


def _check_order(shards: _Shards, config: SplitConfig, claimed: Mapping[str, Any]) -> Check:
    """The first value held out, and that no training content has one as late."""
    claim = f"split by {config.split_by}"
    missing = [content.id for content in shards.contents if content.value is None]
    if missing or not shards.contents:
        return Check(claim, False, f"content '{missing[0]}' has no value there" if missing else "")
    checks = []
    for values in _readings([content.value for content in shards.contents]):
        try:
            found = _order(config, shards.contents, values)
        except UserError as error:  # values that cannot be ordered
            checks.append(Check(claim, False, str(error)))
            continue
        check = _compare(claim, claimed, found)
        if check.holds:
            spans = [f"{split} {a} to {b}" for split, (a, b) in found.pop("spans").items()]
            check = Check(claim, True, f"{_figures(found)}: {', '.join(spans)}")
        late = f"{found['too_late']} training contents are not before {found['held_out_from']}"
        checks.append(check if not found["too_late"] else Check(claim, False, late))
    return next((check for check in checks if check.holds), checks[0])


def _order(
    config: SplitConfig, contents: Sequence[_Sample], values: Sequence[Any]
) -> dict[str, Any]:
    """The claim about order alone, made as it was made before."""
    return make_claims(
        [content.id for content in contents],
        [cast("ContentSplit", content.split) for content in contents],
        groups=range(len(contents)),
        links=defaultdict(list),
        cold=(),
        values=values,
        held_out_from=held_out_from(config, values),
    )["split_by"]


def _readings(values: list[Any]) -> Iterator[list[Any]]:
    """The values as JSON holds them; of text also the decimals or the times that it may stand for."""
    yield values
    if all(isinstance(value, str) for value in values):
        readers: tuple[Callable[[str], Any], ...] = (Decimal, datetime.fromisoformat)
        for read in readers:
            with suppress(InvalidOperation, ValueError):
                yield [read(value) for value in values]
