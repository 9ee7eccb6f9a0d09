"""The only place that asks for rank and world size, and the collectives that training needs.

Every function here also works in a single process, where no process group exists.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


def world_size() -> int:
    """The number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number among those of the group on its machine; 0 without a group."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


@contextmanager
def launched_group() -> Iterator[None]:
    """Join the processes that `accelerate launch` or torchrun started; nothing where there is one alone.

    For programs whose processes meet at the beginning and the end: messages go by the processors, and
    one may wait for the others for days. A group that is there already serves.
    """
    if world_size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_sizes(local: Shaped[Tensor, " b *rest"]) -> list[int]:
    """How many rows each rank brings, in rank order."""
    if world_size() == 1:
        return [len(local)]
    return gather(torch.tensor([len(local)], device=local.device)).tolist()


def gather_with_gradient(
    local: Shaped[Tensor, " b *rest"], sizes: list[int] | None = None
) -> Shaped[Tensor, " B *rest"]:
    """Concatenate every rank's rows, in rank order, so that gradients flow back to their owners.

    A row's gradient is the sum over the losses of all ranks. Where ranks bring different numbers of rows,
    `sizes` are those of `gather_sizes`. Backward waits for every rank, also for those whose own rows
    need no gradient.
    """
    if world_size() == 1:
        return local
    if torch.is_grad_enabled() and not local.requires_grad:
        # Backward is a collective: a rank whose rows came of no parameter joins the others all the same.
        local = local.detach().requires_grad_()
    return _Gather.apply(local, sizes)  # pyright: ignore[reportReturnType]


def gather(
    local: Shaped[Tensor, " b *rest"], sizes: list[int] | None = None
) -> Shaped[Tensor, " B *rest"]:
    """Concatenate every rank's rows, in rank order, without gradients; `sizes` as above."""
    if world_size() == 1:
        return local
    sizes = sizes or [len(local)] * world_size()
    padded = _pad(local.detach(), max(sizes)).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def logsumexp_over_ranks(local: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """The logsumexp of every rank's values, place by place; gradients flow back to every rank's."""
    return _LogSumExp.apply(local) if world_size() > 1 else local  # pyright: ignore


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


def _pad(rows: Tensor, size: int) -> Tensor:
    missing = rows.new_zeros(size - len(rows), *rows.shape[1:])
    return torch.cat([rows, missing]) if len(missing) else rows


class Agreement:
    """Numbers that every rank must see alike: whether to stop, and which step went wrong.

    The processors exchange them, so no rank waits for what its GPU has still to do. Every rank makes
    one, and calls it as often as the others.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None

    def largest(self, value: int) -> int:
        """The largest of the numbers that the ranks bring."""
        if self._group is None:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return int(shared)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int] | None) -> Tensor:
        ctx.sizes = sizes or [len(local)] * world_size()
        return gather(local, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Each rank's loss depends on all rows, so a row's gradient is the sum over ranks.
        parts = gradients[0].split(ctx.sizes)
        padded = torch.cat([_pad(part, max(ctx.sizes)) for part in parts])
        own = torch.empty_like(padded[: max(ctx.sizes)])
        dist.reduce_scatter_tensor(own, padded)
        return own[: ctx.sizes[rank()]], None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        largest = local.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        largest.clamp_(min=torch.finfo(local.dtype).min)  # -inf - -inf is not a number.
        total = (local - largest).exp_()
        dist.all_reduce(total)
        result = total.log_() + largest
        ctx.save_for_backward(local, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        local, result = ctx.saved_tensors
        gradient = sum_over_ranks(gradients[0].contiguous())
        return gradient * (local - result.clamp(min=torch.finfo(result.dtype).min)).exp()
