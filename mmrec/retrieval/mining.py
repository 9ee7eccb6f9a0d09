"""Hard negatives out of a search: the nearest products that are not a content's, nor too near to be wrong.

Shape letters: Q contents, K products found for each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

OWN, TOO_CLOSE, NOT_LINKED, BEYOND = "own product", "too close", "never linked", "beyond the number"


def keep_negatives(
    found: Sequence[Sequence[str]],
    scores: Float[np.ndarray, "Q K"],
    *,
    own: Sequence[Sequence[str]],
    own_scores: Sequence[float],
    allowed: Mapping[str, object] | None,
    margin: float,
    most: int,
) -> tuple[list[tuple[list[str], list[float]]], Counter[str]]:
    r"""Of the products found for each content, nearest first, keep up to `most` that are negatives.

    Left out are the content's own products, and those whose score is above
    :math:`s - m\,|s|`, with s the score of its best own product (`own_scores`) and m the relative
    margin: what is as near as a right product often is one, without a link that says so. This is
    the positive-aware mining of NV-Retriever (Moreira et al. 2024, TopK-PercPos at 1 - m). `allowed`,
    if given, holds the products that may be negatives at all.

    Returns ids and scores by content, and how many candidates were kept (""), or left out by reason.
    """
    kept, reasons = [], Counter[str]()
    for names, values, mine, best in zip(found, scores, own, own_scores, strict=True):
        limit = best - margin * abs(best)
        ids: list[str] = []
        near: list[float] = []
        for name, score in zip(names, values[: len(names)].tolist(), strict=True):
            reason = _reason(name, score, mine, limit, allowed, full=len(ids) == most)
            reasons[reason] += 1
            if not reason:
                ids.append(name)
                near.append(score)
        kept.append((ids, near))
    return kept, reasons


def _reason(
    name: str,
    score: float,
    own: Sequence[str],
    limit: float,
    allowed: Mapping[str, object] | None,
    *,
    full: bool,
) -> str:
    """Why a candidate is left out; empty if it is kept."""
    if name in own:
        return OWN
    if score > limit:
        return TOO_CLOSE
    if allowed is not None and name not in allowed:
        return NOT_LINKED
    return BEYOND if full else ""
