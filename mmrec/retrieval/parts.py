"""Parts: how a folder of embeddings lies on disk, and reading one by parts, ours or clip-retrieval's.

    img_emb/img_emb_000000.npy          (M, D) float16 or float32, unit length
    metadata/metadata_000000.parquet    an id and more for each of the same rows
    parts.json                          ours alone: rows and hashes of each part
    manifest.json                       ours alone

embedding-reader, autofaiss and clip-retrieval sort the names in each folder as text and pair them by place,
passing over vectors without rows. So our numbers have leading zeros, and no part is empty.
Shape letters: M rows of a part or of a stretch of it, N rows of all parts, D embedding width.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float32

from mmrec.data.storage import write_bytes_whole
from mmrec.errors import UserError
from mmrec.manifest import FILE_NAME, Manifest, fingerprint_of, read_manifest
from mmrec.retrieval.intake import checked_vectors, name_ids

VECTORS, METADATA, RECORD = "img_emb", "metadata", "parts.json"
_KINDS = (np.dtype("<f2"), np.dtype("<f4"))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One `.npy` file of vectors and the Parquet file of the same rows."""

    vectors: Path
    metadata: Path
    rows: int
    width: int
    dtype: np.dtype
    offset: int
    """Where the vectors begin in their file, in bytes."""
    vectors_sha256: str | None = None
    """What was written; None where others wrote it."""
    metadata_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A folder of embeddings that has been looked at, but not read."""

    folder: Path
    manifest: Manifest
    """Of embeddings that others wrote one with what is known of them, and no parents."""
    parts: list[Part]
    id_column: str | None
    """The column of the metadata that holds the ids; None where rows go by their numbers."""
    foreign: bool = False
    """Whether another program wrote them."""

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def width(self) -> int:
        """D."""
        return self.parts[0].width

    @property
    def key(self) -> str:
        """What an index calls the ids: product_id, or content_id for contents."""
        return "product_id" if self.manifest.details["family"] == "products" else "content_id"


# -------------------------------------------------------------------------------------------- writing


def part_names(number: int) -> tuple[str, str]:
    """The paths of a part's vectors and metadata in the folder."""
    return (
        f"{VECTORS}/{VECTORS}_{number:06d}.npy",
        f"{METADATA}/{METADATA}_{number:06d}.parquet",
    )


def write_part(
    folder: Path, number: int, vectors: Float[np.ndarray, "M D"], metadata: pa.Table
) -> dict[str, Any]:
    """Write a part; returns its entry for `write_record`, with hashes of the bytes it had in memory."""
    array, table = io.BytesIO(), io.BytesIO()
    np.save(array, vectors, allow_pickle=False)
    pq.write_table(metadata, table)
    entry: dict[str, Any] = {"rows": len(vectors)}
    for name, stream in zip(part_names(number), (array, table), strict=True):
        write_bytes_whole(folder / name, stream.getvalue())
        entry[name] = {
            "bytes": stream.getbuffer().nbytes,
            "sha256": hashlib.sha256(stream.getbuffer()).hexdigest(),
        }
    return entry


def is_written(folder: Path, number: int, entry: dict[str, Any]) -> bool:
    """Whether the files of a part are there, as long as its entry says."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry[name]["bytes"]
        for name in part_names(number)
    )


def write_record(folder: Path, entries: Sequence[dict[str, Any]]) -> str:
    """Write `parts.json`; returns the fingerprint of all parts."""
    text = json.dumps(entries, indent=1)
    write_bytes_whole(folder / RECORD, (text + "\n").encode())
    return _fingerprint([_hashes(entry, number) for number, entry in enumerate(entries)])


def _hashes(entry: dict[str, Any], number: int) -> tuple[str, str]:
    one, two = part_names(number)
    return entry[one]["sha256"], entry[two]["sha256"]


def _fingerprint(hashes: Sequence[tuple[str, str]]) -> str:
    named = {
        name: sha256
        for number, pair in enumerate(hashes)
        for name, sha256 in zip(part_names(number), pair, strict=True)
    }
    return fingerprint_of(named)


# ------------------------------------------------------------------------------------------- opening


def open_parts(folder: Path | str, *, ids: str | None = None, queries: bool = False) -> Parts:
    """Look at a folder of embeddings: of each part the header and the schema are read.

    `ids` names the column of ids in the metadata; a folder that mmrec wrote has its own. `queries` says that
    the vectors count: others' rows go by their numbers where no column is named, and their side is not known.
    Raises `UserError` naming the file for a part that is missing, cut off, of another width or not float16 or
    float32.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (expected embeddings)")
    if not (folder / FILE_NAME).is_file() and (folder / VECTORS).is_dir():
        return _open_foreign(folder, ids, queries)
    if ids not in (None, "id"):
        raise UserError(
            f"{folder}: was written by mmrec, with ids of its own; leave out --ids {ids}"
        )
    manifest = read_manifest(folder, "embeddings")
    try:
        entries = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        hashes = [_hashes(entry, number) for number, entry in enumerate(entries)]
        rows = [int(entry["rows"]) for entry in entries]
    except FileNotFoundError:
        raise UserError(
            f"{folder / RECORD}: no such file; embed again with `mmrec embed ... --overwrite`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD}: not a record of parts ({error!r})") from None
    if _fingerprint(hashes) != manifest.fingerprint:
        raise UserError(f"{folder / RECORD}: is not the one that {FILE_NAME} names; embed again")
    found = len(list((folder / VECTORS).glob("*.npy")))
    if found != len(entries):
        raise UserError(f"{folder}: expected {len(entries)} parts, found {found}; embed again")
    parts = [
        _look_at(folder, *part_names(number), hashes=pair) for number, pair in enumerate(hashes)
    ]
    _check_alike(parts, rows)
    return Parts(folder=folder, manifest=manifest, parts=parts, id_column="id")


