"""What 100 million or 10 billion products take: bytes, machines, build hours, queries a second.

    python benchmarks/plan_catalogue.py --out docs/planning.json     # measures 100,000 x 256: five minutes
    python benchmarks/plan_catalogue.py --quick                      # 10,000 x 128: under a minute
    python benchmarks/plan_catalogue.py --measured docs/planning.json    # the tables of docs/planning.md

Measures, on one thread, what each kind of index takes for each product on the disk, in core seconds to build,
and in core seconds to answer a query at recall@10 of 0.95 (or where more effort finds no more), and
multiplies by the formulas of `planned`. Core seconds are the process's own, so that a busy machine changes
them little. Products and queries are the mixtures of search_index.py. The last line is one JSON object.
"""

import json
import math
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import tyro
from search_index import catalogue

from mmrec.retrieval.index import ProductIndex

K, RECALL = 10, 0.95
NUM_QUERIES = 500
FACTORIES = (
    "Flat",
    "HNSW32",
    "HNSW32_SQ8",
    "IVF{lists},SQ8",
    "IVF{lists},PQ64",
    "IVF{lists},RaBitQ",
)
SIZES = (100_000_000, 10_000_000_000)
HOUR = 3_600


@dataclass(frozen=True, kw_only=True)
class PlanCatalogueConfig:
    """What is measured, and the machine that it is planned for."""

    quick: bool = False
    """A small catalogue."""
    factories: tuple[str, ...] = FACTORIES
    """FAISS factories; {lists} stands for four times the square root of the products."""
    measured: Path | None = None
    """A file that an earlier run wrote: nothing is measured."""
    out: Path | None = None
    """Where measurements are kept; kinds that it has already are not measured again."""
    memory_gb: float = 512.0
    """Memory of a machine, in 10^9 bytes."""
    used: float = 0.7
    """Share of it that the index may fill; the rest is for the system, queries and compaction."""
    cores: int = 64
    """Cores of a machine."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One kind of index, measured on one thread."""

    factory: str
    products: int
    width: int
    index_bytes: float
    """Bytes a product of the FAISS file: vectors or codes, graph or lists."""
    id_bytes: float
    """Bytes a product of what finds a row by its id."""
    attribute_bytes: float
    """Bytes a product of the id, title, category, price and availability."""
    build_s: float
    """Core seconds to train and fill."""
    query_s: float
    """Core seconds a query."""
    recall: float
    """recall@10 against exact search."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One kind of index at one size."""

    factory: str
    products: int
    total_bytes: float
    machines: int
    shard: int
    """Products on each machine."""
    build_core_hours: float
    build_hours: float
    """With all cores of all machines."""
    queries_s: float | None
    """Queries a second that one copy answers: all its machines work on each query. None of a graph."""


def main(config: PlanCatalogueConfig) -> None:
    """Measure or read, and print tables; one JSON object on the last line."""
    found = read_measured(config.measured) if config.measured else measure_all(config)
    print("\n".join(tables(found, config)))
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, one used, "
        f"Python {platform.python_version()}, FAISS {faiss.__version__}"
    )
    results = [
        {
            "what": f"bytes a product, {kind.factory}, {kind.products} x {kind.width}",
            "peer": "its vector in float32",
            "ratio": round(bytes_of(kind) / (4 * kind.width), 3),
            "bar": None,
            "holds": None,
        }
        for kind in found
    ]
    print(json.dumps({"benchmark": "plan_catalogue", "machine": machine, "results": results}))


# --------------------------------------------------------------------------------------------- measure


def measure_all(config: PlanCatalogueConfig) -> list[Measured]:
    """Measure what `config.out` has not yet."""
    faiss.omp_set_num_threads(1)
    count, width = (10_000, 128) if config.quick else (100_000, 256)
    known = read_measured(config.out) if config.out and config.out.exists() else []
    vectors, queries = catalogue(count, width, NUM_QUERIES)
    truth = faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    for factory in config.factories:
        if any(kind.factory == factory for kind in known):
            continue
        known.append(measure(factory, vectors, queries, truth))
        print(known[-1])
        if config.out:
            config.out.write_text(json.dumps([asdict(kind) for kind in known], indent=1) + "\n")
    order = {factory: place for place, factory in enumerate(FACTORIES)}
    return sorted(known, key=lambda kind: order.get(kind.factory, len(order)))


