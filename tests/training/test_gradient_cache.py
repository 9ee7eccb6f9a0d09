"""Gradients of a batch that goes through the towers in chunks are those of the batch in one piece."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_training import TrainingServer
from safetensors.torch import load_file
from torch import Tensor
from written_shards import TINY_VIT, write_shards

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.model.encoder import Encoder, EncoderConfig, Side, TowerOutputs, Views
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.training.checkpoints import list_checkpoints
from mmrec.training.gradient_cache import CacheConfig, cached_backward
from mmrec.training.run import read_metrics

ROWS = 7
ALL = Objectives(video_image=0.5, title_title=0.25, video_title=0.5, image_title=0.25)


def vit(folder: Path, *, patch_dropout: float = 0.0, **config: bool) -> Encoder:
    towers = deepcopy(TINY_VIT)
    towers["vision_cfg"]["patch_dropout"] = patch_dropout
    path = folder / f"vit-{patch_dropout}.json"
    path.write_text(json.dumps(towers))
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(towers=str(path), **config))  # pyright: ignore[reportArgumentType]
    return encoder.train()


def items(num_pictures: int, seed: int) -> ItemBatch:
    """Row 1 has one picture, row 2 none, row 3 no title, row 4 nothing."""
    draw = torch.Generator().manual_seed(seed)
    size = (ROWS, num_pictures, 3, 32, 32)
    images = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
    tokens = torch.randint(1, 400, (ROWS, 12), generator=draw)
    image_mask = torch.ones(ROWS, num_pictures, dtype=torch.bool)
    text_mask = torch.ones(ROWS, dtype=torch.bool)
    image_mask[1, 1:], image_mask[2], image_mask[4] = False, False, False
    text_mask[3], text_mask[4] = False, False
    images[~image_mask] = 0
    return ItemBatch(images=images, image_mask=image_mask, tokens=tokens, text_mask=text_mask)


@pytest.fixture
def batch() -> PairBatch:
    links = torch.tensor([[i % 4, -1 if i % 2 else 5] for i in range(ROWS)])
    return PairBatch(
        content=items(3, 1),
        product=items(2, 2),
        product_number=links[:, 0],
        links=links,
        weights=(links >= 0).float(),
        samples=torch.arange(ROWS),
    )


def gradients(encoder: Encoder) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def cached(
    encoder: Encoder, batch: PairBatch, config: CacheConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a cached step."""

    def losses_of(views: Views, scale: Tensor) -> dict[str, Tensor]:
        return contrastive_loss(views, batch, scale, ALL)

    encoder.zero_grad()
    losses = cached_backward(encoder, batch, losses_of, config=config)
    return losses, gradients(encoder)


