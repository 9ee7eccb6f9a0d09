"""How fast an index answers, beside bare FAISS with the same factory, hnswlib at equal recall, and autofaiss.

    taskset -c 0-1 python benchmarks/search_index.py            # 1,000,000 x 256 and 100,000 x 512
    taskset -c 0-1 python benchmarks/search_index.py --quick    # 20,000 x 128: under a minute

The full form takes about half an hour on two cores, most of it for building graphs.

Products and queries are drawn from two mixtures, as products and videos are embedded into two parts of
one space. Our index is loaded from its folder, with string ids, and beside bare FAISS with 1% of its products
deleted and 1% upserted since it was built; FAISS holds the same vectors in memory and returns rows. The two
take turns, and ratios are medians of the rounds. FAISS's threads are as many as the cores. The last line is
one JSON object.

autofaiss (2.18.0) chooses an index and its parameters for a memory budget, with its own defaults, from the
same vectors. It runs in a process of its own, its pins (numpy below 2, pyarrow below 20, and FAISS 1.8, since
with 1.15.1 its OPQ indexes end in a TypeError) in a virtual environment under .peers/, made at the first
call. Ours is tuned under the same budget to a recall a quarter nearer to one than autofaiss's; it is tuned
with other queries of the same distribution than those that both are then measured with, turn by turn.
Budgets are shares of the vectors' own bytes: one that lets everything in, and one that asks for
compression, which --quick leaves out.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
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
from mmrec.retrieval.tuning import TuningGoal, exact_truth, recall_of, tuned_index

BATCH, K, NUM_QUERIES = 256, 10, 2_048
QPS_BAR, OVERHEAD_BAR_MS, HNSWLIB_BAR = 0.95, 0.3, 0.9
CHANGED_SHARE = 0.01
SETTLED_S = 5.0
"""After the first search: what an index does in the background with a large delta is over by then."""
NUM_SINGLES = 200
HNSW_LINKS, HNSW_CONSTRUCTION = 32, 40
AUTOFAISS_BARS = (1.0, 1.5)
"""Of recall and of QPS."""
BUDGETS = (2.0, 0.4)
"""Bytes of an index for each byte of float32 vectors."""
PEER = Path(__file__).resolve().parents[1] / ".peers" / "autofaiss"
PEER_REQUIREMENTS = """\
autofaiss==2.18.0
embedding-reader==1.8.1
faiss-cpu==1.8.0
numpy==1.26.4
packaging==26.3
pyarrow==19.0.1
"""


@dataclass(frozen=True, kw_only=True)
class SearchIndexConfig:
    """What is measured."""

    quick: bool = False
    """One small catalogue and fewer rounds."""
    sizes: tuple[str, ...] = ("1000000x256", "100000x512")
    """Catalogues as products x width."""
    factories: tuple[str, ...] = ("Flat", "IVF{lists},Flat", "HNSW32")
    """FAISS factories; {lists} stands for four times the square root of the products."""
    peers: tuple[str, ...] = ("faiss", "hnswlib", "autofaiss")
    """Whom to measure beside."""


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
        for template in config.factories if "faiss" in config.peers else ():
            factory = template.format(lists=4 * int(count**0.5))
            results += compare_with_faiss(vectors, queries, factory, size, rounds)
        if "hnswlib" in config.peers:
            results += compare_with_hnswlib(vectors, queries, size, rounds, threads)
        if "autofaiss" in config.peers and (python := _autofaiss_python()):
            for budget in BUDGETS[:1] if config.quick else BUDGETS:
                results += compare_with_autofaiss(python, vectors, size, budget, rounds, threads)
    machine = (
        f"{platform.machine()}, {threads} of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, FAISS {faiss.__version__}"
    )
    print(json.dumps({"benchmark": "search_index", "machine": machine, "results": results}))


def catalogue(
    count: int, width: int, num_queries: int = NUM_QUERIES
) -> tuple[np.ndarray, np.ndarray]:
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
            index.search(queries, K)
            time.sleep(SETTLED_S)
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
            singles = _singles(bare, index, queries[:NUM_SINGLES])
            if factory != "Flat":
                print(f"{size} {factory}: {_both_recalls(bare, index, vectors, queries, changed)}")
    overhead = statistics.median(ours - theirs for theirs, ours in singles)
    p50, p99 = (1e3 * np.quantile([ours for _, ours in singles], q) for q in (0.5, 0.99))
    print(
        f"{size} {factory}: single query p50 {p50:.3f} ms, p99 {p99:.3f}; overhead {1e3 * overhead:.3f} ms"
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


def _both_recalls(
    bare: Any, index: ProductIndex, vectors: np.ndarray, queries: np.ndarray, changed: int
) -> str:
    """Recall of either among the products that it holds; ours has another graph and fewer products."""
    late = len(vectors) - changed
    held = np.delete(np.arange(len(vectors)), slice(late - changed, late))
    rows = np.array([[int(id_[8:]) for id_ in row] for row in index.search(queries, K).ids])
    theirs = recall_of(exact_truth(vectors, queries, K), bare.search(queries, K)[1])
    truth = exact_truth(vectors[held], queries, K)
    ours = recall_of(truth, np.searchsorted(held, rows))
    return f"recall@{K} {theirs:.4f} bare, {ours:.4f} through ProductIndex"


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
    for candidates in range(12, 257, 2):
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


def compare_with_autofaiss(
    python: Path, vectors: np.ndarray, size: str, share: float, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Recall and QPS of what each chooses under a budget of `share` times the vectors' bytes."""
    count, width = vectors.shape
    budget = int(share * vectors.nbytes)
    same, both = catalogue(count, width, num_queries=2 * NUM_QUERIES)
    assert np.array_equal(same, vectors)
    del same
    for_tuning, queries = both[:NUM_QUERIES], both[NUM_QUERIES:]
    truth = exact_truth(vectors, queries, K)
    with (
        tempfile.TemporaryDirectory() as folder,
        Autofaiss(python, Path(folder), vectors, queries, budget, threads) as peer,
    ):
        theirs = recall_of(truth, peer.rows())
        print(f"{size}, {budget / 1e6:,.0f} MB: autofaiss takes {peer.choice}, recall {theirs:.4f}")
        goal = TuningGoal(
            recall_target=theirs + (1 - theirs) / 4,
            k=K,
            memory_budget=budget,
            best_effort=True,  # a recall that nothing reaches is a result, too
        )
        names = [str(row) for row in range(count)]
        index, frontier = tuned_index(names, vectors, for_tuning, goal, report=print)
        found = index.search(queries, K).ids
        rows = np.array([[*map(int, row), *[-1] * (K - len(row))] for row in found])
        ours = recall_of(truth, rows)
        search = lambda part: index.search(part, K)  # noqa: E731
        pairs = []
        for _ in range(rounds):
            pairs.append((peer.ask("batches"), _seconds(lambda: _batches(search, queries))))
        ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
        alone = [_seconds(lambda row=row: search(queries[row : row + 1])) for row in range(200)]
        print(
            f"{size}, {budget / 1e6:,.0f} MB: recall@{K} {theirs:.4f} of autofaiss, {ours:.4f} ours "
            f"({frontier.taken.factory}); queries/s "
            f"{len(queries) / statistics.median(pair[0] for pair in pairs):,.0f} and "
            f"{len(queries) / statistics.median(pair[1] for pair in pairs):,.0f}; single query "
            f"p50 {1e3 * peer.ask('p50'):.3f} and {1e3 * np.quantile(alone, 0.5):.3f} ms, "
            f"p99 {1e3 * peer.ask('p99'):.3f} and {1e3 * np.quantile(alone, 0.99):.3f} ms"
        )
        who = f"autofaiss {peer.choice}"
    at = f"{size} in {budget / 1e6:,.0f} MB"
    return [
        _result(f"recall@{K}, {at}", who, ours / theirs, AUTOFAISS_BARS[0]),
        _result(f"QPS in batches of {BATCH}, {at}", who, ratio, AUTOFAISS_BARS[1]),
    ]


