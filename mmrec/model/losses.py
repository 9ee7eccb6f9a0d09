r"""The contrastive loss over products: pure functions on embeddings and ids.

Positives are decided by product id, not by the diagonal. With unit rows :math:`r_i`, unit columns
:math:`c_j`, scale :math:`s`, and :math:`w_{ij}` the weight with which row i links to column j's product
(0 without a link):

.. math::
    L = -\frac{1}{B} \sum_i \sum_j \frac{w_{ij}}{\sum_k w_{ik}} \log p_{ij}, \qquad
    p_{ij} = \frac{e^{s\, r_i \cdot c_j}}{\sum_k e^{s\, r_i \cdot c_k}}

taken in both directions over the global batch and averaged: InfoNCE (van den Oord et al. 2018, as in
CLIP) with the positives' mass shared as in SupCon's outer form (Khosla et al. 2020). With one positive
a row it is CLIP's loss. `LossConfig` has the variants: other positives, a sigmoid a pair, and a
correction by product frequency.

Each rank holds its own rows against the columns of all ranks. The columns' direction sums over all rows:
each rank adds up its own, and the ranks' logsumexps are joined, so that rows never travel. Logits are made
in chunks of rows (logits.py). Shape letters: b rows or columns of this rank, C columns of all ranks, M links
of a row, D width, P positive pairs, H extra columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from mmrec import distributed
from mmrec.data.batches import PairBatch
from mmrec.data.sampler import SamplerConfig
from mmrec.errors import UserError
from mmrec.model.encoder import Views
from mmrec.model.logits import Entries, find_entries, logsumexps, softplus_sums
from mmrec.ranges import Count, NonNegative, Share


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Edges between views, and how much each weighs; an edge of weight 0 is not computed."""

    content_product: NonNegative = 1.0
    """The fused content against the fused product: what retrieval uses."""
    video_image: NonNegative = 0.0
    """Frames alone against product images alone."""
    title_title: NonNegative = 0.0
    """Content title against product title."""
    video_title: NonNegative = 0.0
    """Frames against the content's own kind of title."""
    image_title: NonNegative = 0.0
    """Product images against the product's title."""


EDGES: dict[str, tuple[str, str]] = {
    "content_product": ("content", "product"),
    "video_image": ("video", "image"),
    "title_title": ("content_title", "product_title"),
    "video_title": ("video", "content_title"),
    "image_title": ("image", "product_title"),
}
_CONTENT_VIEWS = ("content", "video", "content_title")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What every edge minimises."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """InfoNCE in both directions, or a yes or no for every pair (SigLIP; wants encoder.start_bias)."""
    positives: Literal["shared", "masked", "diagonal"] = "shared"
    """Which columns are a row's positives.

    shared: all that show a product the row's content links to, each with its link's weight. masked: those
    that show the product drawn for the row; the content's other products are neither positive nor negative.
    diagonal: the row's own column alone, and every other column is a negative, as in CLIP: for studies.
    """
    logq: Share = 0.0
    """Strength, 0 to 1, of the correction for how often a product is a column (Yi et al. 2019).

    From the logit of a product's column is subtracted logq times the log of the number of columns that
    the product is expected to have in a global batch (`log_expected_columns`). At 1 the sum over a batch's
    columns estimates the sum over a catalogue in which each product stands once; at 0 popular products
    are pushed away as often as they are drawn.
    """
    chunk_rows: Count = 256
    """Rows whose logits are held at once, by as many columns as the global batch has; the loss is the same.

    On a CPU a chunk that stays in the cache is fastest: benchmarks/contrastive_loss.py.
    """


@dataclass(frozen=True, kw_only=True)
class ExtraColumns:
    """Further products that are negatives, such as mined ones; where a row links to one it does not count.

    They take part in the rows' direction only: they have no content to be found by.
    """

    views: Views
    """Of the products' side, as `Encoder.views` gives them: (H, D) features and (H,) masks."""
    products: Int[Tensor, " H"]
    """Numbers of the products, as in `PairBatch.links`."""
    rows: Int[Tensor, " H"] | None = None
    """The row of this rank's batch that each is a negative of, and of no other.

    None makes them columns of all rows of all ranks: then every rank must bring some, or an empty set.
    """


