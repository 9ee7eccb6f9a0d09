"""Averaged weights against the sum written out, and what they are saved as."""

from pathlib import Path

import torch
from small_towers import random_items, random_pairs, small_encoder

from mmrec.model.encoder import Encoder
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.model.tuning import TuningConfig, tune
from mmrec.training.ema import AveragedEncoder
from mmrec.training.optimizers import OptimizerConfig, build_optimizer


def step(encoder: Encoder, optimizer: torch.optim.Optimizer, seed: int) -> None:
    batch = random_pairs(encoder, seed=seed)
    views, scale = encoder(batch)
    contrastive_loss(views, batch, scale, Objectives())["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_average_is_the_sum_written_out(tmp_path: Path) -> None:
    """Weights and batch statistics alike, with a decay that rises with the step to its limit."""
    encoder = small_encoder(tmp_path, "ours").train()
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.01))
    average = AveragedEncoder(encoder, decay=0.6)
    expected: dict[str, torch.Tensor] = {}
    for t in range(1, 7):
        step(encoder, optimizer, seed=t)
        average.update(encoder, t)
        decay = min(0.6, 1 - t ** (-2 / 3))
        for name, part in encoder.state_dict().items():
            part = part.double()
            expected[name] = part if t == 1 else decay * expected[name] + (1 - decay) * part
    found = average.module.state_dict()
    counters = {name for name in found if not found[name].is_floating_point()}
    assert counters
    for name, part in found.items():
        if name in counters:
            assert torch.equal(part, encoder.state_dict()[name])
        else:
            assert torch.allclose(part.double(), expected[name], atol=1e-6), name
    statistics = "image_tower.trunk.layer1.0.bn1.running_var"
    assert not torch.allclose(found[statistics], encoder.state_dict()[statistics])


def test_the_average_is_ready_for_use_and_leaves_the_encoder_training(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, "ours").train()
    average = AveragedEncoder(encoder, decay=0.9)
    assert not average.module.training
    assert encoder.training
    assert not any(part.requires_grad for part in average.module.parameters())
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.01))
    for t in (1, 2, 3):
        step(encoder, optimizer, seed=t)
        average.update(encoder, t)
    average.module.save(tmp_path / "encoder")
    items = random_items(encoder, [1, 2], ["a", None])
    loaded = Encoder.load(tmp_path / "encoder").embed_content(items)
    assert torch.equal(loaded, average.module.embed_content(items))
    assert not torch.allclose(loaded, encoder.eval().embed_content(items), atol=1e-4)


def test_frozen_weights_stay_bit_for_bit(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path).train()
    tune(encoder, TuningConfig(frozen_image_layers="all"))
    before = {name: part.clone() for name, part in encoder.image_tower.state_dict().items()}
    average = AveragedEncoder(encoder, decay=0.99)
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.01))
    for t in (1, 2, 3):
        step(encoder, optimizer, seed=t)
        average.update(encoder, t)
    after = average.module.image_tower.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
