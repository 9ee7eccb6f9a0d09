"""The order of the data: a pure function of (seed, epoch, t), cut into equal slices for ranks."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmrec.data.sampler import GlobalBatches, RankBatches, Row, SamplerConfig
from mmrec.errors import UserError


def make(config: SamplerConfig, products: list[list[int]], shard_size: int = 7) -> GlobalBatches:
    count = len(products)
    sizes = [min(shard_size, count - start) for start in range(0, count, shard_size)]
    return GlobalBatches(
        config, shard_sizes=sizes, products=products, weights=[[1.0] * len(p) for p in products]
    )


def test_an_epoch_shows_each_sample_once_and_only_the_remainder_is_left_out() -> None:
    batches = make(SamplerConfig(batch_size=8), [[i % 5] for i in range(45)])
    rows = [row.sample for batch in batches.epoch(0) for row in batch]
    assert batches.steps_per_epoch == 5
    assert len(rows) == len(set(rows)) == 40


def test_same_seed_and_epoch_give_the_same_batches_and_others_do_not() -> None:
    products = [[i % 5] for i in range(45)]
    one, two = (make(SamplerConfig(batch_size=8, seed=3), products) for _ in range(2))
    assert one.epoch(4) == two.epoch(4)
    assert one.epoch(4) != one.epoch(5)
    assert one.epoch(4) != make(SamplerConfig(batch_size=8, seed=4), products).epoch(4)


def test_a_window_of_one_shard_reads_shards_one_after_another() -> None:
    batches = make(SamplerConfig(batch_size=7, window_shards=1), [[i] for i in range(35)])
    for batch in batches.epoch(0):
        assert len({row.sample // 7 for row in batch}) == 1


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_product_fills_at_most_its_share_of_every_batch(limit: int) -> None:
    rng = np.random.default_rng(0)
    # A long tail: product 0 has about a third of all samples.
    products = [
        [int(p)] for p in np.minimum(rng.geometric(0.08, 400) - 1, 40) * (rng.random(400) > 0.3)
    ]
    batches = make(SamplerConfig(batch_size=16, max_rows_per_product=limit), products)
    for epoch in range(3):
        plan = batches.epoch(epoch)
        assert len(plan) == batches.steps_per_epoch
        for batch in plan:
            assert len(batch) == len({row.sample for row in batch}) == 16
            assert max(Counter(batches.product_of(row) for row in batch).values()) <= limit


def test_without_a_heavy_product_the_limit_still_shows_every_sample() -> None:
    batches = make(
        SamplerConfig(batch_size=8, max_rows_per_product=2), [[i % 20] for i in range(80)]
    )
    assert len({row.sample for batch in batches.epoch(1) for row in batch}) >= 76


def test_several_links_are_drawn_by_weight() -> None:
    batches = GlobalBatches(
        SamplerConfig(batch_size=50),
        shard_sizes=[100],
        products=[[0, 1]] * 100,
        weights=[[3.0, 1.0]] * 100,
    )
    slots = [row.slot for epoch in range(40) for batch in batches.epoch(epoch) for row in batch]
    assert np.mean(slots) == pytest.approx(0.25, abs=0.03)


def ranks(batches: GlobalBatches, world: int, **start: int) -> list[list[list[Row]]]:
    return [
        list(RankBatches(batches, rank=rank, world_size=world, num_epochs=3, **start))
        for rank in range(world)
    ]


def test_ranks_share_global_batches_whatever_their_number() -> None:
    batches = make(SamplerConfig(batch_size=8), [[i % 9] for i in range(50)])
    (alone,) = ranks(batches, 1)
    for world in (2, 4):
        parts = ranks(batches, world)
        joined = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
        assert joined == alone


def test_starting_in_the_middle_gives_the_rest_of_the_stream() -> None:
    batches = make(SamplerConfig(batch_size=8), [[i % 9] for i in range(50)])
    (whole,) = ranks(batches, 1)
    (rest,) = ranks(batches, 1, start_epoch=1, start_step=4)
    assert rest == whole[batches.steps_per_epoch + 4 :]
    assert len(
        RankBatches(batches, rank=0, world_size=1, num_epochs=3, start_epoch=1, start_step=4)
    ) == len(rest)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="a batch of 64 rows needs as many samples, found 10"):
        make(SamplerConfig(batch_size=64), [[i] for i in range(10)])
    with pytest.raises(UserError, match="cannot fill a batch of 8 rows: at most 4 rows fit"):
        make(SamplerConfig(batch_size=8, max_rows_per_product=2), [[i % 2] for i in range(40)])
    with pytest.raises(UserError, match="cannot be cut into 3 equal parts"):
        RankBatches(
            make(SamplerConfig(batch_size=8), [[i] for i in range(40)]),
            rank=0,
            world_size=3,
            num_epochs=1,
        )


@pytest.mark.parametrize("limit", [None, 2])
def test_unique_products_come_with_their_first_row_of_the_global_batch(limit: int | None) -> None:
    products = [[i % 5, 5 + i % 3] for i in range(48)]
    plain = SamplerConfig(batch_size=8, max_rows_per_product=limit)
    batches = make(replace(plain, unique_products=True), products)
    for batch, same in zip(batches.epoch(1), make(plain, products).epoch(1), strict=True):
        assert [(row.sample, row.slot) for row in batch] == [(r.sample, r.slot) for r in same]
        assert all(row.brings_product for row in same)
        drawn = [batches.product_of(row) for row in batch]
        firsts = [product not in drawn[:i] for i, product in enumerate(drawn)]
        assert [row.brings_product for row in batch] == firsts
    # Ranks cut the marked batch: a product comes once over all of them.
    ranks = [list(RankBatches(batches, rank=r, world_size=2, num_epochs=1)) for r in (0, 1)]
    for parts in zip(*ranks, strict=True):
        brought = [batches.product_of(row) for part in parts for row in part if row.brings_product]
        assert len(brought) == len(set(brought))