@dataclass(frozen=True, kw_only=True)
class Block:
    """One edge's logits: this rank's rows against the columns of all ranks, and which are positive."""

    rows: Float[Tensor, "b D"]
    columns: Float[Tensor, "C D"]
    scale: Float[Tensor, ""]
    positives: Entries
    mass: Float[Tensor, " P"]
    """The weight of each positive's link."""
    ignored: Entries
    """Neither positive nor negative."""
    row_log_q: Float[Tensor, " b"] | None
    column_log_q: Float[Tensor, " C"] | None
    """Subtracted from the logits where the rows, or the columns, are what is summed over."""
    own_logits: Float[Tensor, " H"]
    """Of negatives that belong to one row each."""
    own_rows: Int[Tensor, " H"]
    chunk_rows: int

    def targets(self) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"], Tensor, Tensor]:
        """Each positive's share of its row's mass, and of its column's; how many rows and columns have any.

        Shares of a column and both counts are over all ranks.
        """
        by_row = self.mass.new_zeros(len(self.rows)).index_add(0, self.positives.rows, self.mass)
        by_column = self.mass.new_zeros(len(self.columns))
        by_column = by_column.index_add(0, self.positives.columns, self.mass)
        by_column = distributed.sum_over_ranks(by_column)
        num_rows = distributed.sum_over_ranks((by_row > 0).sum()).clamp(min=1)
        num_columns = (by_column > 0).sum().clamp(min=1)
        tiny = torch.finfo(self.mass.dtype).tiny  # A link may weigh nothing.
        of_row = self.mass / by_row[self.positives.rows].clamp(min=tiny)
        of_column = self.mass / by_column[self.positives.columns].clamp(min=tiny)
        return of_row, of_column, num_rows, num_columns


def softmax_loss(block: Block) -> Float[Tensor, ""]:
    r"""This rank's part of InfoNCE in both directions; the sum over ranks is the loss.

    .. math::
        \frac{1}{2B} \sum_{ij} t_{ij} \Big(\log \sum_k e^{x_{ik} - \lambda \log q_k} - x_{ij} +
        \lambda \log q_j\Big)
        + \frac{1}{2C} \sum_{ij} u_{ij} \Big(\log \sum_k e^{x_{kj}} - x_{ij}\Big)

    with t a positive's share of its row's mass and u of its column's, B and C the rows and columns that have
    a positive, and the first sum over columns that are not ignored. A column's own :math:`\log q_j` would
    cancel in the second; there the rows' is subtracted, where rows are products too.
    """
    of_row, of_column, num_rows, num_columns = block.targets()
    i, j = block.positives.rows, block.positives.columns
    by_row, by_column, chosen = logsumexps(
        block.rows,
        block.columns,
        block.scale,
        picked=block.positives,
        excluded=block.ignored,
        column_shift=None if block.column_log_q is None else -block.column_log_q,
        row_shift=None if block.row_log_q is None else -block.row_log_q,
        chunk_rows=block.chunk_rows,
    )
    by_row = _add_own(by_row, block.own_logits, block.own_rows)
    by_column = distributed.logsumexp_over_ranks(by_column)
    # Summed pair by pair: the difference of two large sums would lose digits in float32.
    missed_by_row, missed_by_column = by_row[i] - chosen, by_column[j] - chosen  # (P,), (P,)
    if block.column_log_q is not None:
        missed_by_row = missed_by_row + block.column_log_q[j]
    if block.row_log_q is not None:
        missed_by_column = missed_by_column + block.row_log_q[i]
    rows_part = (of_row * missed_by_row).sum() / num_rows
    return (rows_part + (of_column * missed_by_column).sum() / num_columns) / 2


