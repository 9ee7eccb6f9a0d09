"""Attention over frames, and rows that lost a modality."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_shards import make_small_shards
from small_towers import random_items, random_pairs, small_encoder
from torch import Tensor
from torch.nn.functional import normalize

from mmrec.data.batches import (
    AugmentConfig,
    PairBatch,
    PairDataset,
    Preprocess,
    collate_items,
    number_products,
)
from mmrec.data.sampler import Row
from mmrec.data.shards import open_shards
from mmrec.model.encoder import Encoder
from mmrec.model.fusion import AttentionPool, masked_mean, relative_positions
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.training.optimizers import OptimizerConfig, build_optimizer


def trained_pool(width: int = 6) -> AttentionPool:
    torch.manual_seed(0)
    pool = AttentionPool(width)
    torch.nn.init.normal_(pool.query)
    return pool


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    frames = normalize(torch.randn(4, 5, 6, generator=generator), dim=-1)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool
    )
    return frames, mask


def test_attention_starts_as_the_mean() -> None:
    frames, mask = example()
    assert torch.allclose(AttentionPool(6)(frames, mask), masked_mean(frames, mask), atol=1e-6)


def test_attention_is_a_softmax_over_the_frames_that_are_there() -> None:
    frames, mask = example()
    pool = trained_pool()
    pooled = pool(frames, mask)
    for row in range(4):
        present = frames[row][mask[row]]
        scores = []
        for t, frame in enumerate(present):
            share = t / max(1, len(present) - 1)
            angles = [math.pi * 2**f * share for f in range(4)]
            position = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
            key = pool.key.weight @ torch.cat([frame * 6**0.5, position]) + pool.key.bias
            scores.append(pool.query @ key)
        expected = torch.zeros(6)
        if scores:
            expected = torch.stack(scores).softmax(0) @ present
        assert torch.allclose(pooled[row], expected, atol=1e-5), row


def test_one_frame_is_itself_and_none_is_zero() -> None:
    frames, mask = example()
    pooled = trained_pool()(frames, mask)
    assert torch.allclose(pooled[2], frames[2, 2], atol=1e-6)
    assert pooled[3].abs().sum() == 0


def test_positions_are_shares_of_the_clip() -> None:
    _, mask = example()
    shares = relative_positions(mask)
    assert shares[0].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert shares[1][mask[1]].tolist() == [0, 0.5, 1]
    assert shares[2][mask[2]].tolist() == [0]


def test_padding_changes_nothing_and_order_does(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, pooling="attention").eval()
    for pool in encoder.pools.values():
        torch.nn.init.normal_(pool.query)  # pyright: ignore
    short = random_items(encoder, [3, 1], ["a", None])
    padded = replace(
        short,
        images=torch.cat([short.images, torch.full_like(short.images, 77)], 1),
        image_mask=torch.cat([short.image_mask, torch.zeros_like(short.image_mask)], 1),
    )
    embedded = encoder.embed_content(short)
    assert torch.allclose(embedded, encoder.embed_content(padded), atol=1e-6)
    backwards = replace(short, images=short.images[:, [2, 1, 0]])
    assert not torch.allclose(embedded[0], encoder.embed_content(backwards)[0], atol=1e-4)


def test_attention_is_saved_and_older_encoders_have_none(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, pooling="attention").eval()
    torch.nn.init.normal_(encoder.pools["content"].query)  # pyright: ignore
    encoder.save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    items = random_items(encoder, [3, 1], ["a", None])
    assert torch.equal(again.embed_content(items), encoder.embed_content(items))
    assert not any("pools" in name for name in small_encoder(tmp_path).state_dict())


def test_attention_learns_which_frame_counts() -> None:
    """Of five frames the one along the first axis is what must come out, wherever it lies."""
    torch.manual_seed(0)
    pool = AttentionPool(8)
    optimizer = torch.optim.Adam(pool.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        frames = normalize(torch.randn(32, 5, 8), dim=-1)
        right = torch.randint(5, (32,))
        frames[:, :, 0] = 0
        frames[torch.arange(32), right, 0] = 1.0
        frames = normalize(frames, dim=-1)
        pooled = normalize(pool(frames, torch.ones(32, 5, dtype=torch.bool)), dim=-1)
        loss = 1 - (pooled * frames[torch.arange(32), right]).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# --- modality dropout --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("fusion"))


def dropped_rows(shards: Path, dropout: float, epochs: int = 6) -> list[tuple[bool, bool, int]]:
    """Of every content in every epoch: whether it has pictures, a title, and which content it is."""
    reader = open_shards(shards, "contents", "train")
    dataset = PairDataset(
        reader,
        number_products(reader.product_ids),
        preprocess=Preprocess(size=16),
        augment=AugmentConfig(modality_dropout=dropout),
        num_frames=2,
        num_images=1,
        num_epochs=epochs,
        seed=0,
    )
    rows = [
        dataset[Row(epoch, sample, 0, True)]
        for epoch in range(epochs)
        for sample in range(len(reader))
    ]
    return [(bool(row.content), bool(row.content_title), row.sample) for row in rows]


def test_a_row_never_loses_both_modalities(shards: Path) -> None:
    whole = {sample: (pictures, title) for pictures, title, sample in dropped_rows(shards, 0.0, 1)}
    lost = {"pictures": 0, "title": 0}
    for pictures, title, sample in dropped_rows(shards, 1.0):
        assert pictures or title
        had = whole[sample]
        # A row with both keeps exactly one; one that came with one keeps it.
        assert (pictures + title == 1) if all(had) else (pictures, title) == had
        lost["pictures"] += all(had) and not pictures
        lost["title"] += all(had) and not title
    assert min(lost.values()) > 0.25 * sum(lost.values())


def without(batch: PairBatch, encoder: Encoder, what: list[str]) -> PairBatch:
    """The batch with the pictures, the title or nothing taken from each content."""
    size = encoder.preprocess.size
    pictures = [
        [] if kept == "pictures" else list(images)
        for kept, images in zip(what, batch.content.images, strict=True)
    ]
    titles = [None if kept == "title" else f"clip {i}" for i, kept in enumerate(what)]
    content = collate_items(pictures, titles, tokenizer=encoder.tokenizer, size=size)
    return replace(batch, content=content)


def test_training_with_dropped_modalities_teaches_each_alone(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path).train()
    whole = random_pairs(encoder, rows=6)
    optimizer = build_optimizer(encoder, OptimizerConfig(learning_rate=3e-3))
    generator = torch.Generator().manual_seed(0)
    kinds = ["pictures", "title", "nothing"]
    for _ in range(40):
        drawn = [kinds[i] for i in torch.randint(3, (6,), generator=generator).tolist()]
        batch = without(whole, encoder, drawn)
        views, scale = encoder(batch)
        contrastive_loss(views, batch, scale, Objectives())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    encoder.eval()
    products = encoder.embed_product(whole.product)
    for kind in kinds:
        queries = encoder.embed_content(without(whole, encoder, [kind] * 6).content)
        assert (queries @ products.T).argmax(1).tolist() == list(range(6)), kind
