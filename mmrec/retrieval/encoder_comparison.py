"""Two encoders, or more, asked the same: metrics with paired intervals, and galleries where they differ.

Nothing is read from indexes or evaluations: contents and catalogue are embedded anew by each encoder, and
searched exactly. For runs that were evaluated already there is `mmrec compare`.

Shape letters: Q queries, N catalogue size, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int

from mmrec.data.media import decode_jpeg, encode_jpeg, resize_shorter
from mmrec.data.shards import ShardReader, image_name
from mmrec.data.storage import Place, place
from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.retrieval.embed import Split, embed_rows, open_split
from mmrec.retrieval.match_gallery import THUMBNAIL, matches_html, query_html
from mmrec.retrieval.matches import Match, Matches
from mmrec.retrieval.metrics import (
    METRIC_NAMES,
    PairedDifference,
    holm,
    paired_bootstraps,
    per_query,
    rank_relevant,
)
from mmrec.terminal import one_line

if TYPE_CHECKING:
    import pandas

_BEYOND_CHANCE = 0.05
_CELL = "padding:2px 10px;text-align:right"


@dataclass(frozen=True, kw_only=True)
class ComparedMetric:
    """One metric of an encoder beside the first one's."""

    encoder: str
    metric: str
    first: float
    """Of the first encoder."""
    value: float
    """Of this one."""
    difference: PairedDifference
    """This one less the first, over the same queries."""
    p: float
    """That of a sign-flip test, adjusted for the number of metrics and encoders (Holm)."""

    @property
    def beyond_chance(self) -> bool:
        """Whether the difference is more than what drawing other queries would bring: p below 0.05."""
        return self.p < _BEYOND_CHANCE


