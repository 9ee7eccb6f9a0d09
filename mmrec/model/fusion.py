"""Frames to a video, and a video with a title to one vector; anything may be missing in any row.

Shape letters: B samples, T frames, D embedding width, V views to fuse, F frequencies of a position.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize


def masked_mean(frames: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """The mean over the frames that are there; zero where none is."""
    weights = mask.to(frames.dtype)[:, :, None]  # (B, T, 1)
    return (frames * weights).sum(1) / weights.sum(1).clamp(min=1)


def relative_positions(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Where each frame lies among those that are there: 0 the first, 1 the last, 0 where it is alone.

    Order stands for time: frames are drawn from equal spans of a clip. A share of the clip, and not a
    frame's number, since a video has more frames in a query than in a training row.
    """
    order = mask.cumsum(1) - 1  # (B, T)
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return order.clamp(min=0) / last.clamp(min=1)


class AttentionPool(nn.Module):
    """A weighted mean over frames; a learned query looks at each frame and at where it lies in the clip.

        weight_t = softmax_t(query . W [sqrt(D) frame_t; position_t])

    Attention as in multiple-instance learning (Ilse et al. 2018), its values the frames themselves, so
    the result stays in their space. The query starts at zero, where this is the mean; one frame alone
    comes out as it is.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_frequencies: int = 4) -> None:
        super().__init__()
        self.key = nn.Linear(width + 2 * num_frequencies, width)
        self.query = nn.Parameter(torch.zeros(width))
        frequencies = math.pi * 2.0 ** torch.arange(
            num_frequencies
        )  # half a turn over the clip, ...
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, frames: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B D"]:
        """Pool unit vectors of frames; zero where there is none."""
        angles = relative_positions(mask)[:, :, None] * self.frequencies  # (B, T, F)
        positions = torch.cat([angles.sin(), angles.cos()], -1).to(frames.dtype)  # (B, T, 2F)
        scaled = frames * frames.shape[-1] ** 0.5  # numbers of about 1, as a layer expects them
        scores = self.key(torch.cat([scaled, positions], -1)) @ self.query  # (B, T)
        scores = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
        weights = scores.softmax(1) * mask  # (B, T)
        return (weights[:, :, None] * frames).sum(1)


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
