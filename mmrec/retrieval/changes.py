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
from mmrec.retrieval.delta_lists import DeltaLists
from mmrec.retrieval.generations import CHANGES, full_disk_refused, replace_file

_MAGIC = b"MMREC-C1"
_HEADER = len(_MAGIC) + 8 + 32
_ACKNOWLEDGED = "acknowledged"
# Later than any moment.
_ALIVE = np.int64(2**62)


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

    Never changed: `with_upsert` and `without` give the next one, at the cost of what is new. All share
    buffers, of which each sees the rows that it knows and the deaths before it, so that a search goes on
    while changes come in. Only the newest may be followed by another.
    """

    def __init__(
        self,
        buffers: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        places: "_Places",
        tables: tuple[pa.Table, ...],
        lists: DeltaLists,
        *,
        count: int = 0,
        alive: int = 0,
        moment: int = 0,
    ) -> None:
        """Buffers are ids, vectors, what searches compare with, and when each row died, with room to grow."""
        self._buffers = buffers
        self._places = places
        self._tables = tables
        self.lists = lists
        """Over the rows that came first: see delta_lists.py."""
        self._alive = alive
        self._moment = moment
        self.count = count

    @classmethod
    def empty(cls, width: int, indexed_width: int) -> "Delta":
        """A delta with nothing in it."""
        wide, narrow = (np.zeros((0, d), np.float32) for d in (width, indexed_width))
        buffers = (np.empty(0, object), wide, narrow, np.zeros(0, np.int64))
        return cls(buffers, _Places(), (), DeltaLists())

    def __len__(self) -> int:
        """The number of products that are in it and alive."""
        return self._alive

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
        """Id and attributes of each row, in some pieces; a column that a product has not is null."""
        if not self._tables:
            return pa.table({})
        return pa.concat_tables(self._tables, promote_options="permissive")

    @property
    def live(self) -> Bool[np.ndarray, " M"]:
        """Which rows are alive."""
        return self._buffers[3][: self.count] > self._moment

    def live_rows(self) -> Int64[np.ndarray, " M"]:
        """The rows that are alive, in order."""
        return np.flatnonzero(self.live)

    def rows_of(self, ids: Sequence[str]) -> Int64[np.ndarray, " M"]:
        """The row of each product; -1 for those that are not here."""
        rows = np.array([self._places.before(id_, self.count) for id_ in ids], np.int64)
        here = np.flatnonzero(rows >= 0)
        rows[here[self._buffers[3][rows[here]] <= self._moment]] = -1
        return rows

    def without(self, ids: Sequence[str]) -> "Delta":
        """The delta without some products."""
        return self._after(ids, self._buffers, self._tables, self.count)

    def with_upsert(self, change: Change, scored: Float32[np.ndarray, "M I"]) -> "Delta":
        """The delta with products added or replaced."""
        assert change.vectors is not None
        old = self._compacted()
        count = old.count + len(change.ids)
        ids = np.array(change.ids, object)
        added = (ids, change.vectors, scored, np.full(len(ids), _ALIVE))
        grown = [_grown(*pair, old.count) for pair in zip(old._buffers, added, strict=True)]
        buffers = (grown[0], grown[1], grown[2], grown[3])
        new = old._after(change.ids, buffers, _appended(old._tables, change.products), count)
        new._alive += len(ids)
        old._places.add(change.ids)
        return new

    def _after(
        self, gone: Sequence[str], buffers: Any, tables: tuple[pa.Table, ...], count: int
    ) -> "Delta":
        """The next moment, without the rows that some products have at this one."""
        rows = np.unique(self.rows_of(gone))
        rows = rows[rows >= 0]
        buffers[3][rows] = self._moment + 1
        return Delta(
            buffers,
            self._places,
            tables,
            self.lists,
            count=count,
            alive=self._alive - len(rows),
            moment=self._moment + 1,
        )

    def _compacted(self) -> "Delta":
        """Without its dead rows, once they are most of it."""
        if self.count - len(self) <= max(1_000, len(self)):
            return self
        live = self.live_rows()
        ids, vectors, scored, died = (buffer[live] for buffer in self._buffers)
        places = _Places()
        places.add(ids.tolist())
        table = self.table.take(pa.array(live))
        return Delta(
            (ids, vectors, scored, died),
            places,
            (table,),
            DeltaLists(),
            count=len(live),
            alive=len(live),
            moment=self._moment,
        )


class _Places:
    """Where ids lie, for all moments: the last row of each, and of each row the one before of its id."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._earlier: list[int] = []

    def add(self, ids: Sequence[str]) -> None:
        """Note the next rows."""
        for id_ in ids:
            row = len(self._earlier)
            # In this order, for whoever reads meanwhile.
            self._earlier.append(self._last.get(id_, -1))
            self._last[id_] = row

    def before(self, id_: str, count: int) -> int:
        """The last row of an id among the first `count`, or -1."""
        row = self._last.get(id_, -1)
        while row >= count:
            row = self._earlier[row]
        return row


def _appended(tables: tuple[pa.Table, ...], table: pa.Table) -> tuple[pa.Table, ...]:
    """Tables with one more; small ones are joined, so that there are few and each row is copied seldom."""
    kept = list(tables)
    while kept and len(kept[-1]) <= 2 * len(table):
        table = join_tables([kept.pop(), table])
    return (*kept, table)


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
