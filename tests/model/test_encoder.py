"""Encoders from open_clip's architectures and our own: what goes in, what comes out, what is saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmrec.data.batches import ItemBatch, Preprocess, collate_items
from mmrec.errors import UserError
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.model.fusion import GatedSum, masked_mean
from mmrec.model.towers import build_towers

VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def vit_config(tmp_path: Path) -> Path:
    """A one-layer ViT in open_clip's own format."""
    path = tmp_path / "tiny-vit.json"
    path.write_text(json.dumps(VIT))
    return path


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32)).eval()
    with torch.no_grad():  # Gates start at zero; give them something to say.
        for gate in encoder.gates.values():
            torch.nn.init.normal_(gate.weight, std=0.5)
    return encoder


def items(encoder: Encoder, pictures: list[int], titles: list[str | None]) -> ItemBatch:
    generator = torch.Generator().manual_seed(1)
    size = encoder.preprocess.size
    shape = (3, size, size)
    images = [
        [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(count)]
        for count in pictures
    ]
    return collate_items(images, titles, tokenizer=encoder.tokenizer, size=size)


def test_embeddings_are_unit_vectors_whatever_is_missing(encoder: Encoder) -> None:
    batch = items(encoder, [3, 0, 1], ["a red mug", "only words", None])
    for side in ("content", "product"):
        vectors = encoder.embed(batch, side)
        assert vectors.shape == (3, 128)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_padding_changes_nothing(encoder: Encoder) -> None:
    short = items(encoder, [2, 1], ["a", None])
    padded = replace(
        short,
        images=torch.cat([short.images, torch.full_like(short.images, 77)], 1),
        image_mask=torch.cat([short.image_mask, torch.zeros_like(short.image_mask)], 1),
    )
    assert torch.allclose(encoder.embed_content(short), encoder.embed_content(padded), atol=1e-6)


def test_an_item_with_nothing_is_zero(encoder: Encoder) -> None:
    vectors = encoder.embed_content(items(encoder, [0, 1], [None, "x"]))
    assert vectors[0].norm() == 0
    assert vectors[1].norm() == pytest.approx(1, abs=1e-5)


def test_views_are_the_parts_of_the_whole(encoder: Encoder) -> None:
    batch = items(encoder, [2, 2, 0], ["a", None, "b"])
    views = encoder.views(batch, "content")
    assert views["video"][1].tolist() == [True, True, False]
    assert views["content_title"][1].tolist() == [True, False, True]
    fused = views["content"][0]
    assert torch.allclose(fused[1], views["video"][0][1], atol=1e-6)
    assert torch.allclose(fused[2], views["content_title"][0][2], atol=1e-6)
    assert not torch.allclose(fused[0], views["video"][0][0], atol=1e-3)


def test_gates_are_a_softmax_over_what_is_present() -> None:
    gate = GatedSum(4)
    torch.nn.init.normal_(gate.weight)
    vectors = torch.nn.functional.normalize(torch.randn(3, 2, 4), dim=-1)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    fused = gate(vectors, present)
    scores = (vectors[0] * gate.weight).sum(1) + gate.bias
    expected = torch.nn.functional.normalize(scores.softmax(0) @ vectors[0], dim=0)
    assert torch.allclose(fused[0], expected, atol=1e-6)
    assert torch.allclose(fused[1], vectors[1, 0], atol=1e-6)
    assert fused[2].abs().sum() == 0


def test_masked_mean_ignores_absent_frames() -> None:
    frames = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_mean(frames, mask).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_save_and_load_give_the_same_encoder(encoder: Encoder, tmp_path: Path) -> None:
    fingerprint = encoder.save(tmp_path / "encoder")
    assert {p.name for p in (tmp_path / "encoder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "manifest.json",
    }
    again = Encoder.load(tmp_path / "encoder")
    batch = items(encoder, [2, 1], ["a", None])
    assert again.fingerprint == fingerprint
    assert torch.equal(encoder.embed_content(batch), again.embed_content(batch))
    with pytest.raises(UserError, match="already exists"):
        encoder.save(tmp_path / "encoder")


def test_a_tags_way_with_pixels_is_saved(encoder: Encoder, tmp_path: Path) -> None:
    """A pretrained tag sets mean, std and resize; the name alone would give CLIP's."""
    pixels = {
        "size": 32,
        "interpolation": "bilinear",
        "resize": "squash",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.1],
    }
    tagged = Encoder(encoder.config, pixels=pixels).eval()
    tagged.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert (
        again.preprocess
        == tagged.preprocess
        == Preprocess(size=32, interpolation="bilinear", resize="squash")
    )
    assert torch.equal(again.mean, tagged.mean)
    assert torch.equal(again.std, tagged.std)
    assert not torch.equal(again.mean, encoder.mean)


