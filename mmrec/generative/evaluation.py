"""How well the next product is found: one contract for counts, generators and rankers.

The rules, which hold for a model and for a baseline alike:

- A hit is a product, never an ID: a generated ID stands for all products that carry it, and they tie.
- The whole catalogue is ranked. What a list does not name comes after all that it names.
- Ties count against the model. A list that names neither the whole catalogue nor all that its system
  proposes may have left out products that tie with its last score, so those at that score count as not named.
- Every score must be finite.
- Products that the user took before are kept in the ranking and, for a second set of figures, removed.

Figures stand by what a query needs: a transition that training repeats, one that it never shows, or a
product that it never shows at all. Training decides this for every system, one that has seen more included.

Shape letters: Q queries, N catalogue size, K places of a list, L codes of an ID, I different IDs,
E events of all sequences together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Real
from scipy import sparse

from mmrec.errors import UserError
from mmrec.generative.sessions import Sequences, Split
from mmrec.retrieval.metrics import Intervals, Summary, bootstrap_intervals, summarise

CUTOFFS = (5, 10)
METRIC_NAMES = (*(f"{name}@{k}" for k in CUTOFFS for name in ("R", "N")), "MRR")
STRATA = ("all", "repeated transition", "unseen transition", "cold product")
SEEN = ("kept", "removed")

# Units in the last place, of a row's best score or the score itself, within which scores are equal: as in
# mmrec.retrieval.metrics, since sums of the same numbers in another order differ by so much. What lies below
# a score does not count: it may be masked by a number such as -1e9.
_ULPS = 64


@dataclass(frozen=True, kw_only=True)
class RankedProducts:
    """Lists of products, as a ranker or an index gives them."""

    products: Int[np.ndarray, "Q K"]
    """Catalogue rows; -1 where a list is shorter."""
    scores: Real[np.ndarray, "Q K"]
    """Higher is better; what stands beside -1 is not read."""
    id_table: Int[np.ndarray, "N _L"] | None = None
    """The semantic ID of each catalogue row, to say by how much counting IDs would inflate the figures."""
    whole: Bool[np.ndarray, " Q"] | None = None
    """Lists that name all that their system proposes, so that none was cut off; left out, none is known."""


@dataclass(frozen=True, kw_only=True)
class RankedIds:
    """Lists of generated semantic IDs, and the table that says which products carry them."""

    codes: Int[np.ndarray, "Q K _L"]
    """Generated IDs; one that no product carries takes its place and finds nothing."""
    scores: Real[np.ndarray, "Q K"]
    """Higher is better, such as log probabilities."""
    id_table: Int[np.ndarray, "N _L"]
    """The ID of each catalogue row; products may share one."""


Scores = RankedProducts | RankedIds | sparse.csr_array | np.ndarray
"""What a system says of Q queries. A matrix is (Q, N); what a sparse one has no entry for, or one that is not
positive, was not proposed."""


def check_id_table(
    product_ids: Sequence[str], catalogue: Sequence[str], *, where: str = "the ID table"
) -> Int[np.ndarray, " N"]:
    """The row of an ID table for each product of the catalogue.

    Raises `UserError` when a product of the catalogue has no ID: the table belongs to another catalogue.
    """
    rows = {product: row for row, product in enumerate(product_ids)}
    found = np.array([rows.get(product, -1) for product in catalogue], np.int64)
    missing = np.flatnonzero(found < 0)
    if len(missing):
        raise UserError(
            f"{where}: belongs to another catalogue: {len(missing):,} of {len(catalogue):,} products have no "
            f"ID, such as '{catalogue[missing[0]]}'; make IDs of this catalogue with train/semantic_ids.py"
        )
    return found


def list_scores(ranked: RankedProducts, num_products: int) -> sparse.csr_array:
    """Lists as a sparse matrix (Q, N) of positive whole numbers that order as the scores do, ties included.

    A product that a list names twice counts at its best place. A list that does not name every product was
    cut off, whatever its length, unless it is known to be whole; what it names at its last score is left out.
    Raises `UserError` for a score that is not finite and a product outside the catalogue.
    """
    products, scores = ranked.products, _as_floats(ranked.scores)
    listed = products >= 0
    _check_finite(np.where(listed, scores, 0.0))
    if len(outside := np.argwhere((products < -1) | (products >= num_products))):
        query, place = outside[0]
        raise UserError(
            f"query {query}: a list names row {products[query, place]} of a catalogue of {num_products:,} "
            "products; expected rows of that catalogue, or -1"
        )
    levels = _tie_levels(np.where(listed, scores, -np.inf))
    queries = np.broadcast_to(np.arange(len(products))[:, None], products.shape)[listed]
    shape = (len(products), num_products)
    best = _best_of(queries, products[listed], levels[listed], shape)
    num_named = np.diff(best.indptr)
    cut_off = num_named < num_products
    if ranked.whole is not None:
        cut_off &= ~ranked.whole
    # The last score of a list has level 1.
    best.data -= np.repeat(cut_off, num_named)
    best.eliminate_zeros()
    return best


def expand_ids(
    ranked: RankedIds,
) -> tuple[sparse.csr_array, sparse.csr_array, Int[np.ndarray, " N"]]:
    """Generated IDs as scores of products (Q, N), as scores of IDs (Q, I), and the ID number of each product.

    All products of an ID get its score. Raises `UserError` for a score that is not finite.
    """
    num_products, width = ranked.id_table.shape
    if ranked.codes.shape[2] != width:
        raise UserError(
            f"generated IDs have {ranked.codes.shape[2]} codes, those of the ID table {width}; they are not "
            "of one making"
        )
    every = np.concatenate([ranked.id_table, ranked.codes.reshape(-1, width)])
    _, numbers = np.unique(every, axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)
    id_of = numbers[:num_products]
    num_ids = int(numbers.max()) + 1
    generated = numbers[num_products:].reshape(ranked.codes.shape[:2])
    ids = list_scores(RankedProducts(products=generated, scores=ranked.scores), num_ids)
    carried = sparse.csr_array(
        (np.ones(num_products), (id_of, np.arange(num_products))), shape=(num_ids, num_products)
    )
    return sparse.csr_array(ids @ carried), ids, id_of


def rank_targets(
    scores: sparse.csr_array | np.ndarray,
    targets: Int[np.ndarray, " Q"],
    seen: Sequences | None = None,
) -> Int[np.ndarray, " Q"]:
    """The 1-based rank of each query's target among all columns, ties against it.

    A target that was not proposed stands last. With `seen`, those columns are removed from each query's
    ranking first, and a target that is among them stands last. Raises `UserError` naming the query whose
    score is not finite.
    """
    num_queries, num_products = matrix_shape(scores)
    if num_queries != len(targets):
        raise ValueError(f"{len(targets)} targets, and scores for {num_queries} queries")
    last = _num_left(num_products, num_queries, seen)
    if isinstance(scores, np.ndarray):
        return _rank_dense(scores, targets, seen, last)
    return _rank_sparse(scores, targets, seen, last)


def matrix_shape(matrix: sparse.csr_array | np.ndarray) -> tuple[int, int]:
    """Rows and columns; SciPy's own annotations leave open whether a matrix has a shape."""
    rows, columns = matrix.shape or (0, 0)
    return rows, columns


