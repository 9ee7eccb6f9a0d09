"""The order of the data: a pure function of (seed, epoch, t), cut into equal slices for ranks."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmrec.data.sampler import GlobalBatches, RankBatches, Row, SamplerConfig, draw_some
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
    assert list(one.epoch(4)) == list(two.epoch(4))
    assert list(one.epoch(4)) != list(one.epoch(5))
    other = make(SamplerConfig(batch_size=8, seed=4), products)
    assert list(one.epoch(4)) != list(other.epoch(4))


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
        shown = Counter(row.sample for batch in plan for row in batch)
        assert max(shown.values()) > 1
        # What is shown again is augmented anew.
        views = {(row.sample, row.repeat) for batch in plan for row in batch}
        assert views == {(sample, n) for sample, count in shown.items() for n in range(count)}


def test_a_limit_is_judged_by_all_links_and_epochs_that_cannot_keep_it_take_the_next() -> None:
    def linked(products: list[list[int]], weights: list[float], limit: int) -> GlobalBatches:
        config = SamplerConfig(batch_size=8, max_rows_per_product=limit)
        return GlobalBatches(
            config, shard_sizes=[64], products=products, weights=[weights] * len(products)
        )

    # Half of the rows show the product that all contents link to first.
    batches = linked([[0, 1 + i] for i in range(64)], [1.0, 1.0], 4)
    for batch in batches.epoch(0):
        assert max(Counter(map(batches.product_of, batch)).values()) <= 4
    with pytest.raises(UserError, match="cannot fill a batch of 8 rows: at most 4 rows fit"):
        linked([[1 + i, 0] for i in range(64)], [0.01, 10.0], 4)
    # About nine products an epoch, and in some epochs fewer than the batch has rows.
    batches = linked([[0, 1 + i] for i in range(64)], [7.0, 1.0], 1)
    limits = []
    for epoch in range(40):
        plan = batches.epoch(epoch)
        assert len(plan) == 8
        assert all(len({row.sample for row in batch}) == 8 for batch in plan)
        largest = max(max(Counter(map(batches.product_of, batch)).values()) for batch in plan)
        limits.append(largest)
        _, slots = batches.order(epoch)
        assert largest == max(1, 8 - slots.sum())
    assert {1, 2} <= set(limits)


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
    with pytest.raises(UserError, match="at least one group of 8 rows in a batch of 8"):
        make(SamplerConfig(batch_size=8, group_by="x"), [[i] for i in range(40)])
    with pytest.raises(UserError, match=r"--sampler\.max-rows-per-product 0: expected at least 1"):
        make(SamplerConfig(batch_size=8, max_rows_per_product=0), [[i] for i in range(40)])
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


# --- earlier batches stay what they were -------------------------------------------------------


def linked_tail(count: int) -> tuple[list[list[int]], list[list[float]]]:
    """Products with a long tail, one to three a content, and weights."""
    rng = np.random.default_rng(0)
    draws = [rng.geometric(0.08, 1 + i % 3) - 1 for i in range(count)]
    products = [sorted({int(p) for p in np.minimum(drawn, 39)}) for drawn in draws]
    return products, [[1.0 + (i + j) % 4 for j in range(len(p))] for i, p in enumerate(products)]


@pytest.mark.parametrize(
    ("config", "count", "digests"),
    [
        (
            SamplerConfig(batch_size=8, window_shards=2, seed=3),
            45,
            ("bf26f3f191de00de", "3ce9b1a9dcdb8640"),
        ),
        (
            SamplerConfig(batch_size=16, max_rows_per_product=1, seed=1),
            400,
            ("e807b933177251f4", "7d52b17c52da8059"),
        ),
        (
            SamplerConfig(batch_size=16, max_rows_per_product=3, window_shards=5),
            400,
            ("d5c997355ae9a4ea", "3dbfce3b8c1a8e4f"),
        ),
        (
            SamplerConfig(batch_size=16, max_rows_per_product=2, unique_products=True),
            400,
            ("ec01039f8f77a5b0", "a53c1c622771a49d"),
        ),
    ],
)
def test_batches_are_those_of_the_first_version(
    config: SamplerConfig, count: int, digests: tuple[str, str]
) -> None:
    """A run that was begun earlier can be resumed; the digests were taken before arrays replaced lists."""
    products, weights = linked_tail(count)
    sizes = [min(7, count - start) for start in range(0, count, 7)]
    batches = GlobalBatches(config, shard_sizes=sizes, products=products, weights=weights)
    for epoch, digest in zip((0, 4), digests, strict=True):
        rows = [
            [row.epoch, row.sample, row.slot, int(row.brings_product)]
            for batch in batches.epoch(epoch)
            for row in batch
        ]
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


# --- groups ------------------------------------------------------------------------------------


def grouped(limit: int | None, *, share: float = 0.5) -> GlobalBatches:
    """240 samples of 60 products; product p is of group p % 12, and those above 53 of none."""
    config = SamplerConfig(
        batch_size=24,
        group_by="category",
        group_share=share,
        group_size=4,
        max_rows_per_product=limit,
    )
    products = [[(i * 7) % 60] for i in range(250)]
    return GlobalBatches(
        config,
        shard_sizes=[50] * 5,
        products=products,
        weights=[[1.0]] * 250,
        groups=np.array([p % 12 if p < 54 else -1 for p in range(60)]),
    )


@pytest.mark.parametrize("limit", [None, 2])
def test_a_share_of_each_batch_comes_in_groups(limit: int | None) -> None:
    def in_groups(batches: GlobalBatches) -> np.ndarray:
        """Rows of each batch that stand in fours of one group."""
        found = []
        for epoch in range(3):
            for batch in batches.epoch(epoch):
                counts = Counter(batches.product_of(row) % 12 for row in batch)
                found.append(sum(n - n % 4 for n in counts.values()))
        return np.array(found)

    # With five products a group a cap of two sends some rows of a group to the next batch.
    for share, least in ((0.5, 12), (1.0, 20 if limit is None else 15)):
        batches = grouped(limit, share=share)
        assert in_groups(batches).mean() >= least
        for epoch in range(2):
            rows = [row for batch in batches.epoch(epoch) for row in batch]
            assert len(rows) == 240
            assert len({row.sample for row in rows}) >= (240 if limit is None else 230)
            if limit:
                for batch in batches.epoch(epoch):
                    assert max(Counter(map(batches.product_of, batch)).values()) <= limit
    plain = SamplerConfig(batch_size=24)
    without = make(plain, [[(i * 7) % 60] for i in range(250)], shard_size=50)
    assert in_groups(without).mean() < 7


def test_groups_are_a_pure_function_and_share_ranks() -> None:
    assert list(grouped(2).epoch(3)) == list(grouped(2).epoch(3))
    (alone,) = ranks(grouped(2), 1)
    parts = ranks(grouped(2), 4)
    assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == alone


def test_where_few_groups_can_be_formed_the_rest_comes_as_it_came() -> None:
    batches = GlobalBatches(
        SamplerConfig(batch_size=8, group_by="x", group_size=4),
        shard_sizes=[40],
        products=[[i] for i in range(40)],
        weights=[[1.0]] * 40,
        groups=np.array([0] * 9 + [-1] * 31),
    )
    rows = [row.sample for batch in batches.epoch(0) for row in batch]
    assert sorted(rows) == list(range(40))
    together = [sum(row.sample < 9 for row in batch) for batch in batches.epoch(0)]
    assert sum(n >= 4 for n in together) == 2


# --- several sources ---------------------------------------------------------------------------


def mixed(*weights: float, limit: int | None = None, seed: int = 0) -> GlobalBatches:
    """Three sources of ten products each; product 7 occurs in all of them."""
    sizes = (60, 30, 10)
    config = SamplerConfig(
        batch_size=10,
        source_weights=weights,
        window_shards=2,
        max_rows_per_product=limit,
        seed=seed,
    )
    products = [
        [7 if i % 10 == 7 else 10 * source + i % 10]
        for source, size in enumerate(sizes)
        for i in range(size)
    ]
    return GlobalBatches(
        config,
        shard_sizes=[part for size in sizes for part in [10] * (size // 10)],
        products=products,
        weights=[[1.0]] * len(products),
        source_sizes=sizes,
    )


def source_of(row: Row) -> int:
    return 0 if row.sample < 60 else 1 if row.sample < 90 else 2


def test_each_batch_has_rows_of_each_source_by_weight() -> None:
    batches = mixed(1.0, 1.0, 0.5)
    assert batches.steps_per_epoch == 10
    counts = [
        Counter(source_of(row) for row in batch) for e in range(5) for batch in batches.epoch(e)
    ]
    assert all(counts[t][0] == counts[t][1] == 4 and counts[t][2] == 2 for t in range(50))
    thirds = [
        Counter(source_of(row) for row in batch)
        for e in range(3)
        for batch in mixed(1.0, 1.0, 1.0).epoch(e)
    ]
    assert all(sum(count.values()) == 10 for count in thirds)
    assert all(3 <= count[source] <= 4 for count in thirds for source in range(3))
    assert sum((count for count in thirds), Counter())[0] == pytest.approx(100, abs=3)


def test_a_source_that_ends_is_shuffled_anew_with_its_own_counter() -> None:
    batches = mixed(1.0, 1.0, 0.5)
    rows = [row for e in range(3) for batch in batches.epoch(e) for row in batch]
    for source, size in enumerate((60, 30, 10)):
        own = [row for row in rows if source_of(row) == source]
        # 120, 120 and 60 rows are whole passes: no sample is shown more often than another.
        assert set(Counter(row.sample for row in own).values()) == {len(own) // size}
        assert [row.sample for row in own[:size]] != [row.sample for row in own[size : 2 * size]]
    # A sample that comes twice in an epoch is augmented anew.
    assert len({(row.epoch, row.sample, row.repeat) for row in rows}) == len(rows)


def test_without_weights_an_epoch_is_one_pass_over_the_sum() -> None:
    batches = mixed()
    rows = [row.sample for batch in batches.epoch(0) for row in batch]
    assert sorted(rows) == list(range(100))


def test_a_mixture_is_a_pure_function_and_keeps_the_cap() -> None:
    one, two = (mixed(3.0, 2.0, 1.0, limit=1, seed=5) for _ in range(2))
    assert list(one.epoch(2)) == list(two.epoch(2))
    for batch in one.epoch(2):
        assert len({one.product_of(row) for row in batch}) == 10
    (alone,) = ranks(one, 1)
    parts = ranks(one, 2)
    assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == alone
    (rest,) = ranks(one, 1, start_epoch=1, start_step=3)
    assert rest == alone[13:]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"1\.0 2\.0: expected a weight for each of the 3"):
        mixed(1.0, 2.0)
    with pytest.raises(UserError, match=r"source-weights 0\.0: expected more than 0"):
        mixed(1.0, 2.0, 0.0)
    with pytest.raises(
        UserError, match=r"folder 3 has 10 samples, and its share of a batch is 1[67]"
    ):
        GlobalBatches(
            SamplerConfig(batch_size=50, source_weights=(1.0, 1.0, 1.0)),
            shard_sizes=[60, 30, 10],
            products=[[i] for i in range(100)],
            weights=[[1.0]] * 100,
            source_sizes=[60, 30, 10],
        )


def test_some_are_drawn_in_order() -> None:
    rng = np.random.default_rng(0)
    assert draw_some(3, 5, rng) == [0, 1, 2]
    draws = {tuple(draw_some(4, 2, rng)) for _ in range(200)}
    assert draws == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
