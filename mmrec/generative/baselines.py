"""What a recommender has to beat: popularity, and counts of what was taken after what.

Both learn from training sequences alone and give scores for `mmrec.generative.evaluation`. Products that
counts never saw after anything of a history have no entry: they were not proposed.

Shape letters: Q queries, N catalogue size, E events of all sequences together.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import sparse

from mmrec.generative.sessions import Sequences
from mmrec.ranges import Count, NonNegative, Share, check_ranges


@dataclass(frozen=True, kw_only=True)
class TransitionConfig:
    """How transitions are counted and put together."""

    window: Count = 5
    """A product counts as taken after each of this many before it, and a history's last so many are asked."""
    decay: Share = 0.7
    """What a history's product counts for, relative to the one after it."""
    shrinkage: NonNegative = 2.0
    """Added to the total that a product's counts are divided by: what was seen once proves little."""

    def __post_init__(self) -> None:
        check_ranges(self)


def popularity_scores(
    train: Sequences, num_queries: int, num_products: int
) -> Float[np.ndarray, "Q N"]:
    """Each product's number of training events, the same for every query: a view of one row."""
    counts = np.bincount(train.items, minlength=num_products).astype(np.float64)
    return np.broadcast_to(counts, (num_queries, num_products))


def count_transitions(train: Sequences, num_products: int, window: int) -> sparse.csr_array:
    """Sum over training sequences of 1 / gap for each ordered pair at most `window` places apart, (N, N).

    Row: the earlier product; column: the later one.
    """
    earlier, later, weights = [], [], []
    left = train.places_from_end
    for gap in range(1, window + 1):
        starts = np.flatnonzero(left >= gap)
        earlier.append(train.items[starts])
        later.append(train.items[starts + gap])
        weights.append(np.full(len(starts), 1 / gap))
    pairs = (np.concatenate(earlier), np.concatenate(later))
    return sparse.csr_array((np.concatenate(weights), pairs), shape=(num_products, num_products))


def transition_shares(counts: sparse.csr_array, shrinkage: float) -> sparse.csr_array:
    """Counts over their row's total plus `shrinkage`."""
    totals = counts.sum(axis=1) + shrinkage
    return sparse.csr_array(sparse.diags_array(1 / np.where(totals > 0, totals, 1)) @ counts)


def history_weights(
    histories: Sequences, num_products: int, *, window: int, decay: float
) -> sparse.csr_array:
    """`decay` to the power of the places from a history's end, for its last `window` products, (Q, N)."""
    places = histories.places_from_end
    recent = places < window
    where = (histories.owners[recent], histories.items[recent])
    shape = (len(histories), num_products)
    return sparse.csr_array((decay ** places[recent].astype(np.float64), where), shape=shape)


def transition_scores(
    train: Sequences,
    histories: Sequences,
    num_products: int,
    config: TransitionConfig | None = None,
) -> sparse.csr_array:
    """Score products by what was taken after those of a history, (Q, N).

    score(q, j) = sum over the last `window` products h of q, d places from the end, of
    decay^d * C[h, j] / (shrinkage + sum over j of C[h, j]), where C is `count_transitions`.
    """
    config = config or TransitionConfig()
    counts = count_transitions(train, num_products, config.window)
    weights = history_weights(histories, num_products, window=config.window, decay=config.decay)
    return sparse.csr_array(weights @ transition_shares(counts, config.shrinkage))