def sigmoid_loss(block: Block, bias: Float[Tensor, ""]) -> Float[Tensor, ""]:
    r"""This rank's part of SigLIP's loss (Zhai et al. 2023); the sum over ranks is the loss.

    .. math::
        \frac{1}{B} \sum_{ij} \begin{cases}
        \tfrac{1}{2} (t_{ij} + u_{ij}) \log(1 + e^{-z_{ij}}) & \text{for a positive} \\
        \log(1 + e^{z_{ij}}) & \text{for a negative}\end{cases}
        \qquad z_{ij} = s\, r_i \cdot c_j + \beta - \lambda \log q_j

    with t and u as in `softmax_loss`, since a pair has one term for both directions, and B all rows that
    take part. With one positive a row and a column it is SigLIP's. The correction is that of
    noise-contrastive estimation (Gutmann and Hyvärinen 2010), where a negative is drawn so often.
    """
    of_row, of_column, _, _ = block.targets()
    offset = bias.to(block.mass.dtype).expand(len(block.columns))  # (C,)
    if block.column_log_q is not None:
        offset = offset - block.column_log_q
    by_row, chosen = softplus_sums(
        block.rows,
        block.columns,
        block.scale,
        offset,
        picked=block.positives,
        excluded=block.ignored,
        chunk_rows=block.chunk_rows,
    )
    found = ((of_row + of_column) / 2 * softplus(-chosen)).sum()
    own = softplus(block.own_logits + bias).sum()
    num_rows = distributed.sum_over_ranks(torch.tensor(len(by_row), device=by_row.device))
    return (by_row.sum() + found + own) / num_rows.clamp(min=1)


def edge_loss(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "b D"],
    *,
    row_mask: Bool[Tensor, " b"],
    column_mask: Bool[Tensor, " b"],
    links: Int[Tensor, "b M"],
    weights: Float[Tensor, "b M"],
    products: Int[Tensor, " b"],
    scale: Float[Tensor, ""],
    config: LossConfig | None = None,
    bias: Float[Tensor, ""] | None = None,
    row_log_q: Float[Tensor, " b"] | None = None,
    column_log_q: Float[Tensor, " b"] | None = None,
    extra: ExtraColumns | None = None,
    extra_view: str = "product",
) -> Float[Tensor, ""]:
    """One edge over the global batch, in both directions.

    Everything is this rank's; the columns of the others are gathered with gradients, and ranks may bring
    different numbers. `products` are drawn for the rows and shown by the columns. A row or column
    whose mask is false takes no part; a row or column without a positive is only a negative of others.
    The value is this rank's share, scaled so that the mean over ranks, which is what DDP takes of
    gradients, is the loss of the global batch.
    """
    config = config or LossConfig()
    wanted, mass, ids, avoided = _positives(config, links, weights, products)
    rows, links, wanted, mass, avoided = _keep(row_mask, rows, links, wanted, mass, avoided)
    columns, ids = _keep(column_mask, columns, ids)
    sizes = distributed.gather_sizes(columns)
    columns = distributed.gather_with_gradient(columns, sizes)  # (C, D)
    ids = distributed.gather(ids, sizes)  # (C,)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if row_log_q is not None:
        row_log_q = config.logq * row_log_q[row_mask].to(dtype)
    if column_log_q is not None:
        column_log_q = config.logq * distributed.gather(column_log_q[column_mask].to(dtype), sizes)
    positives, which = find_entries(wanted, ids)
    ignored, _ = find_entries(avoided, ids)
    own_logits, own_rows = rows.new_zeros(0, dtype=dtype), links.new_zeros(0)
    if extra and extra.rows is not None:
        own_logits, own_rows = _own_logits(rows, row_mask, links, scale, extra, extra_view)
    elif extra:
        features, known = _gather_extra(extra, extra_view)
        ignored = _join(ignored, find_entries(links, known)[0], first_column=len(columns))
        columns = torch.cat([columns, features.to(columns.dtype)])
        if column_log_q is not None:
            # Mined, not drawn: it is there for certain, and the log of that is 0.
            column_log_q = torch.cat([column_log_q, column_log_q.new_zeros(len(features))])
    block = Block(
        rows=rows,
        columns=columns,
        scale=scale,
        positives=positives,
        mass=mass.flatten()[which].to(dtype),
        ignored=ignored,
        row_log_q=row_log_q,
        column_log_q=column_log_q,
        own_logits=own_logits,
        own_rows=own_rows,
        chunk_rows=config.chunk_rows,
    )
    if config.kind == "softmax":
        return softmax_loss(block) * distributed.world_size()
    bias = scale.new_zeros(()) if bias is None else bias
    return sigmoid_loss(block, bias) * distributed.world_size()


