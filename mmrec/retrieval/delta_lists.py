"""Inverted lists over a large delta, so that many upserts do not slow an approximate search down.

Shape letters: Q queries, M rows of the delta, G rows in the lists, K matches, I indexed width.

A delta is compared row by row, which finds what is new for certain. Beside a graph of a million products
ten thousand rows so compared are half as much work as the graph itself. So the older rows of such a delta
go into inverted lists, made on one thread in the background; what came since, and everything until the lists
are ready, is compared as before. How many lists a search probes is measured with queries that were asked,
and measured again as others come: those of a page of products say little of those of a feed of videos.
"""

import threading
from collections import deque
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
_NEEDED_QUERIES, _KEPT_QUERIES = 64, 128
MEASURED_EVERY = 4_096
"""Queries after which it is measured again how many lists to probe."""
_LISTS_PER_ROOT = 2.5
_FEWEST_PROBED, _MOST_PROBED_SHARE = 4, 4
_RECALL = 0.95
_TRAINED_ON = 64  # Rows for each list.
_NONE = np.float32(-np.inf)


@dataclass(frozen=True, eq=False)
class Lists:
    """Inverted lists over the first rows of a delta."""

    index: Any
    """A FAISS `IndexIVFFlat`; its own `nprobe` stays 1, since searches that run would trip over a change."""
    probed: int
    """Lists that a search looks into."""
    parameters: Any
    """The same, as FAISS takes it with a search: made once, since a single query notices."""

    @property
    def count(self) -> int:
        """The number of rows in them."""
        return self.index.ntotal

    def search(
        self, queries: Float32[np.ndarray, "Q I"], k: int, wanted: Bool[np.ndarray, " G"]
    ) -> Found:
        """The k nearest of the wanted rows in the lists probed; -inf and row -1 where they hold fewer."""
        if wanted.all():
            scores, rows = self.index.search(queries, k, params=self.parameters)
        else:
            scores, rows = search_selected(
                self.index, queries, k, wanted, effort=float(self.probed)
            )
        return np.where(rows >= 0, scores, _NONE), rows


class DeltaLists:
    """The lists of a delta as it grows, shared by all its moments."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: deque[np.ndarray] = deque(maxlen=_KEPT_QUERIES)
        self._since_measured = 0
        self._index: Any = None
        self._lists: Lists | None = None
        self._worker: threading.Thread | None = None

    def over(
        self, queries: Float32[np.ndarray, "Q I"], scored: Float32[np.ndarray, "M I"]
    ) -> Lists | None:
        """The lists that there are for a search of these rows; renewed in the background when it is time."""
        if len(scored) <= FEWEST_ROWS:
            return None
        with self._lock:
            self._asked.extend(queries[-_KEPT_QUERIES:].copy())
            self._since_measured += len(queries)
            if self._worker is None or not self._worker.is_alive():
                self._improve(scored)
            return self._lists

    def wait(self) -> None:
        """Until no lists are being made or measured."""
        if worker := self._worker:
            worker.join()

    def _improve(self, scored: np.ndarray) -> None:
        listed = self._index.ntotal if self._index else 0
        grown = len(scored) - listed > max(FEWEST_ROWS, listed // _GROWTH)
        if len(self._asked) < _NEEDED_QUERIES or not (
            grown or self._since_measured >= MEASURED_EVERY
        ):
            return
        self._since_measured = 0
        index = None if grown else self._index
        self._worker = threading.Thread(
            target=self._work, args=(index, scored, np.stack(self._asked))
        )
        self._worker.start()

    def _work(self, index: Any, scored: np.ndarray, queries: np.ndarray) -> None:
        faiss.omp_set_num_threads(1)  # Of this thread; the others go on searching.
        index = index or make_index(scored)
        lists = measured_lists(index, scored, queries)
        with self._lock:
            self._index, self._lists = index, lists


def make_index(scored: Float32[np.ndarray, "M I"]) -> Any:
    """A FAISS `IndexIVFFlat` of all rows."""
    count, width = scored.shape
    quantizer = faiss.IndexFlatIP(width)
    num_lists = int(_LISTS_PER_ROOT * count**0.5)
    index = faiss.IndexIVFFlat(quantizer, width, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINED_ON
    index.train(scored)
    index.add(scored)
    return index


def measured_lists(
    index: Any, scored: Float32[np.ndarray, "M I"], queries: Float32[np.ndarray, "Q I"]
) -> Lists | None:
    """Lists of which as many are probed as find the nearest row for 95% of the queries.

    None where that takes a quarter of them or more: comparing one by one is then as good.
    """
    rows = scored[: index.ntotal]
    nearest = faiss.knn(queries, rows, 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    for probed in _doublings(_FEWEST_PROBED, index.nlist // _MOST_PROBED_SHARE):
        parameters = _probing(probed)
        if np.mean(index.search(queries, 1, params=parameters)[1] == nearest) >= _RECALL:
            return Lists(index, probed, parameters)
    return None


def _probing(probed: int) -> Any:
    parameters: Any = faiss.SearchParametersIVF()
    parameters.nprobe = probed
    return parameters


def _doublings(first: int, end: int) -> Sequence[int]:
    """First, twice that and so on, below an end."""
    numbers = []
    while first < end:
        numbers.append(first)
        first *= 2
    return numbers
