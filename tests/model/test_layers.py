"""How towers of every structure are cut into layers, from the input up."""

from pathlib import Path

import pytest
from small_towers import small_encoder
from torch import nn

from mmrec.errors import UserError
from mmrec.model.layers import layer_depths


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "vit",
            {
                "conv1.weight": 0,
                "class_embedding": 0,
                "ln_pre.bias": 0,
                "transformer.resblocks.0.attn.in_proj_weight": 1,
                "transformer.resblocks.2.mlp.c_fc.weight": 3,
                "ln_post.weight": 3,
                "proj": 4,
            },
        ),
        (
            "resnet",
            {
                "conv1.weight": 0,
                "bn3.weight": 0,
                "layer1.0.conv1.weight": 1,
                "layer4.0.downsample.0.weight": 4,
                "attnpool.c_proj.weight": 5,
            },
        ),
        (
            "timm-vit",
            {
                "trunk.cls_token": 0,
                "trunk.patch_embed.proj.weight": 0,
                "trunk.blocks.0.attn.qkv.weight": 1,
                "trunk.blocks.11.mlp.fc1.weight": 12,
                "trunk.norm.weight": 12,
                "head.proj.weight": 13,
            },
        ),
        (
            "ours",
            {
                "trunk.conv1.0.weight": 0,
                "trunk.conv1.3.weight": 0,
                "trunk.bn1.weight": 0,
                "trunk.layer1.0.conv1.weight": 1,
                "trunk.layer4.0.bn2.bias": 4,
                "head.proj.weight": 5,
            },
        ),
    ],
)
def test_layers_rise_from_stem_to_projection(
    kind: str, expected: dict[str, int], tmp_path: Path
) -> None:
    tower = small_encoder(tmp_path, kind).image_tower
    depths = layer_depths(tower)
    assert depths.keys() == {name for name, _ in tower.named_parameters()}
    assert {name: depths[name] for name in expected} == expected
    assert max(depths.values()) == max(expected.values())


def test_text_towers_have_layers_too(tmp_path: Path) -> None:
    depths = layer_depths(small_encoder(tmp_path).text_tower)
    assert depths["token_embedding.weight"] == depths["positional_embedding"] == 0
    assert depths["transformer.resblocks.1.ln_1.weight"] == depths["ln_final.weight"] == 2
    assert depths["text_projection"] == 3


def test_an_unknown_structure_is_refused() -> None:
    with pytest.raises(UserError, match=r"Sequential: expected a tower whose layers"):
        layer_depths(nn.Sequential(nn.Linear(2, 2)))
