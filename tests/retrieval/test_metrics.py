"""Ranks and metrics against brute force, ties, intervals, and the shape of the result."""

import json
import math

import numpy as np
import pytest

from mmrec.errors import UserError
from mmrec.retrieval import metrics
from mmrec.retrieval.metrics import (
    METRIC_NAMES,
    bootstrap_intervals,
    evaluation,
    format_table,
    holm,
    paired_bootstrap,
    paired_bootstraps,
    per_query,
    rank_relevant,
    rank_relevant_scores,
    recall_curve,
    summarise,
)


def reference_ranks(scores: list[float], right: set[int]) -> list[int]:
    """Sort with right products after irrelevant ones of an equal score; read off the places."""
    order = sorted(range(len(scores)), key=lambda product: (-scores[product], product in right))
    return [place for place, product in enumerate(order, 1) if product in right]


def random_case(num_queries: int, num_products: int, width: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    # Small whole numbers: scores are exact, and many of them tie.
    queries = generator.integers(-2, 3, (num_queries, width)).astype(np.float32)
    gallery = generator.integers(-2, 3, (num_products, width)).astype(np.float32)
    relevant = [
        generator.choice(num_products, size=generator.integers(1, 6), replace=False)
        for _ in range(num_queries)
    ]
    return queries, gallery, relevant


@pytest.mark.parametrize("block", [7, 1000])
def test_ranks_equal_brute_force(monkeypatch, block):
    monkeypatch.setattr(metrics, "_GALLERY_BLOCK", block)
    queries, gallery, relevant = random_case(23, 50, 3)
    scores = queries @ gallery.T
    expected = [
        reference_ranks(list(line), set(right.tolist()))
        for line, right in zip(scores, relevant, strict=True)
    ]
    for ranks in (
        rank_relevant(queries, gallery, relevant, chunk=5),
        rank_relevant_scores(scores, relevant),
    ):
        assert [query.tolist() for query in ranks] == expected


def test_equal_scores_rank_last():
    ranks = rank_relevant(
        np.ones((1, 4), np.float32), np.ones((10, 4), np.float32), [np.array([3])]
    )
    assert ranks[0].tolist() == [10]
    ranks = rank_relevant_scores(np.zeros((1, 10)), [np.array([0, 4])])
    assert ranks[0].tolist() == [9, 10]


@pytest.mark.parametrize("width", [64, 513])
def test_duplicates_tie_whatever_their_place_in_the_block(width):
    generator = np.random.default_rng(1)
    vector = generator.normal(size=width).astype(np.float32)
    gallery = generator.normal(size=(1001, width)).astype(np.float32)
    copies = [0, 1, 500, 999, 1000]
    gallery[copies] = vector
    for copy in copies:
        ranks = rank_relevant(vector[None], gallery, [np.array([copy])])
        assert ranks[0].tolist() == [len(copies)]


def test_neighbours_that_float32_tells_apart_do_not_tie():
    gallery = np.ones((2, 8), np.float32)
    gallery[1, 0] = np.nextafter(np.float32(1), np.float32(2))
    ranks = rank_relevant(np.ones((1, 8), np.float32), gallery, [np.array([1])])
    assert ranks[0].tolist() == [1]


def test_repeated_right_rows_count_once():
    ranks = rank_relevant_scores(np.array([[3.0, 2.0, 1.0]]), [np.array([2, 2, 0])])
    assert ranks[0].tolist() == [1, 3]


def test_score_that_is_not_finite_names_its_query():
    queries, gallery, relevant = random_case(4, 6, 3)
    queries[2, 1] = np.nan
    with pytest.raises(UserError, match="query row 2, product row 0: the score is nan"):
        rank_relevant(queries, gallery, relevant, chunk=2)
    scores = np.zeros((4, 6))
    scores[3, 5] = np.inf
    with pytest.raises(UserError, match="query row 3, product row 5: the score is inf"):
        rank_relevant_scores(scores, relevant)


@pytest.mark.parametrize(
    ("right", "message"),
    [([], "no right product"), ([6], "outside the 6 rows"), ([-1], "outside the 6 rows")],
)
def test_bad_right_rows_name_their_query(right, message):
    relevant = [np.array([0]), np.array(right, np.int64)]
    with pytest.raises(ValueError, match=f"query row 1.*{message}"):
        rank_relevant_scores(np.zeros((2, 6)), relevant)


def test_metrics_of_known_ranks():
    values = per_query([np.array([1, 3]), np.array([7]), np.array([60, 61])])
    assert list(values) == list(METRIC_NAMES)
    assert values["R@1"].tolist() == [1, 0, 0]
    assert values["R@5"].tolist() == [1, 0, 0]
    assert values["R@10"].tolist() == [1, 1, 0]
    assert values["R@50"].tolist() == [1, 1, 0]
    assert values["MRR"] == pytest.approx([1, 1 / 7, 1 / 60])
    ideal = 1 + 1 / math.log2(3)
    assert values["nDCG@10"] == pytest.approx([(1 + 1 / 2) / ideal, 1 / 3, 0])


def test_ndcg_of_more_right_products_than_places_is_one():
    assert per_query([np.arange(1, 21)])["nDCG@10"] == pytest.approx([1])


def test_summary_has_means_and_counts_and_no_empty_slice():
    values = {"R@1": np.array([1.0, 0.0, 1.0, 1.0])}
    slices = {
        "all": np.ones(4, bool),
        "cold": np.array([True, True, False, False]),
        "none": np.zeros(4, bool),
    }
    assert summarise(values, slices) == {
        "all": {"queries": 4, "R@1": 0.75},
        "cold": {"queries": 2, "R@1": 0.5},
    }
    assert list(bootstrap_intervals(values, slices, num_resamples=10)) == ["all", "cold"]


def test_intervals_match_the_normal_approximation(monkeypatch):
    monkeypatch.setattr(metrics, "_BOOTSTRAP_BLOCK", 5000)  # several blocks of resamples
    values = {"R@1": (np.arange(400) < 120).astype(float), "MRR": np.linspace(0, 1, 400)}
    slices = {"all": np.ones(400, bool)}
    intervals = bootstrap_intervals(values, slices, num_resamples=4000)["all"]
    for name, column in values.items():
        half_width = 1.96 * column.std() / math.sqrt(400)
        expected = [column.mean() - half_width, column.mean() + half_width]
        assert intervals[name] == pytest.approx(expected, abs=0.005)


def test_intervals_are_reproducible_and_do_not_depend_on_other_slices():
    generator = np.random.default_rng(3)
    values = {"MRR": generator.random(50)}
    warm = generator.random(50) < 0.5
    alone = bootstrap_intervals(values, {"warm": warm}, seed=4)
    beside = bootstrap_intervals(values, {"all": np.ones(50, bool), "warm": warm}, seed=4)
    assert alone["warm"] == beside["warm"]
    assert alone != bootstrap_intervals(values, {"warm": warm}, seed=5)
    low, high = alone["warm"]["MRR"]
    assert low < values["MRR"][warm].mean() < high
    narrow = bootstrap_intervals(values, {"warm": warm}, seed=4, level=0.5)["warm"]["MRR"]
    assert low < narrow[0] < narrow[1] < high


def test_paired_interval_matches_the_normal_approximation(monkeypatch):
    monkeypatch.setattr(
        metrics, "_BOOTSTRAP_BLOCK", 5000
    )  # several blocks of resamples and of flips
    generator = np.random.default_rng(5)
    theirs = generator.random(400)
    ours = theirs + generator.normal(0.02, 0.1, 400)
    found = paired_bootstrap(ours, theirs, num_resamples=4000)
    difference = ours - theirs
    error = difference.std() / math.sqrt(400)
    assert found.difference == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.001)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.001)
    assert found.p == pytest.approx(math.erfc(difference.mean() / error / math.sqrt(2)), abs=0.01)
    assert found.queries == 400
    # Unpaired, the spread of the queries (a third) would drown a fiftieth.
    assert found.beyond_chance
    assert not paired_bootstrap(ours, np.roll(theirs, 1)).beyond_chance


