"""What was watched as a source of candidates: which contents count, and what they propose."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_sessions import write_small

from mmrec.errors import UserError
from mmrec.generative.sessions import Sessions, leave_one_out, write_sessions
from mmrec.generative.watched import watched_before, watched_scores


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
