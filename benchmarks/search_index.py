"""How fast an index answers, beside bare FAISS with the same factory, and hnswlib at equal recall.

    taskset -c 0-1 python benchmarks/search_index.py            # 1,000,000 x 256 and 100,000 x 512
    taskset -c 0-1 python benchmarks/search_index.py --quick    # 20,000 x 128: under a minute

The full form takes about half an hour on two cores, most of it for building graphs.

Products and queries are drawn from two mixtures, as products and videos are embedded into two parts of
one space. Our index is loaded from its folder, with string ids, 1% of its products deleted and 1% upserted
since it was built; FAISS holds the same vectors in memory and returns rows. The two take turns, and ratios
are medians of the rounds. FAISS's threads are as many as the cores. The last line is one JSON object.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import tyro

from mmrec.retrieval.index import ProductIndex

BATCH, K = 256, 10
QPS_BAR, OVERHEAD_BAR_MS, HNSWLIB_BAR = 0.95, 0.3, 0.9
CHANGED_SHARE = 0.01
HNSW_LINKS, HNSW_CONSTRUCTION = 32, 40


@dataclass(frozen=True, kw_only=True)
class SearchIndexConfig:
    """What is measured."""

    quick: bool = False
    """One small catalogue and fewer rounds."""
    sizes: tuple[str, ...] = ("1000000x256", "100000x512")
    """Catalogues as products x width."""
    factories: tuple[str, ...] = ("Flat", "IVF{lists},Flat", "HNSW32")
    """FAISS factories; {lists} stands for four times the square root of the products."""


def main(config: SearchIndexConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    # As many as numpy's BLAS has taken: the cores of this process.
    threads = len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(threads)
    sizes = ("20000x128",) if config.quick else config.sizes
    rounds = 3 if config.quick else 5
    results: list[dict[str, Any]] = []
    for size in sizes:
        count, width = (int(number) for number in size.split("x"))
        vectors, queries = catalogue(count, width)
        for template in config.factories:
            factory = template.format(lists=4 * int(count**0.5))
            results += compare_with_faiss(vectors, queries, factory, size, rounds)
        results += compare_with_hnswlib(vectors, queries, size, rounds, threads)
    machine = (
        f"{platform.machine()}, {threads} of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, FAISS {faiss.__version__}"
    )
    print(json.dumps({"benchmark": "search_index", "machine": machine, "results": results}))


def catalogue(count: int, width: int, num_queries: int = 2_048) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of products around a thousand centres, and of queries around the same ones moved.

    Every query is nearer to all other queries than to products, and its spread is wider: what a modality
    gap looks like.
    """
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((1_000, width)).astype(np.float32)
    gap = 0.5 * rng.standard_normal(width).astype(np.float32)

    def draw(number: int, spread: float, shift: np.ndarray | float) -> np.ndarray:
        vectors = rng.standard_normal((number, width), dtype=np.float32)
        vectors *= spread
        vectors += centers[rng.integers(len(centers), size=number)] + shift
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    return draw(count, 0.7, 0.0), draw(num_queries, 0.9, gap)


