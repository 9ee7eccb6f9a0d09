"""Finding the first bad batch, and saying so."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mmrec.distributed import Agreement
from mmrec.errors import UserError
from mmrec.training.faults import FaultWatch, stop_at_fault, weights_are_finite


def add(watch: FaultWatch, step: int, loss: float, **others: float) -> None:
    losses = {name: torch.tensor(value) for name, value in {"loss": loss, **others}.items()}
    watch.add(losses, step=step, epoch=0, batch=step - 1, samples=torch.tensor([step, step + 100]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_of_several_bad_batches_is_found(bad: float) -> None:
    watch = FaultWatch(max_loss_ratio=0.0, check_norms=True)
    for step in range(1, 6):
        add(watch, step, bad if step >= 3 else 1.0, content_product=1.0)
    fault = watch.look()
    assert fault
    assert (fault.step, fault.batch, fault.samples) == (3, 2, [3, 103])
    assert fault.reason == f"loss is {bad}"
    assert watch.look() is None  # Everything before was looked at.


def test_a_gradient_that_is_not_finite_counts_unless_a_scaler_watches_it() -> None:
    for check_norms in (True, False):
        watch = FaultWatch(max_loss_ratio=0.0, check_norms=check_norms)
        add(watch, 1, 1.0, gradient_norm=math.inf)
        fault = watch.look()
        assert (fault and fault.reason) == ("gradient norm is inf" if check_norms else None)


def test_a_loss_far_above_the_recent_median_is_a_fault_if_asked() -> None:
    for ratio, expected in ((5.0, 30), (0.0, None)):
        watch = FaultWatch(max_loss_ratio=ratio, check_norms=True)
        for step in range(1, 30):
            add(watch, step, 0.9 if step % 2 else 1.1)
        add(watch, 30, 6.0)
        fault = watch.look()
        assert (fault and fault.step) == expected
        assert not fault or "6.7 times" in fault.reason or "5.5 times" in fault.reason


def test_no_ratio_is_judged_by_a_few_batches() -> None:
    watch = FaultWatch(max_loss_ratio=2.0, check_norms=True)
    for step in range(1, 20):
        add(watch, step, 1.0)
    add(watch, 20, 100.0)
    assert watch.look() is None


def test_the_bad_batch_is_written_and_named(tmp_path: Path) -> None:
    watch = FaultWatch(max_loss_ratio=0.0, check_norms=True)
    add(watch, 7, math.nan, content_product=2.0)
    ids = [f"c{number}" for number in range(200)]
    with pytest.raises(
        UserError, match=r"step 7: loss is nan; its batch is in .*bad_batch\.json.*shards anew"
    ):
        stop_at_fault(
            watch, Agreement(), run=tmp_path, content_ids=ids, last_checkpoint=Path("x/step-5")
        )
    written = json.loads((tmp_path / "bad_batch.json").read_text())
    assert written == {
        "step": 7,
        "epoch": 0,
        "batch": 6,
        "reason": "loss is nan",
        "losses": {"loss": "nan", "content_product": 2.0},
        "content_ids": ["c7", "c107"],
        "samples": [7, 107],
    }


def test_good_batches_stop_nothing(tmp_path: Path) -> None:
    watch = FaultWatch(max_loss_ratio=0.0, check_norms=True)
    add(watch, 1, 1.0)
    stop_at_fault(watch, Agreement(), run=tmp_path, content_ids=[], last_checkpoint=None)
    assert not list(tmp_path.iterdir())


def test_one_bad_weight_or_buffer_is_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    # What is not saved may be infinite, as a causal attention mask is.
    model.register_buffer("mask", torch.full((2,), -math.inf), persistent=False)
    assert weights_are_finite(model)
    weight, buffer = model[0].weight, model[1].running_var
    for part in (weight, buffer):
        assert isinstance(part, torch.Tensor)
        with torch.no_grad():
            before = part.clone()
            part.view(-1)[1] = math.nan
            assert not weights_are_finite(model)
            part.copy_(before)
    assert weights_are_finite(model)
