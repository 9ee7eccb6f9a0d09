"""What FSDP2 takes of an encoder, without ranks; tests/train/test_ranks.py has real ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.training.sharding import (
    check_sharding,
    make_shardable,
    scale_of,
    whole_encoder,
    whole_tensor,
)

SHARDED: Any = SimpleNamespace(is_fsdp2=True)
WHOLE: Any = SimpleNamespace(is_fsdp2=False)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))


@pytest.fixture(autouse=True)
def no_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is no Accelerator."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def test_weights_are_ready_to_be_cut_and_the_scale_is_the_same(encoder: Encoder) -> None:
    before, scale = scale_of(encoder), encoder.scale
    make_shardable(encoder, SHARDED)
    assert all(p.ndim > 0 and p.is_contiguous() for p in encoder.parameters())
    assert scale_of(encoder) == before
    assert torch.equal(encoder.scale, scale)


def test_without_fsdp_nothing_changes(encoder: Encoder) -> None:
    make_shardable(encoder, WHOLE)
    assert encoder.log_scale.ndim == 0
    assert whole_encoder(encoder) is encoder
    assert whole_tensor(encoder.log_scale) is encoder.log_scale


def test_a_bias_that_cannot_be_cut_is_refused() -> None:
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32, start_bias=-10.0))
    with pytest.raises(UserError, match=r"start-bias.*one_node"):
        make_shardable(encoder, SHARDED)


def test_what_needs_whole_weights_is_refused_with_fsdp_alone() -> None:
    check_sharding(WHOLE, averaged=True, adapted=True)
    check_sharding(SHARDED, averaged=False, adapted=False)
    with pytest.raises(UserError, match=r"--ema does not work.*one_node"):
        check_sharding(SHARDED, averaged=True, adapted=False)
    with pytest.raises(UserError, match=r"--tuning\.lora-rank does not work"):
        check_sharding(SHARDED, averaged=False, adapted=True)