def test_a_fingerprint_does_not_depend_on_where_weights_came_from(
    vit_config: Path, tmp_path: Path
) -> None:
    save_open_clip_weights(vit_config, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    fingerprints = [
        Encoder(
            EncoderConfig(towers=str(vit_config), pretrained=str(tmp_path / f"{name}.safetensors"))
        ).save(tmp_path / name)
        for name in ("one", "two")
    ]
    assert fingerprints[0] == fingerprints[1]


def test_weights_that_were_exchanged_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "one")
    other = Encoder(encoder.config)
    other.save(tmp_path / "two")
    (tmp_path / "one/model.safetensors").write_bytes(
        (tmp_path / "two/model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="not those that the manifest names"):
        Encoder.load(tmp_path / "one")


def test_nothing_of_a_modality_still_has_a_gradient(encoder: Encoder) -> None:
    """Gathering gradients over ranks needs every rank to join in, whatever its rows hold."""
    views = encoder.views(items(encoder, [1, 1], [None, None]), "content")
    assert views["content_title"][0].requires_grad
    views = encoder.views(items(encoder, [0, 0], ["a", "b"]), "content")
    assert views["video"][0].requires_grad


def test_a_broken_encoder_is_named(encoder: Encoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "encoder")
    weights = tmp_path / "encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        Encoder.load(tmp_path / "encoder")
    with pytest.raises(UserError, match="no such folder"):
        Encoder.load(tmp_path / "nothing")


def test_separate_towers_start_equal_and_are_their_own() -> None:
    encoder = Encoder(
        EncoderConfig(towers="mmrec-tiny", image_size=32, separate_towers=True)
    ).eval()
    batch = items(encoder, [1], [None])
    assert torch.equal(encoder.embed_content(batch), encoder.embed_product(batch))
    with torch.no_grad():
        for weight in encoder.product_image_tower.parameters():  # pyright: ignore[reportOptionalMemberAccess]
            weight.mul_(1.5).add_(0.01)
    assert not torch.equal(encoder.embed_content(batch), encoder.embed_product(batch))


def test_scale_is_capped() -> None:
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", start_scale=500.0))
    encoder.cap_scale()
    assert float(encoder.scale.detach()) == pytest.approx(100, rel=1e-5)


# --- open_clip's own towers --------------------------------------------------------------------


def save_open_clip_weights(config: Path, path: Path) -> torch.nn.Module:
    open_clip.add_model_config(config)
    torch.manual_seed(5)
    model = open_clip.create_model(config.stem).eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return model


def test_pretrained_from_a_file_gives_open_clips_own_embeddings(
    vit_config: Path, tmp_path: Path
) -> None:
    theirs = save_open_clip_weights(vit_config, tmp_path / "weights.safetensors")
    ours = Encoder(
        EncoderConfig(towers=str(vit_config), pretrained=str(tmp_path / "weights.safetensors"))
    ).eval()
    batch = items(ours, [1, 1], ["red mug", "blue hat"])
    pixels = ours.normalise_pixels(batch.images[:, 0])
    with torch.no_grad():
        image = torch.nn.functional.normalize(theirs.encode_image(pixels), dim=-1)  # pyright: ignore
        text = torch.nn.functional.normalize(theirs.encode_text(batch.tokens), dim=-1)  # pyright: ignore
    views = ours.views(batch, "product")
    assert torch.allclose(views["image"][0], image, atol=1e-6)
    assert torch.allclose(views["product_title"][0], text, atol=1e-6)


def test_pictures_reach_the_tower_as_open_clip_prepares_them(vit_config: Path) -> None:
    open_clip.add_model_config(vit_config)
    _, _, transform = open_clip.create_model_and_transforms(vit_config.stem)
    encoder = Encoder(EncoderConfig(towers=str(vit_config)))
    picture = (
        np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    )
    theirs = transform(Image.fromarray(picture))  # pyright: ignore[reportCallIssue]
    ours = encoder.preprocess(torch.from_numpy(picture).permute(2, 0, 1))
    difference = (encoder.normalise_pixels(ours[None])[0] - theirs).abs()
    # torchvision and Pillow round differently: at most two levels of 255 apart, a quarter on average.
    assert difference.max() < 2.5 / 255 / 0.26
    assert difference.mean() < 0.3 / 255 / 0.26


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "RN50"])
def test_any_open_clip_architecture_builds(name: str) -> None:
    towers = build_towers(name)
    assert towers.width == towers.model_config["embed_dim"]
    assert towers.pixels["size"] == 224


