"""Dropout whose masks cost little on a CPU.

PyTorch draws the masks of `nn.Dropout` one number after another in one thread, except on processors by
Intel: that was a tenth of a small model's training step on one core, and more of it the more cores share the
rest. Here one 64-bit draw decides over eight values.
"""

import torch
from torch import Tensor, nn

_STEPS = 256  # What a byte tells apart.


class ByteDropout(nn.Dropout):
    """`nn.Dropout`, with a share that is rounded to a multiple of 1/256 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop values in training, and scale the others up so that the mean stays."""
        dropped = round(self.p * _STEPS)
        if input.device.type != "cpu" or self.inplace or dropped == _STEPS:
            return super().forward(input)
        if not self.training or not dropped:
            return input
        draws = torch.empty((input.numel() + 7) // 8, dtype=torch.int64)
        draws.random_(torch.iinfo(torch.int64).min, None)
        kept = (draws.view(torch.uint8)[: input.numel()] >= dropped).view(input.shape)
        return input * (kept * input.new_tensor(_STEPS / (_STEPS - dropped)))


def replace_dropouts(module: nn.Module) -> None:
    """Put `ByteDropout` in the place of every `nn.Dropout` inside a module."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, ByteDropout(child.p, child.inplace))
        else:
            replace_dropouts(child)
