"""Shards: plain WebDataset tars, each with an index beside it that makes it randomly readable.

This is the only home of the member names. A content `<key>` has `<key>.f00.jpg` (a frame),
`<key>.p0.i0.jpg` (image 0 of its product 0) and `<key>.json`; a catalogue product has
`<key>.i0.jpg` and `<key>.json`. The webdataset library reads the tars as they are.

A tar that others wrote can stay as it is: its index (made by `mmrec shards index`) gives the members
our names, holds what the JSON member would hold, and says where the tar lies.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmrec.data.storage import (
    Place,
    is_file,
    is_remote,
    joined,
    list_files,
    local_copy,
    place,
)
from mmrec.errors import UserError
from mmrec.manifest import FILE_NAME, Manifest, read_manifest

AnyPlace = TypeVar("AnyPlace", bound=Place)
Family = Literal["contents", "products"]
Split = Literal["train", "val", "test", "catalog"]

FAMILY_SPLITS: Mapping[str, tuple[str, ...]] = {
    "contents": ("train", "val", "test"),
    "products": ("catalog",),
}
META_NAME = "json"

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("content_id", pa.string()),  # null in a catalog
        ("product_ids", pa.list_(pa.string())),
        ("weights", pa.list_(pa.float64())),
        ("names", pa.list_(pa.string())),
        ("offsets", pa.list_(pa.int64())),
        ("sizes", pa.list_(pa.int64())),
    ]
)
META_COLUMN = pa.field("meta", pa.large_string())
"""In the index of a foreign tar: the text of the JSON member that the tar does not have."""
TAR_BYTES = b"tar_bytes"
"""In an index's metadata: the size of its tar."""
TAR_PLACE = b"tar"
"""In an index's metadata: its tar's URL, or path from the index's folder, if it does not lie beside it."""
_MOST_OPEN_FILES = 128  # well below the usual limit of 1,024 a process
_FETCHES = 16  # indexes fetched at once
_CHECKED = 5  # samples of a shard that are compared with its index as it is opened
_MEND = (
    "make the shards anew with data_prep/make_shards.py, or the index of a foreign tar with "
    "`mmrec shards index`"
)
_ATTEMPTS = 3  # a tar may leave the cache between its fetch and its opening


def frame_name(t: int) -> str:
    """The member name of frame `t` of a content."""
    return f"f{t:02d}.jpg"


def product_image_name(p: int, i: int) -> str:
    """The member name of image `i` of a content's product `p`."""
    return f"p{p}.i{i}.jpg"


def image_name(i: int) -> str:
    """The member name of image `i` of a catalogue product."""
    return f"i{i}.jpg"


def shard_path(folder: AnyPlace, split: str, number: int) -> AnyPlace:
    """Where shard `number` of a split lies in a shards' folder."""
    family = next(family for family, splits in FAMILY_SPLITS.items() if split in splits)
    return cast("AnyPlace", folder / family / f"{split}-{number:06d}.tar")


@dataclass(frozen=True)
class ShardSample:
    """One sample of a shard: a content or a catalogue product."""

    key: str
    """Unique in its split, without dots: webdataset splits a member's name at the first one."""
    members: Mapping[str, bytes]
    """JPEG bytes by member name."""
    meta: Mapping[str, Any]
    """What the sample's JSON member holds."""


