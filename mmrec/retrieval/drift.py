"""Drift: when an index should be compacted, and when it should be built anew.

Each upsert notes how well the base's codec holds the new vectors, and how unequal the inverted lists have
become with them. Both are set against what they were when the base was built: products of another kind
than the ones that it was trained on make both grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """Products upserted since the base was built, and alive."""
    tombstones: int
    """Rows of the base that were deleted or replaced."""
    changes: int
    """Calls of upsert and delete since."""
    quantization_error: float
    """Of the base when it was built: mean squared distance of unit vectors from their codes."""
    upserted_error: float | None
    """The same of what was upserted since; None where nothing was or nothing is compressed."""
    imbalance: float
    """Of the inverted lists when the base was built; 1 is even."""
    imbalance_now: float
    """The same with what was upserted since."""
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
) -> IndexStatus:
    """Weigh a generation and what was noted of each change since."""
    measured = [fact for fact in facts if fact.get("quantization_error") is not None]
    vectors = sum(fact["vectors"] for fact in measured)
    error = None
    if vectors:
        error = sum(fact["quantization_error"] * fact["vectors"] for fact in measured) / vectors
    imbalances = [fact["imbalance"] for fact in facts if "imbalance" in fact]
    now = imbalances[-1] if imbalances else record.imbalance
    advice = _compact_advice(record, len(facts), delta, tombstones)
    advice += _rebuild_advice(record, error, vectors, now)
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
        imbalance_now=now,
        search=record.search,
        advice=advice,
    )


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
