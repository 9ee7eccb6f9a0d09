"""Dropout by bytes."""

import pytest
import torch
from torch import nn

from mmrec.generative.dropout import ByteDropout, replace_dropouts


def test_it_drops_the_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = ByteDropout(0.2)
    values = torch.ones(401, 1003, requires_grad=True)
    found = drop(values)
    dropped = found.detach()
    assert dropped.unique().tolist() == [0, pytest.approx(256 / (256 - 51))]
    assert float((dropped == 0).float().mean()) == pytest.approx(51 / 256, abs=0.002)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.003)
    # Neither rows nor columns are dropped together.
    assert (dropped == 0).float().mean(0).sub(0.2).abs().max() < 0.1
    assert (dropped == 0).float().mean(1).sub(0.2).abs().max() < 0.1
    found.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, dropped)
    # One mask after another, and the same ones from the same seed.
    assert not torch.equal(drop(values), dropped)
    torch.manual_seed(0)
    assert torch.equal(drop(values), dropped)


def test_it_leaves_all_as_it_is_out_of_training() -> None:
    values = torch.randn(5, 3)
    assert ByteDropout(0.2).eval()(values) is values
    assert ByteDropout(0.0)(values) is values
    assert not ByteDropout(1.0)(values).any()


def test_it_replaces_dropout_everywhere() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.3)), nn.Dropout(0.1))
    replace_dropouts(module)
    found = [part for part in module.modules() if isinstance(part, nn.Dropout)]
    assert [type(part) for part in found] == [ByteDropout, ByteDropout]
    assert [part.p for part in found] == [0.3, 0.1]