def write_shard(path: Path, samples: Iterable[ShardSample]) -> None:
    """Write a tar and its index; the same samples give the same bytes.

    Both are written under temporary names. The index is renamed first, so a tar under its final
    name is whole and has its index.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tar = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    index = tar.with_suffix(tar.suffix + ".parquet")
    try:
        # As webdataset's own writer does it, which would bring torch into each worker of a preparation.
        with tarfile.open(tar, "w") as archive:
            for sample in samples:
                if "." in sample.key or "/" in sample.key:
                    raise ValueError(f"key '{sample.key}' has a dot or a slash in it")
                meta = json.dumps(sample.meta, ensure_ascii=False, allow_nan=False).encode()
                for name, data in sorted({META_NAME: meta, **sample.members}.items()):
                    member = tarfile.TarInfo(f"{sample.key}.{name}")
                    member.size = len(data)
                    member.mode = 0o444
                    member.uname = member.gname = "mmrec"
                    archive.addfile(member, io.BytesIO(data))
        pq.write_table(index_shard(tar), index)
        index.replace(index_path(path))
        tar.replace(path)
    finally:
        tar.unlink(missing_ok=True)
        index.unlink(missing_ok=True)


def index_path(tar: AnyPlace) -> AnyPlace:
    """Where the index of a tar lies."""
    return cast("AnyPlace", tar.with_suffix(".parquet"))


def index_shard(tar: Path) -> pa.Table:
    """Scan a tar into its index: a row per sample, in the order of the tar.

    Columns: key, content_id (null in a catalog), product_ids, weights, and for every member its
    name without the key, the offset of its bytes in the tar, and their number. The table's metadata
    holds the tar's size. Raises `UserError` as `scan_tar` does, and for a sample without a JSON
    member that names its products.
    """
    with open(tar, "rb") as file:
        rows = [_index_row(tar, sample, file.fileno()) for sample in scan_tar(tar)]
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    return table.replace_schema_metadata({TAR_BYTES: str(tar.stat().st_size)})


def _index_row(tar: Path, sample: "TarSample", descriptor: int) -> dict[str, Any]:
    if META_NAME not in sample.members:
        raise UserError(
            f"{tar}: sample '{sample.key}' has no {META_NAME} that names its products; a tar that mmrec "
            f"did not write is read by way of `mmrec shards index`"
        )
    offset, size = sample.members[META_NAME]
    try:
        meta = json.loads(os.pread(descriptor, size, offset))
        content_id, ids = _ids_of(meta)
        row = {
            "content_id": content_id,
            "product_ids": ids,
            "weights": [float(p.get("weight", 1.0)) for p in meta.get("products", [meta])],
        }
        if not ids or not all(isinstance(product_id, str) for product_id in ids):
            raise TypeError("expected product ids, as text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{tar}: member '{sample.key}.{META_NAME}' is not that of a shard: {error!r}"  # repr: one line
        ) from None
    places = sample.members.values()
    return row | {
        "key": sample.key,
        "names": list(sample.members),
        "offsets": [offset for offset, _ in places],
        "sizes": [size for _, size in places],
    }


def _ids_of(meta: Any) -> tuple[Any, list[Any]]:
    """The content's id, if it is one, and its products' ids, by a sample's JSON member."""
    products = meta.get("products", [meta])
    return meta.get("content_id"), [product["product_id"] for product in products]


def _meta_of(text: bytes, expected: tuple[str | None, list[str]]) -> dict[str, Any] | None:
    """What a JSON member holds; None where it is not that of a sample with such ids."""
    try:
        meta = json.loads(text)
        return meta if _ids_of(meta) == expected else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


# Scanning tars, ours or not.

# As webdataset splits a name: a folder belongs to the key, and a name ends at the first dot after it.
_KEY_AND_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_TAR_META = re.compile(r"__[^/]*__(/|$)")
_BLOCK = 512  # the unit of a tar
_TAIL_BYTES = 1 << 20


@dataclass
class TarSample:
    """Members of a tar that follow each other and share a key."""

    key: str
    """With its folder, as webdataset has it: `a/b/000` for `a/b/000.jpg`."""
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size in bytes by name; names in lower case, as webdataset has them."""


def scan_tar(tar: Path) -> Iterator[TarSample]:
    """Samples of a plain tar in its order, from its headers alone.

    Folders, and files that webdataset would pass over, are passed over. Raises `UserError` for a tar
    that is compressed, cut off or damaged, and for one in which a member is absolute or climbs up
    (`..`), is a link, a device or a sparse file, occurs twice, or belongs to a sample that has ended.
    """
    sample: TarSample | None = None
    seen: set[str] = set()
    for member in _scan_members(tar):
        _check_member(tar, member)
        found = _KEY_AND_NAME.fullmatch(member.name)
        if not member.isfile() or found is None or _TAR_META.match(member.name):
            continue
        key, name = found[1], found[2].lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            if key in seen:
                raise _bad_member(tar, member, f"sample '{key}' has ended before it")
            seen.add(key)
            sample = TarSample(key)
        if name in sample.members:
            raise _bad_member(tar, member, "it occurs twice")
        sample.members[name] = (member.offset_data, member.size)
    if sample is not None:
        yield sample


class _TarInfo(tarfile.TarInfo):
    """A header whose size is sound: by a negative one, older Pythons read the same bytes for ever."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_TarInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise tarfile.ReadError(f"member '{info.name}' has a negative size")
        return info


