"""Choosing an index by measurement: candidates and their bytes, recall, the sweep, and the commands."""

import json
import math
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image
from vectors import names, unit_vectors

from mmrec import ProductIndex
from mmrec.errors import UserError
from mmrec.retrieval import tuning
from mmrec.retrieval.candidates import KEY_BYTES, candidates_for, num_lists, parse_bytes
from mmrec.retrieval.faiss_base import build_base, set_search, size_of, write_base
from mmrec.retrieval.frontier import Frontier, Measured, Setting, ranked, undominated
from mmrec.retrieval.tuning import TuningGoal, exact_truth, recall_of, scaled_qps, sweep, tune
from mmrec.retrieval.view import View


def catalogue(count: int, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Products around a hundred centres, and queries beside them, as contents are."""
    rng = np.random.default_rng(0)
    centers, gap = unit_vectors(100, 1, width), 0.05 * rng.standard_normal(width)

    def draw(number: int, spread: float, shift: np.ndarray | float) -> np.ndarray:
        near = centers[rng.integers(100, size=number)]
        vectors = near + spread * unit_vectors(number, number, width) + shift
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    return draw(count, 0.9, 0.0), draw(300, 1.0, gap)


# --------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GB", 4 * 10**9), ("4GiB", 2**32), ("1.5 mb", 1_500_000), ("700", 700), ("2K", 2_000)],
)
def test_bytes_are_read(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "4 apples", "-1GB", "0", "GB", "4iB"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected one such as 500MB"):
        parse_bytes(text)


@pytest.mark.parametrize("budget", [None, 1_300_000, 900_000])
def test_estimates_are_the_bytes_on_the_disk(budget: int | None, tmp_path: Path) -> None:
    count, width = 10_000, 32
    vectors, _ = catalogue(count, width)
    kept, _ = candidates_for(count, width, budget=budget)
    assert len(kept) == (3 if budget else 8)
    for candidate in kept:
        base = build_base(vectors, candidate.factory)
        write_base(base, tmp_path / "base")
        written = (tmp_path / "base").stat().st_size
        assert size_of(base) == written
        estimated = (candidate.bytes_per_vector - KEY_BYTES) * count
        assert estimated == pytest.approx(written, rel=0.03), candidate.factory


def test_what_is_over_the_budget_is_left_out_with_the_reason() -> None:
    kept, left = candidates_for(100_000, 64, budget=10_000_000)
    assert all(candidate.bytes_per_vector <= 100 for candidate in kept)
    reasons = {one.factory: one.reason for one in left}
    # 256 bytes a vector and 16 of keys.
    assert reasons["Flat"] == "272 bytes a vector are 27.2 MB, and the budget is 10.0 MB"
    assert "HNSW32_SQ8" in reasons
    # Of refinements the best that fits.
    assert any("PQ" in c.factory and c.factory.endswith("Refine(SQ4)") for c in kept)
    assert any(name.endswith("Refine(SQ8)") for name in reasons)
    kept, _ = candidates_for(100_000, 64)
    (coded,) = [c.factory for c in kept if "PQ" in c.factory]
    assert coded.endswith("Refine(SQfp16)")


def test_a_small_catalogue_stays_flat() -> None:
    kept, left = candidates_for(9_000, 64)
    assert [candidate.factory for candidate in kept] == ["Flat"]
    assert "exact and fast" in left[0].reason
    kept, _ = candidates_for(9_000, 64, budget=1_500_000)
    assert kept
    assert "Flat" not in [candidate.factory for candidate in kept]


def test_lists_grow_with_the_root() -> None:
    assert num_lists(1_000_000) == 4_000
    assert num_lists(4_000_000) == 8_000
    assert num_lists(3_900) == 100  # enough vectors to train each
    assert num_lists(10) == 1
    odd, _ = candidates_for(20_000, 33)
    assert not any("PQ" in candidate.factory for candidate in odd)


# ------------------------------------------------------------------------------- recall and the sweep


def test_recall_is_the_share_of_true_neighbours() -> None:
    vectors, queries = unit_vectors(500, 1), unit_vectors(40, 2)
    truth = exact_truth(vectors, queries, 10)
    order = np.argsort(-(queries @ vectors.T), axis=1)
    assert recall_of(truth, order[:, :10]) == 1.0
    assert recall_of(truth, order[:, 5:15]) == pytest.approx(0.5)
    few = order[:, :10].copy()
    few[:, 7:] = -1
    assert recall_of(truth, few) == pytest.approx(0.7)
    # Two products with one vector: either is right.
    twice = np.concatenate([vectors, vectors])
    other = exact_truth(twice, queries, 1)
    assert recall_of(other, order[:, :1]) == recall_of(other, order[:, :1] + 500) == 1.0


@pytest.mark.parametrize("factory", ["IVF100,Flat", "HNSW8", "IVF100,PQ16x4fs,Refine(SQfp16)"])
def test_the_sweep_finds_the_least_that_reaches_the_target(factory: str) -> None:
    vectors, queries = catalogue(5_000)
    truth = exact_truth(vectors, queries, 10)
    view = view_of(vectors, factory)
    settings = sweep(view, truth, 0.9)
    chosen = tuning.best_setting(settings, 0.9)
    assert chosen.recall >= 0.9
    name = "efSearch" if "HNSW" in factory else "nprobe"
    value = chosen.parameters[name]

    def recall_at(value: float) -> float:
        set_search(view.base.index, {**chosen.parameters, name: value})
        return recall_of(truth, view.search(queries, 10)[1])

    assert recall_at(value) == pytest.approx(chosen.recall)
    if "Refine" not in factory and value > 10:
        # To within a tenth.
        assert recall_at(int(value / 1.1) - 1) < 0.9
    assert len(settings) < 60


def test_bisection_ends_within_a_tenth() -> None:
    tried: list[int] = []

    def measure(value: int) -> Setting:
        tried.append(value)
        return Setting(parameters={"nprobe": float(value)}, recall=value / 1000, qps=1.0)

    found = tuning._least(measure, 1, 1000, 0.7, 0.0)
    assert found
    assert 700 <= found.parameters["nprobe"] <= 770
    assert len(tried) < 20
    assert tuning._least(measure, 1, 600, 0.7, 0.0) is None


def test_a_target_out_of_reach_ends_the_sweep() -> None:
    vectors, queries = catalogue(5_000)
    truth = exact_truth(vectors, queries, 10)
    settings = sweep(view_of(vectors, "IVF100,PQ4"), truth, 0.95)
    # Codes of four bytes find too little in all lists, which is seen before all are probed.
    assert max(setting.recall for setting in settings) < 0.95
    assert len(settings) <= 8
    assert tuning.best_setting(settings, 0.95).recall == max(s.recall for s in settings)


def test_what_is_far_slower_than_another_is_given_up() -> None:
    vectors, queries = catalogue(5_000)
    truth = exact_truth(vectors, queries, 10)
    settings = sweep(view_of(vectors, "IVF100,Flat"), truth, 0.9, fastest=1e12)
    assert len(settings) == 1


def test_speed_is_extrapolated_by_kind() -> None:
    assert scaled_qps(1000.0, "linear", 10_000, 1_000_000) == pytest.approx(10)
    assert scaled_qps(1000.0, "root", 10_000, 1_000_000) == pytest.approx(100)
    assert scaled_qps(1000.0, "log", 10_000, 1_000_000) == pytest.approx(1000 * 4 / 6)
    assert scaled_qps(1000.0, "log", 10_000, 10_000) == 1000


def view_of(vectors: np.ndarray, factory: str) -> View:
    return ProductIndex.build(names(len(vectors)), vectors, factory=factory)._view


# ------------------------------------------------------------------------------------------- choosing


def measured(name: str, qps: float, recall: float, *, target: float = 0.9, fits: bool = True):
    setting = Setting(parameters={}, recall=recall, qps=qps)
    return Measured(
        name=name,
        factory=name,
        products=10,
        settings=[setting],
        setting=setting,
        reached=recall >= target and fits,
        fits=fits,
        margin=0.0,
        given_up=False,
        qps_of_all=qps,
        p50_ms=1.0,
        p99_ms=1.0,
        bytes_per_vector=1.0,
        build_s=1.0,
    )


def test_the_fastest_that_reaches_the_target_comes_first() -> None:
    all_ = [
        measured("slow", 10.0, 0.99),
        measured("fast", 20.0, 0.91),
        measured("faster, too little", 30.0, 0.89),
        measured("less", 40.0, 0.5),
        measured("too large", 99.0, 0.99, fits=False),
    ]
    order = [one.name for one in ranked(all_)]
    assert order == ["fast", "slow", "faster, too little", "less", "too large"]
    settings = [
        Setting(parameters={}, recall=r, qps=q) for r, q in [(1.0, 5.0), (0.8, 9.0), (0.9, 4.0)]
    ]
    assert undominated(settings) == [settings[1], settings[0]]


@pytest.fixture
def few_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs take their time to build; one of each kind is enough here."""

    def fewer(*args, **options):
        kept, left = candidates_for(*args, **options)
        names_ = ("Flat", "IVF,Flat", "IVF,SQ8", "HNSW32_SQ8")
        return [candidate for candidate in kept if candidate.name in names_], left

    monkeypatch.setattr(tuning, "candidates_for", fewer)


@pytest.mark.usefixtures("few_kinds")
def test_tuning_takes_an_index_that_reaches_the_target() -> None:
    vectors, queries = catalogue(12_000)
    lines: list[str] = []
    tuned = tune(vectors, queries, TuningGoal(recall_target=0.9), report=lines.append)
    assert {one.name for one in tuned.frontier.measured} == {
        *("Flat", "IVF,Flat", "IVF,SQ8", "HNSW32_SQ8")
    }
    order = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    _, rows = tuned.index.search(queries, 10)
    pairs = list(zip(rows.tolist(), order.tolist(), strict=True))
    recall = np.mean([len({*ours} & {*true}) / 10 for ours, true in pairs])
    assert recall >= 0.89
    # Every other query chose; the others say what was chosen.
    found = np.array([len({*ours} & {*true}) / 10 for ours, true in pairs[1::2]])
    taken = tuned.frontier.taken
    assert found.mean() == pytest.approx(taken.setting.recall, abs=1e-6)
    assert taken.margin == pytest.approx(1.96 * found.std() / math.sqrt(150), abs=1e-6)
    assert max(setting.recall for setting in taken.settings) >= 0.9
    reaching = [one for one in tuned.frontier.measured if one.reached]
    assert tuned.frontier.taken.setting.qps == max(one.setting.qps for one in reaching)
    table = tuned.frontier.lines()
    assert lines[-len(table) :] == table
    assert len(lines) == 4 + len(table)
    assert table[1].startswith(tuned.factory)


@pytest.mark.usefixtures("few_kinds")
def test_a_sample_decides_and_all_are_measured(tmp_path: Path) -> None:
    vectors, queries = catalogue(16_000)
    lines: list[str] = []
    goal = TuningGoal(recall_target=0.9, sample=4_000, memory_budget=16_000 * 110)
    tuned = tune(vectors, queries, goal, report=lines.append)
    # 4 * 32 + 16 bytes are over the budget, as a sample's lists and bytes would not be.
    assert tuned.factory == f"IVF{num_lists(16_000)},SQ8"
    assert tuned.index.ntotal == 16_000
    assert [one.factory for one in tuned.frontier.measured] == [f"IVF{num_lists(4_000)},SQ8"]
    assert tuned.frontier.taken.products == 16_000
    assert tuned.frontier.taken.setting.recall >= 0.88
    assert any("drawn at random" in line for line in lines)
    assert any("~" in line for line in tuned.frontier.lines())
    one = tuned.frontier.measured[0]
    assert one.qps_of_all == pytest.approx(one.setting.qps / 2)
    tuned.frontier.write(tmp_path)
    loaded = json.loads((tmp_path / "frontier.json").read_text())
    assert loaded["taken"]["factory"] == tuned.factory
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.size == (900, 460)
        assert len(picture.getcolors(1 << 20) or []) > 20


def test_what_breaks_its_promise_on_all_products_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    promised = {
        "HNSW32": 900.0,
        "HNSW32_SQ8": 800.0,
        "IVF,Flat": 400.0,
        "IVF,SQ8": 390.0,
        "Flat": 30.0,
    }
    kept = {"HNSW32": 20.0, "HNSW32_SQ8": 99.0, "IVF,Flat": 80.0, "IVF,SQ8": 99.0, "Flat": 30.0}
    built: list[tuple[str, float]] = []

    def measure(task, candidate, truth, fastest):
        built.append((candidate.name, fastest))
        return measured(candidate.name, kept[candidate.name], 0.95), f"index of {candidate.name}"

    monkeypatch.setattr(tuning, "_measure", measure)
    candidates = [one for one in candidates_for(10_000, 32)[0] if one.name in promised]
    task = tuning._Task(
        goal=TuningGoal(), count=10_000, indexed_width=32, rerank=False, report=lambda line: None
    )
    order = ranked([measured(name, qps, 0.95) for name, qps in promised.items()])
    vectors, queries = catalogue(500)
    best, index = tuning._measure_finalists(
        task, order, candidates, exact_truth(vectors, queries, 10)
    )
    # The second graph is taken to break its promise as the first did; lists kept a fifth of theirs.
    assert built == [("HNSW32", 0.0), ("IVF,Flat", 20.0)]
    assert (best.name, index) == ("IVF,Flat", "index of IVF,Flat")


def test_a_sample_is_not_charged_with_what_all_products_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, queries = catalogue(16_000)
    queries = queries[:120]
    kept, _ = candidates_for(16_000, 32)
    (coded,) = [one for one in kept if "RaBitQ" in one.factory]
    monkeypatch.setattr(tuning, "candidates_for", lambda *given, **options: ([coded], []))
    # The rotation alone weighs four bytes for each of a thousand vectors.
    budget = math.ceil(coded.bytes_per_vector * 16_000 * 1.03)
    goal = TuningGoal(recall_target=0.8, sample=1_000, memory_budget=budget)
    tuned = tune(vectors, queries, goal)
    assert tuned.factory == coded.factory
    assert all(one.fits for one in [*tuned.frontier.measured, tuned.frontier.taken])
    # What is taken is held to the bytes that it has.
    monkeypatch.setattr(tuning, "size_of", lambda index: budget)
    with pytest.raises(UserError, match="no index reaches"):
        tune(vectors, queries, goal)


@pytest.mark.usefixtures("few_kinds")
def test_a_target_that_nothing_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = catalogue(12_000)
    budget = 12_000 * 100  # IVF,SQ8 alone
    goal = TuningGoal(recall_target=0.999, memory_budget=budget)
    with pytest.raises(
        UserError, match=r"no index reaches recall@10 0.999 within 1,200,000 bytes;"
    ):
        tune(vectors, queries, goal)
    goal = TuningGoal(recall_target=0.999, memory_budget=budget, best_effort=True)
    tuned = tune(vectors, queries, goal)
    assert not tuned.frontier.taken.reached
    assert tuned.frontier.taken.setting.recall > 0.9
    assert any("nothing reaches" in line for line in tuned.frontier.lines())
    with pytest.raises(UserError, match="fits a memory budget of 1,000 bytes"):
        tune(vectors, queries, TuningGoal(memory_budget=1_000))


@pytest.mark.usefixtures("few_kinds")
def test_the_same_seed_gives_the_same_recalls() -> None:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        vectors, queries = catalogue(12_000)
        goal = TuningGoal(recall_target=0.9, sample=10_500, memory_budget=12_000 * 100)
        found = [
            [(s.parameters, s.recall) for s in tune(vectors, queries, goal).frontier.taken.settings]
            for _ in range(2)
        ]
        assert found[0] == found[1]
    finally:
        faiss.omp_set_num_threads(threads)


def test_nested_widths_are_measured_against_the_full_one() -> None:
    vectors, queries = catalogue(3_000)
    goal = TuningGoal(recall_target=0.9, best_effort=True)
    plain = tune(vectors, queries, goal, indexed_width=16).frontier.taken
    again = tune(vectors, queries, goal, indexed_width=16, rerank=True).frontier.taken
    index = ProductIndex.build(names(3_000), vectors, indexed_width=16)
    found = [[int(id_[4:]) for id_ in row] for row in index.search(queries, 10).ids]
    truth = exact_truth(vectors, queries, 10).of(slice(1, None, 2))
    assert plain.setting.recall == pytest.approx(recall_of(truth, np.array(found)[1::2]), abs=1e-3)
    assert again.setting.recall > plain.setting.recall + 0.1
    assert again.bytes_per_vector == pytest.approx(plain.bytes_per_vector + 2 * 32, abs=0.1)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (TuningGoal(recall_target=1.2), "--recall-target 1.2: expected more than 0"),
        (TuningGoal(recall_target=math.nan), "--recall-target nan"),
        (TuningGoal(k=0), "--k 0: expected at least 1"),
        (TuningGoal(sample=5), "--tuning-sample 5: expected at least 1000"),
    ],
)
def test_a_goal_that_cannot_be_aimed_at(goal: TuningGoal, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tune(*catalogue(100), goal)


@pytest.mark.usefixtures("few_kinds")
def test_few_queries_choose_nothing() -> None:
    vectors, queries = catalogue(12_000)
    goal = TuningGoal(recall_target=0.9, memory_budget=12_000 * 100)
    with pytest.raises(UserError, match="99 queries are too few to tune with; give 100 at least"):
        tune(vectors, queries[:99], goal)
    taken = tune(vectors, queries[:50], replace(goal, best_effort=True)).frontier
    assert "50 queries; +- is the 95% interval" in "\n".join(taken.lines())
    # Of what is exact there is nothing to choose.
    assert tune(vectors[:500], queries[:1], TuningGoal()).factory == "Flat"


def test_parameters_stay_through_saving_opening_and_compaction(tmp_path: Path) -> None:
    vectors, queries = catalogue(4_000)

    def make(indexed: np.ndarray):
        base = build_base(indexed, "IVF64,PQ16x4fs,Refine(SQfp16)")
        set_search(base, {"nprobe": 7.0, "k_factor": 3.0})
        return base, "IVF64,PQ16x4fs,Refine(SQfp16)", {"nprobe": 7.0, "k_factor": 3.0}

    index = ProductIndex.assemble(names(4_000), vectors, make)
    right = index.search(queries, 10).ids
    index.save(tmp_path / "index")
    with ProductIndex.load(tmp_path / "index", device="cpu") as opened:
        assert opened.search(queries, 10).ids == right
        opened.delete(names(4_000)[:10])
        opened.compact()
        base = opened._view.base.index
        assert base.k_factor == 3
        assert faiss.extract_index_ivf(base.base_index).nprobe == 7
        assert "search: nprobe 7, k_factor 3, by tuning" in opened.status().lines()


def test_a_frontier_knows_what_it_was_for() -> None:
    one = measured("Flat", 100.0, 1.0)
    frontier = Frontier(
        recall_target=0.9,
        k=10,
        memory_budget=None,
        products=10,
        sample=10,
        queries=5,
        threads=1,
        seed=0,
        measured=[one],
        left_out=[],
        taken=one,
    )
    assert frontier.lines()[0].split()[:3] == ["index", "recall@10", "queries/s"]
    assert json.loads(json.dumps(frontier.to_dict()))["taken"]["setting"]["recall"] == 1.0
