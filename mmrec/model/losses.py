r"""The contrastive loss over products: pure functions on embeddings and ids.

Positives are decided by product id, not by the diagonal. With unit rows :math:`r_i`, unit columns
:math:`c_j`, scale :math:`s`, and :math:`w_{ij}` the weight with which row i links to column j's product
(0 without a link):

.. math::
    L = -\frac{1}{B} \sum_i \sum_j \frac{w_{ij}}{\sum_k w_{ik}} \log p_{ij}, \qquad
    p_{ij} = \frac{e^{s\, r_i \cdot c_j}}{\sum_k e^{s\, r_i \cdot c_k}}

taken in both directions over the global batch and averaged: InfoNCE (van den Oord et al. 2018, as in
CLIP) with the positives' mass shared as in SupCon's outer form (Khosla et al. 2020). With one positive
a row it is CLIP's loss. Shape letters: B rows here, C columns over all ranks, M links of a row, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmrec import distributed
from mmrec.data.batches import PairBatch
from mmrec.model.encoder import Views


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Edges between views, and how much each weighs; an edge of weight 0 is not computed."""

    content_product: float = 1.0
    """The fused content against the fused product: what retrieval uses."""
    video_image: float = 0.0
    """Frames alone against product images alone."""
    title_title: float = 0.0
    """Content title against product title."""
    video_title: float = 0.0
    """Frames against the content's own kind of title."""
    image_title: float = 0.0
    """Product images against the product's title."""


EDGES: dict[str, tuple[str, str]] = {
    "content_product": ("content", "product"),
    "video_image": ("video", "image"),
    "title_title": ("content_title", "product_title"),
    "video_title": ("video", "content_title"),
    "image_title": ("image", "product_title"),
}
_CONTENT_VIEWS = ("content", "video", "content_title")


def link_mass(
    links: Int[Tensor, "B M"], weights: Float[Tensor, "B M"], columns: Int[Tensor, " C"]
) -> Float[Tensor, "B C"]:
    """The weight with which each row links to each column's product; 0 where it does not."""
    mass = weights.new_zeros(len(links), len(columns))
    for m in range(links.shape[1]):  # One (B, C) matrix at a time instead of (B, M, C).
        mass += weights[:, m, None] * (links[:, m, None] == columns)
    return mass


def info_nce(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "C D"],
    mass: Float[Tensor, "B C"],
    scale: Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """One direction of the loss, summed over the rows that have a positive, and the number of those.

    A row whose mass is all zero has nothing to find and is left out.
    """
    logits = scale * rows @ columns.T  # (B, C)
    total = mass.sum(1, keepdim=True)  # (B, 1)
    target = mass / total.clamp(min=torch.finfo(mass.dtype).tiny)  # (B, C)
    per_row = (target * (logits.logsumexp(1, keepdim=True) - logits)).sum(1)  # (B,)
    return per_row.sum(), (total > 0).sum()


def edge_loss(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "B D"],
    *,
    row_mask: Bool[Tensor, " B"],
    column_mask: Bool[Tensor, " B"],
    links: Int[Tensor, "B M"],
    weights: Float[Tensor, "B M"],
    products: Int[Tensor, " B"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Both directions of one edge over the global batch.

    `rows` and `columns` are this rank's; the others' are gathered with gradients. A row or column
    whose mask is false takes no part. The value is this rank's share, scaled so that the mean over
    ranks, which is what DDP takes of gradients, is the loss of the global batch. Every rank brings as
    many rows, and links as wide.
    """
    all_rows = distributed.gather_with_gradient(rows)
    all_columns = distributed.gather_with_gradient(columns)
    all_row_mask = distributed.gather(row_mask)
    all_column_mask = distributed.gather(column_mask)
    all_links = distributed.gather(links)
    all_weights = distributed.gather(weights)
    all_products = distributed.gather(products)
    forward = link_mass(links, weights, all_products)  # (B, C)
    backward = link_mass(all_links, all_weights, products).T  # (B, C)
    share = torch.zeros((), device=rows.device)
    for here, there, mass, mask, keep in (
        (rows, all_columns, forward, row_mask, all_column_mask),
        (columns, all_rows, backward, column_mask, all_row_mask),
    ):
        loss, count = info_nce(here[mask].float(), there[keep].float(), mass[mask][:, keep], scale)
        share = share + loss * distributed.world_size() / distributed.sum_over_ranks(count).clamp(
            min=1
        )
    return share / 2


def contrastive_loss(
    views: Views, batch: PairBatch, scale: Float[Tensor, ""], objectives: Objectives
) -> dict[str, Float[Tensor, ""]]:
    """Each objective's loss, unweighted, by name, and their weighted sum under "loss".

    An edge within one side (video against content title) has the row's own product as its one link.
    """
    losses: dict[str, Tensor] = {}
    own = batch.product_number[:, None]
    for name, weight in active(objectives).items():
        row_view, column_view = EDGES[name]
        crosses = row_view in _CONTENT_VIEWS and column_view not in _CONTENT_VIEWS
        rows, row_mask = views[row_view]
        columns, column_mask = views[column_view]
        losses[name] = edge_loss(
            rows,
            columns,
            row_mask=row_mask,
            column_mask=column_mask,
            links=batch.links if crosses else own,
            weights=batch.weights if crosses else torch.ones_like(own, dtype=torch.float32),
            products=batch.product_number,
            scale=scale,
        )
        losses["loss"] = losses.get("loss", torch.zeros_like(losses[name])) + weight * losses[name]
    return losses


def active(objectives: Objectives) -> Mapping[str, float]:
    """The edges that weigh something."""
    weights = {field.name: getattr(objectives, field.name) for field in fields(objectives)}
    return {name: weight for name, weight in weights.items() if weight}
