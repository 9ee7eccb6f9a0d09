"""Popularity and transition counts, against loops over pairs."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import load_program

from mmrec.errors import UserError
from mmrec.generative.baselines import TransitionConfig, popularity_scores, transition_scores
from mmrec.generative.evaluation import query_values, rank_targets
from mmrec.generative.sessions import leave_one_out, sequences_of


def counted_by_hand(
    train: list[list[int]], history: list[int], num_products: int, config: TransitionConfig
) -> np.ndarray:
    counts: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in train:
        for later, item in enumerate(row):
            for gap in range(1, min(config.window, later) + 1):
                counts[row[later - gap]][item] += 1 / gap
    scores = np.zeros(num_products)
    for place, item in enumerate(reversed(history[-config.window :])):
        total = sum(counts[item].values()) + config.shrinkage
        for candidate, count in counts[item].items():
            scores[candidate] += config.decay**place * count / total
    return scores


@pytest.mark.parametrize(
    "config", [TransitionConfig(), TransitionConfig(window=2, decay=0.5, shrinkage=0.0)]
)
def test_transition_scores_equal_a_loop(config: TransitionConfig) -> None:
    generator = np.random.default_rng(3)
    train = [generator.integers(0, 12, size=generator.integers(1, 9)).tolist() for _ in range(30)]
    histories = [generator.integers(0, 12, size=size).tolist() for size in (1, 2, 7, 9)]
    found = transition_scores(sequences_of(train), sequences_of(histories), 12, config).toarray()
    for row, history in zip(found, histories, strict=True):
        np.testing.assert_allclose(row, counted_by_hand(train, history, 12, config), atol=1e-12)


def test_popularity_counts_training_events() -> None:
    scores = popularity_scores(sequences_of([[0, 2], [2]]), 2, 4)
    assert scores.tolist() == [[1, 0, 2, 0]] * 2


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="--window 0: expected at least 1"):
        TransitionConfig(window=0)
    with pytest.raises(UserError, match=r"--decay 1.5: expected 0 to 1"):
        TransitionConfig(decay=1.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("beauty", (0.0516, 0.0375, 0.0734, 0.0446)),
        ("toys", (0.0606, 0.0444, 0.0839, 0.0518)),
    ],
)
def test_real_reviews_give_the_known_figures(
    shared_data: Callable[[str], Path], tmp_path: Path, name: str, expected: tuple[float, ...]
) -> None:
    program = load_program("data_prep/amazon_reviews.py")
    source = shared_data("amazon2014_seqrec") / name
    sessions = program.main(program.AmazonReviewsConfig(source=source, out=tmp_path / "sessions"))
    split = leave_one_out(sessions, "test")
    scores = transition_scores(split.train, split.histories, len(sessions.product_ids))
    values = query_values(rank_targets(scores, split.targets))
    found = [values[metric].mean() for metric in ("R@5", "N@5", "R@10", "N@10")]
    np.testing.assert_allclose(found, expected, atol=6e-5)