def test_paired_bootstrap_is_reproducible_antisymmetric_and_knows_equals():
    generator = np.random.default_rng(6)
    ours, theirs = generator.random(60), generator.random(60)
    found = paired_bootstrap(ours, theirs, seed=3)
    assert found == paired_bootstrap(ours, theirs, seed=3)
    turned = paired_bootstrap(theirs, ours, seed=3)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    assert turned.p == found.p
    same = paired_bootstrap(ours, ours)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert not same.beyond_chance
    both = paired_bootstraps({"a": ours, "b": theirs}, {"a": theirs, "b": theirs}, seed=3)
    assert (both["a"].low, both["a"].high) == pytest.approx((found.low, found.high))
    assert both["b"].p == 1


def test_p_of_few_differing_queries_is_that_of_all_sign_flips():
    ours, theirs = np.zeros(100), np.zeros(100)
    ours[:5] = 1
    # Of the 32 ways to flip five equal signs two reach the sum: all plus and all minus.
    assert paired_bootstrap(ours, theirs).p == pytest.approx(2 / 32, abs=0.008)


@pytest.mark.parametrize(("ours", "theirs"), [(3, 4), (0, 0)])
def test_paired_bootstrap_wants_the_same_queries(ours, theirs):
    with pytest.raises(ValueError, match=f"{ours} queries of ours, {theirs} of theirs"):
        paired_bootstrap(np.zeros(ours), np.zeros(theirs))


