"""What is asked and what is searched: the queries of one split, the catalogue, and which products are right.

Shape letters: Q queries, N catalogue size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from mmrec.data.shards import ShardReader, open_shards
from mmrec.errors import UserError
from mmrec.retrieval.embed import Split, open_split

Slices = dict[str, Bool[np.ndarray, " Q"]]
CATEGORY = "category"
OTHER, MISSING, EMPTY = "other", "missing", "(empty)"
# A column of more distinct numbers than this is sliced into ranges.
_MOST_NUMBERS = 12
_NUM_RANGES = 4


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Queries of one split, the whole catalogue, and which products are right for which query."""

    contents: ShardReader
    catalog: ShardReader
    relevant: list[np.ndarray]
    """For each content, the catalogue rows of its linked products."""

    @classmethod
    def open(cls, shards: Path, split: Split) -> "Gallery":
        """Open a split's contents and the catalogue of a folder of shards."""
        contents = open_split(shards, split)
        catalog = open_split(shards, "catalog")
        rows = {ids[0]: row for row, ids in enumerate(catalog.product_ids)}
        return cls(
            contents=contents,
            catalog=catalog,
            relevant=[np.array([rows[p] for p in ids]) for ids in contents.product_ids],
        )

    @cached_property
    def content_metas(self) -> list[dict[str, Any]]:
        """Every content's JSON member, read once."""
        return [self.contents.meta(row) for row in range(len(self.contents))]

    @cached_property
    def product_metas(self) -> list[dict[str, Any]]:
        """Every product's JSON member, read once."""
        return [self.catalog.meta(row) for row in range(len(self.catalog))]

    @property
    def product_ids(self) -> list[str]:
        """The id of each row of the catalogue."""
        return [ids[0] for ids in self.catalog.product_ids]


def count_train_links(shards: Path, catalog: ShardReader) -> Float64[np.ndarray, " N"]:
    """How many training contents each catalogue product is linked from."""
    counts = Counter(p for ids in open_shards(shards, "contents", "train").product_ids for p in ids)
    return np.array([counts[ids[0]] for ids in catalog.product_ids], np.float64)


def query_slices(
    gallery: Gallery,
    train_links: Float64[np.ndarray, " N"],
    *,
    columns: Sequence[str] = (),
    max_values: int = 20,
) -> Slices:
    """Masks over the queries by what is known of their products and what is missing; no mask is empty.

    - warm: at least one right product has training links; cold: none has.
    - popular and rare: above and at or below the median link count of the warm queries.
    - a missing modality: of the query (no title, no pictures), or of all its right products; a pair of
      slices each, where some have it and some have not.
    - category, where products have that attribute, and `columns`, of products or else of contents: see
      `column_slices`. A query with several right products counts where the first of them does.

    Raises `UserError` for a column that neither products nor contents have.
    """
    links = np.array([train_links[rows].max() for rows in gallery.relevant])
    warm = links > 0
    middle = np.median(links[warm]) if warm.any() else 0.0
    slices: Slices = {"all": np.ones(len(links), bool), "warm": warm, "cold": ~warm}
    if (warm & (links > middle)).any():
        slices |= {"popular": warm & (links > middle), "rare": warm & (links <= middle)}
    slices |= _modality_slices(gallery)
    has_category = any(CATEGORY in meta["attributes"] for meta in gallery.product_metas)
    own = [CATEGORY] if has_category and CATEGORY not in columns else []
    for column in [*own, *columns]:
        slices |= column_slices(column, _column(gallery, column), max_values)
    return {name: mask for name, mask in slices.items() if mask.any()}


def _modality_slices(gallery: Gallery) -> Slices:
    titled = np.array([bool(meta["title"]) for meta in gallery.content_metas])
    pictured = _pictured(gallery.contents)
    product_titled = np.array([bool(meta["title"]) for meta in gallery.product_metas])
    product_pictured = _pictured(gallery.catalog)
    right_titled = np.array([product_titled[rows].any() for rows in gallery.relevant])
    right_pictured = np.array([product_pictured[rows].any() for rows in gallery.relevant])
    pairs = {
        ("with title", "no title"): titled,
        ("with pictures", "no pictures"): pictured,
        ("product with title", "product without title"): right_titled,
        ("product with pictures", "product without pictures"): right_pictured,
    }
    slices: Slices = {}
    for (has, lacks), mask in pairs.items():
        if mask.any() and not mask.all():
            slices |= {has: mask, lacks: ~mask}
    return slices


def _pictured(reader: ShardReader) -> Bool[np.ndarray, " _R"]:
    """Whether each sample has pictures of its own: a content's frames, a product's images."""
    first = "f" if reader.family == "contents" else "i"
    return np.array(
        [any(n[0] == first for n in reader.names(row)) for row in range(len(reader))], bool
    )


def _column(gallery: Gallery, column: str) -> list[Any]:
    """A column's value for each query: of its first right product, or else of the content itself."""
    products = [meta["attributes"] for meta in gallery.product_metas]
    if any(column in attributes for attributes in products):
        return [products[rows[0]].get(column) for rows in gallery.relevant]
    contents = [meta["attributes"] for meta in gallery.content_metas]
    if any(column in attributes for attributes in contents):
        return [attributes.get(column) for attributes in contents]
    known = sorted({name for attributes in (*products, *contents) for name in attributes})
    raise UserError(
        f"--slice-by {column}: no product and no content has it; expected one of: "
        f"{', '.join(known) or 'none, the tables had no further columns'}"
    )


def column_slices(column: str, values: Sequence[Any], max_values: int) -> Slices:
    """A slice for each of the most frequent values, "other" for the rest, and "missing".

    Many different numbers are cut into four ranges that hold about as many queries each.
    """
    labels = _labels(values)
    counts = Counter(label for label in labels if label is not None)
    # By name where counts are equal, so that always the same are kept.
    kept = set(sorted(counts, key=lambda name: (-counts[name], name))[:max_values])
    names = [MISSING if n is None else n if n in kept else OTHER for n in labels]
    last = [name for name in (OTHER, MISSING) if name in names and name not in kept]
    in_order = [name for name in _in_order(values, labels) if name in kept] + last
    return {f"{column}: {name}": np.array([n == name for n in names]) for name in in_order}


def _labels(values: Sequence[Any]) -> list[str | None]:
    """What each value is called in a slice's name; None where there is none."""
    known = [value for value in values if value is not None]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)
    if not numbers or len(set(known)) <= _MOST_NUMBERS:
        return [None if value is None else _named(value) for value in values]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, _NUM_RANGES + 1)))
    names = [f"{low:.4g} to {high:.4g}" for low, high in pairwise(edges)]
    inner = edges[1:-1]
    return [None if v is None else names[int(np.searchsorted(inner, v, "right"))] for v in values]


def _named(value: Any) -> str:
    text = str(value)
    return text if text.strip() else EMPTY


def _in_order(values: Sequence[Any], labels: Sequence[str | None]) -> list[str]:
    """Labels by value where values are numbers, else by name."""
    pairs = [(v, label) for v, label in zip(values, labels, strict=True) if label is not None]
    numbers = all(isinstance(value, int | float) for value, _ in pairs)
    ordered = sorted(pairs, key=lambda pair: pair[0] if numbers else pair[1])
    return list(dict.fromkeys(label for _, label in ordered))
