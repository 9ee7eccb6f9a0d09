"""Steps that went wrong: a loss that is not a number, or one that exploded.

Numbers stay on the device until somebody looks, so that a GPU is not held up at every step: one
transfer then judges all steps since the last look.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mmrec import distributed
from mmrec.errors import UserError
from mmrec.manifest import write_whole

BAD_BATCH = "bad_batch.json"
_MEDIAN_OF = 100
_FEWEST_FOR_A_MEDIAN = 20


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One batch that must not have been learned from."""

    step: int
    """The optimizer step that took it in."""
    epoch: int
    batch: int
    """Its number in the epoch."""
    reason: str
    losses: dict[str, float]
    samples: list[int]
    """This rank's rows of the split."""


@dataclass(frozen=True)
class _Seen:
    step: int
    epoch: int
    batch: int
    samples: Tensor
    losses: dict[str, Tensor]


class FaultWatch:
    """Keeps what every batch gave until it is looked at.

    `max_loss_ratio` is how many times the median loss of the last 100 batches a loss may be; 0 allows
    any finite one. `check_norms` says whether the gradient norm must be finite as well: under fp16
    it need not be, since the loss scaler leaves such steps out.
    """

    def __init__(self, *, max_loss_ratio: float, check_norms: bool) -> None:
        self._max_loss_ratio = max_loss_ratio
        self._check_norms = check_norms
        self._seen: list[_Seen] = []
        self._recent: deque[float] = deque(maxlen=_MEDIAN_OF)

    def add(
        self, losses: Mapping[str, Tensor], *, step: int, epoch: int, batch: int, samples: Tensor
    ) -> None:
        """Remember a batch: `step` is the optimizer step that it belongs to."""
        kept = {name: value.detach() for name, value in losses.items()}
        self._seen.append(_Seen(step, epoch, batch, samples, kept))

    def look(self) -> Fault | None:
        """The first bad batch since the last look."""
        seen, self._seen = self._seen, []
        if not seen:
            return None
        names = [(i, name) for i, one in enumerate(seen) for name in one.losses]
        numbers = torch.stack([seen[i].losses[name].float() for i, name in names]).tolist()
        values: list[dict[str, float]] = [{} for _ in seen]
        for (i, name), number in zip(names, numbers, strict=True):
            values[i][name] = number
        for one, losses in zip(seen, values, strict=True):
            reason = self._judge(losses)
            if reason:
                return Fault(
                    step=one.step,
                    epoch=one.epoch,
                    batch=one.batch,
                    reason=reason,
                    losses=losses,
                    samples=one.samples.tolist(),
                )
        return None

    def _judge(self, losses: Mapping[str, float]) -> str | None:
        for name, value in losses.items():
            if not math.isfinite(value) and (name != "gradient_norm" or self._check_norms):
                return f"{name.replace('_', ' ')} is {value}"
        loss = losses["loss"]
        if self._max_loss_ratio and len(self._recent) >= _FEWEST_FOR_A_MEDIAN:
            median = statistics.median(self._recent)
            if loss > self._max_loss_ratio * median:
                return f"loss is {loss:.4g}, {loss / median:.1f} times the recent median"
        self._recent.append(loss)
        return None


def stop_at_fault(
    watch: FaultWatch,
    agreement: distributed.Agreement,
    *,
    run: Path,
    content_ids: Sequence[str],
    last_checkpoint: Path | None,
) -> None:
    """Look at the batches since the last time; every rank calls this after the same step.

    Where one is bad on any rank, its global batch is written to bad_batch.json, and `UserError`
    names the step, the loss, that file and the last good checkpoint.
    """
    fault = watch.look()
    if not agreement.largest(0 if fault is None else 1):
        return
    parts = [part for part in distributed.gather_objects(fault) if part is not None]
    # A loss that is bad on one rank makes the gradients of all bad: the loss is the better reason.
    first = min(parts, key=lambda p: (p.epoch, p.batch, p.reason.startswith("gradient")))
    if distributed.rank() == 0:
        samples = [i for p in parts if p.batch == first.batch for i in p.samples]
        write_whole(run / BAD_BATCH, _to_json(first, samples, content_ids))
    kept = last_checkpoint or "none yet"
    raise UserError(
        f"step {first.step}: {first.reason}; its batch is in {run / BAD_BATCH}, the last good checkpoint is "
        f"{kept}; go on from there with --resume --accept-changes and a lower "
        "--optimizer.learning-rate; to leave contents out, take them from the tables, make the shards anew "
        "and start a run with another --out"
    )


def _to_json(fault: Fault, samples: Sequence[int], content_ids: Sequence[str]) -> str:
    # JSON has no NaN, so numbers that are none are written as words.
    losses = {n: v if math.isfinite(v) else str(v) for n, v in fault.losses.items()}
    row = {
        "step": fault.step,
        "epoch": fault.epoch,
        "batch": fault.batch,
        "reason": fault.reason,
        "losses": losses,
        "content_ids": [content_ids[i] for i in samples],
        "samples": list(samples),
    }
    return json.dumps(row, indent=2) + "\n"


@torch.no_grad()
def weights_are_finite(model: nn.Module) -> bool:
    """Whether nothing that a checkpoint would hold of this rank's model is NaN or infinite."""
    parts = [part for part in model.state_dict().values() if part.is_floating_point()]
    # The sum of a tensor is finite only if all of it is: one pass, one number to transfer.
    sums = [getattr(part, "_local_tensor", part).float().sum() for part in parts]
    return bool(torch.stack(sums).isfinite().all())
