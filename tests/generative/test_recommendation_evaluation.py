"""The contract: ranks, ties, IDs, strata and intervals, against loops over small cases."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from small_sessions import write_small

from mmrec.errors import UserError
from mmrec.generative.evaluation import (
    METRIC_NAMES,
    RankedIds,
    RankedProducts,
    check_id_table,
    evaluate_recommendations,
    expand_ids,
    format_table,
    list_scores,
    query_values,
    rank_targets,
    strata,
)
from mmrec.generative.sessions import Sequences, Split, leave_one_out, sequences_of


def ranked_by_hand(
    scores: np.ndarray, targets: list[int], seen: list[list[int]] | None
) -> list[int]:
    """What was not proposed (0) ties with all the rest that was not."""
    ranks = []
    for query, target in enumerate(targets):
        left = [i for i in range(scores.shape[1]) if seen is None or i not in seen[query]]
        own = scores[query, target] if target in left else -np.inf
        ranks.append(max(1, sum(bool(scores[query, i] >= own) for i in left)))
    return ranks


@pytest.mark.parametrize("removed", [False, True])
def test_ranks_equal_a_loop(removed: bool) -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, size=(60, 20)).astype(float)
    targets = generator.integers(0, 20, size=60)
    seen = [generator.integers(0, 20, size=3).tolist() for _ in range(60)]
    expected = ranked_by_hand(scores, targets.tolist(), seen if removed else None)
    taken = sequences_of(seen) if removed else None
    assert rank_targets(scores, targets, taken).tolist() == expected
    assert rank_targets(sparse.csr_array(scores), targets, taken).tolist() == expected


def test_scores_that_differ_by_rounding_tie() -> None:
    scores = np.array([[0.1 + 0.2, 0.3, 0.0]])
    for own in (0, 1):
        for matrix in (scores, sparse.csr_array(scores)):
            assert rank_targets(matrix, np.array([own])).tolist() == [2]


def test_a_model_that_collapsed_finds_nothing() -> None:
    split = Split(
        train=sequences_of([[0]]),
        before=sequences_of([[0]]),
        queries=np.arange(3),
        histories=sequences_of([[0]] * 3),
        targets=np.array([1, 2, 3]),
    )
    products = np.tile(np.arange(10), (3, 1))
    collapsed = {
        "dense": np.zeros((3, 50)),
        "list": RankedProducts(products=products, scores=np.full((3, 10), -2.5)),
        "one ID": RankedIds(
            codes=np.zeros((3, 1, 2), int), scores=np.zeros((3, 1)), id_table=np.zeros((50, 2), int)
        ),
    }
    found = evaluate_recommendations(collapsed, split, 50, num_resamples=10)
    for figures in found.systems.values():
        assert figures["kept"].slices["all"]["R@10"] == 0
    inflated = found.systems["one ID"]["kept"].inflated_by
    assert inflated
    assert inflated["all"]["R@5"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = np.array([[1.0, 2.0], [1.0, bad]])
    for matrix in (scores, sparse.csr_array(scores)):
        with pytest.raises(UserError, match=f"query 1: a score is {bad}"):
            rank_targets(matrix, np.array([0, 0]))
    with pytest.raises(UserError, match=f"query 1: a score is {bad}"):
        list_scores(RankedProducts(products=np.array([[0, 1]] * 2), scores=scores), 5)


def test_lists_are_ranked_with_their_ties_and_padding() -> None:
    products = np.array([[4, 2, 3, -1], [4, 2, 3, 0], [1, 1, 3, -1]])
    scores = np.array([[-1.0, -1.0, -5.0, np.nan], [-1.0, -2.0, -3.0, -3.0], [3.0, 2.0, 2.5, 9.0]])
    matrix = list_scores(RankedProducts(products=products, scores=scores), 6)
    ranks = {
        (row, item): rank_targets(matrix[[row]], np.array([item]))[0]
        for row in range(3)
        for item in range(6)
    }
    assert [ranks[0, item] for item in (4, 2, 3, 0)] == [2, 2, 6, 6]
    # The list was cut off between 3 and 0, which tie: others may have been left out.
    assert [ranks[1, item] for item in (4, 2, 3, 0)] == [1, 2, 6, 6]
    assert [ranks[2, item] for item in (1, 3, 0)] == [1, 2, 6]


@pytest.mark.parametrize("length", [1, 3, 10, 20])
@pytest.mark.parametrize("padding", [0, 4])
def test_a_list_never_ranks_better_than_all_the_scores_it_was_cut_from(
    length: int, padding: int
) -> None:
    scores = np.random.default_rng(0).integers(0, 6, size=(60, 20)).astype(float)
    # One product comes first whenever it ties, so that cutting between equals would help it.
    targets = np.zeros(60, np.int64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    ranked = RankedProducts(
        products=np.pad(order, ((0, 0), (0, padding)), constant_values=-1),
        scores=np.pad(np.take_along_axis(scores, order, axis=1), ((0, 0), (0, padding))),
    )
    found = rank_targets(list_scores(ranked, 20), targets)
    sure = (scores[:, 0] > scores[np.arange(60), order[:, -1]]) | (length == 20)
    assert found.tolist() == np.where(sure, rank_targets(scores, targets), 20).tolist()


def test_unknown_products_do_not_make_a_list_whole() -> None:
    ranked = RankedProducts(products=np.array([[2, -1, 1, -1]]), scores=np.full((1, 4), -3.0))
    for target in range(4):
        assert rank_targets(list_scores(ranked, 4), np.array([target])).tolist() == [4]


def test_a_list_of_all_that_was_proposed_is_whole() -> None:
    products, scores = np.array([[2, 1, -1]] * 2), np.array([[2.0, 1.0, 0.0]] * 2)
    ranked = RankedProducts(products=products, scores=scores, whole=np.array([True, False]))
    assert rank_targets(list_scores(ranked, 5), np.array([1, 1])).tolist() == [2, 5]


def test_whole_numbers_are_scores_and_rows_outside_the_catalogue_are_refused() -> None:
    products = np.array([[3, 1, 0, 2], [0, 1, 2, 3]])
    scores = np.array([[4, 3, 2, 1], [4, 3, 2, 1]])
    lists = list_scores(RankedProducts(products=products, scores=scores), 4)
    for matrix in (lists, scores[:, [2, 1, 3, 0]]):
        assert rank_targets(matrix[:1], np.array([1])).tolist() == [2]
    for row in (4, -2):
        products[1, 2] = row
        with pytest.raises(UserError, match=f"query 1: a list names row {row} of a catalogue of 4"):
            list_scores(RankedProducts(products=products, scores=scores), 4)


@pytest.mark.parametrize("mask", [-1e9, np.finfo(np.float32).min])
def test_masked_products_do_not_make_the_others_tie(mask: float) -> None:
    scores = np.array([[0.5, mask, 0.25, 0.75, 0.5 + 1e-7]], np.float32)
    targets = np.arange(5)
    ranks = [3, 5, 4, 1, 3]
    assert rank_targets(scores.repeat(5, axis=0), targets).tolist() == ranks
    order = np.argsort(-scores, axis=1)
    ranked = RankedProducts(products=order, scores=np.take_along_axis(scores, order, axis=1))
    matrix = list_scores(ranked, 5)
    assert [int(rank_targets(matrix, targets[[row]])[0]) for row in range(5)] == ranks


def test_a_whole_catalogue_is_not_cut_off() -> None:
    ranked = RankedProducts(products=np.array([[0, 1, 2]]), scores=np.array([[3.0, 1.0, 1.0]]))
    assert rank_targets(list_scores(ranked, 3), np.array([2])).tolist() == [3]
    assert rank_targets(list_scores(ranked, 4), np.array([2])).tolist() == [4]


def test_ids_are_expanded_to_their_products() -> None:
    table = np.array([[0, 0], [0, 1], [0, 0], [1, 1], [0, 0]])
    ranked = RankedIds(
        codes=np.array([[[0, 1], [7, 7], [0, 0], [1, 1]]]),
        scores=np.array([[-1.0, -2.0, -3.0, -4.0]]),
        id_table=table,
    )
    products, ids, id_of = expand_ids(ranked)
    # [7, 7] is carried by nothing; the three products of [0, 0] tie behind the one of [0, 1].
    assert [rank_targets(products, np.array([row]))[0] for row in range(5)] == [4, 1, 4, 5, 4]
    assert [rank_targets(ids, id_of[[row]])[0] for row in range(3)] == [3, 1, 3]


def test_ids_whose_products_were_all_seen_are_removed() -> None:
    table = np.array([[0], [0], [1], [2]])
    split = Split(
        train=sequences_of([[0, 1, 2, 3]] * 2),
        before=sequences_of([[0, 1, 2, 3]] * 2),
        queries=np.arange(2),
        histories=sequences_of([[0], [2]]),
        targets=np.array([1, 1]),
    )
    codes = np.array([[[1], [0], [2]]] * 2)
    ranked = RankedIds(codes=codes, scores=np.array([[3.0, 2.0, 1.0]] * 2), id_table=table)
    figures = evaluate_recommendations({"generator": ranked}, split, 4, num_resamples=10)
    values = figures.systems["generator"]["removed"].values["MRR"]
    # Query 0 took 0, so that 1 is alone in its ID; query 1 took 2, so that ID 1 is gone.
    np.testing.assert_allclose(values, [1 / 2, 1 / 2])
    inflated = figures.systems["generator"]["removed"].inflated_by
    assert inflated
    np.testing.assert_allclose(inflated["all"]["MRR"], ((1 / 2 - 1 / 2) + (1 - 1 / 2)) / 2)


def test_ids_of_another_making_are_refused() -> None:
    ranked = RankedIds(
        codes=np.zeros((1, 2, 3), int), scores=np.zeros((1, 2)), id_table=np.zeros((5, 4), int)
    )
    with pytest.raises(UserError, match="have 3 codes, those of the ID table 4"):
        expand_ids(ranked)
    assert check_id_table(["b", "x", "a"], ["a", "b"]).tolist() == [2, 0]
    with pytest.raises(
        UserError, match="another catalogue: 1 of 2 products have no ID, such as 'c'"
    ):
        check_id_table(["a"], ["a", "c"])


def test_metrics_by_hand() -> None:
    values = query_values(np.array([1, 5, 6, 10, 11]))
    assert values["R@5"].tolist() == [1, 1, 0, 0, 0]
    assert values["R@10"].tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_allclose(values["N@5"], [1, 1 / np.log2(6), 0, 0, 0])
    np.testing.assert_allclose(values["N@10"][3], 1 / np.log2(11))
    np.testing.assert_allclose(values["MRR"], [1, 1 / 5, 1 / 6, 1 / 10, 1 / 11])


def test_strata_by_hand(tmp_path: Path) -> None:
    # Trained on: ab, bc, a, c. Queries: abc -> b (c b never), bca -> b (a b seen), acd -> h (cold).
    sessions = write_small(tmp_path, ["abcb", "bcab", "acdh"])
    split = leave_one_out(sessions, "test")
    found = strata(split, 8)
    assert found["all"].tolist() == [True, True, True]
    assert found["repeated transition"].tolist() == [False, True, False]
    assert found["unseen transition"].tolist() == [True, False, False]
    assert found["cold product"].tolist() == [False, False, True]


def random_case(num_queries: int = 400) -> tuple[Split, np.ndarray]:
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 30, size=num_queries)
    train = sequences_of([generator.integers(0, 28, size=5).tolist() for _ in range(200)])
    histories = Sequences(generator.integers(0, 28, size=num_queries), np.arange(num_queries + 1))
    split = Split(
        train=train,
        before=train,
        queries=np.arange(num_queries),
        histories=histories,
        targets=targets,
    )
    scores = generator.random((num_queries, 30))
    scores[np.arange(num_queries), targets] += 0.3
    return split, scores


def test_a_paired_interval_is_narrower_than_those_of_its_sides() -> None:
    split, scores = random_case()
    better = scores.copy()
    better[np.arange(0, 400, 8), split.targets[::8]] += 1
    found = evaluate_recommendations({"a": scores, "b": better}, split, 30)
    means, intervals = found.difference("b", "a")
    ours, theirs = (found.systems[name]["kept"] for name in "ba")
    expected = ours.slices["all"]["R@5"] - theirs.slices["all"]["R@5"]
    np.testing.assert_allclose(means["all"]["R@5"], expected)
    low, high = intervals["all"]["R@5"]
    assert 0 < low < expected < high
    own = ours.intervals["all"]["R@5"]
    assert high - low < own[1] - own[0]
    _, same = found.difference("a", "a")
    assert same["all"]["R@10"] == [0, 0]


def test_a_table_names_every_system_and_stratum() -> None:
    split, scores = random_case(40)
    ranked = RankedIds(
        codes=np.arange(10)[None, :, None].repeat(40, axis=0) // 2,
        scores=-np.arange(10.0)[None].repeat(40, axis=0),
        id_table=np.arange(30)[:, None] // 2,
    )
    found = evaluate_recommendations({"counts": scores, "generator": ranked}, split, 30)
    text = format_table(found)
    assert "40 queries against a catalogue of 30 products" in text
    assert "strata: by the training sequences alone" in text
    assert "beyond the first K products" in text
    for word in ("counts", "generator", "removed", "cold product", "inflated by", *METRIC_NAMES):
        assert word in text
    inflated = found.systems["generator"]["kept"].inflated_by
    assert inflated
    assert f"{inflated['all']['R@5']:+.4f}" in text
    assert found.to_dict()["systems"]["counts"]["kept"]["inflated_by"] is None