def measure(template: str, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> Measured:
    """Build, save and search one kind, on one thread."""
    count, width = vectors.shape
    factory = template.format(lists=4 * int(count**0.5))
    ids = [f"product-{number:09d}" for number in range(count)]
    started = time.process_time()
    index = ProductIndex.build(ids, vectors, factory=factory, attributes=attributes(ids))
    build_s = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        sizes = {path.name: path.stat().st_size / count for path in files}
    query_s, recall = search_at_recall(index, queries, truth)
    return Measured(
        factory=template,
        products=count,
        width=width,
        index_bytes=sizes["base.faiss"],
        id_bytes=sum(size for name, size in sizes.items() if name.startswith("keys")),
        attribute_bytes=sizes["products.arrow"],
        build_s=build_s,
        query_s=query_s,
        recall=recall,
    )


def attributes(ids: list[str]) -> pa.Table:
    """What a shop filters by: a title of about 40 letters, category, price, availability."""
    numbers = np.arange(len(ids))
    return pa.table(
        {
            "product_id": ids,
            "title": [f"Stoneware mug with a handle, no. {number:09d}" for number in numbers],
            "category": [f"category {number % 50:02d}" for number in numbers],
            "price": numbers % 90 + 0.5,
            "available": numbers % 3 > 0,
        }
    )


def search_at_recall(
    index: ProductIndex, queries: np.ndarray, truth: np.ndarray
) -> tuple[float, float]:
    """Core seconds a query and recall, at the least effort that reaches the recall wanted.

    Codes may never reach it: then at the effort past which recall grows by less than 0.005.
    """
    space, best = faiss.ParameterSpace(), (0.0, 0.0)
    names = {"IVF": "nprobe", "HNSW": "efSearch"}
    name = next((names[kind] for kind in names if kind in index.factory), None)
    for effort in (8, 16, 32, 64, 128, 256, 512):
        if name:
            space.set_index_parameter(index._view.base.index, name, effort)
        started = time.process_time()
        found = index.search(queries, K).ids
        seconds = (time.process_time() - started) / len(queries)
        rows = [{int(id_[8:]) for id_ in ids} for ids in found]
        hits = [len(ours & {*true}) for ours, true in zip(rows, truth.tolist(), strict=True)]
        recall = float(np.mean(hits)) / K
        if recall < best[1] + 0.005:
            break
        best = seconds, recall
        if recall >= RECALL or not name:
            break
    return best


def read_measured(path: Path) -> list[Measured]:
    """What an earlier run measured."""
    return [Measured(**row) for row in json.loads(path.read_text())]


# ------------------------------------------------------------------------------------------------ plan


def bytes_of(kind: Measured) -> float:
    """Bytes a product, of everything."""
    return kind.index_bytes + kind.id_bytes + kind.attribute_bytes


def planned(kind: Measured, products: int, config: PlanCatalogueConfig) -> Plan:
    """Extrapolate from n measured products to machines that hold s products each.

    bytes        linear in products
    build        Flat linear; HNSW s log s; IVF s^1.5, since each product is compared with 4 sqrt(s) lists
    query        Flat linear in s; IVF sqrt(s), since a list has sqrt(s) / 4 products; HNSW not at all: log s
                 holds at one effort, and at one recall search_index.py found 47 times as much at a million
    """
    memory = config.memory_gb * 1e9 * config.used
    total = products * bytes_of(kind)
    machines = math.ceil(total / memory)
    shard = math.ceil(products / machines)
    growth, logs = shard / kind.products, math.log(shard) / math.log(kind.products)
    if "IVF" in kind.factory:
        build, query = growth**1.5, growth**0.5
    elif "HNSW" in kind.factory:
        build, query = growth * logs, None
    else:
        build, query = growth, growth
    core_hours = machines * build * kind.build_s / HOUR
    return Plan(
        factory=kind.factory,
        products=products,
        total_bytes=total,
        machines=machines,
        shard=shard,
        build_core_hours=core_hours,
        build_hours=core_hours / (machines * config.cores),
        queries_s=None if query is None else config.cores / (query * kind.query_s),
    )


def tables(found: list[Measured], config: PlanCatalogueConfig) -> list[str]:
    """Markdown: what was measured, and a table a size of what follows from it."""
    lines = [
        "| kind | index, bytes a product | ids | attributes | build, core s | query, core ms | recall@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in found:
        lines.append(
            f"| `{kind.factory}` | {kind.index_bytes:,.0f} | {kind.id_bytes:,.0f} | "
            f"{kind.attribute_bytes:,.0f} | {kind.build_s:,.2f} | {1e3 * kind.query_s:,.3f} | "
            f"{kind.recall:.3f} |"
        )
    for products in SIZES:
        lines += [
            "",
            f"{products:,} products, {found[0].width} wide:",
            "",
            "| kind | total | machines | products on each | build, core hours | hours | queries/s a copy |",
            "|---|---|---|---|---|---|---|",
        ]
        for kind in found:
            plan = planned(kind, products, config)
            lines.append(
                f"| `{plan.factory}` | {plan.total_bytes / 1e12:,.2f} TB | {plan.machines:,} | "
                f"{plan.shard / 1e6:,.0f} M | {plan.build_core_hours:,.1f} | "
                f"{plan.build_hours:,.2f} | {_three_digits(plan.queries_s)} |"
            )
    return lines


def _three_digits(value: float | None) -> str:
    return "measure it" if value is None else f"{float(f'{value:.3g}'):,.10g}"


if __name__ == "__main__":
    main(tyro.cli(PlanCatalogueConfig))
