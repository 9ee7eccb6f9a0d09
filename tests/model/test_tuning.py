"""Frozen, checkpointed and compiled towers: what learns, what stays, and that nothing else changes."""

from pathlib import Path

import pytest
import torch
from small_towers import random_items, random_pairs, small_encoder
from torch import Tensor, nn

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.model.layers import layer_depths
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.model.tuning import TuningConfig, compile_tower, tune
from mmrec.training.optimizers import OptimizerConfig, build_optimizer


def loss_of(encoder: Encoder, *, seed: int = 1) -> Tensor:
    batch = random_pairs(encoder, seed=seed)
    views, scale = encoder(batch)
    return contrastive_loss(views, batch, scale, Objectives(video_image=1.0))["loss"]


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    loss_of(encoder).backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["vit", "resnet", "ours"])
@pytest.mark.parametrize("layers", [2, "all"])
def test_frozen_layers_get_no_gradient_and_no_state(kind: str, layers: int, tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, kind).train()
    tune(encoder, TuningConfig(frozen_image_layers=layers))
    tower = encoder.image_tower
    depths = layer_depths(tower)
    frozen = {
        f"image_tower.{name}" for name, n in depths.items() if layers == "all" or n < int(layers)
    }
    before = {name: p.detach().clone() for name, p in encoder.state_dict().items()}
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.01))
    loss_of(encoder).backward()
    optimizer.step()
    parameters = dict(encoder.named_parameters())
    assert frozen == {name for name, p in parameters.items() if p.grad is None}
    learned = {name for name, p in parameters.items() if p in optimizer.state}
    assert learned == set(parameters) - frozen
    after = encoder.state_dict()
    moved = {name for name in parameters if not torch.equal(before[name], after[name])}
    assert not moved & frozen
    assert len(moved) > len(learned) / 2


def test_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, "ours")
    tune(encoder, TuningConfig(frozen_image_layers=3))
    encoder.train()
    before = {name: b.clone() for name, b in encoder.image_tower.named_buffers()}
    loss_of(encoder)
    after = dict(encoder.image_tower.named_buffers())
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"layer3", "layer4"}
    encoder.eval().train()  # As after each evaluation.
    norms = {
        name.split(".")[1]: part.training
        for name, part in encoder.image_tower.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    }
    assert norms == {
        **{"conv1": False, "bn1": False, "layer1": False, "layer2": False},
        **{"layer3": True, "layer4": True},
    }


def test_a_partly_frozen_tower_still_joins_in_gathering_gradients(tmp_path: Path) -> None:
    """A rank without pictures must have a gradient to gather where the other ranks have one."""
    encoder = small_encoder(tmp_path)
    tune(encoder, TuningConfig(frozen_image_layers=1, frozen_text_layers="all"))
    pictures = encoder.views(random_items(encoder, [1, 1], [None, None]), "content")
    words = encoder.views(random_items(encoder, [0, 0], ["a", "b"]), "content")
    assert pictures["video"][0].requires_grad
    assert words["video"][0].requires_grad
    assert not pictures["content_title"][0].requires_grad
    assert not words["content_title"][0].requires_grad


def test_separate_towers_are_frozen_alike(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, separate_towers=True)
    tune(encoder, TuningConfig(frozen_text_layers=1))
    for tower in (encoder.text_tower, encoder.product_text_tower):
        assert tower is not None
        assert {name for name, p in tower.named_parameters() if not p.requires_grad} == {
            "token_embedding.weight",
            "positional_embedding",
        }


@pytest.mark.parametrize("kind", ["vit", "resnet", "ours"])
def test_checkpointed_towers_have_the_same_gradients(kind: str, tmp_path: Path) -> None:
    plain = small_encoder(tmp_path, kind).train()
    spared = small_encoder(tmp_path, kind).train()
    tune(spared, TuningConfig(checkpoint_towers=True))
    expected, found = gradients(plain), gradients(spared)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], atol=1e-6), name


def test_checkpointed_towers_keep_less(tmp_path: Path) -> None:
    def kept(encoder: Encoder) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(encoder)
        return count

    plain, spared = small_encoder(tmp_path).train(), small_encoder(tmp_path).train()
    tune(spared, TuningConfig(checkpoint_towers=True))
    assert kept(spared) < 0.6 * kept(plain)


def test_compiled_towers_keep_their_names_and_numbers(tmp_path: Path) -> None:
    plain, compiled = small_encoder(tmp_path).train(), small_encoder(tmp_path).train()
    for tower in (compiled.image_tower, compiled.text_tower):
        compile_tower(tower, backend="eager")  # graphs are traced, and run without C++
    expected, found = gradients(plain), gradients(compiled)
    assert compiled.image_tower._compiled_call_impl is not None
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], atol=1e-5), name
    compiled.eval().save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    items = random_items(plain, [1, 2], ["a", None])
    assert torch.allclose(again.embed_content(items), plain.eval().embed_content(items), atol=1e-6)


def test_an_encoder_trains_in_bfloat16(tmp_path: Path) -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        encoder = small_encoder(tmp_path, pooling="attention").train()
        optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=2e-3))
        losses[dtype] = []
        for _ in range(12):
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                loss = loss_of(encoder)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(loss.item())
    low, full = losses[torch.bfloat16], losses[torch.float32]
    assert low[0] == pytest.approx(full[0], rel=0.05)
    assert low[-1] < 0.5 * low[0]
    assert all(part.dtype == torch.float32 for part in encoder.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            TuningConfig(frozen_image_layers=6),
            "frozen-image-layers 6: expected 0 to 5, the layers of this tower",
        ),
        (TuningConfig(frozen_text_layers=-1), "frozen-text-layers -1: expected 0 to 4"),
        (TuningConfig(lora_rank=-2), "lora-rank -2: expected at least 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    config: TuningConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        tune(small_encoder(tmp_path), config)


def test_a_tower_that_cannot_be_checkpointed_is_named(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    encoder.image_tower = nn.Linear(2, 2)
    with pytest.raises(UserError, match="checkpoint-towers: Linear cannot"):
        tune(encoder, TuningConfig(checkpoint_towers=True))
