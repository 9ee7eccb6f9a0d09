"""Encoders whose weights are cut among the ranks (FSDP2), and what must be whole: evaluation and export.

Under DDP and on one process every function here hands back what it was given.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder


def check_sharding(accelerator: Accelerator, *, averaged: bool, adapted: bool) -> None:
    """Refuse, before any work, what needs whole weights during a training with FSDP2."""
    for flag, used in (("--ema", averaged), ("--tuning.lora-rank", adapted)):
        if used and accelerator.is_fsdp2:
            raise UserError(
                f"{flag} does not work with weights that are cut among ranks; launch without FSDP, for "
                "example with train/launch/one_node.yaml"
            )


def make_shardable(encoder: Encoder, accelerator: Accelerator) -> None:
    """Ready an encoder for FSDP2, which cuts weights in rows and takes no others.

    The scale is given a dimension, and kernels in channels-last order are laid out plainly. Raises
    `UserError` for a sigmoid loss's bias, which the loss reads outside of the forward pass.
    """
    if accelerator.is_fsdp2:
        if encoder.logit_bias is not None:
            raise UserError(
                "--encoder.start-bias: the sigmoid loss's bias cannot be cut among ranks; launch without "
                "FSDP, for example with train/launch/one_node.yaml"
            )
        encoder.log_scale = nn.Parameter(encoder.log_scale.detach().reshape(1))
        for weight in encoder.parameters():
            weight.data = weight.data.contiguous()


def whole_encoder(encoder: Encoder) -> Encoder:
    """An encoder with all of its weights on this rank; every rank calls this.

    Evaluation runs its towers one by one, outside of the forward pass that would gather them.
    """
    if not isinstance(encoder, FSDPModule):
        return encoder
    options = StateDictOptions(full_state_dict=True)
    weights: dict[str, Any] = get_model_state_dict(encoder, options=options)
    weights["log_scale"] = weights["log_scale"].reshape(())
    whole = Encoder(encoder.config, model_config=encoder.model_config, pixels=encoder.pixels)
    whole.load_state_dict(weights)
    return whole.to(weights["log_scale"].device)


@torch.no_grad()
def scale_of(encoder: Encoder) -> float:
    """The learned scale of similarities; every rank calls this."""
    return float(whole_tensor(encoder.log_scale).exp())


def whole_tensor(part: Tensor) -> Tensor:
    """A tensor that may be cut among the ranks, whole; every rank calls this."""
    return part.full_tensor() if isinstance(part, DTensor) else part