def _scan_members(tar: Path) -> Iterator[tarfile.TarInfo]:
    end = 0
    try:
        with tarfile.open(tar, "r:", tarinfo=_TarInfo) as archive:
            while (member := archive.next()) is not None:
                yield member
                # Else it keeps all of them.
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            end = archive.offset
    except FileNotFoundError:
        raise UserError(f"{tar}: no such tar") from None
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"{tar}: not a shard that mmrec reads: {error}") from None
    # tarfile takes a header that it cannot read for the end, which is marked by a block of zeros.
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise UserError(
                f"{tar}: not a shard that mmrec reads: it is cut off or damaged at byte {end}, where a "
                f"member or the mark of its end should be"
            )
        # What follows is zeros, which fill up the last record of a tape.
        while rest := file.read(_TAIL_BYTES):
            if rest.count(0) < len(rest):
                start = file.tell() - len(rest.lstrip(b"\0"))
                raise UserError(
                    f"{tar}: holds something at byte {start}, after the mark of its end, where nobody "
                    f"would find it; tars are joined with `tar --concatenate`, not with `cat`"
                )


def _check_member(tar: Path, member: tarfile.TarInfo) -> None:
    name = member.name
    if name.startswith("/"):
        raise _bad_member(tar, member, "its name is absolute")
    if ".." in name.split("/"):
        raise _bad_member(tar, member, "its name climbs up by '..'")
    if member.issym() or member.islnk():
        raise _bad_member(tar, member, f"it is a link to '{member.linkname}'")
    if member.issparse():
        raise _bad_member(tar, member, "it is a sparse file, whose bytes are not in one piece")
    if not member.isfile() and not member.isdir():
        raise _bad_member(tar, member, "it is neither a file nor a folder")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _bad_member(tar, member, "its name is not UTF-8") from None


def _bad_member(tar: Path, member: tarfile.TarInfo, reason: str) -> UserError:
    # repr keeps the message to one line, whatever the name holds.
    return UserError(f"{tar}: member {member.name!r} is refused: {reason}")


class ShardReader:
    """Random access to the samples of one split, by row number.

    Row numbers run through the shards in order. Reads need no lock and no seek, so threads and
    forked workers may share a reader; it pickles without its open files.
    """

    def __init__(self, tars: Sequence[Place], family: Family) -> None:
        with ThreadPoolExecutor(_FETCHES) as pool:
            indexes = list(pool.map(_read_index, tars))
        tables = [index.table for index in indexes]
        has_meta = any(META_COLUMN.name in table.column_names for table in tables)
        table = pa.concat_tables(tables, promote_options="default")
        self.family: Family = family
        self.paths: list[Place] = [index.tar for index in indexes]
        """Where the tars lie."""
        self.shard_sizes: list[int] = [len(part) for part in tables]
        self.keys: list[str] = table["key"].to_pylist()
        self.content_ids: list[str] = table["content_id"].to_pylist()
        """A content's id; None in every row of a catalog."""
        self.product_ids: list[list[str]] = table["product_ids"].to_pylist()
        self.weights: list[list[float]] = table["weights"].to_pylist()
        self._tar_bytes = [index.tar_bytes for index in indexes]
        # Kept as Arrow has it: the texts of millions of samples, read a few at a time.
        self._metas = table[META_COLUMN.name] if has_meta else None
        self._shard_ends = np.cumsum(self.shard_sizes)
        # Members of all rows one after another: row r has those from _starts[r] to _starts[r + 1].
        columns = {name: table[name].combine_chunks() for name in ("names", "offsets", "sizes")}
        self._starts = columns["names"].offsets.to_numpy()
        self._offsets = columns["offsets"].flatten().to_numpy()
        self._sizes = columns["sizes"].flatten().to_numpy()
        # A few dozen names occur in millions of rows, so a row keeps their numbers.
        names = columns["names"].flatten().dictionary_encode()
        self._name_codes = names.indices.to_numpy()
        self._names: list[str] = names.dictionary.to_pylist()
        self._files: dict[int, _File] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def names(self, row: int) -> list[str]:
        """The member names of a sample, without its key, in the order of the tar."""
        return [self._names[code] for code in self._name_codes[self._members(row)]]

    def read(self, row: int, names: Sequence[str] | None = None) -> dict[str, bytes]:
        """Read the named members of a sample, or all of them.

        Raises `KeyError` for a name that the sample does not have, and `UserError` when the tar has
        shrunk since it was opened.
        """
        found = self.names(row)
        members = range(len(found)) if names is None else [_position(found, n) for n in names]
        where = self._members(row)
        offsets, sizes = self._offsets[where], self._sizes[where]
        shard = self._shard_of(row)
        return {found[i]: self._read_bytes(shard, int(offsets[i]), int(sizes[i])) for i in members}

    def meta(self, row: int) -> dict[str, Any]:
        """What a sample's JSON member holds, or its index in that member's place.

        Raises `UserError` where that member is of other ids than the index has for the sample.
        """
        if self._metas is not None:
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of {len(self)}")
            text = self._metas[row].as_py()
            if text is not None:
                return json.loads(text)
        text = self.read(row, [META_NAME])[META_NAME]
        meta = _meta_of(text, (self.content_ids[row], self.product_ids[row]))
        if meta is None:
            raise _other_sample(self.paths[self._shard_of(row)], self.keys[row])
        return meta

    def _members(self, row: int) -> slice:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    def _shard_of(self, row: int) -> int:
        return int(np.searchsorted(self._shard_ends, row, side="right"))

    def _read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _MOST_OPEN_FILES:
                self._files.clear()
            file = self._files[shard] = _File(self.paths[shard], self._tar_bytes[shard])
        data = file.read_at(offset, size)
        if len(data) < size:
            raise UserError(f"{self.paths[shard]}: ends before byte {offset + size}")
        return data