def _open_foreign(folder: Path, ids: str | None, queries: bool) -> Parts:
    """Parts that clip-retrieval or another program wrote, paired by the numbers in their names."""
    vectors = _numbered(folder / VECTORS, "npy")
    metadata = _numbered(folder / METADATA, "parquet")
    if set(vectors) != set(metadata):
        missing = sorted(set(vectors) ^ set(metadata))
        raise UserError(
            f"{folder}: {VECTORS} has {len(vectors)} .npy files and {METADATA} {len(metadata)} .parquet "
            f"files; number {missing[0]} is in one of them alone"
        )
    looked = [
        _look_at(folder, vectors[number], metadata[number], hashes=None)
        for number in sorted(vectors)
    ]
    parts = [part for part in looked if part.rows]
    if not parts:
        raise UserError(f"{folder}: holds no embeddings")
    _check_alike(parts, [part.rows for part in parts])
    rows = sum(part.rows for part in parts)
    manifest = Manifest(
        kind="embeddings",
        config={"ids": ids},
        counts={"out": rows},
        fingerprint="",  # Known once all has been read: see `fingerprint_read`.
        details={
            "width": parts[0].width,
            "family": None if queries else "products",
            "parts": len(parts),
        },
    )
    return Parts(
        folder=folder,
        manifest=manifest,
        parts=parts,
        id_column=None if queries and ids is None else _id_column(parts[0].metadata, ids),
        foreign=True,
    )


def _numbered(folder: Path, ending: str) -> dict[int, str]:
    """The files of a folder by the last number in their names."""
    found: dict[int, str] = {}
    for path in sorted(folder.glob(f"*.{ending}")):
        digits = re.findall(r"\d+", path.stem)
        if not digits:
            raise UserError(f"{path}: has no number in its name; expected {folder.name}_0.{ending}")
        if int(digits[-1]) in found:
            raise UserError(f"{path}: has the same number as {found[int(digits[-1])]}")
        found[int(digits[-1])] = f"{folder.name}/{path.name}"
    return found


def _id_column(metadata: Path, ids: str | None) -> str:
    names = _schema(metadata).names
    if ids is None or ids not in names:
        what = (
            "does not say which column holds the ids" if ids is None else f"has no column '{ids}'"
        )
        raise UserError(f"{metadata}: {what}; give one with --ids, of {', '.join(names)}")
    return ids


def _look_at(folder: Path, vectors: str, metadata: str, *, hashes: tuple[str, str] | None) -> Part:
    path = folder / vectors
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a numpy file that can be read ({error})") from None
    if dtype not in _KINDS or len(shape) != 2 or fortran:
        order = " in Fortran's order" if fortran else ""
        raise UserError(
            f"{path}: expected float16 or float32 of shape (rows, D), found {dtype} of shape "
            f"{shape}{order}"
        )
    expected = offset + shape[0] * shape[1] * dtype.itemsize
    if path.stat().st_size != expected:
        raise UserError(
            f"{path}: is {path.stat().st_size} bytes long, and its header asks for {expected}"
        )
    _schema(folder / metadata)
    return Part(
        vectors=path,
        metadata=folder / metadata,
        rows=shape[0],
        width=shape[1],
        dtype=dtype,
        offset=offset,
        vectors_sha256=hashes and hashes[0],
        metadata_sha256=hashes and hashes[1],
    )


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({_line(error)})") from None


