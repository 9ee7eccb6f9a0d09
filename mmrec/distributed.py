"""The only place that asks for rank and world size, and the collectives that training needs.

Every function here also works in a single process, where no process group exists.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def world_size() -> int:
    """The number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_with_gradient(local: Shaped[Tensor, " b *rest"]) -> Shaped[Tensor, " B *rest"]:
    """Concatenate every rank's rows, in rank order, so that gradients flow back to their owners.

    Each rank must bring the same number of rows.
    """
    if world_size() == 1:
        return local
    return _Gather.apply(local)  # pyright: ignore[reportReturnType]


def gather(local: Shaped[Tensor, " b *rest"]) -> Shaped[Tensor, " B *rest"]:
    """Concatenate every rank's rows, in rank order, without gradients."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's tensor, without gradients."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every rank the first one's buffers, such as the statistics of batch normalisation."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(local: Any) -> list[Any]:
    """Every rank's picklable object, in rank order; for results, not for the inner loop."""
    if world_size() == 1:
        return [local]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, local)
    return parts


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.num_rows = len(local)
        return gather(local)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Each rank's loss depends on all rows, so a row's gradient is the sum over ranks. gloo has no
        # reduce_scatter on every platform; all_reduce moves more bytes and works everywhere.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]
