"""View: an index as of one moment, and how it is searched.

Shape letters: Q queries, N rows of the base, M rows of the delta, G rows in the delta's lists, K matches,
D width, I indexed width.

A view joins an immutable base, the delta of later upserts, and marks on the base's rows that were deleted
or replaced since. Changes make a new view, so a search sees one state from beginning to end. Rows count
through: 0 to N-1 are the base's, from N on the delta's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64

from mmrec.retrieval.base import Base, narrowed
from mmrec.retrieval.changes import Change, Delta, join_tables
from mmrec.retrieval.delta_lists import Lists
from mmrec.retrieval.exact import MANY_QUERIES, Found, above, best, joined, nearest, nothing
from mmrec.retrieval.faiss_base import (
    MOST_CANDIDATES,
    as_scored,
    candidates_of,
    scores_rows,
    search_selected,
    takes_selector,
)
from mmrec.retrieval.filters import matching_rows

# Up to so many rows that a filter leaves are compared one by one.
_EXACT_ROWS = 20_000
_ROWS_AT_ONCE = 20_000
# Matches fetched for each one wanted, where they are scored again at full width.
_RERANKED = 4
# What a filter leaves is not as near to a query as what the effort was tuned for.
_FURTHER = 2
_KEPT_FILTERS = 32
_NONE = np.float32(-np.inf)


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows that a filter leaves, whether alive or not."""

    base: Bool[np.ndarray, " N"]
    delta: Bool[np.ndarray, " M"]


@dataclass(frozen=True, eq=False)
class _Late:
    """Some rows of the delta and what they are compared by."""

    rows: Int64[np.ndarray, " M"]
    scored: Float32[np.ndarray, "M I"]

    def among(self, wanted: Bool[np.ndarray, " N"] | None) -> "_Late":
        """Those that are wanted of all rows; None wants all."""
        if wanted is None:
            return self
        chosen = wanted[self.rows]
        return _Late(self.rows[chosen], self.scored[chosen])


