"""CutMix for contents with links: a rectangle of one row's pictures goes into another's, and so do its links.

Yun et al. 2019 mix two labels by area. A row here has links to products with weights, so the mixture is a
row that links to both rows' products, which the loss takes as it takes any content with several links.

Rows mix with those of their group: `GROUP_ROWS` that follow each other in the global batch. A rank has whole
groups, so any number of ranks makes the same mixtures.
Shape letters: B rows, T frames, H W pixels, M links of a row.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

GROUP_ROWS = 4
"""Few, so that small batches of many ranks can be mixed, and enough that most rows find a partner."""


def mix_rows(
    images: UInt8[np.ndarray, "B T H W 3"],
    mask: Bool[np.ndarray, "B T"],
    links: Int[np.ndarray, "B M"],
    weights: Float[np.ndarray, "B M"],
    *,
    probability: float,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "B 2*M"], Float[np.ndarray, "B 2*M"], Bool[np.ndarray, " B"]]:
    """Mix rows' pictures in place; returns links and weights twice as wide, and which rows were mixed.

    A row is mixed with `probability`, with another one that has as many pictures. Its links' weights then
    sum to the share of its pictures that is left, and its partner's to the rest.
    """
    count, height, width = len(images), *images.shape[2:4]
    partners = rng.permutation(count)
    chosen = rng.random(count) < probability
    shares = rng.random(count)
    centres = rng.random((count, 2))
    num_pictures = mask.sum(1)
    chosen &= (num_pictures == num_pictures[partners]) & (num_pictures > 0)
    chosen &= partners != np.arange(count)
    all_links = np.concatenate([links, np.full_like(links, -1)], axis=1)
    all_weights = np.concatenate([weights, np.zeros_like(weights)], axis=1)
    originals = images.copy() if chosen.any() else images
    for row in np.flatnonzero(chosen):
        partner, t = partners[row], num_pictures[row]
        top, bottom = _edges(centres[row, 0], shares[row], height)
        left, right = _edges(centres[row, 1], shares[row], width)
        place = (slice(0, t), slice(top, bottom), slice(left, right))
        images[row][place] = originals[partner][place]
        taken = (bottom - top) * (right - left) / (height * width)
        all_weights[row] = np.concatenate(
            [
                (1 - taken) * weights[row] / weights[row].sum(),
                taken * weights[partner] / weights[partner].sum(),
            ]
        )
        all_links[row, links.shape[1] :] = links[partner]
    return all_links, all_weights, chosen


def _edges(centre: float, share: float, length: int) -> tuple[int, int]:
    """Where a stretch of the square root of `share` around a centre starts and ends inside a side."""
    half = share**0.5 * length / 2
    middle = centre * length
    return max(0, round(middle - half)), min(length, round(middle + half))