def _rank_sparse(
    scores: sparse.csr_array,
    targets: Int[np.ndarray, " Q"],
    seen: Sequences | None,
    last: Int[np.ndarray, " Q"],
) -> Int[np.ndarray, " Q"]:
    num_products = matrix_shape(scores)[1]
    rows, columns, values = sparse.find(scores)
    _check_finite(values, rows)
    if seen is not None:
        taken = _pair_keys(seen.owners, seen.items, num_products)
        left = ~np.isin(_pair_keys(rows, columns, num_products), taken)
        rows, columns, values = rows[left], columns[left], values[left]
    proposed = values > 0
    rows, columns, values = rows[proposed], columns[proposed], values[proposed]
    own = np.zeros(len(targets))
    right = columns == targets[rows]
    own[rows[right]] = values[right]
    largest = np.zeros(len(targets))
    np.maximum.at(largest, rows, values)
    thresholds = own - _ULPS * np.finfo(np.float64).eps * largest
    ahead = np.bincount(rows[values >= thresholds[rows]], minlength=len(targets))
    return np.where(own > 0, ahead, last)


def _rank_dense(
    scores: np.ndarray,
    targets: Int[np.ndarray, " Q"],
    seen: Sequences | None,
    last: Int[np.ndarray, " Q"],
) -> Int[np.ndarray, " Q"]:
    scores = _as_floats(scores)
    ranks = np.zeros(len(targets), np.int64)
    for query, target in enumerate(targets):
        line = scores[query].astype(np.float64)
        _check_finite(line[None], np.array([query]))
        largest = max(abs(line[target]), abs(line.max()))
        tolerance = _ULPS * np.finfo(scores.dtype).eps * largest
        if seen is not None:
            line[seen[query]] = -np.inf
        proposed = line[target] > -np.inf
        ranks[query] = (
            np.count_nonzero(line >= line[target] - tolerance) if proposed else last[query]
        )
    return ranks