def _check_alike(parts: Sequence[Part], rows: Sequence[int]) -> None:
    """Refuse parts of several widths, or with another number of rows than their metadata."""
    for part, expected in zip(parts, rows, strict=True):
        if part.width != parts[0].width or not part.width:
            raise UserError(
                f"{part.vectors}: is {part.width} wide, and {parts[0].vectors.name} {parts[0].width}"
            )
        told = pq.read_metadata(part.metadata).num_rows
        if not part.rows == expected == told:
            raise UserError(f"{part.vectors}: {part.rows} vectors, and metadata for {told}")


# ------------------------------------------------------------------------------------------- reading


def read_stretches(part: Part, rows_at_once: int) -> Iterator[Float[np.ndarray, "M D"]]:
    """The vectors of a part as they lie on disk, some rows at a time.

    They are read, not mapped: mapped pages count as memory of the process.
    """
    with part.vectors.open("rb") as file:
        file.seek(part.offset)
        for start in range(0, part.rows, rows_at_once):
            rows = min(rows_at_once, part.rows - start)
            stretch = np.empty((rows, part.width), part.dtype)
            file.readinto(stretch.data.cast("B"))
            yield stretch


def read_metadata(part: Part, id_column: str | None, first: int = 0) -> tuple[list[str], pa.Table]:
    """The ids of a part as text, or the numbers of its rows from `first` on, and all of its metadata.

    Raises `UserError` for a row without an id.
    """
    try:
        table = pq.read_table(part.metadata)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{part.metadata}: not a Parquet file that can be read ({_line(error)})"
        ) from None
    if id_column is None:
        return [str(first + row) for row in range(part.rows)], table
    if id_column not in table.column_names:
        raise UserError(f"{part.metadata}: has no column '{id_column}'")
    column = table[id_column]
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise UserError(f"{part.metadata}: row {row} has no {id_column}")
    try:
        return column.cast(pa.string()).to_pylist(), table
    except pa.ArrowException as error:
        raise UserError(
            f"{part.metadata}: column '{id_column}' does not hold ids ({_line(error)})"
        ) from None


def joined_metadata(folder: Path, tables: Sequence[pa.Table]) -> pa.Table:
    """The metadata of all parts. Raises `UserError` for a column of types that do not go together."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"{folder / METADATA}: a column has other types in some parts than in others "
            f"({_line(error)}); write it with one"
        ) from None


def checked_part(
    part: Part, ids: Sequence[str], vectors: Float[np.ndarray, "M D"]
) -> Float32[np.ndarray, "M D"]:
    """Vectors as they lie on disk as float32 of length one.

    Raises `UserError`, naming the file and ids, for those that are not finite or not of unit length.
    """
    try:
        checked = checked_vectors(ids, vectors)
    except UserError as error:
        raise UserError(f"{part.vectors}: {error}") from None
    # float16 loses some length.
    return checked / np.linalg.norm(checked, axis=1, keepdims=True)


def check_files(part: Part) -> tuple[str, str]:
    """The hashes of a part's two files. Raises `UserError` naming one that is not what was written."""
    found = []
    for path, expected in (
        (part.vectors, part.vectors_sha256),
        (part.metadata, part.metadata_sha256),
    ):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if expected not in (None, sha256):
            raise UserError(f"{path}: is not the file that was written; embed again")
        found.append(sha256)
    return found[0], found[1]


def fingerprint_read(parts: Parts, hashes: Sequence[tuple[str, str]]) -> str:
    """The fingerprint of a folder whose parts have these hashes: for folders that others wrote."""
    return parts.manifest.fingerprint or _fingerprint(hashes)


def check_distinct(ids: Sequence[str]) -> None:
    """Refuse ids that occur more than once, in one part or in several."""
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    twice = list(dict.fromkeys(id_ for id_ in ids if id_ in seen or seen.add(id_)))
    raise UserError(f"ids that occur more than once: {name_ids(twice)}")


def attributes_of(parts: Parts, metadata: pa.Table, ids: Sequence[str]) -> pa.Table:
    """What an index keeps beside vectors: the id first, then a column an attribute."""
    if not parts.foreign:
        return _own_attributes(metadata, parts.key)
    rest = metadata.drop_columns([parts.id_column])
    if parts.key in rest.column_names:
        rest = rest.drop_columns([parts.key])
    columns = [pa.array(ids, pa.string()), *rest.columns]
    return pa.table(columns, names=[parts.key, *rest.column_names])


def _own_attributes(metadata: pa.Table, key: str) -> pa.Table:
    linked = ["product_ids"] if "product_ids" in metadata.column_names else []
    rows = [
        {
            key: row["id"],
            "title": row["title"],
            **json.loads(row["attributes"]),
            **{name: row[name] for name in linked},
        }
        for row in metadata.to_pylist()
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]