class Autofaiss:
    """A process that has built autofaiss's index, and searches it when asked."""

    def __init__(
        self,
        python: Path,
        folder: Path,
        vectors: np.ndarray,
        queries: np.ndarray,
        budget: int,
        threads: int,
    ) -> None:
        """Write vectors and queries, and wait until the index is built."""
        (folder / "vectors").mkdir()
        np.save(folder / "vectors" / "part.npy", vectors)
        np.save(folder / "queries.npy", queries)
        self._folder = folder
        self._process = subprocess.Popen(
            [python, "-c", AUTOFAISS, folder, str(budget), str(threads), str(K), str(BATCH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.choice = self._answer()
        """The factory and parameters that it took."""

    def __enter__(self) -> "Autofaiss":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate("")

    def rows(self) -> np.ndarray:
        """What it finds for the queries."""
        return np.load(self._folder / "rows.npy")

    def ask(self, what: str) -> float:
        """Seconds: of all queries in `batches`, or the `p50` or `p99` of single ones."""
        assert self._process.stdin
        print(what, file=self._process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("answer: "):
                return line.removeprefix("answer: ").strip()
        raise SystemExit("autofaiss ended; what it says is above")


AUTOFAISS = """
import sys, time
import numpy as np
import autofaiss
folder, budget, threads, k, batch = sys.argv[1], *map(int, sys.argv[2:])
queries = np.load(folder + "/queries.npy")
index, infos = autofaiss.build_index(
    embeddings=folder + "/vectors",
    save_on_disk=False,
    max_index_memory_usage=f"{budget / 1e6}MB",
    current_memory_available=f"{max(32e9, 2 * budget) / 1e6}MB",
    metric_type="ip",
    nb_cores=threads,
    verbose=40,
)
parts = [queries[start : start + batch] for start in range(0, len(queries), batch)]
np.save(folder + "/rows.npy", np.concatenate([index.search(part, k)[1] for part in parts]))
def seconds(part):
    started = time.perf_counter()
    index.search(part, k)
    return time.perf_counter() - started
print("answer:", infos["index_key"], infos["index_param"], flush=True)
for line in sys.stdin:
    if line.strip() == "batches":
        found = sum(seconds(part) for part in parts)
    else:
        alone = [seconds(queries[row : row + 1]) for row in range(200)]
        found = np.quantile(alone, float(line.strip()[1:]) / 100)
    print("answer:", found, flush=True)
"""


def _autofaiss_python() -> Path | None:
    """The Python of an environment that has autofaiss, made at the first call; None where it cannot be."""
    python, made = PEER / "bin" / "python", PEER / "requirements.txt"
    if made.is_file() and made.read_text() == PEER_REQUIREMENTS:
        return python
    print(f"making {PEER}", flush=True)
    commands = [
        [sys.executable, "-m", "venv", "--clear", PEER],
        [python, "-m", "pip", "install", "--quiet", *PEER_REQUIREMENTS.split()],
    ]
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"autofaiss cannot be installed: left out ({done.stderr.strip()[-300:]})")
            return None
    made.write_text(PEER_REQUIREMENTS)
    return python


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
