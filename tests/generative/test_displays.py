"""Positions of lists: what they are worth is found again, and a ranker that weighs them learns wants."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_program

from mmrec.errors import UserError
from mmrec.generative.displays import (
    Displays,
    position_propensities,
    read_displays,
    target_weights,
)
from mmrec.generative.ranker import Ranker, RankerConfig, fit_ranker
from mmrec.generative.sessions import Sessions, leave_one_out, sequences_of, write_sessions

WANTED = np.arange(1.0, 6)
"""How much each of five products is wanted; the shop shows the least wanted first."""
LOOKED = np.arange(1.0, 6) ** -1.5
SHUFFLED = 0.1


def draw_lists(number: int, shuffled: float, seed: int = 0) -> tuple[Displays, np.ndarray]:
    """Lists of all five products, and the product that each was taken for, -1 for none."""
    generator = np.random.default_rng(seed)
    orders = np.tile(np.arange(5), (number, 1))
    random = generator.random(number) < shuffled
    orders[random] = generator.permuted(orders[random], axis=1)
    wanted = generator.choice(5, size=number, p=WANTED / WANTED.sum())
    positions = (orders == wanted[:, None]).argmax(axis=1)
    looked = generator.random(number) < LOOKED[positions]
    taken = np.where(looked, positions + 1, 0)
    lengths = np.full(number, 5)
    return Displays(lengths=lengths, taken=taken, shuffled=random), np.where(looked, wanted, -1)


def test_propensities_are_those_that_lists_were_drawn_with() -> None:
    displays, _ = draw_lists(100_000, 1.0)
    np.testing.assert_allclose(position_propensities(displays), LOOKED, atol=0.015)
    # In the shop's own order what is wanted and what is looked at are one, and tell nothing apart.
    own = Displays(lengths=displays.lengths, taken=displays.taken, shuffled=~displays.shuffled)
    with pytest.raises(
        UserError, match="0 products taken of 0 lists in random order, expected 100"
    ):
        position_propensities(own)


def test_long_lists_are_compared_with_long_lists() -> None:
    """Positions that only long lists have: the first position counts in those alone."""
    lengths = np.repeat([2, 3], 600)
    taken = np.concatenate([np.repeat([1, 2], 300), np.repeat([1, 2, 3], 200)])
    shuffled = np.ones(1200, bool)
    found = position_propensities(Displays(lengths=lengths, taken=taken, shuffled=shuffled))
    np.testing.assert_allclose(found, [1, 1, 1])


def test_a_position_that_nothing_is_known_of_is_worth_the_one_before_it() -> None:
    """Of lists of three products 99 are taken in random order, and of lists of four none are shuffled."""
    lengths = np.repeat([2, 3, 4], [600, 99, 50])
    taken = np.concatenate([np.repeat([1, 2], [400, 200]), np.repeat([1, 3], [60, 39]), [4] * 50])
    shuffled = lengths < 4
    found = position_propensities(Displays(lengths=lengths, taken=taken, shuffled=shuffled))
    np.testing.assert_allclose(found, [1, 200 / 460, 200 / 460, 200 / 460])
    # One more, and the third has a figure of its own.
    lengths, taken, shuffled = (
        np.append(*pair) for pair in ((lengths, 3), (taken, 1), (shuffled, True))
    )
    found = position_propensities(Displays(lengths=lengths, taken=taken, shuffled=shuffled))
    np.testing.assert_allclose(found, [1, 200 / 461, 39 / 61, 39 / 61])


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """Users who come from one product and take one of five from a list, and others who name them apart."""
    displays, products = draw_lists(40_000, SHUFFLED, seed=1)
    asking = np.flatnonzero(products >= 0)
    # How often each product occurs otherwise has nothing to do with how much it is wanted.
    others = np.repeat(np.arange(5), [30, 10, 50, 20, 40])
    items = [["hub", f"p{products[row]}", "hub"] for row in asking]
    items += [["hub", f"p{product}"] for product in others]
    positions = [[0, int(displays.taken[row]), 0] for row in asking] + [[0, 0]] * len(others)
    folder = tmp_path_factory.mktemp("lists")
    shown = {"item_ids": [["p0"] * 5] * 40_000, "taken": displays.taken}
    return write_sessions(
        folder,
        products=pa.table({"product_id": [*(f"p{row}" for row in range(5)), "hub"]}),
        sessions=pa.table(
            {
                "user_id": list(map(str, range(len(items)))),
                "item_ids": items,
                "positions": positions,
            }
        ),
        displays=pa.table({**shown, "shuffled": displays.shuffled}),
        config={"folder": str(folder)},
        counts={},
    )


def order_of(ranker: Ranker) -> list[int]:
    """The five products as the ranker puts them after the one that all come from."""
    ranked = ranker.rank(sequences_of([[5]]), k=6).products[0]
    return [row for row in ranked.tolist() if 0 <= row < 5]


def test_weights_recover_what_is_wanted_where_counting_does_not(sessions: Sessions) -> None:
    split = leave_one_out(sessions, "val")
    config = RankerConfig(candidates=6, rounds=80, leaves=6, leaf_rows=20, threads=1)
    displays, _ = draw_lists(40_000, SHUFFLED, seed=1)
    weights = target_weights(sessions, split, position_propensities(displays), 20.0)
    naive = fit_ranker(split, sessions.product_ids, sessions.titles, config)
    weighed = fit_ranker(split, sessions.product_ids, sessions.titles, config, weights=weights)
    assert order_of(weighed) == [4, 3, 2, 1, 0]
    assert order_of(naive)[0] == 0
    # The very counts that both learn from, weighed and not.
    taken = np.bincount(split.targets, minlength=5)[:5]
    weighed_counts = np.bincount(split.targets, weights, minlength=5)[:5]
    assert taken.argmax() == 0
    np.testing.assert_allclose(weighed_counts / weighed_counts.sum(), WANTED / 15, atol=0.05)


def test_weights_are_limited_and_one_outside_of_lists(sessions: Sessions) -> None:
    split = leave_one_out(sessions, "val")
    assert sessions.positions is not None
    propensities = np.array([1.0, 0.5, 0.25, 0.0, 0.2])
    weights = target_weights(sessions, split, propensities, 4.5)
    positions = sessions.positions[1 : 3 * len(split.queries) : 3]
    expected = np.array([0, 1, 2, 4, 4.5, 4.5])[positions]
    np.testing.assert_array_equal(weights, expected)
    last = target_weights(sessions, leave_one_out(sessions, "test"), propensities, 4.5)
    assert (last == 1).all()
    with pytest.raises(UserError, match=r"taken at position 5, and the longest list of .* has 4"):
        target_weights(sessions, split, propensities[:4], 4.5)


def test_files_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; the sessions have positions"):
        read_displays(tmp_path)
    path = tmp_path / "displays.parquet"
    rows = {"item_ids": [["a", "b"], ["a"]], "taken": [1, 2], "shuffled": [True, False]}
    pq.write_table(pa.table(rows), path)
    with pytest.raises(UserError, match="row 2: taken 2: expected 0 to 1"):
        read_displays(tmp_path)
    pq.write_table(pa.table({**rows, "taken": [1, None]}), path)
    with pytest.raises(UserError, match="expected item_ids, taken, shuffled in every row"):
        read_displays(tmp_path)
    pq.write_table(pa.table({"item_ids": rows["item_ids"]}), path)
    with pytest.raises(UserError, match="expected item_ids, taken, shuffled in every row"):
        read_displays(tmp_path)


def test_generated_lists_follow_the_position_based_model() -> None:
    program = load_program("data_prep/content_sessions.py")
    config = program.ContentSessionsConfig(
        tables=Path(), out=Path(), shown=4, shuffled=0.5, position_bias=1.5
    )
    generator = np.random.default_rng(0)
    order = generator.permutation(9)
    liking = generator.normal(0, 1, 9)
    lists = [
        own
        for _ in range(1500)
        for own in program.draw_lists(config, generator, liking, [2, 7], order)
    ]
    assert all(set(own.products).isdisjoint({2, 7}) and len(own.products) == 4 for own in lists)
    places = [order[own.products].tolist() for own in lists if not own.shuffled]
    assert all(own == sorted(own) for own in places)
    displays = Displays(
        lengths=np.array([len(own.products) for own in lists]),
        taken=np.array([own.taken for own in lists]),
        shuffled=np.array([own.shuffled for own in lists]),
    )
    found = position_propensities(displays)
    np.testing.assert_allclose(found, np.arange(1, 5) ** -1.5, atol=0.08)