class _File:
    """A tar open for reading, closed when its last holder lets go, so that no read loses it."""

    def __init__(self, tar: Place, expected: int) -> None:
        self._descriptor = _open_copy(tar)
        # A local tar was measured when its index was read; a remote one has only now come.
        if is_remote(tar):
            _check_size(tar, os.fstat(self._descriptor).st_size, expected)

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _open_copy(tar: Place) -> int:
    """A descriptor of a tar, fetched where it is remote."""
    try:
        if isinstance(tar, Path):
            return os.open(tar, os.O_RDONLY)
        for _ in range(_ATTEMPTS):
            copy = local_copy(tar)
            with suppress(FileNotFoundError):
                return os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{tar}: no longer there") from None
    raise UserError(f"{tar}: leaves the cache before it is read; raise MMREC_CACHE_GB")


def open_shards(folder: Place | str, family: Family, split: Split) -> ShardReader:
    """Open all shards of a split for random reading; `folder` is a path or a URL.

    Indexes are fetched now, and a remote tar at the first read of a member. Raises `UserError` when
    the folder has no such split, a tar has no index, or the two disagree.
    """
    reader, _ = open_sources([folder], family, split)
    return reader


def open_sources(
    folders: Sequence[Place | str], family: Family, split: Split
) -> tuple[ShardReader, list[int]]:
    """Open a split of several folders as one, and say how many samples each of them has.

    Row numbers run through the folders in order. Raises `UserError` as `open_shards` does.
    """
    if split not in FAMILY_SPLITS.get(family, ()):
        raise ValueError(f"no split '{split}' in family '{family}'")
    places = [place(folder) for folder in folders]
    manifests = [
        read_manifest(folder, "shards") if is_file(folder / FILE_NAME) else None
        for folder in places
    ]
    tars = [
        _tars_of_split(folder, family, split, manifest)
        for folder, manifest in zip(places, manifests, strict=True)
    ]
    reader = ShardReader([tar for some in tars for tar in some], family)
    ends = np.cumsum([len(some) for some in tars])
    sizes = [
        sum(reader.shard_sizes[end - len(some) : end])
        for some, end in zip(tars, ends.tolist(), strict=True)
    ]
    for folder, manifest, size in zip(places, manifests, sizes, strict=True):
        if manifest is not None:
            _check_count(folder, split, manifest, size)
    return reader, sizes


def _tars_of_split(
    folder: Place, family: Family, split: Split, manifest: Manifest | None
) -> list[Place]:
    tars = _find_tars(folder, family, manifest)
    wanted = [tar for tar in tars if _split_of(tar) == split]
    if not wanted:
        found = ", ".join(sorted({_split_of(tar) for tar in tars})) or "none"
        raise UserError(f"{folder}: no {family} shards of split '{split}'; found {found}")
    return wanted


def _check_count(folder: Place, split: Split, manifest: Manifest, found: int) -> None:
    details = manifest.details
    samples = details["catalog"] if split == "catalog" else details["splits"][split]["contents"]
    if found != samples:
        raise UserError(
            f"{folder}: the manifest counts {samples} samples of split '{split}', and the shards "
            f"that are there hold {found}; make the shards anew with data_prep/make_shards.py"
        )


