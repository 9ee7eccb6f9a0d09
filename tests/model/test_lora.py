"""Low-rank adapters: what learns, and that a saved encoder is a plain one with their effect."""

import sys
from pathlib import Path

import pytest
import torch
from small_towers import random_items, random_pairs, small_encoder
from torch import nn

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.model.lora import adaptable, has_lora, merged_weights
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.model.tuning import TuningConfig, tune
from mmrec.training.optimizers import OptimizerConfig, build_optimizer

pytest.importorskip("peft", reason="peft is an extra: pip install 'mmrec[lora]'")


def train(encoder: Encoder, steps: int = 3) -> None:
    encoder.train()
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=0.02))
    batch = random_pairs(encoder)
    for _ in range(steps):
        views, scale = encoder(batch)
        contrastive_loss(views, batch, scale, Objectives())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()


def test_adapters_start_without_effect_and_learn_alone(tmp_path: Path) -> None:
    plain, encoder = small_encoder(tmp_path).eval(), small_encoder(tmp_path).eval()
    tune(encoder, TuningConfig(lora_rank=2))
    items = random_items(plain, [1, 2], ["a red mug", None])
    assert torch.equal(plain.embed_content(items), encoder.embed_content(items))
    before = {name: part.detach().clone() for name, part in encoder.named_parameters()}
    train(encoder)
    moved = {n for n, part in encoder.named_parameters() if not torch.equal(part, before[n])}
    towers = {n for n in moved if "tower" in n}
    assert moved - towers == {"log_scale", *(f"gates.{s}.weight" for s in encoder.gates)} | {
        f"gates.{side}.bias" for side in encoder.gates
    }
    assert all(".lora_" in name for name in towers)
    # Three blocks of pictures and two of words, two layers a block, two matrices a layer.
    assert len(towers) == (3 + 2) * 2 * 2


def test_a_saved_encoder_has_the_adapters_merged(tmp_path: Path) -> None:
    plain, encoder = small_encoder(tmp_path), small_encoder(tmp_path)
    tune(encoder, TuningConfig(lora_rank=2))
    train(encoder)
    items = random_items(plain, [1, 2, 0], ["a red mug", None, "hat"])
    expected = encoder.embed_content(items)
    assert not torch.allclose(plain.eval().embed_content(items), expected, atol=1e-3)
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert not has_lora(again)
    assert list(again.state_dict()) == list(plain.state_dict())
    assert torch.allclose(again.embed_content(items), expected, atol=1e-5)
    # Saving leaves the encoder in training as it was.
    assert has_lora(encoder)
    assert torch.equal(encoder.embed_content(items), expected)


def test_merging_adds_the_product_of_the_adapters(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    tune(encoder, TuningConfig(lora_rank=3))
    train(encoder)
    name = "image_tower.transformer.resblocks.1.mlp.c_fc"
    parts = encoder.state_dict()
    update = parts[f"{name}.lora_B.default.weight"] @ parts[f"{name}.lora_A.default.weight"]
    expected = parts[f"{name}.base_layer.weight"] + 2 * update
    assert torch.allclose(merged_weights(encoder)[f"{name}.weight"], expected, atol=1e-6)


def test_frozen_layers_get_no_adapters(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    tune(encoder, TuningConfig(lora_rank=2, frozen_image_layers=3, frozen_text_layers="all"))
    adapted = {n.split(".lora_")[0] for n, _ in encoder.named_parameters() if ".lora_" in n}
    block = "image_tower.transformer.resblocks.2.mlp"
    assert adapted == {f"{block}.c_fc", f"{block}.c_proj"}


def test_adapters_learn_the_same_in_checkpointed_towers(tmp_path: Path) -> None:
    found = []
    for checkpoint in (False, True):
        encoder = small_encoder(tmp_path)
        tune(encoder, TuningConfig(lora_rank=2, checkpoint_towers=checkpoint))
        train(encoder)
        found.append(merged_weights(encoder))
    for name, part in found[0].items():
        assert torch.allclose(part, found[1][name], atol=1e-6), name


def test_every_linear_layer_of_a_timm_transformer_is_adapted(tmp_path: Path) -> None:
    tower = small_encoder(tmp_path, "timm-vit").image_tower
    layers = {name.removeprefix("trunk.blocks.0.") for name in adaptable(tower) if ".0." in name}
    assert layers == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert len(adaptable(tower)) == 12 * 4
    assert all(type(tower.get_submodule(name)) is nn.Linear for name in adaptable(tower))


def test_a_tower_without_linear_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora-rank 4: .*found TimmModel with none"):
        tune(small_encoder(tmp_path, "ours"), TuningConfig(lora_rank=4))


def test_missing_peft_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'mmrec\[lora\]'"):
        tune(small_encoder(tmp_path), TuningConfig(lora_rank=4))
