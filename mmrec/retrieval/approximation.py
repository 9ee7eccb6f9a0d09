"""What an index loses against an exact search, on the queries of an evaluation.

Shape letters: Q queries, N catalogue size, D embedding width, K matches.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from mmrec.errors import UserError
from mmrec.retrieval.backend import CatalogueIndex
from mmrec.retrieval.base import narrowed
from mmrec.retrieval.exact import nearest
from mmrec.retrieval.index import ProductIndex, SearchResult

CUTOFFS = (1, 10, 50, 100)
# Queries that are also asked one at a time: enough for a 99th percentile of two or three of them.
_MOST_TIMED = 256


def ask_index(
    index: CatalogueIndex,
    queries: Float32[np.ndarray, "Q D"],
    products: Float32[np.ndarray, "N D"],
    product_ids: Sequence[str],
    relevant: Sequence[Int[np.ndarray, " _R"]],
) -> tuple[dict[str, Any], list[Int[np.ndarray, " _R"]]]:
    """Ask an index the queries of an evaluation: its agreement with exact search, speed, and ranks.

    "recall" under K is the mean share of the K products of highest exact score that the index returns
    among its first K; a product that ties with the K-th counts as one of them. What the index does not
    hold counts as missed. "latency_ms" is of one query at a time, "queries_per_s" of all at once, both
    beside a flat index of the same vectors in the same process.

    The ranks are those of `rank_relevant`, by the order of the index's own answers; a right product that
    is not among its first 100 stands last. Raises `UserError` for an index of other products.
    """
    held = set(index.ids)
    missing = sum(product_id not in held for product_id in product_ids)
    if index.key != "product_id" or missing == len(product_ids):
        raise UserError(
            f"--index: holds none of the {len(product_ids):,} products of these shards; give an index "
            f"of them: `mmrec embed --split catalog ...`, `mmrec index build ...`"
        )
    depth = min(CUTOFFS[-1], len(product_ids))
    asked = narrowed(queries, index.width)
    result = index.search(asked, depth)
    exact = ProductIndex.build(product_ids, products)
    best = nearest(queries, products, depth)[0]
    rows = {product_id: row for row, product_id in enumerate(product_ids)}
    found = [[rows.get(product_id, -1) for product_id in ids] for ids in result.ids]
    facts = {
        "products": len(index),
        "missing": missing,
        "depth": depth,
        "recall": _recall(found, queries, products, best),
        "latency_ms": {"index": _latency(index, asked), "exact": _latency(exact, queries)},
        "queries_per_s": {
            "index": _throughput(index, asked, depth),
            "exact": _throughput(exact, queries, depth),
        },
    }
    return facts, _ranks(result, found, relevant, len(product_ids))


def _recall(
    found: Sequence[Sequence[int]],
    queries: Float32[np.ndarray, "Q D"],
    products: Float32[np.ndarray, "N D"],
    best: Float32[np.ndarray, "Q K"],
) -> dict[str, float]:
    depth = best.shape[1]
    cutoffs = [k for k in CUTOFFS if k <= depth]
    shares = np.zeros((len(found), len(cutoffs)))
    for query, own in enumerate(found):
        known = [row for row in own if row >= 0]
        scores = np.full(depth, -np.inf)
        scores[[place for place, row in enumerate(own) if row >= 0]] = (
            products[known] @ queries[query]
        )
        # Float32 sums of equal vectors differ by their order: what is that near to the K-th ties with it.
        slack = 1e-6 * max(1.0, abs(float(best[query, 0])))
        for column, k in enumerate(cutoffs):
            shares[query, column] = np.mean(scores[:k] >= best[query, k - 1] - slack)
    return {str(k): float(share) for k, share in zip(cutoffs, shares.mean(axis=0), strict=True)}


def _ranks(
    result: SearchResult,
    found: Sequence[Sequence[int]],
    relevant: Sequence[Int[np.ndarray, " _R"]],
    num_products: int,
) -> list[Int[np.ndarray, " _R"]]:
    ranks = []
    for own, scores, right in zip(found, result.scores, relevant, strict=True):
        rows = np.array(own, np.int64)
        is_right = np.isin(rows, right)
        scores = scores[: len(rows)]
        ahead = [int((~is_right & (scores >= score)).sum()) for score in scores[is_right]]
        places = np.array([count + place for place, count in enumerate(ahead, 1)], np.int64)
        lost = len(np.unique(right)) - len(places)
        last = np.arange(num_products - lost + 1, num_products + 1)
        ranks.append(np.concatenate([places, last]))
    return ranks


def _latency(index: CatalogueIndex, queries: Float32[np.ndarray, "Q D"]) -> dict[str, float]:
    """Milliseconds of a search for the first ten, one query at a time."""
    chosen = np.unique(np.linspace(0, len(queries) - 1, _MOST_TIMED).astype(int))
    index.search(queries[:1], 10)  # The first touches pages and makes threads.
    times = []
    for query in chosen:
        started = time.perf_counter()
        index.search(queries[query : query + 1], 10)
        times.append(1000 * (time.perf_counter() - started))
    names = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: round(float(np.quantile(times, share)), 4) for name, share in names.items()}


def _throughput(index: CatalogueIndex, queries: Float32[np.ndarray, "Q D"], depth: int) -> float:
    started = time.perf_counter()
    index.search(queries, depth)
    return round(len(queries) / max(time.perf_counter() - started, 1e-9), 1)