def _split_of(tar: Place) -> str:
    return tar.name.rsplit("-", 1)[0]


def _find_tars(folder: Place, family: Family, manifest: Manifest | None) -> list[Place]:
    """The tars of a family in their order, also those of which only the index lies in the folder.

    Not every remote folder can be listed, so there the manifest's own list counts.
    """
    listed = manifest.details.get("files") if manifest else None
    if is_remote(folder) and listed is not None:
        names = sorted(name for name in listed if name.split("/")[0] == family)
        return [joined(folder, name) for name in names]
    tars = list_files(folder / family, "*.tar")
    beside = {tar.name for tar in tars}
    for index in list_files(folder / family, "*.parquet"):
        tar = index.with_suffix(".tar")
        if tar.name not in beside and _is_of_a_foreign_tar(index):
            tars.append(tar)
    return sorted(tars, key=str)


def _is_of_a_foreign_tar(index: Place) -> bool:
    try:
        return TAR_PLACE in (pq.read_schema(local_copy(index)).metadata or {})
    except (pa.ArrowException, OSError):
        return False  # as any other file that happens to lie there


@dataclass(frozen=True)
class _Index:
    table: pa.Table
    tar: Place
    tar_bytes: int


def _read_index(tar: Place) -> _Index:
    path = index_path(tar)
    mend = "make the shards anew with data_prep/make_shards.py"
    try:
        table = pq.read_table(local_copy(path))
    except FileNotFoundError:
        raise UserError(f"{tar}: has no index {path.name} beside it; {mend}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not the index of a shard ({error}); {mend}") from None
    try:
        metadata = table.schema.metadata
        expected = int(metadata[TAR_BYTES])
        columns = [
            *INDEX_SCHEMA,
            *([META_COLUMN] if META_COLUMN.name in table.column_names else []),
        ]
        schema = pa.schema(columns)
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the index of a shard ({error}); {mend}") from None
    if TAR_PLACE in metadata:
        tar = joined(path.parent, metadata[TAR_PLACE].decode())
    if isinstance(tar, Path):
        try:
            _check_size(tar, tar.stat().st_size, expected)
            _check_samples(tar, table)
        except FileNotFoundError:
            raise UserError(f"{path}: is the index of {tar}, which is not there") from None
    return _Index(table, tar, expected)


def _check_size(tar: Place, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(
            f"{tar}: has {found} bytes, but its index was made for a tar of {expected}; {_MEND}"
        )


def _check_samples(tar: Path, table: pa.Table) -> None:
    """Refuse an index that was made of another tar of the same size; some samples tell."""
    rows = np.unique(np.linspace(0, len(table) - 1, min(_CHECKED, len(table))).astype(int))
    with open(tar, "rb") as file:
        for sample in table.take(rows).to_pylist():
            _check_sample(tar, file.fileno(), sample)


def _check_sample(tar: Path, descriptor: int, sample: Mapping[str, Any]) -> None:
    """Compare the header of a sample's last member, which is the block before its bytes, and its ids."""
    key, name = sample["key"], sample["names"][-1]
    offset, size = sample["offsets"][-1], sample["sizes"][-1]
    header = os.pread(descriptor, _BLOCK, offset - _BLOCK)
    try:
        member = _TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        member = None
    if member is None or member.size != size:
        raise UserError(
            f"{tar}: has no member of {size} bytes at byte {offset}, where its index has one; {_MEND}"
        )
    # Of a foreign tar the index has the keys, names of its own, and what would be in a JSON member.
    is_foreign = sample.get(META_COLUMN.name) is not None
    expected = f"{key}." if is_foreign else f"{key}.{name}"
    # A longer name, or one of other letters, may be cut or replaced in this header.
    is_plain = key.isascii() and len(member.name) < tarfile.LENGTH_NAME
    if is_plain and not member.name.lower().startswith(expected.lower()):
        raise UserError(
            f"{tar}: has member {member.name!r} where its index has one of sample {key!r}; {_MEND}"
        )
    if not is_foreign:
        place = sample["names"].index(META_NAME)
        text = os.pread(descriptor, sample["sizes"][place], sample["offsets"][place])
        if _meta_of(text, (sample["content_id"], sample["product_ids"])) is None:
            raise _other_sample(tar, key)


def _other_sample(tar: Place, key: str) -> UserError:
    return UserError(f"{tar}: sample {key!r} has other ids than its index says; {_MEND}")


def _position(names: list[str], name: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise KeyError(f"no member '{name}' among {', '.join(names)}") from None
