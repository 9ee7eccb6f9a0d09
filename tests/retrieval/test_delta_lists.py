"""Lists over a large delta beside a graph: what they find, and what they may not find."""

from pathlib import Path

import numpy as np
import pytest
from vectors import names, unit_vectors

from mmrec.retrieval.delta_lists import (
    FEWEST_ROWS,
    MEASURED_EVERY,
    DeltaLists,
    Lists,
    make_index,
    measured_lists,
)
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.view import View

WIDTH, NUM_BASE, NUM_LATE = 16, 400, 2 * FEWEST_ROWS
FEW = View._few_of_delta


@pytest.fixture(params=["HNSW16", "IVF8,Flat"])
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ProductIndex:
    """An approximate base, and many times as many products upserted since; lists are used all the same."""
    monkeypatch.setattr(View, "_few_of_delta", lambda view, k: True)
    vectors = unit_vectors(NUM_BASE + NUM_LATE, width=WIDTH)
    ids = names(NUM_BASE + NUM_LATE)
    index = ProductIndex.build(ids[:NUM_BASE], vectors[:NUM_BASE], factory=request.param)
    if request.param == "IVF8,Flat":
        index._view.base.index.nprobe = 8  # What the base finds is not what is tested.
    index.upsert(ids[NUM_BASE:], vectors[NUM_BASE:])
    return index


def listed(index: ProductIndex) -> Lists | None:
    """The lists of its delta once they are ready, where enough queries were asked."""
    delta = index._view.delta
    delta.lists.wait()
    return delta.lists.over(np.zeros((0, WIDTH), np.float32), delta.scored)


def all_vectors(index: ProductIndex) -> dict[str, np.ndarray]:
    view = index._view
    rows = np.concatenate([view.live_rows(), view.base.record.count + view.delta.live_rows()])
    return dict(zip(view.ids_of(rows), view.vectors(rows), strict=True))


def recall(index: ProductIndex, queries: np.ndarray, k: int = 10) -> float:
    held = all_vectors(index)
    ids = np.array(list(held))
    order = np.argsort(-(queries @ np.stack(list(held.values())).T), axis=1)[:, :k]
    found = index.search(queries, k).ids
    return float(np.mean([len({*ids[a]} & {*b}) / k for a, b in zip(order, found, strict=True)]))


def test_a_large_delta_is_listed_once_queries_were_asked(index: ProductIndex) -> None:
    queries = unit_vectors(200, 9, WIDTH)
    assert listed(index) is None
    assert recall(index, queries[:10]) == 1
    assert listed(index) is None  # Ten queries say too little of how many lists to probe.
    assert recall(index, queries) == 1
    lists = listed(index)
    assert lists is not None
    assert lists.count == NUM_LATE
    assert lists.probed < lists.index.nlist / 4
    assert 0.85 < recall(index, queries) < 1


