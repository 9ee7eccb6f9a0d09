"""How much of a GPU's arithmetic a training uses: model FLOPs utilization (MFU; Chowdhery et al. 2022, PaLM).

Counted are the floating point operations that the towers need for the rows that are there, forward
once and backward twice; what is computed again (checkpointing, gradient caching) is not counted.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.model.encoder import Encoder

# Dense peaks in TFLOP/s by part of the device's name, as NVIDIA's data sheets give them: bfloat16 and
# float16 tensor cores, and float32 without tensor cores. The first that fits counts.
_PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.4, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "B200": (2250.0, 75.0),
    "A100": (311.8, 19.5),
    "A10G": (70.0, 31.2),
    "A10": (125.0, 31.2),
    "L40S": (362.1, 91.6),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.1, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.2, 35.6),
}


def peak_flops(device_name: str, *, half: bool) -> float | None:
    """A GPU's peak in FLOP/s by its name, in 16-bit or in float32; None for one that is not listed."""
    for name, peaks in _PEAKS.items():
        if name in device_name:
            return peaks[0 if half else 1] * 1e12
    return None


class FlopCount:
    """Floating point operations of a training step: rows that are there times what one row costs.

    NaN for a tower that cannot run without numbers.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._image = _without_numbers(encoder.image_tower)
        self._text = _without_numbers(encoder.text_tower)
        self._known: dict[tuple[str, int], float] = {}

    def of_image(self, size: int) -> float:
        """One picture of `size` pixels a side, forward."""
        return self._count("image", self._image, size, torch.zeros(1, 3, size, size, device="meta"))

    def of_title(self, length: int) -> float:
        """One title of `length` tokens, forward."""
        tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
        return self._count("text", self._text, length, tokens)

    def of_step(self, batch: PairBatch) -> float:
        """Forward and backward of a batch: backward takes a product for the input and one for the weights."""
        return 3 * (self._of_items(batch.content) + self._of_items(batch.product))

    def _of_items(self, items: ItemBatch) -> float:
        pictures, titles = int(items.image_mask.sum()), int(items.text_mask.sum())
        return pictures * self.of_image(items.images.shape[-1]) + titles * self.of_title(
            items.tokens.shape[-1]
        )

    def _count(self, kind: str, tower: nn.Module, size: int, rows: torch.Tensor) -> float:
        if (kind, size) not in self._known:
            tower.train()  # In eval mode attention takes a fused path that the counter does not know.
            with FlopCounterMode(display=False) as counter:
                try:
                    tower(rows)
                    found = float(counter.get_total_flops())
                except Exception:  # a tower that looks at its numbers, which these have none of
                    found = math.nan
            self._known[kind, size] = found
        return self._known[kind, size]


def _without_numbers(tower: nn.Module) -> nn.Module:
    """A tower of the same shapes that takes no memory and no time."""
    known: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to("meta")) for weight in tower.parameters()
    }
    known |= {id(buffer): buffer.to("meta") for buffer in tower.buffers()}
    return deepcopy(tower, known)