@dataclass(frozen=True, kw_only=True, repr=False)
class Disagreement:
    """One query, and what each encoder finds for it. A notebook shows a gallery for each."""

    content_id: str
    right: dict[str, str]
    """Titles of the right products by id."""
    ranks: dict[str, int]
    """Where each encoder has the first right product."""
    matches: dict[str, Matches]

    def __repr__(self) -> str:
        found = ", ".join(f"{name} at {rank}" for name, rank in self.ranks.items())
        return one_line(f"{self.content_id}: {', '.join(self.right.values())}: {found}")

    def _repr_html_(self) -> str:
        query = next(iter(self.matches.values()))
        parts = "".join(
            f"<div style='margin-top:12px'><b>{escape(name)}</b>: right at place {self.ranks[name]}"
            f"{matches_html(replace(own, frames=[], title=None), right=self.right)}</div>"
            for name, own in self.matches.items()
        )
        right = escape(", ".join(self.right.values()))
        return (
            f"<div style='color:inherit;margin-bottom:24px'>{query_html(query)}"
            f"<div>{escape(self.content_id)}: right is {right}</div>{parts}</div>"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class EncoderComparison:
    """What encoders make of the same queries and the same catalogue; the first is what others are held to."""

    names: list[str]
    contents: ShardReader
    catalog: ShardReader
    queries: dict[str, Float32[np.ndarray, "Q _D"]]
    products: dict[str, Float32[np.ndarray, "N _D"]]
    ranks: dict[str, list[Int[np.ndarray, " _R"]]] = field(repr=False)
    """Ascending ranks of each query's right products."""
    metrics: list[ComparedMetric]

    def to_pandas(self) -> "pandas.DataFrame":
        """A row a metric and encoder: both values, the difference with its 95% interval, and p."""
        try:
            import pandas
        except ImportError:
            raise UserError("to_pandas needs pandas: pip install 'mmrec[notebook]'") from None
        first = self.names[0]
        return pandas.DataFrame(
            [
                {
                    "encoder": own.encoder,
                    "metric": own.metric,
                    first: own.first,
                    "value": own.value,
                    "difference": own.difference.difference,
                    "low": own.difference.low,
                    "high": own.difference.high,
                    "p": own.p,
                    "beyond chance": own.beyond_chance,
                }
                for own in self.metrics
            ]
        )

    def differing(
        self, most: int = 5, *, k: int = 5, other: str | None = None
    ) -> list[Disagreement]:
        """Queries whose first right product two encoders place most differently, the farthest first.

        `other` is the one that is held to the first, the second if left out. The distance of two places is
        that of their inverses, as in MRR: 1 and 4 are farther apart than 40 and 80. Queries that both place
        alike are left out.
        """
        other = other or self.names[1]
        if other not in self.names[1:]:
            raise UserError(f"other '{other}': expected one of {', '.join(self.names[1:])}")
        inverse = {
            name: 1 / np.array([ranks[0] for ranks in self.ranks[name]])
            for name in (self.names[0], other)
        }
        gaps = np.abs(inverse[self.names[0]] - inverse[other])
        rows = [int(row) for row in np.argsort(-gaps, kind="stable")[:most] if gaps[row] > 0]
        return [self._disagreement(row, k, [self.names[0], other]) for row in rows]

    def __repr__(self) -> str:
        lines = [f"{len(self.contents):,} queries, {len(self.catalog):,} products"]
        for own in self.metrics:
            change = own.difference
            lines.append(
                f"{own.metric:8} {self.names[0]} {own.first:.3f}  {own.encoder} {own.value:.3f}  "
                f"{change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
                f"{'  beyond chance' if own.beyond_chance else ''}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return "".join(self._table(name) for name in self.names[1:])

    def _table(self, name: str) -> str:
        """One encoder beside the first."""
        head = ("metric", self.names[0], name, "difference", "95% interval", "")
        rows = [
            (
                own.metric,
                f"{own.first:.3f}",
                f"{own.value:.3f}",
                f"{own.difference.difference:+.3f}",
                f"{own.difference.low:+.3f} to {own.difference.high:+.3f}",
                "beyond chance" if own.beyond_chance else "may be chance",
            )
            for own in self.metrics
            if own.encoder == name
        ]
        cells = "".join(
            f"<tr><th scope='row' style='{_CELL}'>{metric}</th>"
            + "".join(f"<td style='{_CELL}'>{text}</td>" for text in texts)
            + "</tr>"
            for metric, *texts in rows
        )
        columns = "".join(f"<th scope='col' style='{_CELL}'>{escape(text)}</th>" for text in head)
        counts = f"{len(self.contents):,} queries, {len(self.catalog):,} products"
        return (
            f"<table style='color:inherit;font-variant-numeric:tabular-nums'><caption>{counts}</caption>"
            f"<thead><tr>{columns}</tr></thead><tbody>{cells}</tbody></table>"
        )

    def _disagreement(self, row: int, k: int, names: Sequence[str]) -> Disagreement:
        meta = self.contents.meta(row)
        return Disagreement(
            content_id=meta["content_id"],
            right={
                own["product_id"]: own["title"] or own["product_id"] for own in meta["products"]
            },
            ranks={name: int(self.ranks[name][row][0]) for name in names},
            matches={name: self._matches(name, row, meta, k) for name in names},
        )

    def _matches(self, name: str, row: int, meta: Mapping[str, Any], k: int) -> Matches:
        scores = self.products[name] @ self.queries[name][row]
        best = np.argsort(-scores, kind="stable")[:k]
        frames = [member for member in self.contents.names(row) if member.startswith("f")]
        own = self.contents.read(row, frames).values()
        return Matches(
            matches=[_match(self.catalog, int(place), float(scores[place])) for place in best],
            title=meta["title"],
            frames=[_thumbnail(jpeg) for jpeg in own],
        )


def compare_encoders(
    encoders: Mapping[str, Encoder],
    shards: Place | str,
    *,
    split: Split = "test",
    seed: int = 0,
    num_resamples: int = 2000,
    batch_size: int = 64,
) -> EncoderComparison:
    """Ask encoders, by name, with every content of a split, and compare each with the first.

    Intervals are paired bootstraps over queries. Raises `UserError` for fewer than two encoders, and where
    the split is not one of contents or is not there.
    """
    if len(encoders) < 2:
        raise UserError(f"expected two encoders or more, found {len(encoders)}")
    contents, catalog = open_split(place(shards), split), open_split(place(shards), "catalog")
    if contents.family != "contents":
        raise UserError(f"split '{split}' holds products; expected train, val or test")
    rows = {ids[0]: row for row, ids in enumerate(catalog.product_ids)}
    relevant = [np.array([rows[id_] for id_ in ids]) for ids in contents.product_ids]
    queries, products, ranks = {}, {}, {}
    for name, encoder in encoders.items():
        queries[name], products[name] = (
            embed_rows(encoder, own, batch_size=batch_size, progress=f"{name}: {own.family}")
            for own in (contents, catalog)
        )
        ranks[name] = rank_relevant(queries[name], products[name], relevant)
    names = list(encoders)
    return EncoderComparison(
        names=names,
        contents=contents,
        catalog=catalog,
        queries=queries,
        products=products,
        ranks=ranks,
        metrics=_compared(names, ranks, seed, num_resamples),
    )


def _compared(
    names: Sequence[str],
    ranks: Mapping[str, list[Int[np.ndarray, " _R"]]],
    seed: int,
    num_resamples: int,
) -> list[ComparedMetric]:
    values = {name: per_query(ranks[name]) for name in names}
    first = names[0]
    found = []
    for name in names[1:]:
        differences = paired_bootstraps(
            values[name], values[first], seed=seed, num_resamples=num_resamples
        )
        found += [(name, metric, differences[metric]) for metric in METRIC_NAMES]
    adjusted = holm([difference.p for _, _, difference in found])
    return [
        ComparedMetric(
            encoder=name,
            metric=metric,
            first=float(values[first][metric].mean()),
            value=float(values[name][metric].mean()),
            difference=difference,
            p=p,
        )
        for (name, metric, difference), p in zip(found, adjusted, strict=True)
    ]


def _match(catalog: ShardReader, row: int, score: float) -> Match:
    meta, name = catalog.meta(row), image_name(0)
    return Match(
        product_id=meta["product_id"],
        score=score,
        title=meta["title"],
        attributes=meta["attributes"],
        image=catalog.read(row, [name])[name] if name in catalog.names(row) else None,
    )


def _thumbnail(jpeg: bytes) -> bytes:
    pixels = decode_jpeg(jpeg).permute(1, 2, 0).numpy()
    return encode_jpeg(resize_shorter(pixels, THUMBNAIL), 85)
