"""Exact search among vectors in memory, for many queries at once.

Shape letters: Q queries, M vectors, K matches, D width.

FAISS's own flat search is slow for vectors below 512 components: 6 GFLOP/s on a core that gives numpy's
BLAS 87 (FAISS 1.15.1, faiss-gpu-cuvs). Here numpy multiplies a block of vectors at a time, and what does
not come above a query's k-th score so far falls to one comparison: several times as fast, from sixteen
queries on. Wider vectors go to FAISS, which is on a par there.
"""

from collections.abc import Sequence

import faiss
import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64

Found = tuple[Float32[np.ndarray, "Q K"], Int64[np.ndarray, "Q K"]]
"""Scores and rows, best first; where nothing more was found -inf and row -1."""

# Scores of a block stay in a core's cache for a few hundred queries.
_VECTORS_AT_ONCE, _QUERIES_AT_ONCE = 8_192, 512
# With fewer queries all is bound by memory, and FAISS copies nothing.
MANY_QUERIES, WIDE = 16, 512
# To wake another library's threads costs more than FAISS's slower product of so few vectors.
_FEW_NUMBERS = 1 << 19
_NONE = np.float32(-np.inf)


def nearest(
    queries: Float32[np.ndarray, "Q D"],
    vectors: Float32[np.ndarray, "M D"],
    k: int,
    wanted: Bool[np.ndarray, " M"] | None = None,
) -> Found:
    """The k vectors of highest inner product with each query, of those wanted; fewer where fewer are."""
    k = min(k, len(vectors) if wanted is None else int(np.count_nonzero(wanted)))
    if not k:
        return nothing(len(queries))
    if (len(queries) < MANY_QUERIES or vectors.shape[1] >= WIDE) and wanted is None:
        vectors = np.ascontiguousarray(vectors)
        return faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    parts = [
        _nearest(queries[start : start + _QUERIES_AT_ONCE], vectors, k, wanted)
        for start in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    return _stacked(parts) if parts else nothing(0)


def above(
    queries: Float32[np.ndarray, "Q D"],
    vectors: Float32[np.ndarray, "M D"],
    floors: Float32[np.ndarray, " Q"],
    k: int,
) -> Found:
    """The k best among vectors, at least those of them that score above a query's floor; -1 past the last."""
    if len(queries) == 1:
        return _above_one(queries, vectors, floors[0], k)
    if np.isneginf(floors).any():
        return nearest(queries, vectors, k)
    if vectors.size <= _FEW_NUMBERS:
        vectors = np.ascontiguousarray(vectors)
        return faiss.knn(queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT)
    parts = [
        _above(
            _products(queries[i : i + _QUERIES_AT_ONCE], vectors),
            floors[i : i + _QUERIES_AT_ONCE],
            k,
        )
        for i in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    return _stacked(parts) if parts else nothing(0)


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> Found:
    """The k matches of highest score, best first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    queries = np.arange(len(rows))[:, None]
    return scores[queries, order], rows[queries, order]


def joined(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], k: int
) -> Found:
    """The k best of two lists for the same queries."""
    scores = np.concatenate([first[0], second[0]], axis=1)
    return best(scores, np.concatenate([first[1], second[1]], axis=1), k)


def nothing(num_queries: int) -> Found:
    """No matches."""
    return np.zeros((num_queries, 0), np.float32), np.zeros((num_queries, 0), np.int64)


def _nearest(
    queries: np.ndarray, vectors: np.ndarray, k: int, wanted: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    found = nothing(len(queries))
    for start in range(0, len(vectors), _VECTORS_AT_ONCE):
        block = slice(start, start + _VECTORS_AT_ONCE)
        scores = queries @ vectors[block].T
        if wanted is not None:
            scores[:, ~wanted[block]] = _NONE
        full = found[0].shape[1] == k and not np.isneginf(found[0][:, -1]).any()
        part = _above(scores, found[0][:, -1], k) if full else _top(scores, k)
        if part[0].shape[1]:
            found = joined(found, (part[0], np.where(part[1] >= 0, part[1] + start, -1)), k)
    return found


def _products(
    queries: Float32[np.ndarray, "Q D"], vectors: Float32[np.ndarray, "M D"]
) -> Float32[np.ndarray, "Q M"]:
    """Inner products between two searches of FAISS, by torch.

    The threads of numpy's BLAS spin for some 20 ms after a product, on the cores that FAISS wants next: a
    batch of a graph that takes 31 ms took 65 with a product of 1 ms after each.
    """
    first, second = (
        torch.from_numpy(np.require(part, requirements="W")) for part in (queries, vectors)
    )
    return (first @ second.T).numpy()


def _top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of each row of scores, in any order; -1 for those that are -inf."""
    if scores.shape[1] > k:
        rows = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    else:
        rows = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    values = np.take_along_axis(scores, rows, axis=1)
    return values, np.where(np.isneginf(values), -1, rows)


def _above(scores: np.ndarray, floors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of each row of scores among those above its floor."""
    flat = np.flatnonzero(scores > floors[:, None])
    if not len(flat):
        return nothing(len(scores))
    numbers, places = np.divmod(flat, scores.shape[1])
    values = scores.ravel()[flat]
    order = np.lexsort((-values, numbers))
    numbers, places, values = numbers[order], places[order], values[order]
    rank = np.arange(len(flat)) - np.searchsorted(numbers, numbers)
    first = rank < k
    width = int(rank[first].max()) + 1
    highest = np.full((len(scores), width), _NONE)
    rows = np.full((len(scores), width), -1, np.int64)
    highest[numbers[first], rank[first]] = values[first]
    rows[numbers[first], rank[first]] = places[first]
    return highest, rows


def _above_one(
    queries: np.ndarray, vectors: np.ndarray, floor: np.floating, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same of one query, by FAISS on one thread.

    A BLAS shares so little work out among threads, and on a busy machine waits for the last of them.
    """
    k = min(k, len(vectors))
    scores, rows = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    found = int(np.searchsorted(-scores[0], -floor))
    return scores[:, :found], rows[:, :found]


def _stacked(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists for several queries under each other, filled up to the longest."""
    width = max(scores.shape[1] for scores, _ in parts)
    scores = [_filled(scores, width, _NONE) for scores, _ in parts]
    rows = [_filled(rows, width, -1) for _, rows in parts]
    return np.concatenate(scores), np.concatenate(rows)


def _filled(part: np.ndarray, width: int, value: np.floating | int) -> np.ndarray:
    missing = width - part.shape[1]
    return np.pad(part, ((0, 0), (0, missing)), constant_values=value) if missing else part