def in_one_piece(encoder: Encoder, batch: PairBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoder.zero_grad()
    views, scale = encoder(batch)
    losses = contrastive_loss(views, batch, scale, ALL)
    losses["loss"].backward()
    return {name: loss.detach() for name, loss in losses.items()}, gradients(encoder)


def in_chunks_with_a_graph(
    encoder: Encoder, batch: PairBatch, config: CacheConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same chunks in the same order, whose graphs are all kept: what caching saves."""
    encoder.zero_grad()
    sides: dict[Side, ItemBatch] = {"content": batch.content, "product": batch.product}
    outputs: TowerOutputs = {}
    for side, part in sides.items():
        size = config.frames if side == "content" else config.images
        pictures = part.images[part.image_mask].split(size)
        titles = part.tokens[part.text_mask].split(config.texts)
        outputs[side] = (
            torch.cat([encoder.picture_features(chunk, side) for chunk in pictures]),
            torch.cat([encoder.title_features(chunk, side) for chunk in titles]),
        )
    losses = contrastive_loss(encoder.views_of(sides, outputs), batch, encoder.scale, ALL)
    losses["loss"].backward()
    return {name: loss.detach() for name, loss in losses.items()}, gradients(encoder)


def assert_same(
    ours: tuple[dict[str, Tensor], dict[str, Tensor]],
    theirs: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(frames=4, images=3, texts=2),
        CacheConfig(frames=1, images=100, texts=1),
        CacheConfig(frames=5),
        CacheConfig(texts=3),
    ],
)
@pytest.mark.parametrize("separate", [False, True])
def test_gradients_are_those_of_the_batch_in_one_piece(
    config: CacheConfig, separate: bool, batch: PairBatch, tmp_path: Path
) -> None:
    encoder = vit(tmp_path, separate_towers=separate)
    expected = in_one_piece(encoder, batch)
    assert max(part.abs().max() for part in expected[1].values()) > 1e-2
    assert_same(cached(encoder, batch, config), expected)


def test_gradients_add_up_over_batches(batch: PairBatch, tmp_path: Path) -> None:
    encoder = vit(tmp_path)
    _, once = cached(encoder, batch, CacheConfig(frames=4, images=4, texts=4))
    cached_backward(
        encoder,
        batch,
        lambda views, scale: contrastive_loss(views, batch, scale, ALL),
        config=CacheConfig(frames=2),
    )
    for name, value in gradients(encoder).items():
        torch.testing.assert_close(value, 2 * once[name], rtol=1e-4, atol=2e-5)


def test_a_chunk_draws_the_same_in_both_passes(batch: PairBatch, tmp_path: Path) -> None:
    encoder = vit(tmp_path, patch_dropout=0.5)
    config = CacheConfig(frames=4, images=3, texts=2)
    found, states = [], []
    for step in (cached, in_chunks_with_a_graph):
        torch.manual_seed(7)
        found.append(step(encoder, batch, config))
        states.append(torch.get_rng_state())
    assert_same(*found)
    # And the next step draws on as if there had been one pass.
    assert torch.equal(*states)


def test_what_is_missing_altogether_takes_no_part(batch: PairBatch, tmp_path: Path) -> None:
    encoder = vit(tmp_path)
    nothing = torch.zeros_like(batch.content.text_mask)
    content = replace(batch.content, text_mask=nothing)
    product = replace(batch.product, image_mask=torch.zeros_like(batch.product.image_mask))
    bare = replace(batch, content=content, product=product)
    assert_same(
        cached(encoder, bare, CacheConfig(frames=2, images=2, texts=2)), in_one_piece(encoder, bare)
    )


def test_running_statistics_move_once_a_chunk(batch: PairBatch) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32)).train()
    other = deepcopy(encoder)
    config = CacheConfig(frames=8, images=6, texts=4)
    # The same chunks with the same statistics, so the gradients agree as well.
    ours, theirs = cached(encoder, batch, config), in_chunks_with_a_graph(other, batch, config)
    for name, value in theirs[0].items():
        torch.testing.assert_close(ours[0][name], value)
    for (name, mine), reference in zip(encoder.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, reference, msg=name)
    assert {part.momentum for part in encoder.modules() if hasattr(part, "momentum")} == {0.1}


def test_a_frozen_tower_gets_no_gradient(batch: PairBatch, tmp_path: Path) -> None:
    encoder = vit(tmp_path)
    encoder.image_tower.requires_grad_(requires_grad=False)
    config = CacheConfig(frames=2, images=2, texts=2)
    assert_same(cached(encoder, batch, config), in_one_piece(encoder, batch))


# --- whole runs --------------------------------------------------------------------------------


def test_two_ranks_train_with_a_cache_as_one_does_without(
    server: TrainingServer, tmp_path: Path
) -> None:
    """The second rank has fewer pictures, so fewer chunks; two batches are added up for a step."""
    shards = write_shards(tmp_path / "shards", num_val=0)
    (tmp_path / "vit.json").write_text(json.dumps(TINY_VIT))
    sizes = "--cache.frames 3 --cache.images 2 --cache.texts 5"
    runs = []
    for ranks, cache in ((1, ""), (2, sizes)):
        out = tmp_path / f"run-{ranks}"
        flags = f"--encoder.image-size 32 --sampler.batch-size 8 --epochs 2 --log-every 1 {cache}"
        arguments = ["demo", "--shards", shards, "--out", out, "--accumulation", "2"]
        arguments += ["--encoder.towers", tmp_path / "vit.json", *flags.split()]
        arguments += ["--num-workers", "0", "--cpu-threads", "1"]
        run = server.start(arguments, ranks=ranks, log=tmp_path / f"log-{ranks}")
        assert run.wait() == [0] * ranks, run.text()
        runs.append(out)
    steps = [[row for row in read_metrics(run) if "loss" in row] for run in runs]
    assert len(steps[0]) == 3
    for one, two in zip(*steps, strict=True):
        for name in ("loss", "content_product", "video_image", "gradient_norm", "scale"):
            assert two[name] == pytest.approx(one[name], rel=2e-4), name
    ends = [load_file(list_checkpoints(run)[-1] / "model.safetensors") for run in runs]
    for name, value in ends[0].items():
        # Attention does not depend on its keys' bias: AdamW makes steps of the rounding error there.
        if not name.endswith("in_proj_bias"):
            torch.testing.assert_close(ends[1][name], value, rtol=1e-2, atol=2e-4, msg=name)
