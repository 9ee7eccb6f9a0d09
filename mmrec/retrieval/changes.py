"""Changes: what was upserted and deleted since a generation was built, on disk and in memory.

Shape letters: N rows of the base, M rows of the delta, D width, I indexed width.

Every call of upsert or delete leaves one file, `changes/00000001.change` and so on: a magic word, the
length and SHA-256 of what follows, and that as an Arrow stream of ids, vectors and attributes. The file
is brought to the disk under a temporary name and then renamed, so it is there whole or not at all, and a
damaged one cannot pass for one that was never finished. `changes/acknowledged` has the number of the last,
so that its loss is noticed, too.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64

from mmrec.errors import UserError
from mmrec.retrieval.generations import CHANGES, full_disk_refused, replace_file

_MAGIC = b"MMREC-C1"
_HEADER = len(_MAGIC) + 8 + 32
_ACKNOWLEDGED = "acknowledged"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One call of upsert or delete."""

    kind: Literal["upsert", "delete"]
    products: pa.Table
    """The ids in the first column; after it, of an upsert, the attributes."""
    vectors: Float32[np.ndarray, "M D"] | None = None
    """Of an upsert, at full width."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was measured of it: see drift.py."""

    @cached_property
    def ids(self) -> list[str]:
        """The products that it changes."""
        return self.products.column(0).to_pylist()


def write_change(generation: Path, sequence: int, belongs_to: str, change: Change) -> None:
    """Make a change durable as number `sequence` of a generation with the fingerprint `belongs_to`."""
    table = change.products
    if change.vectors is not None:
        flat = pa.array(change.vectors.ravel())
        lists = pa.FixedSizeListArray.from_arrays(flat, change.vectors.shape[1])
        table = table.append_column("vector", lists)
    about = {"kind": change.kind, "sequence": sequence, "base": belongs_to, "facts": change.facts}
    table = table.replace_schema_metadata({"mmrec": json.dumps(about)})
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    body = memoryview(stream.getvalue())
    header = _MAGIC + len(body).to_bytes(8, "little") + sha256(body).digest()
    with full_disk_refused(generation.parent.parent):
        replace_file(_path(generation, sequence), b"".join([header, body]))
    # Not waited for: a number that a power failure set back is one that nothing is missed by.
    noted = os.open(generation / CHANGES / _ACKNOWLEDGED, os.O_WRONLY | os.O_CREAT, 0o666)
    os.pwrite(noted, f"{sequence:08d}\n".encode(), 0)
    os.close(noted)


def read_changes(generation: Path, belongs_to: str, *, after: int = 0) -> Iterator[Change]:
    """The changes of a generation in order, from number `after + 1`.

    Raises `UserError` naming a file that is missing between others, damaged, or another index's.
    """
    folder = generation / CHANGES
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    noted = _acknowledged(folder / _ACKNOWLEDGED)  # Before the others: a writer may be at work.
    last = max((int(path.stem) for path in folder.glob("[0-9]*.change")), default=0)
    for sequence in range(after + 1, max(last, noted) + 1):
        yield read_change(_path(generation, sequence), belongs_to)


def hash_changes(generation: Path, count: int) -> str:
    """A hash of the first `count` changes, from those that their files begin with."""
    digest = sha256()
    for sequence in range(1, count + 1):
        with _path(generation, sequence).open("rb") as file:
            digest.update(file.read(_HEADER))
    return digest.hexdigest()


def _acknowledged(path: Path) -> int:
    """The number of the last change; 0 before the first."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = text.strip(" \n\0") or "0"  # What a power failure may have left of the first number.
    if not text.isdecimal():
        raise UserError(f"{path}: expected the number of the last change, found '{text[:20]}'")
    return int(text)


def read_change(path: Path, belongs_to: str) -> Change:
    """Read one change file. Raises `UserError` when it is not what was written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, and it or a later one was acknowledged") from None
    if not data.startswith(_MAGIC):
        raise UserError(f"{path}: not a file of changes that this version reads")
    size = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 8], "little")
    body = memoryview(data)[_HEADER:]
    if len(body) != size:
        raise UserError(f"{path}: holds {len(body)} bytes of changes, and was written with {size}")
    if sha256(body).digest() != data[_HEADER - 32 : _HEADER]:
        raise UserError(f"{path}: is not what was written: its SHA-256 differs")
    table = pa.ipc.open_stream(body).read_all()
    about = json.loads(table.schema.metadata[b"mmrec"])
    if about["base"] != belongs_to or about["sequence"] != int(path.stem):
        raise UserError(f"{path}: is change {about['sequence']} of another generation or index")
    vectors = None
    if about["kind"] == "upsert":
        last = table.num_columns - 1
        lists = table.column(last).combine_chunks()
        vectors = lists.flatten().to_numpy().reshape(-1, lists.type.list_size)
        table = table.remove_column(last)
    products = table.replace_schema_metadata(None)
    return Change(kind=about["kind"], products=products, vectors=vectors, facts=about["facts"])