def contrastive_loss(
    views: Views,
    batch: PairBatch,
    scale: Float[Tensor, ""],
    objectives: Objectives,
    *,
    config: LossConfig | None = None,
    bias: Float[Tensor, ""] | None = None,
    log_q: Float[Tensor, " num_products"] | None = None,
    extra_columns: ExtraColumns | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Each objective's loss, unweighted, by name, and their weighted sum under "loss".

    A row that is of a content has all of its links, also against content titles, each of which shows the
    product drawn for its content; a row that is of a product (image against title) has that one.
    `bias` is the sigmoid's. `log_q` (`log_expected_columns`) is subtracted where products are what is
    summed over: in the rows' direction of an edge from contents to products, in both directions of
    an edge between products, and nowhere between contents, which an epoch offers once each. Extra columns are
    negatives of the edges from contents to those views of products that they bring.
    """
    config = config or LossConfig()
    losses: dict[str, Tensor] = {}
    own = batch.product_number[:, None]
    drawn_q = None if log_q is None or not config.logq else log_q[batch.product_number]
    for name, weight in active(objectives).items():
        row_view, column_view = EDGES[name]
        from_content, to_content = row_view in _CONTENT_VIEWS, column_view in _CONTENT_VIEWS
        crosses = from_content and not to_content
        rows, row_mask = views[row_view]
        columns, column_mask = views[column_view]
        has_extra = crosses and extra_columns and column_view in extra_columns.views
        losses[name] = edge_loss(
            rows,
            columns,
            row_mask=row_mask,
            column_mask=column_mask,
            links=batch.links if from_content else own,
            weights=batch.weights if from_content else torch.ones_like(own, dtype=torch.float32),
            products=batch.product_number,
            scale=scale,
            config=config,
            bias=bias,
            row_log_q=None if from_content else drawn_q,
            column_log_q=None if to_content else drawn_q,
            extra=extra_columns if has_extra else None,
            extra_view=column_view,
        )
        losses["loss"] = losses.get("loss", torch.zeros_like(losses[name])) + weight * losses[name]
    return losses


def active(objectives: Objectives) -> Mapping[str, float]:
    """The edges that weigh something."""
    weights = {field.name: getattr(objectives, field.name) for field in fields(objectives)}
    return {name: weight for name, weight in weights.items() if weight}


def check_loss(config: LossConfig, *, has_bias: bool) -> None:
    """Refuse what cannot work, with a `UserError`."""
    if config.kind == "sigmoid" and not has_bias:
        raise UserError(
            "--loss.kind sigmoid learns a bias, and the encoder has none: "
            "add --encoder.start-bias -10 and --encoder.start-scale 10, SigLIP's"
        )


def log_expected_columns(
    products: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    *,
    num_products: int,
    sampler: SamplerConfig,
) -> Float[Tensor, " num_products"]:
    r"""The log of how many columns each product is expected to have in a global batch.

    An epoch offers each content once, with one of its products drawn by weight, so a row shows product j
    with the probability :math:`q_j = \frac{1}{N} \sum_i w_{ij} / \sum_k w_{ik}` over the split's N contents.
    A batch of B rows then holds :math:`n_j = B q_j` of its columns. Under `max_rows_per_product` k the rows
    that popular products lose go to the others: :math:`n_j = \min(k, s q_j)` with s such that they add up to
    B. Where `unique_products` shows each product once, it has
    :math:`1 - (1 - n_j / k) (1 - n_j / B)^{B - B / k}` columns, with k = B without a limit. Under a limit
    both are right to about a tenth: rows that come again pass over products that are at it in their batch.
    A product that is never drawn has no column; its entry is 0. In the rows' softmax a common factor
    cancels; it matters to the sigmoid, and beside extra columns, which are there for certain.
    """
    counts = [len(row) for row in products]
    flat = np.fromiter(chain.from_iterable(products), np.int64, sum(counts))
    mass = np.fromiter(chain.from_iterable(weights), np.float64, sum(counts))
    row = np.repeat(np.arange(len(counts)), counts)
    share = mass / np.bincount(row, mass, len(counts))[row] / len(counts)
    q = np.bincount(flat, share, num_products)
    limit = min(sampler.max_rows_per_product or sampler.batch_size, sampler.batch_size)
    expected = _share_rows(q, sampler.batch_size, limit)
    if sampler.unique_products:
        size = sampler.batch_size
        missing = (1 - expected / limit) * (1 - expected / size) ** (size - size / limit)
        expected = 1 - missing
    return torch.tensor(np.log(np.where(q > 0, expected, 1.0)), dtype=torch.float32)


def _share_rows(q: Float[np.ndarray, " P"], rows: int, limit: int) -> Float[np.ndarray, " P"]:
    """How many of so many rows each product has: in proportion to `q`, and none more than `limit`."""
    ordered = np.sort(q[q > 0])[::-1]
    # With the first j products at the limit, the others share what is left by these factors.
    factors = (rows - limit * np.arange(len(ordered))) / np.cumsum(ordered[::-1])[::-1]
    fits = factors * ordered <= limit
    factor = factors[fits.argmax()] if fits.any() else limit / ordered[-1]
    return np.minimum(limit, factor * q)


def _positives(
    config: LossConfig,
    links: Int[Tensor, "b M"],
    weights: Float[Tensor, "b M"],
    products: Int[Tensor, " b"],
) -> tuple[Int[Tensor, "b _"], Float[Tensor, "b _"], Int[Tensor, " b"], Int[Tensor, "b _"]]:
    """The ids of each row's positives and their mass, each column's id, and ids that a row ignores."""
    nothing = links[:, :0]
    if config.positives == "shared":
        return links, weights, products, nothing
    one = torch.ones_like(products[:, None], dtype=weights.dtype)
    if config.positives == "masked":
        own = products[:, None]
        return own, one, products, links.masked_fill(links == own, -1)
    # Places take the part of ids: each rank's count from a number that no other reaches.
    places = torch.arange(len(products), device=products.device) + (distributed.rank() << 32)
    return places[:, None], one, places, nothing


def _keep(mask: Bool[Tensor, " b"], *parts: Tensor) -> list[Tensor]:
    """The rows of each part where the mask is true; not a copy where all are, as features are large."""
    return list(parts) if mask.all() else [part[mask] for part in parts]


def _own_logits(
    rows: Float[Tensor, "b D"],
    row_mask: Bool[Tensor, " B"],
    links: Int[Tensor, "b M"],
    scale: Float[Tensor, ""],
    extra: ExtraColumns,
    view: str,
) -> tuple[Float[Tensor, " _H"], Int[Tensor, " _H"]]:
    """The logits of extra columns against the rows they belong to, and those rows' places in `rows`."""
    assert extra.rows is not None
    features, there = extra.views[view]
    places = (row_mask.cumsum(0) - 1)[extra.rows]  # (H,)
    there = there & row_mask[extra.rows]
    features, products, places = features[there], extra.products[there], places[there]
    unlinked = (links[places] != products[:, None]).all(1)
    features, places = features[unlinked], places[unlinked]
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return scale * (rows[places].to(dtype) * features.to(dtype)).sum(1), places


def _gather_extra(extra: ExtraColumns, view: str) -> tuple[Float[Tensor, "H D"], Int[Tensor, " H"]]:
    features, there = extra.views[view]
    sizes = distributed.gather_sizes(extra.products[there])
    features = distributed.gather_with_gradient(features[there], sizes)
    return features, distributed.gather(extra.products[there], sizes)


def _add_own(
    by_row: Float[Tensor, " b"], own: Float[Tensor, " H"], places: Int[Tensor, " H"]
) -> Float[Tensor, " b"]:
    """The logsumexp of each row's columns and its own extra ones."""
    if not len(own):
        return by_row
    tops = by_row.detach().scatter_reduce(0, places, own.detach(), "amax")
    tops = tops.clamp(min=torch.finfo(tops.dtype).min)
    total = (by_row - tops).exp().index_add(0, places, (own - tops[places]).exp())
    # A row that sees nothing has no positive either; its value is not used, but must not be nan.
    return tops + total.clamp(min=torch.finfo(total.dtype).tiny).log()


def _join(first: Entries, second: Entries, *, first_column: int) -> Entries:
    """Both, in the order of their rows; the second's columns are counted from `first_column`."""
    rows = torch.cat([first.rows, second.rows])
    columns = torch.cat([first.columns, second.columns + first_column])
    order = rows.argsort(stable=True)
    return Entries(rows[order], columns[order])
