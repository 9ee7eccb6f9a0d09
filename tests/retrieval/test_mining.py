"""Which of the products found near a content count as hard negatives."""

import numpy as np

from mmrec.retrieval.mining import BEYOND, NOT_LINKED, OWN, TOO_CLOSE, keep_negatives


def test_own_products_and_those_nearly_as_near_are_left_out() -> None:
    kept, reasons = keep_negatives(
        [["a", "b", "c", "d", "e"], ["c", "a"]],
        np.array(
            [[0.90, 0.80, 0.77, 0.75, 0.5], [0.6, 0.2, -np.inf, -np.inf, -np.inf]], np.float32
        ),
        own=[["b", "z"], ["c"]],
        own_scores=[0.80, 0.60],
        allowed=None,
        margin=0.05,
        most=1,
    )
    # Above 0.95 * 0.8 = 0.76 stand a and c, whatever their order among the right ones; d is kept.
    assert [ids for ids, _ in kept] == [["d"], ["a"]]
    np.testing.assert_allclose(kept[0][1], [0.75])
    assert reasons == {OWN: 2, TOO_CLOSE: 2, BEYOND: 1, "": 2}


def test_a_margin_leaves_room_below_a_score_of_either_sign() -> None:
    for best, near, far in ((0.5, 0.46, 0.44), (-0.5, -0.54, -0.56)):
        kept, _ = keep_negatives(
            [["near", "far"]],
            np.array([[near, far]], np.float32),
            own=[["own"]],
            own_scores=[best],
            allowed=None,
            margin=0.1,
            most=5,
        )
        assert kept[0][0] == ["far"]


def test_only_allowed_products_are_kept() -> None:
    kept, reasons = keep_negatives(
        [["a", "b"]],
        np.array([[0.3, 0.2]], np.float32),
        own=[["own"]],
        own_scores=[0.9],
        allowed={"b": 0},
        margin=0.05,
        most=5,
    )
    assert kept[0][0] == ["b"]
    assert reasons == {NOT_LINKED: 1, "": 1}