def _num_left(num_products: int, num_queries: int, seen: Sequences | None) -> Int[np.ndarray, " Q"]:
    """How many products each query ranks: the place of a target that was not proposed."""
    if seen is None:
        return np.full(num_queries, num_products)
    pairs = np.unique(_pair_keys(seen.owners, seen.items, num_products))
    taken = np.bincount(pairs // num_products, minlength=num_queries)
    # A target among them is worse than any other place.
    return np.maximum(num_products - taken, 1)


def _pair_keys(
    rows: Int[np.ndarray, " E"], columns: Int[np.ndarray, " E"], num_columns: int
) -> Int[np.ndarray, " E"]:
    return rows.astype(np.int64) * num_columns + columns


def _as_floats(scores: np.ndarray) -> np.ndarray:
    """Scores with whole numbers made floating."""
    return scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float64)


def _tie_levels(scores: Float[np.ndarray, "Q K"]) -> Int[np.ndarray, "Q K"]:
    """0 for -inf, 1 for a row's lowest other score, more for each higher one; ties have the same."""
    order = np.argsort(scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=1).astype(np.float64)
    largest = np.maximum(np.abs(ordered), np.abs(ordered[:, -1:]))
    with np.errstate(invalid="ignore"):
        steps = np.diff(ordered, axis=1, prepend=-np.inf)
        rises = steps > _ULPS * float(np.finfo(scores.dtype).eps) * largest
    levels = np.empty(scores.shape, np.int64)
    np.put_along_axis(levels, order, np.cumsum(rises, axis=1), axis=1)
    return levels


def _best_of(
    rows: Int[np.ndarray, " E"],
    columns: Int[np.ndarray, " E"],
    values: Int[np.ndarray, " E"],
    shape: tuple[int, int],
) -> sparse.csr_array:
    """A sparse matrix with the largest of the values given for a place."""
    order = np.argsort(-values, kind="stable")
    _, first = np.unique(_pair_keys(rows[order], columns[order], shape[1]), return_index=True)
    best = order[first]
    return sparse.csr_array(
        (values[best].astype(np.float64), (rows[best], columns[best])), shape=shape
    )


def _check_finite(values: np.ndarray, rows: Int[np.ndarray, " E"] | None = None) -> None:
    finite = np.isfinite(values)
    if finite.all():
        return
    place = np.argwhere(~finite)[0]
    query = place[0] if rows is None else rows[min(place[0], len(rows) - 1)]
    raise UserError(
        f"query {query}: a score is {values[tuple(place)]}, expected a finite number; the model's training "
        "diverged, or its lists hold what was ruled out"
    )


def query_values(ranks: Int[np.ndarray, " Q"]) -> dict[str, Float[np.ndarray, " Q"]]:
    """Every metric for every query, from its one target's rank.

    R@K: 1 within the first K, else 0 (the field's HR@K). N@K: 1 / log2(1 + rank) within the first K, else
    0. MRR: 1 / rank.
    """
    found = {k: (ranks <= k).astype(np.float64) for k in CUTOFFS}
    values = {}
    for k in CUTOFFS:
        values[f"R@{k}"] = found[k]
        values[f"N@{k}"] = found[k] / np.log2(1 + ranks)
    values["MRR"] = 1 / ranks
    return values