def test_lists_are_for_matches_of_which_few_are_the_deltas(
    index: ProductIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far lists are probed is measured by the nearest row; for more of them all are compared."""
    queries = unit_vectors(200, 9, WIDTH)
    index.search(queries, 10)
    assert listed(index)
    assert recall(index, queries) < 1
    monkeypatch.setattr(View, "_few_of_delta", FEW)
    assert FEW(index._view, 1)
    assert not FEW(index._view, 2)
    assert recall(index, queries) == 1


def test_what_came_after_the_lists_is_found_for_certain(index: ProductIndex) -> None:
    queries = unit_vectors(100, 9, WIDTH)
    index.search(queries, 10)
    assert listed(index)
    index.upsert([f"new-{i}" for i in range(len(queries))], queries)
    found = index.search(queries, 1)
    assert [ids[0] for ids in found.ids] == [f"new-{i}" for i in range(len(queries))]


def test_a_listed_product_that_was_deleted_or_replaced_is_not_found(index: ProductIndex) -> None:
    queries = unit_vectors(100, 9, WIDTH)
    index.search(queries, 10)
    assert listed(index)
    first = index.search(queries, 1)
    gone = sorted({ids[0] for ids in first.ids})
    assert len(gone) > 50
    index.delete(gone[::2])
    index.upsert(gone[1::2], -np.stack([all_vectors(index)[id_] for id_ in gone[1::2]]))
    held = all_vectors(index)
    after = index.search(queries, 10)
    assert {len({*ids}) for ids in after.ids} == {10}
    for query, ids, scores in zip(queries, after.ids, after.scores, strict=True):
        assert not {*ids} & {*gone[::2]}
        for id_, score in zip(ids, scores, strict=True):
            assert score == pytest.approx(held[id_] @ query, abs=1e-5)


def test_an_earlier_view_does_not_see_what_was_listed_after_it(index: ProductIndex) -> None:
    queries = unit_vectors(100, 9, WIDTH)
    earlier = index._view
    index.upsert(
        [f"new-{i}" for i in range(3 * FEWEST_ROWS)], unit_vectors(3 * FEWEST_ROWS, 5, WIDTH)
    )
    index.search(queries, 10)
    lists = listed(index)
    assert lists is not None
    assert lists.count > earlier.delta.count
    _, rows = earlier.search(queries, 10)
    assert rows.max() < earlier.base.record.count + earlier.delta.count


def test_lists_are_renewed_as_the_delta_grows(index: ProductIndex) -> None:
    queries = unit_vectors(100, 9, WIDTH)
    index.search(queries, 10)
    first = listed(index)
    assert first is not None
    index.upsert(
        [f"new-{i}" for i in range(2 * FEWEST_ROWS)], unit_vectors(2 * FEWEST_ROWS, 5, WIDTH)
    )
    index.search(queries, 10)
    second = listed(index)
    assert second is not None
    assert second.count == first.count + 2 * FEWEST_ROWS


def test_filters_are_exact_all_the_same(index: ProductIndex) -> None:
    queries = unit_vectors(100, 9, WIDTH)
    index.search(queries, 10)
    assert listed(index)
    where = "product_id like '%7'"
    held = {id_: vector for id_, vector in all_vectors(index).items() if id_.endswith("7")}
    ids = np.array(list(held))
    order = np.argsort(-(queries @ np.stack(list(held.values())).T), axis=1)[:, :5]
    assert np.array_equal(index.search(queries, 5, where=where).ids, ids[order])


def test_more_than_the_base_holds_is_filled_from_all_of_the_delta(index: ProductIndex) -> None:
    queries = unit_vectors(100, 9, WIDTH)
    index.search(queries, 10)
    assert listed(index)
    assert {len({*ids}) for ids in index.search(queries[:2], NUM_BASE + 500).ids} == {
        NUM_BASE + 500
    }


def test_a_flat_base_compares_every_row(tmp_path: Path) -> None:
    ids, vectors = names(3 * FEWEST_ROWS), unit_vectors(3 * FEWEST_ROWS, 5, WIDTH)
    index = ProductIndex.build(ids[:100], vectors[:100], factory="Flat")
    index.upsert(ids[100:], vectors[100:])
    for _ in range(2):
        assert recall(index, unit_vectors(100, 9, WIDTH)) == 1
        assert listed(index) is None


def test_no_lists_where_most_of_them_would_be_probed() -> None:
    """Queries that are as near to any row as to any other."""
    rng = np.random.default_rng(0)
    scored = rng.standard_normal((2_500, 512)).astype(np.float32)
    queries = rng.standard_normal((100, 512)).astype(np.float32)
    assert measured_lists(make_index(scored), scored, queries) is None


def test_queries_of_another_kind_are_measured_anew(index: ProductIndex) -> None:
    """The first to come are products themselves, which the first few lists find; videos lie elsewhere."""
    products = np.stack(list(all_vectors(index).values()))[-200:]
    index.search(products, 10)
    easy = listed(index)
    assert easy is not None
    videos = unit_vectors(MEASURED_EVERY, 9, WIDTH)
    before = recall(index, videos[:200])
    index.search(videos, 10)
    after = listed(index)
    assert after is not None
    assert after.probed > easy.probed
    assert recall(index, videos[:200]) > before


def test_lists_of_no_use_are_taken_up_once_queries_change() -> None:
    rng = np.random.default_rng(0)
    scored = rng.standard_normal((2_500, 256)).astype(np.float32)
    lists = DeltaLists()
    lists.over(rng.standard_normal((100, 256)).astype(np.float32), scored)
    lists.wait()
    easy = np.tile(scored, (2, 1))[:MEASURED_EVERY]
    assert lists.over(easy, scored) is None
    lists.wait()
    assert lists.over(scored[:1], scored) is not None