class View:
    """A base, a delta, and which rows of the base are dead."""

    def __init__(self, base: Base, delta: Delta, dead: Bool[np.ndarray, " N"]) -> None:
        self.base = base
        self.delta = delta
        self.dead = dead
        self.num_dead = int(np.count_nonzero(dead))
        """Tombstones: rows of the base that were deleted or replaced."""
        self._selections: dict[str, Selection] = {}
        self._parts: tuple[Lists, np.ndarray, _Late] | None = None

    @classmethod
    def of(cls, base: Base) -> "View":
        """A base that nothing was changed of."""
        record = base.record
        return cls(
            base, Delta.empty(record.width, record.indexed_width), np.zeros(record.count, bool)
        )

    def __len__(self) -> int:
        """The number of products."""
        return self.base.record.count - self.num_dead + len(self.delta)

    def changed(self, change: Change) -> "View":
        """The view after a change."""
        dead = self.dead
        rows = self.base.keys.rows_of(change.ids)
        rows = rows[rows >= 0]
        if not dead[rows].all():
            dead = dead.copy()
            dead[rows] = True
        if change.vectors is None:
            return View(self.base, self.delta.without(change.ids), dead)
        indexed = narrowed(change.vectors, self.base.record.indexed_width)
        return View(
            self.base, self.delta.with_upsert(change, as_scored(self.base.index, indexed)), dead
        )

    def rows_of(self, ids: Sequence[str]) -> Int64[np.ndarray, " M"]:
        """The row of each product; -1 for those that are not here."""
        rows = self.base.keys.rows_of(ids)
        if self.num_dead:
            rows[(rows >= 0) & self.dead[rows]] = -1
        if len(self.delta):
            new = self.delta.rows_of(ids)
            rows = np.where(new >= 0, new + self.base.record.count, rows)
        return rows

    def live_rows(self) -> Int64[np.ndarray, " N"]:
        """The rows of the base that are alive, in order."""
        return np.flatnonzero(~self.dead)

    def ids_of(self, rows: Int64[np.ndarray, " M"]) -> np.ndarray:
        """The ids of rows, of the base and the delta, as an array of Python strings."""
        first = self.base.record.count
        if not self.delta.count or not (late := rows >= first).any():
            return self.base.keys.take(rows)
        ids = np.empty(len(rows), object)
        ids[~late] = self.base.keys.take(rows[~late])
        ids[late] = self.delta.ids[rows[late] - first]
        return ids

    def vectors(self, rows: Int64[np.ndarray, " M"]) -> Float32[np.ndarray, "M D"]:
        """The vectors of rows, of the base and the delta."""
        first = self.base.record.count
        late = rows >= first
        if late.all():
            return self.delta.vectors[rows - first]
        old = self.base.vectors(rows[~late])
        vectors = np.empty((len(rows), old.shape[1]), np.float32)
        vectors[~late], vectors[late] = old, self.delta.vectors[rows[late] - first]
        return vectors

    def attributes(self, row: int) -> dict[str, Any]:
        """Id and attributes of a row."""
        return self.attributes_of(np.array([row]))[0]

    def attributes_of(self, rows: Int64[np.ndarray, " M"]) -> list[dict[str, Any]]:
        """The same of several rows; a product of the base has the base's columns alone."""
        first = self.base.record.count
        late = rows >= first
        found: list[dict[str, Any]] = [{}] * len(rows)
        for places, table, shift in (
            (np.flatnonzero(~late), self.base.products, 0),
            (np.flatnonzero(late), self.delta.table if late.any() else None, first),
        ):
            if table is not None and len(places):
                columns = table.take(pa.array(rows[places] - shift)).to_pylist()
                for place, own in zip(places.tolist(), columns, strict=True):
                    found[place] = own
        return found

    def products(self) -> pa.Table:
        """Id and attributes of all products, in the order of their rows."""
        kept = self.base.products
        if self.num_dead:
            kept = kept.take(pa.array(self.live_rows()))
        if not len(self.delta):
            return kept
        new = self.delta.table
        if len(self.delta) < self.delta.count:
            new = new.take(pa.array(self.delta.live_rows()))
        return join_tables([kept, new])

    # ------------------------------------------------------------------------------------ filters

    def select(self, where: str) -> Selection:
        """The rows that meet a condition. Raises `UserError` when it cannot be understood."""
        if found := self._selections.get(where):
            return found
        base, delta = self.base.products, self.delta.table
        if self.delta.count:  # Either may have columns that the other lacks.
            base = pa.concat_tables([base, delta.slice(0, 0)], promote_options="permissive")
            delta = join_tables([self.base.products.slice(0, 0), delta])
        # What columns there are decides what a condition means.
        key = (where, *map(str, base.schema))
        kept = self.base.filters.get(key)
        if kept is None:
            kept = matching_rows(base, where)
        late = matching_rows(delta, where) if self.delta.count else np.zeros(0, bool)
        with self.base.lock:
            _keep(self.base.filters, key, kept)
            _keep(self._selections, where, Selection(kept, late))
        return Selection(kept, late)

    # ---------------------------------------------------------------------------------- searching

    def search(
        self,
        queries: Float32[np.ndarray, "Q D"],
        k: int,
        *,
        selection: Selection | None = None,
        rerank: bool = False,
    ) -> Found:
        """The k best live rows for each query, among those selected; fewer columns where fewer live."""
        fetched = _RERANKED * k if rerank else k
        narrow = narrowed(queries, self.base.record.indexed_width)
        scores, rows = self._search_base(narrow, fetched, selection)
        # FAISS fills up with row -1 and a very low score where it found fewer.
        found = (np.where(rows >= 0, scores, _NONE) if rows.min(initial=0) < 0 else scores), rows
        if len(self.delta):
            found = self._with_delta(narrow, found, fetched, selection)
        return self._reranked(queries, found, k) if rerank else found

    def _search_base(self, queries: np.ndarray, k: int, selection: Selection | None) -> Found:
        if selection is not None:
            return self._search_selected(queries, k, selection.base & self._live)
        live = self.base.record.count - self.num_dead
        k = min(k, live)
        if not k:
            return nothing(len(queries))
        if len(queries) >= MANY_QUERIES and self.base.matrix is not None:
            return nearest(queries, self.base.matrix, k, self._live if self.num_dead else None)
        if not self.num_dead:
            return self.base.search(queries, k)
        share = self.num_dead / self.base.record.count
        if share > 0.5 and takes_selector(self.base.index):
            return self._held_to(queries, k, self._live)
        # Twice what tombstones spread evenly would take; a query that meets more is asked again.
        fetched = min(self.base.record.count, k + 2 + math.ceil(2 * k * share / (1 - share)))
        return self._asked_again(queries, k, fetched, self._live)

    def _asked_again(
        self, queries: np.ndarray, k: int, fetched: int, wanted: Bool[np.ndarray, " N"]
    ) -> Found:
        """Search all rows and drop the unwanted; where fewer than k stay, search on.

        What a graph does not lead to it never finds: in the end all that is wanted is compared.
        """
        index, graph = self.base.index, self.base.graph
        if graph and fetched > MOST_CANDIDATES:
            return self._one_by_one(queries, k, wanted)
        all_scores, all_rows = self.base.search(queries, fetched)
        scores, rows = all_scores[:, :k], all_rows[:, :k]
        # As mostly: all of the first k are wanted. FAISS puts row -1 last.
        if wanted[rows].all() and rows[:, -1].min(initial=0) >= 0:
            return scores, rows
        scores, rows = _kept(all_scores, all_rows, wanted, k)
        # A row that ended in -1 holds all that the index comes upon, but for a graph.
        short = np.flatnonzero((rows[:, -1] < 0) & (graph | (all_rows[:, -1] >= 0)))
        if not len(short) or (fetched >= self.base.record.count and not graph):
            return scores, rows
        if takes_selector(index):
            again = self._held_to(queries[short], k, wanted)
        elif fetched >= self.base.record.count:
            again = self._one_by_one(queries[short], k, wanted)
        else:
            more = min(self.base.record.count, 4 * fetched)
            again = self._asked_again(queries[short], k, more, wanted)
        scores[short], rows[short] = again
        return scores, rows

    def _search_selected(
        self, queries: np.ndarray, k: int, wanted: Bool[np.ndarray, " N"]
    ) -> Found:
        count = int(np.count_nonzero(wanted))
        k = min(k, count)
        if not k:
            return nothing(len(queries))
        if count <= _EXACT_ROWS and (self.base.exact or scores_rows(self.base.index)):
            return self._one_by_one(queries, k, wanted)
        if len(queries) >= MANY_QUERIES and self.base.matrix is not None:
            return nearest(queries, self.base.matrix, k, wanted)
        if takes_selector(self.base.index):
            effort = math.inf if count <= _EXACT_ROWS else 1.0
            return self._held_to(queries, k, wanted, effort=effort)
        # As many of those wanted as a search without a filter would have in view.
        in_view = _FURTHER * max(2 * k, candidates_of(self.base.index) or 0)
        fetched = min(len(wanted), math.ceil(in_view * len(wanted) / count))
        return self._asked_again(queries, k, fetched, wanted)

    def _one_by_one(self, queries: np.ndarray, k: int, wanted: Bool[np.ndarray, " N"]) -> Found:
        """All wanted rows compared, by the best that the base keeps of their vectors."""
        rows = np.flatnonzero(wanted)
        found = nothing(len(queries))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            scores, places = nearest(queries, self.base.indexed_vectors(block), k)
            found = joined(found, (scores, block[places]), k)
        return found

    def _held_to(
        self, queries: np.ndarray, k: int, wanted: Bool[np.ndarray, " N"], *, effort: float = 1.0
    ) -> Found:
        """A search by FAISS among the wanted rows, k of them at least.

        Where one row in fifty is wanted, fifty times the effort comes upon as many as a search of all
        does, and they may lie further away: it takes twice that. Inverted lists that hold none of them do
        not count. What finds fewer than k all the same is asked again without bounds.
        """
        index, lists = self.base.index, self.base.lists_with(wanted)
        effort *= _FURTHER * len(wanted) / int(np.count_nonzero(wanted))
        scores, rows = search_selected(index, queries, k, wanted, lists=lists, effort=effort)
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short) and not math.isinf(effort):
            again = search_selected(index, queries[short], k, wanted, lists=lists, effort=math.inf)
            scores[short], rows[short] = again
        return scores, rows

    def _with_delta(
        self,
        queries: np.ndarray,
        found: tuple[np.ndarray, np.ndarray],
        k: int,
        selection: Selection | None,
    ) -> Found:
        """What the base gave, joined by what the delta has that is better."""
        full = found[0].shape[1] == k and bool((found[1][:, -1] >= 0).all())
        lists = None
        if full and selection is None and self.base.approximate and self._few_of_delta(k):
            lists = self.delta.lists.over(queries, self.delta.scored)
        if lists is not None:
            listed, late = self._parted(lists)
            found = self._with_late(found, lists.search(queries, k, listed), k)
        else:
            late = self._live_delta.among(selection.delta if selection else None)
        if not len(late.rows):
            return found
        floors = found[0][:, -1] if full else np.full(len(queries), -np.inf, np.float32)
        scores, places = above(queries, late.scored, floors, k)
        rows = np.where(places < 0, -1, late.rows[places]) if scores.shape[1] else places
        return self._with_late(found, (scores, rows), k)

    def _few_of_delta(self, k: int) -> bool:
        """Whether at most one of k matches should be the delta's: lists are measured by the nearest."""
        return k * len(self.delta) <= len(self)

    def _with_late(
        self, found: tuple[np.ndarray, np.ndarray], late: tuple[np.ndarray, np.ndarray], k: int
    ) -> Found:
        """What was found, joined by what is better among rows of the delta, -1 where there are no more."""
        scores, rows = late
        if found[0].shape[1] == k:  # Either is best first: what counts is at the front.
            width = int((scores > found[0][:, -1:]).sum(axis=1).max(initial=0))
            scores, rows = scores[:, :width], rows[:, :width]
        if not scores.shape[1]:
            return found
        return joined(found, (scores, np.where(rows < 0, -1, rows + self.base.record.count)), k)

    @cached_property
    def _live(self) -> Bool[np.ndarray, " N"]:
        """The rows of the base that are alive."""
        return ~self.dead

    @cached_property
    def _live_delta(self) -> "_Late":
        """All live rows of the delta."""
        return _late(self.delta, self.delta.live)

    def _parted(self, lists: Lists) -> tuple[Bool[np.ndarray, " G"], "_Late"]:
        """Which rows of the lists are alive, and the live rows of the delta that came after those."""
        parts = self._parts
        if parts is None or parts[0] is not lists:
            live = self.delta.live
            listed = np.zeros(
                lists.count, bool
            )  # The lists may know of rows that came after this view.
            listed[: len(live)] = live[: lists.count]
            live[: lists.count] = False
            parts = self._parts = lists, listed, _late(self.delta, live)
        return parts[1:]

    def _reranked(self, queries: np.ndarray, found: tuple[np.ndarray, np.ndarray], k: int) -> Found:
        """Candidates scored again by their vectors at full width."""
        _, rows = found
        scores = np.full(rows.shape, -np.inf, np.float32)
        places = np.flatnonzero((rows >= 0).ravel())
        needed, where = np.unique(rows.ravel()[places], return_inverse=True)
        if len(needed):
            vectors = self.vectors(needed)
            pairs = np.einsum("md,md->m", queries[places // rows.shape[1]], vectors[where])
            scores.ravel()[places] = pairs
        return best(scores, rows, k)


def _late(delta: Delta, wanted: Bool[np.ndarray, " M"]) -> _Late:
    """Wanted rows of a delta; their vectors are copied only where some are not."""
    rows = np.flatnonzero(wanted)
    return _Late(rows, delta.scored if len(rows) == delta.count else delta.scored[rows])


def _keep(filters: dict[Any, Any], key: Any, rows: Any) -> None:
    """Remember the rows of a filter, and forget the oldest."""
    while len(filters) >= _KEPT_FILTERS:
        filters.pop(next(iter(filters)), None)
    filters[key] = rows


def _kept(scores: np.ndarray, rows: np.ndarray, wanted: np.ndarray, k: int) -> Found:
    """The first k wanted matches of each query, in order."""
    good = wanted[rows]
    good &= rows >= 0
    order = np.argsort(~good, axis=1, kind="stable")[:, :k]
    queries = np.arange(len(rows))[:, None]
    good = good[queries, order]
    scores = np.where(good, scores[queries, order], _NONE)
    return scores, np.where(good, rows[queries, order], -1)