def test_holm_adjusts_step_by_step():
    # 4 x 0.01; then 3 x 0.02; then 2 x 0.025, which may not be less than the one before; then 0.9.
    assert holm([0.9, 0.01, 0.025, 0.02]) == pytest.approx([0.9, 0.04, 0.06, 0.06])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_recall_curve_is_recall_at_every_cutoff():
    ranks = [np.array([1, 3]), np.array([7]), np.array([60, 61]), np.array([200])]
    curve = recall_curve(ranks)
    assert len(curve) == 100
    assert curve[[0, 5, 6, 58, 59, 99]].tolist() == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    values = per_query(ranks)
    for k in (1, 5, 10, 50):
        assert curve[k - 1] == values[f"R@{k}"].mean()


def small_evaluation() -> dict:
    queries, gallery, relevant = random_case(40, 30, 4)
    values = per_query(rank_relevant(queries, gallery, relevant))
    worse = per_query(rank_relevant_scores(np.zeros((40, 30)), relevant))
    slices = {"all": np.ones(40, bool), "warm": np.arange(40) < 25, "cold": np.arange(40) >= 25}
    return evaluation(
        gallery=30,
        queries=40,
        slices=summarise(values, slices),
        intervals=bootstrap_intervals(values, slices, num_resamples=50),
        baselines={"popularity": summarise(worse, slices)},
    )


def test_evaluation_has_the_documented_shape_and_survives_json():
    result = small_evaluation()
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["gallery", "queries", "slices", "intervals", "baselines"]
    assert result["slices"].keys() == {"all", "warm", "cold"}
    assert result["slices"]["all"].keys() == {"queries", *METRIC_NAMES}
    assert result["intervals"]["cold"].keys() == set(METRIC_NAMES)
    assert result["baselines"]["popularity"]["warm"]["queries"] == 25


def test_evaluation_refuses_other_slices():
    good = {"all": {"queries": 1, "R@1": 1.0}}
    with pytest.raises(ValueError, match="no slice 'all'"):
        evaluation(gallery=1, queries=1, slices={}, intervals={}, baselines={})
    with pytest.raises(ValueError, match="baseline 'popularity'"):
        evaluation(gallery=1, queries=1, slices=good, intervals={}, baselines={"popularity": {}})


def test_table_is_aligned_and_names_the_gallery():
    result = small_evaluation()
    title, blank, header, rule, *rows = format_table(result).splitlines()
    assert title == "40 queries against a gallery of 30 products"
    assert blank == ""
    assert header.split() == ["system", "slice", "queries", *METRIC_NAMES]
    assert [row[:10].strip() for row in rows] == ["trained", "", "", "popularity", "", ""]
    assert [row[12:16] for row in rows] == ["all ", "warm", "cold"] * 2
    assert {len(line) for line in (header, rule, *rows)} == {len(header)}
    assert f"{result['slices']['all']['R@1']:.3f}" in rows[0]
