"""How well right products are found: ranks, R@K, MRR, nDCG and their confidence intervals.

Shape letters: Q queries, N catalogue size, D embedding width, M metrics, S resamples, R right products
of one query (it differs from query to query, so it is written `_R`: unchecked).

The rules, which hold for an encoder and for a baseline alike:

- Search is exact, over the whole catalogue.
- Ties count against the model: an irrelevant product with the score of a right one stands before
  it. So a collapsed encoder, which gives every product one score, ranks right products last.
- The rank of a right product is 1 + the irrelevant products before it + the better right products.
- Every score must be finite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mmrec.errors import UserError

RECALL_CUTOFFS = (1, 5, 10, 50)
NDCG_CUTOFF = 10
METRIC_NAMES = (*(f"R@{k}" for k in RECALL_CUTOFFS), "MRR", f"nDCG@{NDCG_CUTOFF}")
MAIN_METRICS = ("R@1", "R@5", "MRR")
"""Those that are told first."""

LEVEL = 0.05
BEYOND, UNSURE, WITHIN = "beyond chance", "unsure", "within chance"
"""The interval leaves out 0, and p by Holm is below `LEVEL`; the former only; neither."""

# Catalogue rows scored at once: with 1,024 queries a block of float64 scores is 128 MB.
_GALLERY_BLOCK = 16_384
# Entries of the (resamples, queries) count matrix held at once by the bootstrap: 32 MB.
_BOOTSTRAP_BLOCK = 4_000_000
# Of the sign-flip test: p is told from 0 down to 1e-4, enough for Holm over 500 comparisons.
_NUM_FLIPS = 10_000
# Units in the last place, of a row's largest score, within which ready-made scores are equal.
_ULPS = 64

Summary = dict[str, dict[str, int | float]]
"""Slice -> metric -> mean over the slice's queries; also the slice's number of "queries"."""
Intervals = dict[str, dict[str, list[float]]]
"""Slice -> metric -> [low, high]."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much better one system is than another on the same queries."""

    difference: float
    """Mean over queries of ours minus theirs."""
    low: float
    """Lower end of the 95% interval (or of another level) of that mean."""
    high: float
    p: float
    """Two-sided, of a test that flips signs: the share of flips that reach this difference."""
    queries: int

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves out 0: right for one comparison, too generous for many (`holm`)."""
        return self.low > 0 or self.high < 0


def rank_relevant(
    queries: Float[np.ndarray, "Q D"],
    gallery: Float[np.ndarray, "N D"],
    relevant: Sequence[Int[np.ndarray, " _R"]],
    *,
    chunk: int = 1024,
) -> list[Int[np.ndarray, " _R"]]:
    """Rank each query's right products among the whole gallery by exact inner product.

    `relevant[q]` holds the gallery rows that are right for query q. Returns, for each query, the
    1-based ranks of those rows, ascending. `chunk` queries are scored at a time.

    Equal vectors do not always get equal float scores: BLAS adds the products up in an order that
    depends on where a row lies in its block. So scores are computed in float64, and two scores
    count as equal when they differ by no more than that rounding can: 2 D eps |q| max|g|, about
    1e-13 for unit vectors. Exact duplicates tie; nothing else that float32 can tell apart does.

    Raises `UserError` naming the query row when a score is not finite, and `ValueError` when shapes
    disagree or a query has no right product, or one outside the gallery.
    """
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, the gallery {gallery.shape[1]}")
    rows = _checked_rows(relevant, len(queries), len(gallery))
    rounding = 2 * queries.shape[1] * np.finfo(np.float64).eps
    squares = np.einsum("nd,nd->n", gallery, gallery, dtype=np.float64)
    longest = float(np.sqrt(squares.max(initial=0.0)))
    ranks = []
    for start in range(0, len(queries), chunk):
        block = queries[start : start + chunk].astype(np.float64)
        tolerances = rounding * longest * np.linalg.norm(block, axis=1)
        # A NaN is reported below, by its place, rather than by numpy's warning.
        with np.errstate(invalid="ignore"):
            ranks += _rank_block(block, gallery, rows[start : start + chunk], tolerances, start)
    return ranks


def rank_relevant_scores(
    scores: Float[np.ndarray, "Q N"], relevant: Sequence[Int[np.ndarray, " _R"]]
) -> list[Int[np.ndarray, " _R"]]:
    """Rank each query's right products by a ready-made score matrix, higher being better.

    The same rules as `rank_relevant`; scores within 64 units in the last place of a row's largest
    magnitude tie. Raises the same errors.
    """
    rows = _checked_rows(relevant, *scores.shape)
    ranks = []
    for query, right in enumerate(rows):
        line = scores[query].astype(np.float64)
        _check_finite(line[None], query, 0)
        tolerance = _ULPS * np.finfo(scores.dtype).eps * np.abs(line).max()
        own = np.sort(line[right])[::-1]
        line[right] = -np.inf
        ranks.append(_add_right(_count_ahead(line, own - tolerance)))
    return ranks


def _rank_block(
    queries: Float[np.ndarray, "B D"],
    gallery: Float[np.ndarray, "N D"],
    rows: Sequence[Int[np.ndarray, " _R"]],
    tolerances: Float[np.ndarray, " B"],
    first_query: int,
) -> list[Int[np.ndarray, " _R"]]:
    """Count the irrelevant products ahead of each right one, a block of the gallery at a time."""
    thresholds = []
    for query, right, tolerance in zip(queries, rows, tolerances, strict=True):
        own = gallery[right].astype(np.float64) @ query
        thresholds.append(np.sort(own)[::-1] - tolerance)
    ahead = [np.zeros(len(right), np.int64) for right in rows]
    for start in range(0, len(gallery), _GALLERY_BLOCK):
        block = gallery[start : start + _GALLERY_BLOCK].astype(np.float64)
        scores = queries @ block.T  # (B, block)
        _check_finite(scores, first_query, start)
        for line, right, threshold, count in zip(scores, rows, thresholds, ahead, strict=True):
            line[right[(right >= start) & (right < start + len(block))] - start] = -np.inf
            count += _count_ahead(line, threshold)
    return [_add_right(count) for count in ahead]


def _count_ahead(
    line: Float[np.ndarray, " N"], thresholds: Float[np.ndarray, " _R"]
) -> Int[np.ndarray, " _R"]:
    """How many scores reach each threshold; right products must hold -inf."""
    return np.array([np.count_nonzero(line >= value) for value in thresholds], np.int64)


def _add_right(ahead: Int[np.ndarray, " _R"]) -> Int[np.ndarray, " _R"]:
    """Ranks from the irrelevant products ahead of the best, second best, ... right product."""
    return ahead + np.arange(1, len(ahead) + 1)


def _checked_rows(
    relevant: Sequence[Int[np.ndarray, " _R"]], num_queries: int, num_products: int
) -> list[Int[np.ndarray, " _R"]]:
    """The right rows without repeats; every query must have one, inside the gallery."""
    if len(relevant) != num_queries:
        raise ValueError(f"{num_queries} queries, and right products for {len(relevant)}")
    rows = [np.unique(right) for right in relevant]
    for query, right in enumerate(rows):
        if not len(right):
            raise ValueError(f"query row {query} has no right product")
        if right[0] < 0 or right[-1] >= num_products:
            raise ValueError(f"query row {query}: right product outside the {num_products} rows")
    return rows


def _check_finite(scores: Float[np.ndarray, "B N"], first_query: int, first_product: int) -> None:
    if np.isfinite(scores).all():
        return
    query, product = np.argwhere(~np.isfinite(scores))[0]
    raise UserError(
        f"query row {first_query + query}, product row {first_product + product}: the score is "
        f"{scores[query, product]}, expected a finite number; embed again, and if it stays so the "
        "encoder's training diverged"
    )


def per_query(ranks: Sequence[Int[np.ndarray, " _R"]]) -> dict[str, Float[np.ndarray, " Q"]]:
    """Every metric for every query, from the ascending ranks of its right products.

    - R@K: 1 when at least one right product stands within the first K, else 0, which is what CLIP
      and the video retrieval papers report as recall. With one right product it is plain recall.
    - MRR: 1 / rank of the first right product.
    - nDCG@10: gain 1 for each right product within the first 10, discounted by log2(1 + rank), over
      the best that the query's number of right products allows (Jarvelin and Kekalainen, 2002).
    """
    first = np.array([query[0] for query in ranks], np.float64)
    values = {f"R@{k}": (first <= k).astype(np.float64) for k in RECALL_CUTOFFS}
    values["MRR"] = 1 / first
    values[f"nDCG@{NDCG_CUTOFF}"] = np.array([_ndcg(query) for query in ranks], np.float64)
    return values


def _ndcg(ranks: Int[np.ndarray, " _R"]) -> float:
    found = ranks[ranks <= NDCG_CUTOFF]
    ideal = np.arange(1, min(len(ranks), NDCG_CUTOFF) + 1)
    return float((1 / np.log2(1 + found)).sum() / (1 / np.log2(1 + ideal)).sum())


def summarise(
    values: Mapping[str, Float[np.ndarray, " Q"]], slices: Mapping[str, Bool[np.ndarray, " Q"]]
) -> Summary:
    """Mean of each metric over the queries of each slice, and their number under "queries".

    Slices without a query are left out.
    """
    return {
        name: {
            "queries": int(mask.sum()),
            **{metric: float(column[mask].mean()) for metric, column in values.items()},
        }
        for name, mask in slices.items()
        if mask.any()
    }


def bootstrap_intervals(
    values: Mapping[str, Float[np.ndarray, " Q"]],
    slices: Mapping[str, Bool[np.ndarray, " Q"]],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Intervals:
    """Percentile bootstrap intervals of each slice's means, resampling its queries.

    A slice's intervals depend on its own queries and the seed alone, not on which other slices
    there are. Slices without a query are left out. A slice whose queries all score the same gets an
    interval of no width: the bootstrap cannot see beyond its sample. The intervals say how sure the
    test queries make us, not how much another training run would differ.
    """
    tails = [(1 - level) / 2, (1 + level) / 2]
    table = np.stack(list(values.values()), axis=1)  # (Q, metrics)
    intervals: Intervals = {}
    for name, mask in slices.items():
        if not mask.any():
            continue
        means = _resampled_means(table[mask], num_resamples, np.random.default_rng(seed))
        low, high = np.quantile(means, tails, axis=0)
        intervals[name] = {
            metric: [float(low[column]), float(high[column])]
            for column, metric in enumerate(values)
        }
    return intervals


def _resampled_means(
    table: Float[np.ndarray, "Q M"], num_resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, "S M"]:
    """Means of resamples with replacement, as (how often each query was drawn) @ table / Q."""
    num_queries = len(table)
    means = []
    step = max(1, _BOOTSTRAP_BLOCK // num_queries)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        draws = generator.integers(num_queries, size=(size, num_queries))
        draws += np.arange(size)[:, None] * num_queries
        counts = np.bincount(draws.ravel(), minlength=size * num_queries)
        means.append(counts.reshape(size, num_queries) @ table / num_queries)
    return np.concatenate(means)


def paired_bootstrap(
    ours: Float[np.ndarray, " _Q"],
    theirs: Float[np.ndarray, " _Q"],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> PairedDifference:
    """Compare two systems by a metric of each query, as `per_query` gives it, on the same queries in order.

    Queries are resampled in pairs, so what makes a query hard for both does not blur the difference. The
    interval is the percentile bootstrap's. Raises `ValueError` for no queries and for numbers of queries
    that differ.
    """
    compared = paired_bootstraps(
        {"": ours}, {"": theirs}, seed=seed, num_resamples=num_resamples, level=level
    )
    return compared[""]


def paired_bootstraps(
    ours: Mapping[str, Float[np.ndarray, " _Q"]],
    theirs: Mapping[str, Float[np.ndarray, " _Q"]],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, PairedDifference]:
    """`paired_bootstrap` of each of several metrics, by the same draws of queries."""
    for metric, column in ours.items():
        if len(column) != len(theirs[metric]) or not len(column):
            raise ValueError(f"{len(column)} queries of ours, {len(theirs[metric])} of theirs")
    table = np.stack([column - theirs[metric] for metric, column in ours.items()], axis=1)  # (Q, M)
    means = _resampled_means(table, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    ps = _sign_flip_ps(table, seed)
    return {
        metric: PairedDifference(
            difference=float(table[:, column].mean()),
            low=float(low[column]),
            high=float(high[column]),
            p=float(ps[column]),
            queries=len(table),
        )
        for column, metric in enumerate(ours)
    }


def _sign_flip_ps(table: Float[np.ndarray, "Q M"], seed: int) -> Float[np.ndarray, " M"]:
    """Two-sided p of each mean difference: if neither system were better, each sign would be a coin's.

    The randomisation test that Smucker, Allan and Carterette (2007) recommend for search results. It is
    what `holm` is given, since with few queries that differ the percentile bootstrap is too sure.
    """
    differing = np.abs(table[(table != 0).any(axis=1)]).astype(np.float64)
    # Sums of the same numbers in another order differ by rounding; those reach it, too.
    bar = np.abs(table.sum(axis=0, dtype=np.float64)) * (1 - 1e-9)
    generator = np.random.default_rng(seed)
    num_reaching = np.zeros(table.shape[1])
    step = max(1, _BOOTSTRAP_BLOCK // max(1, len(differing)))
    for start in range(0, _NUM_FLIPS, step):
        size = (min(step, _NUM_FLIPS - start), len(differing))
        signs = generator.integers(0, 2, size, dtype=np.int8) * np.int8(2) - np.int8(1)
        num_reaching += (np.abs(signs.astype(np.float64) @ differing) >= bar).sum(axis=0)
    return (num_reaching + 1) / (_NUM_FLIPS + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values for their number (Holm, 1979): of those below 0.05, 5% chance that any is wrong."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for place, number in enumerate(sorted(range(len(ps)), key=lambda number: ps[number])):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[number]))
        adjusted[number] = largest
    return adjusted


def verdict(difference: PairedDifference, p_holm: float) -> str:
    """What is said of one difference of many, whose p is adjusted for all of them."""
    if not difference.beyond_chance:
        return WITHIN
    return BEYOND if p_holm < LEVEL else UNSURE


def recall_curve(
    ranks: Sequence[Int[np.ndarray, " _R"]], longest: int = 100
) -> Float[np.ndarray, " _K"]:
    """R@K for K from 1 to `longest`: the share of queries with a right product within the first K."""
    first = np.array([query[0] for query in ranks])
    within = np.bincount(first[first <= longest], minlength=longest + 1)[1:]
    return within.cumsum() / len(first)


def evaluation(
    *,
    gallery: int,
    queries: int,
    slices: Summary,
    intervals: Intervals,
    baselines: Mapping[str, Summary],
) -> dict[str, Any]:
    """What `metrics.json` holds, in the one shape that it has everywhere.

    `gallery` is the number of products searched, `slices` and `intervals` are the trained
    encoder's, `baselines` has the `summarise` of each thing that learns nothing. Raises
    `ValueError` without a slice "all", or when a baseline was measured on other slices.
    """
    if "all" not in slices:
        raise ValueError(f"no slice 'all' among {', '.join(slices) or 'none'}")
    for name, summary in baselines.items():
        if summary.keys() != slices.keys():
            raise ValueError(f"baseline '{name}' has other slices than the encoder")
    return {
        "gallery": gallery,
        "queries": queries,
        "slices": slices,
        "intervals": intervals,
        "baselines": dict(baselines),
    }


def systems(metrics: Mapping[str, Any]) -> dict[str, Summary]:
    """What a table compares: the encoder, at narrower widths, with half of each query, and baselines."""
    widths = sorted(metrics.get("widths", {}), key=int, reverse=True)[1:]
    return {
        "trained": metrics["slices"],
        **{f"{width} wide": metrics["widths"][width] for width in widths},
        **metrics.get("modalities", {}),
        **metrics["baselines"],
    }


def format_table(
    metrics: Mapping[str, Any], slices: Sequence[str] = ("all", "warm", "cold")
) -> str:
    """`metrics.json` as aligned plain text for a terminal: system and slice down, metrics across.

    Slices that the evaluation does not have are left out.
    """
    header = ["system", "slice", "queries", *METRIC_NAMES]
    rows = []
    for system, summary in systems(metrics).items():
        for name in (name for name in slices if name in summary):
            means = summary[name]
            figures = [f"{means[metric]:.3f}" for metric in METRIC_NAMES]
            rows.append([system, name, f"{means['queries']:,}", *figures])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [f"{metrics['queries']:,} queries against a gallery of {metrics['gallery']:,} products"]
    lines += ["", _aligned(header, widths), "  ".join("-" * width for width in widths)]
    previous = None
    for row in rows:
        # A system's name stands once, on its first line.
        lines.append(_aligned(["" if row[0] == previous else row[0], *row[1:]], widths))
        previous = row[0]
    return "\n".join(lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    text = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    figures = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(text + figures).rstrip()
