"""AdamW over what learns, with a learning rate that may fall from a tower's output to its input."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from mmrec.model.encoder import Encoder
from mmrec.model.layers import layer_depths
from mmrec.ranges import NonNegative, Positive, Range, Share, check_ranges


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, a linear warm-up and half a cosine."""

    learning_rate: NonNegative = 1e-3
    """The peak."""
    weight_decay: NonNegative = 0.05
    """On matrices and kernels; not on biases, norms or the scale."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.98
    """AdamW's second moment; below the usual 0.999 because batches of a contrastive loss vary."""
    warmup: Share = 0.05
    """Share of all steps over which the learning rate rises."""
    clip_norm: Positive = 1.0
    """Largest norm of the gradient; larger ones are scaled down."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Factor on the learning rate a layer further from a tower's output; 0.65 to 0.9 keeps pretrained
    layers, and 1 gives every layer the same."""


def build_optimizer(encoder: Encoder, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW on what learns, with weight decay where a weight has at least two dimensions.

    A group's "lr_scale" is its factor on the learning rate; the first group's is 1. Frozen weights are in
    no group, so they have no state. Raises `UserError` for a setting out of its range.
    """
    check_ranges(config, "optimizer.")
    scales = learning_rate_scales(encoder, config.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, weight in encoder.named_parameters():
        if not weight.requires_grad:
            continue
        scale, decays = scales.get(name, 1.0), weight.ndim >= 2
        group = {
            "params": [],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": scale,
            "lr": config.learning_rate * scale,
        }
        groups.setdefault((scale, decays), group)["params"].append(weight)
    return torch.optim.AdamW(
        [groups[key] for key in sorted(groups, reverse=True)],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        # One pass over each weight: a token embedding makes the plain form cost as much as the towers.
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every group: its own scale times `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def learning_rate_scales(encoder: Encoder, layer_decay: float) -> dict[str, float]:
    """The factor of each tower's parameters by name: `layer_decay` to the power of layers above it.

        scale = layer_decay ** (last - layer)

    As in ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2022); the projection has 1, and so has
    everything that is not in a tower. Raises `UserError` where layers cannot be counted.
    """
    if layer_decay == 1:
        return {}
    scales = {}
    for prefix in ("image_tower", "text_tower", "product_image_tower", "product_text_tower"):
        tower: nn.Module | None = getattr(encoder, prefix)
        if tower is None or not any(part.requires_grad for part in tower.parameters()):
            continue
        depths = layer_depths(tower)
        last = max(depths.values())
        scales |= {f"{prefix}.{name}": layer_decay ** (last - n) for name, n in depths.items()}
    return scales
