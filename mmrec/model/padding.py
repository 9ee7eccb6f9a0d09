"""Titles through a text tower without the padding behind them, where that changes nothing but rounding.

CLIP's text towers take 77 tokens and titles have a dozen. Where attention looks back alone and the vector is
read at the end mark, what stands behind the mark is computed for nothing.

Shape letters: N titles, L tokens, D embedding width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

# Titles of one call are as long as its longest, so long ones have calls of their own.
_LENGTHS = torch.tensor([16, 32])


def accept_short_titles(tower: nn.Module) -> None:
    """Let a tower of open_clip take rows of fewer tokens than it has places: its causal mask is cut, too."""
    if isinstance(tower, TextTransformer):
        tower.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)


def _cut_mask(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask, length = named.get("attn_mask"), inputs[0].shape[1]
    if mask is not None and mask.shape[-1] > length:
        named = named | {"attn_mask": mask[:length, :length]}
    return inputs, named


def ends_of(tower: nn.Module, tokens: Int[Tensor, "N L"]) -> Int[Tensor, " N"] | None:
    """How many tokens of each title count; None where a tower looks at all of them."""
    if (
        not isinstance(tower, TextTransformer)
        or tower.attn_mask is None
        or tower.cls_emb is not None
    ):
        return None
    if tower.pool_type == "argmax":
        return tokens.argmax(1) + 1
    if tower.pool_type == "eos":
        return (tokens == tower.eos_id).int().argmax(1) + 1
    return None


def run_without_padding(
    tower: nn.Module, tokens: Int[Tensor, "N L"], device: torch.device
) -> Float[Tensor, "N D"] | None:
    """What the tower gives for titles, whose tokens lie on the CPU; None where it needs the padding."""
    ends = ends_of(tower, tokens)
    if ends is None or not len(tokens):
        return None
    outputs, order = [], []
    for rows in _groups(ends, together=device.type != "cpu"):
        short = tokens[rows, : int(ends[rows].max())]
        outputs.append(tower(short.to(device)))
        order.append(rows)
    places = torch.cat(order).argsort()
    return torch.cat(outputs)[places.to(device)]


def _groups(ends: Int[Tensor, " N"], *, together: bool) -> Iterator[Int[Tensor, " M"]]:
    """Rows of like length; all of them where a call costs more than what it computes, as on a GPU."""
    if together:
        yield torch.arange(len(ends))
        return
    numbers = torch.bucketize(ends, _LENGTHS)
    for number in numbers.unique():
        yield (numbers == number).nonzero()[:, 0]
