"""Groups of weights: which decay, and how much slower layers near the input learn."""

from pathlib import Path

import pytest
import torch
from small_towers import random_pairs, small_encoder
from torch import nn

from mmrec.errors import UserError
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.model.tuning import TuningConfig, tune
from mmrec.training.optimizers import OptimizerConfig, build_optimizer, set_learning_rate


def rates(encoder: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {part: name for name, part in encoder.named_parameters()}
    return {
        names[part]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for part in group["params"]
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "vit",
            {
                "image_tower.conv1.weight": 4,
                "image_tower.transformer.resblocks.0.mlp.c_fc.weight": 3,
                "image_tower.ln_post.weight": 1,
                "image_tower.proj": 0,
                "text_tower.token_embedding.weight": 3,
                "text_tower.text_projection": 0,
                "gates.content.weight": 0,
                "log_scale": 0,
            },
        ),
        (
            "ours",
            {
                "image_tower.trunk.conv1.0.weight": 5,
                "image_tower.trunk.layer2.0.conv1.weight": 3,
                "image_tower.head.proj.weight": 0,
            },
        ),
    ],
)
def test_rates_fall_by_a_factor_a_layer(
    kind: str, expected: dict[str, int], tmp_path: Path
) -> None:
    encoder = small_encoder(tmp_path, kind)
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.1, layer_decay=0.5))
    set_learning_rate(optimizer, 8.0)
    found = rates(encoder, optimizer)
    assert found.keys() == {name for name, _ in encoder.named_parameters()}
    for name, power in expected.items():
        assert found[name][0] == pytest.approx(8.0 * 0.5**power), name
    assert optimizer.param_groups[0]["lr"] == 8.0


def test_decay_is_on_matrices_alone_and_rates_are_equal_by_default(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.1, weight_decay=0.3))
    shapes = {name: part.ndim for name, part in encoder.named_parameters()}
    for name, (rate, decay) in rates(encoder, optimizer).items():
        assert rate == 0.1
        assert decay == (0.3 if shapes[name] >= 2 else 0.0)
    assert len(optimizer.param_groups) == 2


def test_a_step_moves_low_layers_less(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path).train()
    config = OptimizerConfig(learning_rate=0.01, layer_decay=0.1, weight_decay=0.0)
    optimizer = build_optimizer(encoder, config)
    before = {name: part.detach().clone() for name, part in encoder.named_parameters()}
    batch = random_pairs(encoder)
    views, scale = encoder(batch)
    contrastive_loss(views, batch, scale, Objectives())["loss"].backward()
    optimizer.step()
    # Adam's first step is the learning rate itself wherever there is a gradient.
    moved = {
        name: float((part.detach() - before[name]).abs().max())
        for name, part in encoder.named_parameters()
    }
    assert moved["image_tower.proj"] == pytest.approx(1e-2, rel=1e-2)
    assert moved["image_tower.conv1.weight"] == pytest.approx(1e-6, rel=5e-2)


def test_a_locked_tower_of_any_structure_may_have_a_decay(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    encoder.image_tower = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="Sequential: expected a tower whose layers"):
        build_optimizer(encoder, OptimizerConfig(layer_decay=0.9))
    tune(encoder, TuningConfig(frozen_image_layers="all"))
    build_optimizer(encoder, OptimizerConfig(layer_decay=0.9))


@pytest.mark.parametrize("layer_decay", [0.0, 1.1])
def test_a_decay_out_of_range_is_refused(layer_decay: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layer-decay .*: expected more than 0, at most 1"):
        build_optimizer(small_encoder(tmp_path), OptimizerConfig(layer_decay=layer_decay))
