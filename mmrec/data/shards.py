"""Shards: plain WebDataset tars, each with an index beside it that makes it randomly readable.

This is the only home of the member names. A content `<key>` has `<key>.f00.jpg` (a frame),
`<key>.p0.i0.jpg` (image 0 of its product 0) and `<key>.json`; a catalogue product has
`<key>.i0.jpg` and `<key>.json`. The webdataset library reads the tars as they are.
"""

import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmrec.errors import UserError
from mmrec.manifest import FILE_NAME, read_manifest

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
_TAR_BYTES = b"tar_bytes"
_MOST_OPEN_FILES = 128  # well below the usual limit of 1,024 a process


def frame_name(t: int) -> str:
    """The member name of frame `t` of a content."""
    return f"f{t:02d}.jpg"


def product_image_name(p: int, i: int) -> str:
    """The member name of image `i` of a content's product `p`."""
    return f"p{p}.i{i}.jpg"


def image_name(i: int) -> str:
    """The member name of image `i` of a catalogue product."""
    return f"i{i}.jpg"


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where shard `number` of a split lies in a shards' folder."""
    family = next(family for family, splits in FAMILY_SPLITS.items() if split in splits)
    return folder / family / f"{split}-{number:06d}.tar"


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
    # Imported here because the package brings torch with it.
    from webdataset.writer import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    tar = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    index = tar.with_suffix(tar.suffix + ".parquet")
    try:
        with (
            open(tar, "wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="mmrec", group="mmrec") as writer,
        ):
            for sample in samples:
                if "." in sample.key or "/" in sample.key:
                    raise ValueError(f"key '{sample.key}' has a dot or a slash in it")
                meta = json.dumps(sample.meta, ensure_ascii=False, allow_nan=False).encode()
                writer.write({"__key__": sample.key, META_NAME: meta, **sample.members})
        pq.write_table(index_shard(tar), index)
        index.replace(index_path(path))
        tar.replace(path)
    finally:
        tar.unlink(missing_ok=True)
        index.unlink(missing_ok=True)


def index_path(tar: Path) -> Path:
    """Where the index of a tar lies."""
    return tar.with_suffix(".parquet")


def index_shard(tar: Path) -> pa.Table:
    """Scan a tar into its index: a row per sample, in the order of the tar.

    Columns: key, content_id (null in a catalog), product_ids, weights, and for every member its
    name without the key, the offset of its bytes in the tar, and their number. The table's metadata
    holds the tar's size. Raises `UserError` for a tar that is damaged, or whose samples have no
    JSON member.
    """
    rows: list[dict[str, Any]] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isfile():
                    _index_member(rows, archive, member)
    except (tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{tar}: not a shard that mmrec reads: {error}") from None
    unnamed = next((row["key"] for row in rows if not row["product_ids"]), None)
    if unnamed is not None:
        raise UserError(f"{tar}: sample '{unnamed}' has no {META_NAME} that names its products")
    table = pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)
    return table.replace_schema_metadata({_TAR_BYTES: str(tar.stat().st_size)})


def _index_member(
    rows: list[dict[str, Any]], archive: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
    key, _, name = member.name.partition(".")
    if not rows or rows[-1]["key"] != key:
        new: dict[str, Any] = {"key": key, "content_id": None}
        rows.append(new | {c: [] for c in INDEX_SCHEMA.names if c not in new})
    row = rows[-1]
    row["names"].append(name)
    row["offsets"].append(member.offset_data)
    row["sizes"].append(member.size)
    if name != META_NAME:
        return
    file = archive.extractfile(member)
    meta = json.loads(file.read() if file else b"")
    row["content_id"] = meta.get("content_id")
    products = meta.get("products", [meta])
    row["product_ids"] = [product["product_id"] for product in products]
    row["weights"] = [float(product.get("weight", 1.0)) for product in products]


class ShardReader:
    """Random access to the samples of one split, by row number.

    Row numbers run through the shards in order. Reads need no lock and no seek, so threads and
    forked workers may share a reader; it pickles without its open files.
    """

    def __init__(self, tars: Sequence[Path], family: Family) -> None:
        tables = [_read_index(tar) for tar in tars]
        table = pa.concat_tables(tables)
        self.family: Family = family
        self.paths = [Path(tar) for tar in tars]
        self.shard_sizes: list[int] = [len(part) for part in tables]
        self.keys: list[str] = table["key"].to_pylist()
        self.content_ids: list[str] = table["content_id"].to_pylist()
        """A content's id; None in every row of a catalog."""
        self.product_ids: list[list[str]] = table["product_ids"].to_pylist()
        self.weights: list[list[float]] = table["weights"].to_pylist()
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
        """What a sample's JSON member holds."""
        return json.loads(self.read(row, [META_NAME])[META_NAME])

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
            file = self._files[shard] = _File(self.paths[shard])
        data = file.read_at(offset, size)
        if len(data) < size:
            raise UserError(f"{self.paths[shard]}: ends before byte {offset + size}")
        return data


class _File:
    """A file open for reading, closed when its last holder lets go, so that no read loses it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def open_shards(folder: Path | str, family: Family, split: Split) -> ShardReader:
    """Open all shards of a split for random reading.

    Raises `UserError` when the folder has no such split, a tar has no index, or the two disagree.
    """
    folder = Path(folder)
    if split not in FAMILY_SPLITS.get(family, ()):
        raise ValueError(f"no split '{split}' in family '{family}'")
    tars = sorted((folder / family).glob(f"{split}-*.tar"))
    if not tars:
        kinds = {tar.name.rsplit("-", 1)[0] for tar in (folder / family).glob("*.tar")}
        found = ", ".join(sorted(kinds)) or "none"
        raise UserError(f"{folder}: no {family} shards of split '{split}'; found {found}")
    reader = ShardReader(tars, family)
    if (folder / FILE_NAME).is_file():
        details = read_manifest(folder, "shards").details
        samples = details["catalog"] if split == "catalog" else details["splits"][split]["contents"]
        if len(reader) != samples:
            raise UserError(
                f"{folder}: the manifest counts {samples} samples of split '{split}', and the shards "
                f"that are there hold {len(reader)}; make the shards anew with data_prep/make_shards.py"
            )
    return reader


def _read_index(tar: Path) -> pa.Table:
    path = index_path(tar)
    mend = "make the shards anew with data_prep/make_shards.py"
    if not path.is_file():
        raise UserError(f"{tar}: has no index {path.name} beside it; {mend}")
    try:
        table = pq.read_table(path)
        expected = int(table.schema.metadata[_TAR_BYTES])
        table = table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not the index of a shard ({error}); {mend}") from None
    found = tar.stat().st_size
    if found != expected:
        raise UserError(
            f"{tar}: has {found} bytes, but its index was made for a tar of {expected}; {mend}"
        )
    return table


def _position(names: list[str], name: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise KeyError(f"no member '{name}' among {', '.join(names)}") from None
