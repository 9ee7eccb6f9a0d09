"""CutMix over links: pictures, links and weights change together."""

import numpy as np
import pytest
import torch
from small_loader import small_loader

from mmrec.data.batches import (
    AugmentConfig,
    PairBatch,
    PairDataset,
    Preprocess,
    View,
    number_products,
)
from mmrec.data.mixing import GROUP_ROWS, mix_rows
from mmrec.data.sampler import check_world_size
from mmrec.data.shards import ShardReader, open_shards
from mmrec.errors import UserError


def rows(count: int, side: int = 20) -> dict[str, np.ndarray]:
    """Row i is painted with i + 1 and links to product i with a weight of 2, even rows also to i + 100."""
    paint = np.arange(1, count + 1, dtype=np.uint8).reshape(count, 1, 1, 1, 1)
    links = np.stack([np.arange(count), np.arange(count) + 100], 1)
    links[1::2, 1] = -1
    weights = np.where(links >= 0, np.array([2.0, 6.0]), 0.0)
    return {
        "images": np.broadcast_to(paint, (count, 2, side, side, 3)).copy(),
        "mask": np.ones((count, 2), bool),
        "links": links,
        "weights": weights,
    }


def test_links_follow_the_pixels() -> None:
    before = rows(12)
    x = rows(12)
    links, weights, mixed = mix_rows(**x, probability=1.0, rng=np.random.default_rng(0))
    assert mixed.sum() > 6
    for row in range(12):
        own = links[row] % 100 == row
        painted = (x["images"][row] == row + 1).mean()
        if not mixed[row]:
            assert painted == 1
            np.testing.assert_array_equal(weights[row, :2], before["weights"][row])
            continue
        other = set(x["images"][row].ravel().tolist()) - {row + 1}
        partner = links[row, 2]
        assert other <= {int(partner) + 1}
        # The weights of a row's own links sum to the share of its pixels that is left.
        assert weights[row, own & (links[row] >= 0)].sum() == pytest.approx(painted)
        assert weights[row].sum() == pytest.approx(1)
        # Within a row's links, their ratio stays.
        if row % 2 == 0 and painted:
            assert weights[row, 1] / weights[row, 0] == pytest.approx(3)


def test_rows_with_other_numbers_of_pictures_are_left_as_they_are() -> None:
    x = rows(6)
    x["mask"][:3, 1] = False
    x["mask"][0] = False
    images = x["images"].copy()
    _, _, mixed = mix_rows(**x, probability=1.0, rng=np.random.default_rng(1))
    assert not mixed[0]
    assert np.array_equal(x["images"][0], images[0])
    for row in np.flatnonzero(mixed):
        # Only pictures that are there are changed.
        t = x["mask"][row].sum()
        assert np.array_equal(x["images"][row, t:], images[row, t:])


def test_without_a_chance_nothing_is_mixed() -> None:
    x = rows(4)
    images = x["images"].copy()
    links, weights, mixed = mix_rows(**x, probability=0.0, rng=np.random.default_rng(0))
    assert not mixed.any()
    assert np.array_equal(x["images"], images)
    assert links.shape == weights.shape == (4, 4)
    assert (links[:, 2:] == -1).all()
    assert (weights[:, 2:] == 0).all()


def test_batches_are_mixed_alike_by_any_workers_and_lose_their_titles(tiny_shards) -> None:
    reader = open_shards(tiny_shards, "contents", "train")
    mixed, again, plain = (
        _first_batch(reader, mix, workers) for mix, workers in ((1.0, 0), (1.0, 2), (0.0, 0))
    )
    for name in ("links", "weights"):
        assert torch.equal(getattr(mixed, name), getattr(again, name))
    assert torch.equal(mixed.content.images, again.content.images)
    changed = (mixed.content.images != plain.content.images).flatten(1).any(1)
    assert changed.any()
    assert not mixed.content.text_mask[changed].any()
    assert torch.equal(mixed.product.images, plain.product.images)


def test_ranks_make_the_mixtures_of_one(tiny_shards) -> None:
    reader = open_shards(tiny_shards, "contents", "train")

    def batches(rank: int, world_size: int) -> list[PairBatch]:
        rows = _dataset(reader, mix=0.8)
        loader = small_loader(
            rows, reader, batch_size=8, num_workers=0, rank=rank, world_size=world_size
        )
        return list(loader)

    num_mixed = 0
    for whole, *parts in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        pictures = torch.cat([part.content.pictures() for part in parts])
        assert torch.equal(whole.content.pictures(), pictures)
        text_mask = torch.cat([part.content.text_mask for part in parts])
        assert torch.equal(whole.content.text_mask, text_mask)
        for name in ("links", "weights"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(getattr(whole, name), joined)
        num_mixed += int((whole.links[:, whole.links.shape[1] // 2] >= 0).sum())
    assert num_mixed > 8
    with pytest.raises(
        UserError, match=r"12 gives each of 2 processes 6 rows, and --augment\.mix mixes 4"
    ):
        check_world_size(12, 2, group_rows=GROUP_ROWS)


def _first_batch(reader: ShardReader, mix: float, workers: int) -> PairBatch:
    rows = _dataset(reader, mix=mix)
    return next(iter(small_loader(rows, reader, batch_size=4, num_workers=workers)))


def _dataset(reader: ShardReader, *, mix: float) -> PairDataset:
    return PairDataset(
        reader,
        number_products(reader.product_ids),
        preprocess=Preprocess(size=16),
        augment=AugmentConfig(mix=mix),
        num_frames=2,
        num_images=1,
        num_epochs=2,
        seed=0,
    )


def test_turning_and_erasing_leave_the_mean_behind() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0] = 200
    preprocess = Preprocess(size=32)
    plain = View(crops=((1.0, 1.0),), max_aspect=2.0, top=0.0, left=0.0)
    turned = View(**{**vars(plain), "angle": 30.0})
    # A picture of one colour all over looks the same from any side.
    red = preprocess.augmented(image, turned)[0].float()
    # torchvision darkens the seam between the two.
    assert red.min() > 120
    half = image.clone()
    half[1, :, 16:] = 100
    erased = View(**{**vars(plain), "hole": (0.0, 0.5, 1.0, 0.5)})
    found = preprocess.augmented(half, erased)
    assert torch.equal(found[:, :, :16], half[:, :, :16])
    assert (found[1, :, 16:] == 50).all()
    quarter = preprocess.augmented(half, View(**{**vars(plain), "angle": 90.0}))
    assert (quarter[1, :14] == 100).all()  # against the clock, right becomes top
    assert (quarter[1, 18:] == 0).all()
