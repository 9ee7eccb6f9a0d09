"""Nested (Matryoshka) widths: every prefix of an embedding is one by itself (Kusupati et al. 2022).

Shape letters: B samples, D embedding width, W a narrower one.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from mmrec.errors import UserError

Views = dict[str, tuple[Float[Tensor, "B D"], Bool[Tensor, " B"]]]
"""Vectors by view and, beside each, which rows have that view."""


NarrowViews = dict[str, tuple[Float[Tensor, "B W"], Bool[Tensor, " B"]]]
"""The same of another width."""


def check_widths(widths: Sequence[int], full: int) -> None:
    """Raise `UserError` unless the widths rise from at least 1 to at most the full one."""
    rising = all(a < b for a, b in pairwise(widths))
    if not rising or any(not 1 <= width <= full for width in widths):
        found = " ".join(map(str, widths))
        raise UserError(f"--encoder.widths {found}: expected ascending numbers from 1 to {full}")


def truncate(views: Views, width: int) -> NarrowViews:
    """The first `width` numbers of every view, made unit vectors again; rows of zeros stay so."""
    return {
        name: (
            vectors if width == vectors.shape[-1] else normalize(vectors[:, :width], dim=-1),
            mask,
        )
        for name, (vectors, mask) in views.items()
    }


def nested_loss(
    views: Views, widths: Sequence[int], loss_of: Callable[[Views], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The full width's losses by name, but under "loss" the mean of that entry over all widths.

        loss = 1/|W| sum_{w in W} loss_of(normalised first w numbers of every view)

    Each width weighs the same, as in the paper. A narrow one's own loss is under "loss/64".
    """
    losses = dict(loss_of(views))
    if len(widths) == 1:
        return losses
    narrow = {f"loss/{width}": loss_of(truncate(views, width))["loss"] for width in widths[:-1]}
    mean = (losses["loss"] + sum(narrow.values())) / len(widths)
    return losses | narrow | {f"loss/{widths[-1]}": losses["loss"], "loss": mean}
