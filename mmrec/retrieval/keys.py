"""Keys: from ids to rows and back, without a million Python strings in memory.

Shape letters: N products, M ids asked for.

The ids are an Arrow column, mapped from the disk. Beside it lie the ids' hashes in order, so that an id
is found by bisection: opening reads nothing, and a lookup touches a few pages.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt64

# Between two searches a kernel of Arrow costs 0.05 ms more than these few one by one.
_FEW = 16


class Keys:
    """The ids of the rows of an immutable table."""

    def __init__(self, ids: pa.Array, order: UInt64[np.ndarray, "2 N"]) -> None:
        """`order` is what `order_keys` made of these ids; both may be mapped from the disk."""
        self.ids = ids
        self.order = order
        self._hashes, self._rows = order

    def take(self, rows: Int64[np.ndarray, " M"]) -> np.ndarray:
        """The ids of rows, as an array of Python strings."""
        if len(rows) <= _FEW:
            ids = np.empty(len(rows), object)
            ids[:] = [self.ids[row].as_py() for row in rows.tolist()]
            return ids
        return self.ids.take(pa.array(rows)).to_numpy(zero_copy_only=False)

    def rows_of(self, ids: Sequence[str]) -> Int64[np.ndarray, " M"]:
        """The row of each id; -1 for those that are not here."""
        rows = np.full(len(ids), -1, np.int64)
        hashes = hash_ids(ids)
        first = np.searchsorted(self._hashes, hashes)
        inside = np.flatnonzero(first < len(self._hashes))
        inside = inside[self._hashes[first[inside]] == hashes[inside]]
        candidates = self._rows[first[inside]].astype(np.int64)
        for place, row, id_ in zip(inside.tolist(), candidates, self.take(candidates), strict=True):
            same = id_ == ids[place]
            rows[place] = row if same else self._after(int(first[place]), str(ids[place]))
        return rows

    def _after(self, place: int, wanted: str) -> int:
        """The row of an id that shares its hash with the one at `place` and may come after it."""
        shared = self._hashes[place]
        while (place := place + 1) < len(self._hashes) and self._hashes[place] == shared:
            if self.ids[int(self._rows[place])].as_py() == wanted:
                return int(self._rows[place])
        return -1


def order_keys(ids: Sequence[str]) -> UInt64[np.ndarray, "2 N"]:
    """The ids' hashes in order, and under each its row."""
    return order_hashes(hash_ids(ids))


def order_hashes(hashes: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, "2 N"]:
    """Hashes in order, and under each its row."""
    order = np.argsort(hashes, kind="stable")
    return np.stack([hashes[order], order.astype(np.uint64)])


def hash_ids(ids: Sequence[str]) -> UInt64[np.ndarray, " M"]:
    """64 bits of each id's BLAKE2 hash."""
    digests = b"".join(blake2b(id_.encode(), digest_size=8).digest() for id_ in ids)
    return np.frombuffer(digests, np.uint64)
