"""What was watched as a source of candidates: which contents count, and what they propose."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_sessions import write_small

from mmrec.errors import UserError
from mmrec.generative.sessions import (
    Sessions,
    SplitBy,
    leave_one_out,
    split_sessions,
    write_sessions,
)
from mmrec.generative.watched import (
    last_watched,
    watched_before,
    watched_scores,
    watched_sequences,
)


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    """Two users who ask, and between them one who does not."""
    table = pa.table(
        {
            "user_id": ["u", "v", "w"],
            "item_ids": [["a", "b", "c"], ["a"], ["b", "nowhere", "c", "a"]],
            "times": [[10, 20, 30], [10], [10, 15, 20, 30]],
            "content_ids": [["x", "y", "z", "gone"], ["x"], ["y", "x"]],
            "content_times": [[5, 21, 30, 25], [1], [20, 21]],
        }
    )
    products = pa.table({"product_id": ["a", "b", "c"]})
    (tmp_path / "s").mkdir()
    return write_sessions(tmp_path / "s", products=products, sessions=table, config={}, counts={})


def test_what_was_watched_since_the_last_purchase_counts(sessions: Sessions) -> None:
    watched = watched_before(sessions, leave_one_out(sessions, "test"), ["x", "y", "z"])
    pairs = list(zip(watched.queries.tolist(), watched.contents.tolist(), strict=True))
    assert pairs == [(0, 1), (0, 2), (1, 0)]
    assert (watched.num_queries, watched.without_embedding) == (2, 1)
    # Validation asks for the product before: of w the content at the very moment counts.
    watched = watched_before(sessions, leave_one_out(sessions, "val"), ["x", "y", "z"])
    assert watched.queries.tolist() == [1]
    assert watched.contents.tolist() == [1]


def test_the_last_content_is_asked_with(sessions: Sessions) -> None:
    # The table has y, z of u in another order than that of time, and "gone" has no embedding.
    names = sessions.table["content_ids"].to_pylist()
    assert names[0] == ["x", "y", "z", "gone"]
    last = last_watched(sessions, leave_one_out(sessions, "test"), ["x", "z", "y"])
    assert last.tolist() == [1, -1, 0]


def test_products_are_learned_after_histories_and_contents(sessions: Sessions) -> None:
    def found(rows: list[int]) -> list[tuple[list[int], list[int]]]:
        made = watched_sequences(sessions, sessions.events, np.array(rows), ["x", "y", "z"])
        return [(own.tolist(), contents.tolist()) for own, contents in made]

    assert found([10, 11, 12]) == [
        ([10, 11, 12], [1, 2]),
        ([11, 12], [1]),
        ([11, 12, 10], [0]),
    ]
    # A product without an ID is in no history, and is not learned.
    assert found([10, -1, 12]) == [([10, 12], [1, 2]), ([12], [1]), ([12, 10], [0])]
    assert found([10, 11, -1]) == [([11, 10], [0])]


@pytest.mark.parametrize("by", ["leave-one-out", "time"])
def test_nothing_that_is_held_out_is_learned(tmp_path: Path, by: SplitBy) -> None:
    """Before each product its own content is watched, so that what is learned from tells its place."""
    items = [["a"], list("abcde"), list("bcdea")]
    times = [[5], [10, 20, 30, 40, 50], [12, 22, 32, 42, 52]]
    table = pa.table(
        {
            "user_id": ["t", "u", "v"],
            "item_ids": items,
            "times": times,
            "content_ids": [
                [f"{user}{place}" for place in range(len(own))]
                for user, own in zip("tuv", items, strict=True)
            ],
            "content_times": [[moment - 1 for moment in own] for own in times],
        }
    )
    sessions = write_sessions(
        tmp_path,
        products=pa.table({"product_id": list("abcde")}),
        sessions=table,
        config={},
        counts={},
    )
    names = [name for own in table["content_ids"].to_pylist() for name in own]
    for held_out in ("val", "test"):
        train = split_sessions(sessions, by, held_out).train
        made = watched_sequences(sessions, train, np.arange(5), names)
        learned = {names[row] for _, contents in made for row in contents}
        places = {
            f"{user}{at}"
            for user, own in zip("tuv", train, strict=True)
            for at in range(1, len(own))
        }
        assert learned == places
        assert "u1" in learned
        assert not learned & {"u4", "v4"}
        whole = ["".join("abcde"[row] for row in own) for own in train]
        assert all("".join("abcde"[row] for row in own) in " ".join(whole) for own, _ in made)


def test_contents_propose_the_nearest_products(sessions: Sessions) -> None:
    generator = np.random.default_rng(0)
    contents = generator.standard_normal((3, 4)).astype(np.float32)
    products = generator.standard_normal((9, 4)).astype(np.float32)
    watched = watched_before(sessions, leave_one_out(sessions, "test"), ["x", "y", "z"])
    scores = watched_scores(watched, contents, products, 4).toarray()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (contents, products)]
    cosines = unit[0] @ unit[1].T
    nearest = np.where(cosines >= np.sort(cosines, axis=1)[:, [-4]], cosines, 0).clip(0)
    expected = np.stack([nearest[[1, 2]].max(axis=0), nearest[0]])
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_sessions_without_contents_are_refused(tmp_path: Path) -> None:
    sessions = write_small(tmp_path, ["abc"], times=[[1, 2, 3]])
    with pytest.raises(UserError, match="expected sessions with times, content_ids"):
        watched_before(sessions, leave_one_out(sessions, "test"), [])
