"""How fast an index is changed, compacted and opened, each upsert on the disk before it returns.

    python benchmarks/update_index.py            # 1,000,000 x 256: about ten minutes
    python benchmarks/update_index.py --quick    # 50,000 x 256: under a minute

Upserts go in batches of 1,000 with two attributes, to a flat index and to inverted lists. Opening is by a
process of its own, after imports, on files that the machine has read before. A deleted product must not be
found before and after compaction. The bars hold for the full size. The last line is one JSON object.
"""

import json
import os
import platform
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
import pyarrow as pa
import tyro

from mmrec.retrieval.index import ProductIndex

WIDTH, BATCH = 256, 1_000
UPSERTS_BAR, COMPACT_BAR_S, OPEN_BAR_S = 10_000, 60.0, 1.0
OPEN = """
import sys, time
import faiss, pyarrow
from mmrec.retrieval.index import ProductIndex
started = time.perf_counter()
index = ProductIndex.load(sys.argv[1], device="cpu")
print(time.perf_counter() - started, len(index))
"""


@dataclass(frozen=True, kw_only=True)
class UpdateIndexConfig:
    """What is measured."""

    quick: bool = False
    """A twentieth of the products."""
    factories: tuple[str, ...] = ("Flat", "IVF1024,SQ8")
    """FAISS factories."""


def main(config: UpdateIndexConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    threads = len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(threads)
    count = 50_000 if config.quick else 1_000_000
    late = 10_000 if config.quick else 50_000
    vectors = _unit_vectors(count + late)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for factory in config.factories:
            folder = Path(temporary) / factory.split(",")[0]
            ids = [f"product-{number:09d}" for number in range(count)]
            index = ProductIndex.build(
                ids, vectors[:count], factory=factory, attributes=_table(ids)
            )
            index.save(folder)
            seconds = _seconds(lambda folder=folder: _opened(folder))
            opened = _opened(folder)
            print(
                f"{factory}: opened {count:,} in {opened:.3f} s ({seconds:.1f} s with the imports)"
            )
            results.append(
                _below(f"seconds to open {count:,} x {WIDTH}, {factory}", opened, OPEN_BAR_S)
            )
            with index:
                rate = late / _seconds(lambda index=index: _upsert(index, vectors, count, late))
                print(f"{factory}: {rate:,.0f} upserts/s in batches of {BATCH:,}")
                what = f"upserts a second in batches of {BATCH:,}, {factory}"
                results.append(
                    {"what": what, "peer": "bar", "ratio": round(rate / UPSERTS_BAR, 2)}
                    | {"bar": 1.0, "holds": rate >= UPSERTS_BAR}
                )
                gone = ids[::100]
                deleting = _seconds(lambda index=index, gone=gone: index.delete(gone))
                before = _found(index, vectors[:count:100], set(gone))
                compacting = _seconds(index.compact)
                after = _found(index, vectors[:count:100], set(gone))
            print(
                f"{factory}: {len(gone):,} deleted in {deleting:.3f} s and found {before + after} times; "
                f"compacted to {len(index):,} in {compacting:.1f} s"
            )
            results.append(
                _below(f"times a deleted product is found, {factory}", before + after, 0)
            )
            results.append(_below(f"seconds to compact {factory}", compacting, COMPACT_BAR_S))
            print(f"{factory}: opened in {_opened(folder):.3f} s")
    machine = (
        f"{platform.machine()}, {threads} of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, FAISS {faiss.__version__}"
    )
    print(json.dumps({"benchmark": "update_index", "machine": machine, "results": results}))


def _unit_vectors(count: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _table(ids: list[str]) -> pa.Table:
    numbers = np.arange(len(ids))
    return pa.table({"product_id": ids, "price": numbers % 90 + 0.5, "available": numbers % 3 > 0})


def _upsert(index: ProductIndex, vectors: np.ndarray, first: int, count: int) -> None:
    for start in range(first, first + count, BATCH):
        # Every other one replaces a product.
        ids = [
            f"product-{start + i if i % 2 else 2 * (start - first) + i:09d}" for i in range(BATCH)
        ]
        index.upsert(ids, vectors[start : start + BATCH], _table(ids))


def _found(index: ProductIndex, queries: np.ndarray, gone: set[str]) -> int:
    """How often a deleted product is among the ten nearest to what its vector was."""
    return sum(id_ in gone for row in index.search(queries[:256], 10).ids for id_ in row)


def _opened(folder: Path) -> float:
    """Seconds to open an index, found in a process of its own."""
    command = [sys.executable, "-c", OPEN, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[0])


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _below(what: str, found: float, bar: float) -> dict[str, Any]:
    return {
        "what": what,
        "peer": "bar",
        "ratio": round(found, 3),
        "bar": bar,
        "holds": found <= bar,
    }


if __name__ == "__main__":
    main(tyro.cli(UpdateIndexConfig))