def test_a_local_file_can_be_read_as_a_tags_weights(tmp_path: Path) -> None:
    towers = build_towers("ViT-B-16-SigLIP", pixels_of="webli")
    assert towers.pixels["resize"] == "squash"
    assert towers.pixels["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match=r"pixels-of 'nothing'.*its tags: .*laion2b"):
        build_towers("ViT-B-32", pixels_of="nothing")


def test_siglip_squashes_and_clip_crops() -> None:
    picture = torch.zeros(3, 40, 80, dtype=torch.uint8)
    picture[:, :, 40:] = 255
    picture[:, :, :12] = 128
    squashed = Preprocess(size=20, resize="squash")(picture)
    cropped = Preprocess(size=20)(picture)
    assert squashed.shape == cropped.shape == (3, 20, 20)
    assert squashed[0, 10, 0] == 128  # The left edge is still there,
    assert cropped[0, 10, 0] == 0  # and here it is cut off.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(towers="ViT-B-23"), "towers 'ViT-B-23' are not known.*close: .*ViT-B-32"),
        (EncoderConfig(towers="nowhere.json"), "nowhere.json: cannot be read as a model config"),
        (EncoderConfig(towers="mmrec-tiny", pretrained="laion"), "neither a file nor a tag"),
    ],
)
def test_unknown_names_are_refused(config: EncoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Encoder(config)


def test_weights_that_do_not_fit_are_refused(vit_config: Path, tmp_path: Path) -> None:
    save_open_clip_weights(vit_config, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="does not fit mmrec-tiny: expected its state dict"):
        Encoder(
            EncoderConfig(towers="mmrec-tiny", pretrained=str(tmp_path / "weights.safetensors"))
        )


def test_complaints_name_the_path_that_was_given(vit_config: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"pretrained": str(tmp_path / "notes.txt")}, "does not fit {}: expected its state dict"),
        ({"pretrained": "laion"}, "neither a file nor a tag of {};"),
        ({"pixels_of": "laion"}, "not a tag of {};"),
    )
    for settings, message in cases:
        with pytest.raises(UserError, match=message.format(vit_config)):
            build_towers(str(vit_config), **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": "ten"}, 'has embed_dim, a number above 0; found "ten"'),
        ({"vision_cfg": 3}, "has vision_cfg, an object; found 3"),
        ({"text_cfg": {"width": 17, "heads": 2}}, "expected a model config .* divisible by"),
        ({"vision_cfg": {"paths": 3}}, "expected a model config .* argument 'paths'"),
    ],
)
def test_a_model_config_that_is_wrong_inside_is_refused(
    changes: dict[str, Any], message: str, vit_config: Path
) -> None:
    vit_config.write_text(json.dumps(json.loads(vit_config.read_text()) | changes))
    with pytest.raises(UserError, match=f"{vit_config}.*{message}"):
        build_towers(str(vit_config))


def test_a_saved_encoder_needs_no_model_config_file(vit_config: Path, tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(towers=str(vit_config))).eval()
    encoder.save(tmp_path / "encoder")
    vit_config.unlink()
    again = Encoder.load(tmp_path / "encoder")
    batch = items(encoder, [1], ["x"])
    assert torch.equal(encoder.embed_content(batch), again.embed_content(batch))


def test_without_learned_gates_a_content_is_the_mean_of_what_it_has() -> None:
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32, fusion="mean"))
    assert not any("gates" in name for name, p in encoder.named_parameters() if p.requires_grad)
    views = encoder.eval().views(items(encoder, [2, 1, 1], ["a", "b", "c"]), "content")
    mean = (views["video"][0] + views["content_title"][0]) / 2
    expected = torch.nn.functional.normalize(mean, dim=-1)
    torch.testing.assert_close(views["content"][0], expected)