def strata(split: Split, num_products: int) -> dict[str, Bool[np.ndarray, " Q"]]:
    """Which queries need what; the three strata share out all queries.

    - repeated transition: somewhere in a training sequence the target comes right after the product that
      is last in the history, so remembering is enough
    - unseen transition: it never does, and the target is in a training sequence
    - cold product: the target is in no training sequence
    """
    train = split.train
    warm = np.zeros(num_products, bool)
    warm[train.items] = True
    starts = np.flatnonzero(train.places_from_end >= 1)
    known = _pair_keys(train.items[starts], train.items[starts + 1], num_products)
    last = split.histories.items[split.histories.offsets[1:] - 1]
    repeated = np.isin(_pair_keys(last, split.targets, num_products), known)
    cold = ~warm[split.targets]
    return dict(
        zip(STRATA, (np.ones(len(cold), bool), repeated, ~repeated & ~cold, cold), strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One system's figures, with seen products kept or removed."""

    slices: Summary
    intervals: Intervals
    inflated_by: Summary | None
    """Means over IDs less means over products, of a system that generates IDs; stratum -> metric. A list of
    IDs names each once, so its first K reach further than the IDs of the first K products."""
    values: dict[str, Float[np.ndarray, " Q"]]
    """Metric -> value of each query."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of several systems on the same queries."""

    num_products: int
    num_queries: int
    systems: dict[str, dict[str, Figures]]
    """System -> kept or removed -> figures."""
    strata: dict[str, Bool[np.ndarray, " Q"]]

    def difference(
        self, system: str, other: str, *, seen: str = "kept"
    ) -> tuple[Summary, Intervals]:
        """Mean differences between two systems and their paired bootstrap intervals, by stratum.

        The same resamples of queries stand for both systems, so what makes a query hard cancels. An
        interval that holds 0 says that the queries do not tell the two apart.
        """
        ours, theirs = (self.systems[name][seen].values for name in (system, other))
        values = {metric: ours[metric] - theirs[metric] for metric in METRIC_NAMES}
        return summarise(values, self.strata), bootstrap_intervals(values, self.strata)

    def to_dict(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return {
            "gallery": self.num_products,
            "queries": self.num_queries,
            "systems": {
                name: {
                    seen: {
                        "slices": figures.slices,
                        "intervals": figures.intervals,
                        "inflated_by": figures.inflated_by,
                    }
                    for seen, figures in by_seen.items()
                }
                for name, by_seen in self.systems.items()
            },
        }


def evaluate_recommendations(
    systems: Mapping[str, Scores], split: Split, num_products: int, *, num_resamples: int = 1000
) -> Evaluation:
    """Rank the targets of a split by every system, with seen products kept and removed.

    Raises `UserError` for scores that are not finite and IDs that do not fit their table.
    """
    slices = strata(split, num_products)
    found = {
        name: _figures(scores, split, num_products, slices, num_resamples)
        for name, scores in systems.items()
    }
    return Evaluation(
        num_products=num_products, num_queries=len(split.targets), systems=found, strata=slices
    )


def _figures(
    scores: Scores,
    split: Split,
    num_products: int,
    slices: Mapping[str, Bool[np.ndarray, " Q"]],
    num_resamples: int,
) -> dict[str, Figures]:
    ids = id_of = None
    if isinstance(scores, RankedIds):
        products, ids, id_of = expand_ids(scores)
    elif isinstance(scores, RankedProducts):
        products = list_scores(scores, num_products)
        if scores.id_table is not None:
            ids, id_of = _listed_ids(scores, scores.id_table)
    else:
        products = scores
    if (found := matrix_shape(products)[1]) != num_products:
        raise ValueError(f"scores of {found} products, expected {num_products}")
    figures = {}
    for name in SEEN:
        seen = split.histories if name == "removed" else None
        values = query_values(rank_targets(products, split.targets, seen))
        inflated = None
        if ids is not None and id_of is not None:
            inflated = _inflation(ids, id_of, split, seen, values, slices)
        figures[name] = Figures(
            slices=summarise(values, slices),
            intervals=bootstrap_intervals(values, slices, num_resamples=num_resamples),
            inflated_by=inflated,
            values=values,
        )
    return figures


def _listed_ids(
    ranked: RankedProducts, id_table: Int[np.ndarray, "N L"]
) -> tuple[sparse.csr_array, Int[np.ndarray, " N"]]:
    """The IDs of listed products as scores (Q, I), and the ID number of each product."""
    different, id_of = np.unique(id_table, axis=0, return_inverse=True)
    id_of = id_of.reshape(-1)
    listed = np.where(ranked.products >= 0, id_of[ranked.products], -1)
    of_ids = RankedProducts(products=listed, scores=ranked.scores, whole=ranked.whole)
    return list_scores(of_ids, len(different)), id_of


def _inflation(
    ids: sparse.csr_array,
    id_of: Int[np.ndarray, " N"],
    split: Split,
    seen: Sequences | None,
    values: Mapping[str, Float[np.ndarray, " Q"]],
    slices: Mapping[str, Bool[np.ndarray, " Q"]],
) -> Summary:
    """What would be added if finding the target's ID counted as finding the target."""
    emptied = None if seen is None else _emptied_ids(seen, id_of, matrix_shape(ids)[1])
    found = query_values(rank_targets(ids, id_of[split.targets], emptied))
    return summarise({metric: found[metric] - values[metric] for metric in METRIC_NAMES}, slices)


def _emptied_ids(seen: Sequences, id_of: Int[np.ndarray, " N"], num_ids: int) -> Sequences:
    """For each query the IDs of which it has seen every product."""
    products = np.unique(_pair_keys(seen.owners, seen.items, len(id_of)))
    pairs = _pair_keys(products // len(id_of), id_of[products % len(id_of)], num_ids)
    pairs, num_seen = np.unique(pairs, return_counts=True)
    whole = pairs[num_seen == np.bincount(id_of, minlength=num_ids)[pairs % num_ids]]
    lengths = np.bincount(whole // num_ids, minlength=len(seen))
    return Sequences(whole % num_ids, np.concatenate([[0], np.cumsum(lengths)]))


def format_table(evaluation: Evaluation, *, strata: Sequence[str] = STRATA) -> str:
    """Figures as aligned plain text: system, seen products and stratum down, metrics across.

    The 95% interval of R@10 is beside it. A system that generates IDs has a line more a stratum: by how
    much counting IDs would inflate each figure.
    """
    header = ["system", "seen", "stratum", "queries", *METRIC_NAMES, "R@10 95%"]
    rows: list[list[str]] = []
    for system, by_seen in evaluation.systems.items():
        for seen, figures in by_seen.items():
            for name in (name for name in strata if name in figures.slices):
                low, high = figures.intervals[name]["R@10"]
                means = figures.slices[name]
                rows.append([system, seen, name, f"{means['queries']:,}", *_cells(means)])
                rows[-1].append(f"{low:.4f}-{high:.4f}")
                if figures.inflated_by is not None:
                    inflated = _cells(figures.inflated_by[name], sign="+")
                    rows.append(["", "", "  inflated by", "", *inflated, ""])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [*_legend(evaluation), "", _aligned(header, widths)]
    lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines + [_aligned(row, widths) for row in rows])


def _legend(evaluation: Evaluation) -> list[str]:
    """What stands above a table: what was asked, and how its lines are to be read."""
    lines = [
        f"{evaluation.num_queries:,} queries against a catalogue of {evaluation.num_products:,} products",
        "strata: by the training sequences alone, for every system, also one that counted validation",
    ]
    found = [figures for by_seen in evaluation.systems.values() for figures in by_seen.values()]
    if any(figures.inflated_by is not None for figures in found):
        lines.append("inflated by: what the first K different IDs find beyond the first K products")
    return lines


def format_differences(means: Summary, intervals: Intervals) -> dict[str, str]:
    """R@10 and N@10 of what `Evaluation.difference` found, with their intervals, by stratum."""
    return {
        stratum: ", ".join(
            f"{metric} {means[stratum][metric]:+.4f} ({low:+.4f} to {high:+.4f})"
            for metric in ("R@10", "N@10")
            for low, high in [intervals[stratum][metric]]
        )
        for stratum in means
    }


def _cells(means: Mapping[str, int | float], sign: str = "") -> list[str]:
    return [f"{means[metric]:{sign}.4f}" for metric in METRIC_NAMES]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    text = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    figures = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join(text + figures).rstrip()