def _path(generation: Path, sequence: int) -> Path:
    return generation / CHANGES / f"{sequence:08d}.change"


# -------------------------------------------------------------------------------------- in memory


class Delta:
    """The products that were upserted since the base was built, as of one moment.

    Never changed: `with_upsert` and `without` give the next one. They share buffers, of which each sees
    the rows that it knows, so that a search goes on while changes come in.
    """

    def __init__(
        self,
        ids: np.ndarray,
        vectors: Float32[np.ndarray, "M D"],
        scored: Float32[np.ndarray, "M I"],
        tables: tuple[pa.Table, ...],
        count: int,
    ) -> None:
        """Rows past `count` are room to grow into; `scored` is what searches compare with."""
        self._buffers = ids, vectors, scored
        self._tables = tables
        self.count = count
        self.rows: dict[str, int] = {}
        """Where each id lies; ids that were deleted, and older rows of one upserted again, are not here."""
        self.dead: Bool[np.ndarray, " M"] = np.zeros(count, bool)

    @classmethod
    def empty(cls, width: int, indexed_width: int) -> "Delta":
        """A delta with nothing in it."""
        ids = np.empty(0, object)
        wide, narrow = (np.zeros((0, d), np.float32) for d in (width, indexed_width))
        return cls(ids, wide, narrow, (), 0)

    def __len__(self) -> int:
        """The number of products that are in it and alive."""
        return len(self.rows)

    @property
    def ids(self) -> np.ndarray:
        """The id of each row, dead ones too."""
        return self._buffers[0][: self.count]

    @property
    def vectors(self) -> Float32[np.ndarray, "M D"]:
        """The vector of each row as it was given."""
        return self._buffers[1][: self.count]

    @property
    def scored(self) -> Float32[np.ndarray, "M I"]:
        """The vector of each row as searches compare it."""
        return self._buffers[2][: self.count]

    @cached_property
    def table(self) -> pa.Table:
        """Id and attributes of each row; a column that a product has not is null."""
        return join_tables(self._tables)

    def live_rows(self) -> Int64[np.ndarray, " M"]:
        """The rows that are alive, in order."""
        return np.flatnonzero(~self.dead)

    def without(self, ids: Sequence[str]) -> "Delta":
        """The delta without some products."""
        new = Delta(*self._buffers, self._tables, self.count)
        new.rows, new.dead = dict(self.rows), self.dead.copy()
        for id_ in ids:
            row = new.rows.pop(id_, None)
            if row is not None:
                new.dead[row] = True
        return new

    def with_upsert(self, change: Change, scored: Float32[np.ndarray, "M I"]) -> "Delta":
        """The delta with products added or replaced."""
        assert change.vectors is not None
        old = self._compacted().without(change.ids)
        count = old.count + len(change.ids)
        ids = np.array(change.ids, object)
        added = (ids, change.vectors, scored)
        grown = [_grown(*pair, old.count) for pair in zip(old._buffers, added, strict=True)]
        new = Delta(grown[0], grown[1], grown[2], (*old._tables, change.products), count)
        new.dead[: old.count] = old.dead
        new.rows = old.rows | dict(zip(change.ids, range(old.count, count), strict=True))
        return new

    def _compacted(self) -> "Delta":
        """Without its dead rows, once they are most of it."""
        if self.count - len(self) <= max(1_000, len(self)):
            return self
        live = self.live_rows()
        ids, vectors, scored = (buffer[live] for buffer in self._buffers)
        new = Delta(ids, vectors, scored, (self.table.take(pa.array(live)),), len(live))
        new.rows = dict(zip(ids.tolist(), range(len(live)), strict=True))
        return new


def _grown(buffer: np.ndarray, added: np.ndarray, count: int) -> np.ndarray:
    """A buffer with rows put in after the first `count`; a larger one where there is no room.

    Only the newest delta appends, and earlier ones do not see past their count.
    """
    need = count + len(added)
    if need > len(buffer):
        larger = np.empty((max(need, 2 * len(buffer), 1_024), *buffer.shape[1:]), buffer.dtype)
        larger[:count] = buffer[:count]
        buffer = larger
    buffer[count:need] = added
    return buffer


def join_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one under the other; a column that one lacks is null there."""
    if not tables:
        return pa.table({})
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
