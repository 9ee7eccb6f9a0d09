"""Inverted lists over a large delta, so that many upserts do not slow an approximate search down.

Shape letters: Q queries, M rows of the delta, G rows in the lists, K matches, I indexed width.

A delta is compared row by row, which finds what is new for certain. Beside a graph of a million products
ten thousand rows so compared are half as much work as the graph itself. So the older rows of such a delta
go into inverted lists, made on one thread in the background; what came since, and everything until the lists
are ready, is compared as before. How many lists a search probes is measured with queries that were asked.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Bool, Float32

from mmrec.retrieval.exact import Found
from mmrec.retrieval.faiss_base import search_selected

FEWEST_ROWS = 2_000
"""Rows that are compared one by one for less than lists cost."""
_GROWTH = 4  # Lists are made anew once a quarter of their rows came since.
_NEEDED_QUERIES, _KEPT_QUERIES = 64, 256
_LISTS_PER_ROOT = 2.5
_FEWEST_PROBED, _MOST_PROBED_SHARE = 4, 4
_RECALL = 0.95
_TRAINED_ON = 64  # Rows for each list.
_NONE = np.float32(-np.inf)


@dataclass(frozen=True, eq=False)
class Lists:
    """Inverted lists over the first rows of a delta."""

    index: Any
    """A FAISS `IndexIVFFlat`."""

    @property
    def count(self) -> int:
        """The number of rows in them."""
        return self.index.ntotal

    def search(
        self, queries: Float32[np.ndarray, "Q I"], k: int, wanted: Bool[np.ndarray, " G"]
    ) -> Found:
        """The k nearest of the wanted rows in the lists probed; -inf and row -1 where they hold fewer."""
        if wanted.all():
            scores, rows = self.index.search(queries, k)
        else:
            scores, rows = search_selected(self.index, queries, k, wanted)
        return np.where(rows >= 0, scores, _NONE), rows


class DeltaLists:
    """The lists of a delta as it grows, shared by all its moments."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queries: list[np.ndarray] = []
        self._lists: Lists | None = None
        self._count = 0
        self._maker: threading.Thread | None = None

    def over(
        self, queries: Float32[np.ndarray, "Q I"], scored: Float32[np.ndarray, "M I"]
    ) -> Lists | None:
        """The lists that there are for a search of these rows; renewed in the background when it is time."""
        if len(scored) - self._count > max(FEWEST_ROWS, self._count // _GROWTH):
            self._renew(queries, scored)
        return self._lists

    def wait(self) -> None:
        """Until no lists are being made."""
        if maker := self._maker:
            maker.join()

    def _renew(self, queries: np.ndarray, scored: np.ndarray) -> None:
        with self._lock:
            if self._maker is not None and self._maker.is_alive():
                return
            self._queries.append(queries[:_KEPT_QUERIES].copy())
            if sum(map(len, self._queries)) < _NEEDED_QUERIES:
                return
            asked, self._queries = np.concatenate(self._queries), []
            self._count = len(scored)
            self._maker = threading.Thread(target=self._make, args=(scored, asked))
            self._maker.start()

    def _make(self, scored: np.ndarray, queries: np.ndarray) -> None:
        faiss.omp_set_num_threads(1)  # Of this thread; the others go on searching.
        self._lists = make_lists(scored, queries[-_KEPT_QUERIES:])


def make_lists(
    scored: Float32[np.ndarray, "M I"], queries: Float32[np.ndarray, "Q I"]
) -> Lists | None:
    """Lists that are probed until 95% of the queries find their nearest row.

    None where that takes a quarter of them or more: comparing one by one is then as good.
    """
    count, width = scored.shape
    num_lists = int(_LISTS_PER_ROOT * count**0.5)
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFFlat(quantizer, width, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.train(scored)
    index.add(scored)
    nearest = faiss.knn(queries, scored, 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    for probed in _doublings(_FEWEST_PROBED, num_lists // _MOST_PROBED_SHARE):
        index.nprobe = probed
        if np.mean(index.search(queries, 1)[1] == nearest) >= _RECALL:
            return Lists(index)
    return None


def _doublings(first: int, end: int) -> Sequence[int]:
    """First, twice that and so on, below an end."""
    numbers = []
    while first < end:
        numbers.append(first)
        first *= 2
    return numbers