def compare_with_faiss(
    vectors: np.ndarray, queries: np.ndarray, factory: str, size: str, rounds: int
) -> list[dict[str, Any]]:
    """QPS of batches and overhead of single queries, with ids, tombstones and a delta in place."""
    count = len(vectors)
    changed = int(CHANGED_SHARE * count)
    ids = [f"product-{number:09d}" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        # The last hundredth comes later; the hundredth before is deleted.
        ProductIndex.build(ids[:-changed], vectors[:-changed], factory=factory).save(
            Path(folder) / "index"
        )
        with ProductIndex.load(Path(folder) / "index", device="cpu") as index:
            for start in range(count - changed, count, 1_000):
                index.upsert(ids[start : start + 1_000], vectors[start : start + 1_000])
            index.delete(ids[-2 * changed : -changed])
            bare = faiss.read_index(str(next(Path(folder).rglob("base.faiss"))))
            bare.add(vectors[-changed:])
            pairs = _take_turns(
                lambda: _batches(lambda part: bare.search(part, K), queries),
                lambda: _batches(lambda part: index.search(part, K), queries),
                rounds,
            )
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            qps = [len(queries) / statistics.median(times) for times in zip(*pairs, strict=True)]
            print(
                f"{size} {factory}: {qps[0]:.0f} queries/s bare, {qps[1]:.0f} through ProductIndex"
            )
            singles = _singles(bare, index, queries[: 200 if count < 500_000 else 60])
    overhead = statistics.median(ours - theirs for theirs, ours in singles)
    p50, p99 = (1e3 * np.quantile([ours for _, ours in singles], q) for q in (0.5, 0.99))
    print(
        f"{size} {factory}: single query p50 {p50:.3f} ms, p99 {p99:.3f}; overhead {overhead:.3f} ms"
    )
    return [
        _result(f"QPS in batches of {BATCH}, {size}", f"bare FAISS {factory}", ratio, QPS_BAR),
        {
            "what": f"overhead of a single query in ms, {size}",
            "peer": f"bare FAISS {factory}",
            "ratio": round(1e3 * overhead, 3),
            "bar": OVERHEAD_BAR_MS,
            "holds": 1e3 * overhead <= OVERHEAD_BAR_MS,
        },
    ]


def _singles(bare: Any, index: ProductIndex, queries: np.ndarray) -> list[tuple[float, float]]:
    """Seconds of each query alone, bare and through ProductIndex, turn by turn."""
    times = []
    for row in range(len(queries)):
        one = queries[row : row + 1]
        pair = []
        for search in (bare.search, index.search):
            search(one, K)  # the caches' turn
            pair.append(_seconds(lambda search=search, one=one: search(one, K)))
        times.append((pair[0], pair[1]))
    return times


def compare_with_hnswlib(
    vectors: np.ndarray, queries: np.ndarray, size: str, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """QPS of HNSW at the recall that hnswlib has with its candidates set to 64."""
    try:
        import hnswlib
    except ImportError:
        print("hnswlib is not installed (pip install hnswlib): left out")
        return []
    peer = hnswlib.Index(space="ip", dim=vectors.shape[1])
    peer.init_index(len(vectors), ef_construction=HNSW_CONSTRUCTION, M=HNSW_LINKS)
    peer.set_num_threads(threads)
    peer.add_items(vectors)
    peer.set_ef(64)
    ids = [f"product-{number:09d}" for number in range(len(vectors))]
    index = ProductIndex.build(ids, vectors, factory=f"HNSW{HNSW_LINKS}")
    _, exact = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)
    theirs = _recall(peer.knn_query(queries, K)[0], exact)
    graph = index._view.base.index.hnsw
    for candidates in (16, 24, 32, 48, 64, 96, 128, 192, 256):
        graph.efSearch = candidates
        rows = np.array([[int(id_[8:]) for id_ in row] for row in index.search(queries, K).ids])
        if (ours := _recall(rows, exact)) >= theirs:
            break
    pairs = _take_turns(
        lambda: _batches(lambda part: peer.knn_query(part, K), queries),
        lambda: _batches(lambda part: index.search(part, K), queries),
        rounds,
    )
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    print(
        f"{size} HNSW: recall@{K} {theirs:.3f} of hnswlib, {ours:.3f} ours; QPS ratio {ratio:.2f}"
    )
    return [_result(f"QPS of HNSW at recall@{K} {ours:.3f}, {size}", "hnswlib", ratio, HNSWLIB_BAR)]


def _recall(found: np.ndarray, exact: np.ndarray) -> float:
    hits = [
        len({*ours} & {*true}) for ours, true in zip(found.tolist(), exact.tolist(), strict=True)
    ]
    return float(np.mean(hits)) / exact.shape[1]


def _batches(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> None:
    for start in range(0, len(queries), BATCH):
        search(queries[start : start + BATCH])


def _take_turns(
    theirs: Callable[[], None], ours: Callable[[], None], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of both, round by round, after one that fills caches."""
    theirs(), ours()
    return [(_seconds(theirs), _seconds(ours)) for _ in range(rounds)]


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _result(what: str, peer: str, ratio: float, bar: float) -> dict[str, Any]:
    return {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "holds": ratio >= bar}


if __name__ == "__main__":
    main(tyro.cli(SearchIndexConfig))
