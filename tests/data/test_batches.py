"""Rows of shards become batches of tensors; every draw comes from (seed, epoch, sample)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_loader import letters, small_loader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mmrec.data.batches import (
    AugmentConfig,
    PairDataset,
    Preprocess,
    RememberingTokenizer,
    View,
    collate_items,
    item_loader,
    normalise_pixels,
    number_products,
    spread,
    spread_randomly,
)
from mmrec.data.media import decode_jpeg
from mmrec.data.sampler import Row
from mmrec.data.shards import ShardReader, frame_name, open_shards


@pytest.fixture
def train(tiny_shards: Path) -> ShardReader:
    return open_shards(tiny_shards, "contents", "train")


def dataset(train: ShardReader, **changes: float) -> PairDataset:
    return PairDataset(
        train,
        number_products(train.product_ids),
        preprocess=Preprocess(size=32),
        augment=AugmentConfig(**changes),  # pyright: ignore[reportArgumentType]
        num_frames=2,
        num_images=1,
        num_epochs=4,
        seed=0,
    )


def test_collating_pads_and_masks_what_is_missing() -> None:
    picture = torch.full((3, 4, 4), 9, dtype=torch.uint8)
    batch = collate_items(
        [[picture], [], [picture, picture]], ["a", None, "  "], tokenizer=letters, size=4
    )
    assert batch.images.shape == (3, 2, 3, 4, 4)
    assert batch.image_mask.tolist() == [[True, False], [False, False], [True, True]]
    assert batch.text_mask.tolist() == [True, False, False]
    assert batch.images[~batch.image_mask].max() == 0


def test_frames_are_spread_over_the_clip() -> None:
    assert spread(8, 4) == [1, 3, 5, 7]
    assert spread(3, 8) == [0, 1, 2]
    rng = np.random.default_rng(0)
    for _ in range(50):
        drawn = spread_randomly(8, 4, rng)
        assert [t // 2 for t in drawn] == [0, 1, 2, 3]


def test_a_row_is_a_pure_function_of_seed_epoch_and_sample(train: ShardReader) -> None:
    rows = dataset(train)
    one, again, later = rows[Row(0, 3, 0)], rows[Row(0, 3, 0)], rows[Row(1, 3, 0)]
    assert all(torch.equal(a, b) for a, b in zip(one.content, again.content, strict=True))
    assert not torch.equal(one.product[0], later.product[0])


def test_workers_do_not_change_batches(train: ShardReader) -> None:
    streams = [
        small_loader(dataset(train), train, batch_size=6, num_workers=workers) for workers in (0, 2)
    ]
    for one, two in zip(*streams, strict=True):
        assert torch.equal(one.samples, two.samples)
        assert torch.equal(one.content.images, two.content.images)
        assert torch.equal(one.links, two.links)


def test_links_of_a_row_are_all_its_products(train: ShardReader) -> None:
    numbers = number_products(train.product_ids)
    several = next(row for row in range(len(train)) if len(train.product_ids[row]) > 1)
    pair = dataset(train)[Row(0, several, 1)]
    assert pair.links == [numbers[p] for p in train.product_ids[several]]
    assert pair.number == pair.links[1]
    assert pair.weights == train.weights[several]


def test_a_row_whose_product_is_shown_already_brings_none(train: ShardReader) -> None:
    rows = dataset(train)
    shown, hidden = rows[Row(0, 3, 0)], rows[Row(0, 3, 0, brings_product=False)]
    assert shown.product
    assert hidden.product == []
    assert hidden.product_title is None
    assert all(torch.equal(a, b) for a, b in zip(shown.content, hidden.content, strict=True))
    assert (hidden.number, hidden.links) == (shown.number, shown.links)


def test_early_epochs_have_smaller_pictures_of_the_same_crop(train: ShardReader) -> None:
    augment = {"color": 0.0, "early_size": 16, "early_share": 0.5}
    rows, full = dataset(train, **augment), dataset(train, color=0.0)
    for epoch, size in ((0, 16), (1, 16), (2, 32)):
        (picture,) = rows[Row(epoch, 3, 0)].content[:1]
        assert picture.shape == (3, size, size)
        same = full[Row(epoch, 3, 0)].content[0].float()
        smaller = torch.nn.functional.avg_pool2d(same, 32 // size)
        assert (picture.float() - smaller).abs().mean() < 6


def test_modality_dropout_never_takes_both(train: ShardReader) -> None:
    rows = dataset(train, modality_dropout=1.0)
    pairs = [rows[Row(epoch, 0, 0)] for epoch in range(12)]
    states = {(bool(pair.product), pair.product_title is not None) for pair in pairs}
    assert states == {(True, False), (False, True)}


def test_preprocessing_without_augmentation_is_resize_and_centre_crop(train: ShardReader) -> None:
    preprocess = Preprocess(size=32)
    (batch,) = item_loader(
        train,
        [2],
        preprocess=preprocess,
        tokenizer=letters,
        num_frames=4,
        batch_size=1,
        num_workers=0,
    )
    expected = preprocess(decode_jpeg(train.read(2)[frame_name(1)]))
    assert torch.equal(batch.images[0, 1], expected)


@pytest.mark.parametrize("shape", [(40, 60), (3, 500), (1, 1)])
def test_crops_stay_inside_the_picture(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        view = View.draw(AugmentConfig(min_scale=0.1, max_aspect=2.0), rng)
        top, left, height, width = view.box(*shape)
        assert 0 <= top <= top + height <= shape[0]
        assert 0 <= left <= left + width <= shape[1]
        assert height >= 1
        assert width >= 1


@pytest.mark.parametrize("shape", [(256, 341), (100, 100), (60, 200)])
def test_crops_are_as_large_as_torchvisions(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    config = AugmentConfig(min_scale=0.7)
    ours = [View.draw(config, rng).box(*shape) for _ in range(2000)]
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    ratio = (1 / config.max_aspect, config.max_aspect)
    theirs = [RandomResizedCrop.get_params(image, [0.7, 1.0], list(ratio)) for _ in range(2000)]
    for side in (2, 3):
        found, expected = (np.mean([box[side] for box in boxes]) for boxes in (ours, theirs))
        assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_crops_are_resized_as_torchvision_does(mode: str) -> None:
    rng = np.random.default_rng(0)
    # As decoders give pictures: channels innermost.
    image = torch.from_numpy(rng.integers(0, 256, (50, 70, 3), np.uint8)).permute(2, 0, 1)
    view = View(crops=((0.5, 1.2),), max_aspect=2.0, top=0.3, left=0.9)
    preprocess = Preprocess(size=24, interpolation=mode)  # pyright: ignore[reportArgumentType]
    expected = F.resized_crop(
        image.contiguous(),
        *view.box(50, 70),
        size=[24, 24],
        interpolation=InterpolationMode(mode),
        antialias=True,
    )
    assert torch.equal(preprocess.augmented(image, view), expected)


def test_pixels_are_normalised_by_channel() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    mean, std = torch.tensor([100.0, 110.0, 120.0]), torch.tensor([50.0, 60.0, 70.0])
    expected = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        found = normalise_pixels(given, mean, std)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected)
    assert images.dtype == torch.uint8


def test_a_batchs_pictures_are_those_that_the_mask_names() -> None:
    pictures = [torch.full((3, 4, 4), n, dtype=torch.uint8) for n in range(1, 4)]
    for rows in ([pictures[:2], [], pictures[2:]], [pictures[:1], pictures[1:2], pictures[2:]]):
        batch = collate_items(rows, [None] * 3, tokenizer=letters, size=4)
        assert torch.equal(batch.pictures(), torch.stack(pictures))


def test_titles_are_tokenised_once() -> None:
    asked: list[str] = []

    def tokenizer(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return letters(texts)

    remembering = RememberingTokenizer(tokenizer, most=3)
    for texts in (["a", "b", "a"], ["b", "c"], ["a", "d"], ["c"]):
        assert torch.equal(remembering(texts), letters(texts))
    # The fourth title is one too many: all are let go, and those of its batch are asked for again.
    assert asked == ["a", "b", "c", "a", "d", "c"]


def test_sizes_of_epochs() -> None:
    augment = AugmentConfig(early_size=64, early_share=0.5, late_size=96)
    assert [augment.size_of(epoch, 4) for epoch in range(4)] == [64, 64, 96, 96]
    assert AugmentConfig(late_size=96).size_of(0, 4) == 96
    assert AugmentConfig().size_of(0, 4) is None
