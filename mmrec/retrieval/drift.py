"""Drift: when an index should be compacted, and when it should be built anew.

Each upsert notes how well the base's codec holds the new vectors, and which inverted lists they belong to.
How large the error is and how unequal the lists have become is set against what it was when the index was
built: products of another kind than the ones that it was trained on make both grow. Compaction trains
nothing, so it carries these figures over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmrec.retrieval.base import Base
from mmrec.retrieval.changes import Change
from mmrec.retrieval.faiss_base import imbalance_of, list_sizes
from mmrec.retrieval.generations import Generation

# A delta is searched whole: at this share of the base it costs about as much as an approximate search.
COMPACT_DELTA = 0.05
# A search fetches more to make up for tombstones.
COMPACT_TOMBSTONES = 0.20
# Opening reads every file of changes.
COMPACT_CHANGES = 1_000
# A quarter more error than at the build shows in recall; fewer vectors than this say little.
REBUILD_ERROR = 1.25
REBUILD_ERROR_VECTORS = 100
# A search of inverted lists takes about so many times as long.
REBUILD_IMBALANCE = 1.5


@dataclass(frozen=True, kw_only=True)
class IndexStatus:
    """What `mmrec index status` prints."""

    generation: str
    factory: str
    products: int
    base: int
    """Rows of the base, dead ones too."""
    delta: int
    """Products upserted since the last compaction, and alive."""
    tombstones: int
    """Rows of the base that were deleted or replaced."""
    changes: int
    """Calls of upsert and delete since."""
    quantization_error: float
    """Of the index when it was built: mean squared distance of unit vectors from their codes."""
    upserted_error: float | None
    """The same of what was upserted since; None where nothing was or nothing is compressed."""
    imbalance: float
    """Of the inverted lists when the index was built; 1 is even."""
    imbalance_now: float
    """The same of all products that it holds now."""
    search: dict[str, float]
    """Search parameters that tuning chose; empty where nothing was tuned."""
    advice: list[str]
    """What should be done, each with its reason; empty when nothing should."""

    def lines(self) -> list[str]:
        """The status as text."""
        tuned = ", ".join(f"{name} {value:g}" for name, value in self.search.items())
        drift = "none measured" if self.upserted_error is None else f"{self.upserted_error:.4f}"
        return [
            f"generation {self.generation}, factory {self.factory}",
            *([f"search: {tuned}, by tuning"] if tuned else []),
            f"products: {self.products:,}",
            f"base: {self.base:,} rows, {self.tombstones:,} of them tombstones",
            f"delta: {self.delta:,} products in {self.changes:,} changes",
            f"quantization error: {self.quantization_error:.4f} at the build, {drift} since",
            f"list imbalance: {self.imbalance:.2f} at the build, {self.imbalance_now:.2f} now",
            *(self.advice or ["nothing to do"]),
        ]


def status_of(
    record: Generation,
    facts: Sequence[dict[str, Any]],
    *,
    generation: str,
    delta: int,
    tombstones: int,
    imbalance: float,
) -> IndexStatus:
    """Weigh a generation and what was noted of each change since; `imbalance` is that of now."""
    error, vectors = upserted_error(record, facts)
    advice = _compact_advice(record, len(facts), delta, tombstones)
    advice += _rebuild_advice(record, error, vectors, imbalance)
    return IndexStatus(
        generation=generation,
        factory=record.factory,
        products=record.count - tombstones + delta,
        base=record.count,
        delta=delta,
        tombstones=tombstones,
        changes=len(facts),
        quantization_error=record.quantization_error,
        upserted_error=error,
        imbalance=record.imbalance,
        imbalance_now=imbalance,
        search=record.search,
        advice=advice,
    )


def upserted_error(record: Generation, facts: Sequence[dict[str, Any]]) -> tuple[float | None, int]:
    """The mean quantization error of what was upserted since the build, and of how many vectors."""
    measured = [
        (fact["quantization_error"], fact["vectors"])
        for fact in facts
        if fact.get("quantization_error") is not None
    ]
    if record.upserted_error is not None:
        measured.append((record.upserted_error, record.upserted_vectors))
    vectors = sum(count for _, count in measured)
    return (sum(error * count for error, count in measured) / vectors if vectors else None), vectors


def note_lists(lists: dict[str, int], change: Change) -> None:
    """Keep, for each product in the delta, the inverted list that it belongs to."""
    for id_ in change.ids:
        lists.pop(id_, None)
    if "lists" in change.facts:
        lists.update(zip(change.ids, change.facts["lists"], strict=True))


def imbalance_now(base: Base, dead: np.ndarray, late: dict[str, int]) -> float:
    """The imbalance of the inverted lists with what is alive in the base, and in the delta."""
    sizes = list_sizes(base.index)
    if base.row_lists is not None:
        gone, new = base.row_lists[dead], np.array(list(late.values()), np.int64)
        sizes -= np.bincount(gone, minlength=len(sizes))
        sizes += np.bincount(new[new >= 0], minlength=len(sizes))
    return imbalance_of(sizes)


def _compact_advice(record: Generation, changes: int, delta: int, tombstones: int) -> list[str]:
    base = max(1, record.count)
    reasons = []
    if delta > COMPACT_DELTA * base:
        reasons.append(
            f"the delta is {delta / base:.0%} of the base (threshold {COMPACT_DELTA:.0%})"
        )
    if tombstones > COMPACT_TOMBSTONES * base:
        reasons.append(
            f"{tombstones / base:.0%} of the base are tombstones (threshold {COMPACT_TOMBSTONES:.0%})"
        )
    if changes > COMPACT_CHANGES:
        reasons.append(f"{changes:,} changes (threshold {COMPACT_CHANGES:,})")
    return [f"compact (mmrec index compact): {reason}" for reason in reasons]


def _rebuild_advice(
    record: Generation, error: float | None, vectors: int, imbalance: float
) -> list[str]:
    reasons = []
    # Below this an error is rounding.
    built = max(record.quantization_error, 1e-6)
    if error is not None and vectors >= REBUILD_ERROR_VECTORS and error > REBUILD_ERROR * built:
        reasons.append(
            f"new products lose {error / built:.2f} times as much to compression as those of the "
            f"build did (threshold {REBUILD_ERROR})"
        )
    if imbalance > REBUILD_IMBALANCE * record.imbalance:
        reasons.append(
            f"lists are {imbalance / record.imbalance:.2f} times as unequal as at the build "
            f"(threshold {REBUILD_IMBALANCE})"
        )
    return [f"rebuild (mmrec index build): {reason}" for reason in reasons]
