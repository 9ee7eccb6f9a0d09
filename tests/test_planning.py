"""The page for planning: every figure of its tables comes from the measurements beside it."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, load_program

Scale = Callable[[float, float], float]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_program("benchmarks/plan_catalogue.py")


def test_the_page_holds_what_the_program_prints(program: ModuleType) -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    found = program.read_measured(ROOT / "docs/planning.json")
    assert {kind.products for kind in found} == {100_000}
    tables = "\n".join(program.tables(found, program.PlanCatalogueConfig()))
    assert tables in page


@pytest.mark.parametrize(
    ("factory", "build", "query"),
    [
        ("Flat", lambda s, n: s / n, lambda s, n: s / n),
        ("HNSW32", lambda s, n: s * math.log(s) / (n * math.log(n)), None),
        ("IVF{lists},SQ8", lambda s, n: (s / n) ** 1.5, lambda s, n: math.sqrt(s / n)),
    ],
)
def test_formulas(program: ModuleType, factory: str, build: Scale, query: Scale | None) -> None:
    kind = program.Measured(
        factory=factory,
        products=1_000,
        width=8,
        index_bytes=70,
        id_bytes=20,
        attribute_bytes=10,
        build_s=3.6,
        query_s=0.001,
        recall=1.0,
    )
    config = program.PlanCatalogueConfig(memory_gb=1.0, used=0.5, cores=10)
    plan = program.planned(kind, 20_000_000, config)
    # 100 bytes a product: 2 GB in halves of 1 GB.
    assert (plan.total_bytes, plan.machines, plan.shard) == (2e9, 4, 5_000_000)
    hours = 4 * build(5e6, 1e3) * 3.6 / 3_600
    assert plan.build_core_hours == pytest.approx(hours)
    assert plan.build_hours == pytest.approx(hours / 40)
    queries_s = None if query is None else pytest.approx(10 / (0.001 * query(5e6, 1e3)))
    assert plan.queries_s == queries_s


def test_a_small_measurement(program: ModuleType) -> None:
    vectors, queries = program.catalogue(2_000, 32, 50)
    kind = program.measure("HNSW16", vectors, queries, exact(vectors, queries))
    assert kind.index_bytes > 32 * 4
    assert kind.id_bytes >= 16
    assert kind.attribute_bytes > 60
    assert kind.recall >= 0.95
    assert 0 < kind.query_s < 1


def exact(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
