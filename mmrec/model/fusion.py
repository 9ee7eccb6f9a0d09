"""Frames to a video, and a video with a title to one vector; anything may be missing in any row.

Shape letters: B samples, T frames, D embedding width, V views to fuse.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize


def masked_mean(frames: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """The mean over the frames that are there; zero where none is."""
    weights = mask.to(frames.dtype)[:, :, None]  # (B, T, 1)
    return (frames * weights).sum(1) / weights.sum(1).clamp(min=1)


class GatedSum(nn.Module):
    """A sum of unit vectors under gates that look at each vector: softmax over those that are present.

    A gate is a learned line on its own vector, so a title that says little can step back for the
    video. With one vector present the result is that vector; with none it is zero.
    """

    def __init__(self, width: int, num_views: int = 2) -> None:
        super().__init__()
        # Zero at the start: every present vector weighs the same, and pretrained spaces stay as they are.
        self.weight = nn.Parameter(torch.zeros(num_views, width))
        self.bias = nn.Parameter(torch.zeros(num_views))

    def forward(
        self, vectors: Float[Tensor, "B V D"], present: Bool[Tensor, "B V"]
    ) -> Float[Tensor, "B D"]:
        """Fuse V vectors a row into one of unit length."""
        scores = (vectors * self.weight).sum(-1) + self.bias  # (B, V)
        scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        gates = scores.softmax(-1) * present  # (B, V)
        return normalize((gates[:, :, None] * vectors).sum(1), dim=-1)
