"""Which samples make global batch t of an epoch: a pure function of (seed, epoch, t).

Shards are permuted and read in windows, samples are permuted inside a window, and rows are dealt to
batches so that no product fills more than its share. Ranks take slices of a global batch, so another
number of ranks or of loader workers sees the same batches, and a resume is two integers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, overload

import numpy as np
from jaxtyping import Bool, Float, Int

from mmrec.data.dealing import (
    arrange_groups,
    deal_capped,
    interleave,
    occurrence,
    rows_of_sources,
)
from mmrec.errors import UserError
from mmrec.ranges import Count, CountOrZero, Positive, Range, Share, check_ranges

# Shape letters: S steps in an epoch, B rows in a global batch, N rows of an epoch, M links, P products.

# Third entries of seeds, where sources have 1 and up: one epoch's draws are not another purpose's.
_GROUPING, _MIXING = 2**31, 2**31 + 1


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How an epoch is cut into global batches."""

    batch_size: Count = 256
    """Rows of a global batch, over all ranks."""
    max_rows_per_product: Count | None = None
    """At most this many rows of a global batch show the same product; None sets no limit.

    Rows over the limit wait for later batches, and earlier rows are shown again in their place. In an epoch
    whose draws among contents' links leave too few products for that, the limit is the next that will do.
    """
    unique_products: bool = False
    """Show a product once a global batch: the first of its rows brings it, and is the positive of all.

    The columns are then distinct products, as in a classifier's softmax, and pictures of the same
    product are not encoded twice. Off, every row brings its product, each with its own augmentation.
    """
    group_by: str | None = None
    """A product attribute, such as category: part of each batch comes in groups of products that share
    its value, and so are harder to tell apart. None makes no groups."""
    group_share: Share = 0.5
    """Share of a batch's rows that comes in groups; less where too few rows share a value."""
    group_size: Annotated[int, Range(2)] = 8
    """Rows of a group."""
    source_weights: tuple[Positive, ...] = ()
    """With several folders of shards, the weight of each in every batch; empty takes their sizes.

    An epoch has as many rows as all sources together. A source whose weight is more than its size is
    shown more than once in it, and a source that ends is shuffled anew and goes on; the batch in which it
    does may hold a content twice, with a link and a view drawn for each.
    """
    window_shards: Count = 64
    """Shards whose samples are permuted together: larger mixes better, smaller reads closer together."""
    seed: CountOrZero = 0


@dataclass(frozen=True)
class Row:
    """One row of a batch: which content, and which of its links stands for it."""

    epoch: int
    sample: int
    slot: int
    brings_product: bool = True
    """False where an earlier row of the global batch has brought the same product."""
    repeat: int = 0
    """Which showing of the sample this is within the epoch, counted from 0."""


@dataclass(frozen=True)
class _Stream:
    """Rows of one source in the order in which they are offered."""

    samples: Int[np.ndarray, "*rows"]
    slots: Int[np.ndarray, "*rows"]

    def take(self, rows: Int[np.ndarray, "*rest"]) -> "_Stream":
        return _Stream(self.samples[rows], self.slots[rows])


def _join(parts: Sequence[_Stream]) -> _Stream:
    return _Stream(
        samples=np.concatenate([part.samples for part in parts]),
        slots=np.concatenate([part.slots for part in parts]),
    )


class EpochPlan(Sequence[list[Row]]):
    """The global batches of one epoch; rows are made when a batch is asked for."""

    def __init__(
        self,
        epoch: int,
        *,
        samples: Int[np.ndarray, "S B"],
        slots: Int[np.ndarray, "S B"],
        repeats: Int[np.ndarray, "S B"],
        products: Int[np.ndarray, "S B"] | None,
    ) -> None:
        """`products` are given where only a product's first row of a batch brings it."""
        self._epoch = epoch
        self._samples, self._slots, self._repeats = samples, slots, repeats
        self._products = products

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, step: int) -> list[Row]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[Row]]: ...
    def __getitem__(self, step: int | slice) -> list[Row] | list[list[Row]]:
        if isinstance(step, slice):
            return [self.rows(t) for t in range(*step.indices(len(self)))]
        return self.rows(step)

    def rows(self, step: int, part: slice = slice(None)) -> list[Row]:
        """The rows of one batch, or of a part of it."""
        columns = (
            self._samples[step, part].tolist(),
            self._slots[step, part].tolist(),
            self._brings(step)[part].tolist(),
            self._repeats[step, part].tolist(),
        )
        return [Row(self._epoch, *values) for values in zip(*columns, strict=True)]

    def _brings(self, step: int) -> Bool[np.ndarray, " B"]:
        brings = np.ones(self._samples.shape[1], bool)
        if self._products is not None:
            _, first = np.unique(self._products[step], return_index=True)
            brings[:] = False
            brings[first] = True
        return brings


class GlobalBatches:
    """The global batches of every epoch over one split of one or several sources.

    `shard_sizes` are the samples of each shard in order, `products` each sample's linked product
    numbers, and `weights` the weights of those links; a sample with several links is represented in
    an epoch by one of them, drawn by weight. `source_sizes` are the samples of each folder of shards,
    where there are several: one follows another. `groups` is each product's group by its number, -1 for
    none, where the config asks for groups.

    Raises `UserError` when no full batch can be dealt, or a setting is out of its range.
    """

    def __init__(
        self,
        config: SamplerConfig,
        *,
        shard_sizes: Sequence[int],
        products: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        source_sizes: Sequence[int] = (),
        groups: Int[np.ndarray, " P"] | None = None,
    ) -> None:
        self.config = config
        self._shard_starts = _starts(shard_sizes)
        # All samples' links end to end: sample i has those from _link_starts[i] to _link_starts[i + 1].
        self._link_starts = _starts([len(numbers) for numbers in products])
        self._products = np.fromiter(chain.from_iterable(products), np.int64)
        self._groups = groups
        self._reach = self._cumulated_weights(weights)
        self._source_starts = _starts(source_sizes or [len(products)])
        _check_ranges(config)
        if len(products) < config.batch_size:
            raise UserError(
                f"a batch of {config.batch_size} rows needs as many samples, found {len(products)}; "
                f"lower --sampler.batch-size"
            )
        self.steps_per_epoch = len(products) // config.batch_size
        self._counts = self._rows_of_sources()
        if config.max_rows_per_product is not None:
            room = float(np.minimum(self._expected_rows(), config.max_rows_per_product).sum())
            if room < config.batch_size - 1e-6:  # sums of shares are not exact
                raise UserError(
                    f"--sampler.max-rows-per-product {config.max_rows_per_product} cannot fill a batch of "
                    f"{config.batch_size} rows: at most {int(room)} rows fit; raise it, or lower "
                    f"--sampler.batch-size"
                )

    def _expected_rows(self) -> Float[np.ndarray, " P"]:
        """How many rows of an epoch show each product on average.

        The mean of what fits under a limit is at most what fits of these, as a minimum is concave.
        """
        first, sizes = self._link_starts[:-1], np.diff(self._source_starts)
        shares = np.diff(self._reach, prepend=0.0)
        shares[first] = self._reach[first]
        # A source alone offers all of its rows, and only the remainder is left over.
        times = self._counts.sum(0) / sizes if len(sizes) > 1 else np.ones(1)  # (K,)
        of_links = np.repeat(np.repeat(times, sizes), np.diff(self._link_starts))
        return np.bincount(self._products, shares * of_links)

    def _rows_of_sources(self) -> Int[np.ndarray, "S K"]:
        sizes = np.diff(self._source_starts)
        given = self.config.source_weights or tuple(sizes.tolist())
        if len(given) != len(sizes):
            raise UserError(
                f"--sampler.source-weights {' '.join(map(str, given))}: expected a weight for each "
                f"of the {len(sizes)} folders of shards"
            )
        counts = rows_of_sources(
            np.asarray(given, np.float64),
            batch_size=self.config.batch_size,
            num_batches=self.steps_per_epoch,
        )
        for number, (size, most) in enumerate(zip(sizes, counts.max(0), strict=True), start=1):
            if size < most:
                raise UserError(
                    f"--sampler.source-weights: folder {number} has {size} samples, and its share of a "
                    f"batch is {most}; lower its weight or --sampler.batch-size"
                )
        return counts

    def _cumulated_weights(self, weights: Sequence[Sequence[float]]) -> Float[np.ndarray, " M"]:
        """Each link's upper end in 0..1 when its sample's links share that stretch by weight."""
        reach = np.fromiter(chain.from_iterable(weights), np.float64)
        first, lengths = self._link_starts[:-1], np.diff(self._link_starts)
        for m in range(1, int(lengths.max(initial=1))):
            places = first[lengths > m] + m
            reach[places] += reach[places - 1]
        return reach / np.repeat(reach[first + lengths - 1], lengths)

    def order(self, epoch: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Every sample of a single source in the order in which an epoch offers them, and the slots."""
        rng = np.random.default_rng([self.config.seed, epoch])
        samples = self._permute_shards(np.arange(len(self._shard_starts) - 1), rng)
        return samples, self._draw_slots(samples, rng)

    def _permute_shards(
        self, shards: Int[np.ndarray, " K"], rng: np.random.Generator
    ) -> Int[np.ndarray, " N"]:
        shards = rng.permutation(shards)
        parts = []
        for first in range(0, len(shards), self.config.window_shards):
            window = shards[first : first + self.config.window_shards]
            samples = [np.arange(*self._shard_starts[s : s + 2]) for s in window]
            parts.append(rng.permutation(np.concatenate(samples)))
        return np.concatenate(parts)

    def _draw_slots(
        self, samples: Int[np.ndarray, " N"], rng: np.random.Generator
    ) -> Int[np.ndarray, " N"]:
        draws = rng.random(len(samples))
        slots = np.zeros(len(samples), np.int64)
        lengths = np.diff(self._link_starts)[samples]
        # Only contents with several links need a draw; most have one.
        several = np.flatnonzero(lengths > 1)
        first, lengths, draws = (
            self._link_starts[samples[several]],
            lengths[several],
            draws[several],
        )
        for m in range(int(lengths.max(initial=1)) - 1):
            within = m < lengths - 1
            slots[several[within]] += self._reach[first[within] + m] <= draws[within]
        return slots

    def epoch(self, epoch: int) -> EpochPlan:
        """All global batches of an epoch: `steps_per_epoch` of `batch_size` rows."""
        stream = self._mixed(epoch) if len(self._source_starts) > 2 else self._alone(epoch)
        products = self._products[self._link_starts[stream.samples] + stream.slots]
        rows = self._deal(products)
        dealt = stream.take(rows)
        return EpochPlan(
            epoch,
            samples=dealt.samples,
            slots=dealt.slots,
            repeats=self._repeats(dealt.samples),
            products=products[rows] if self.config.unique_products else None,
        )

    def _repeats(self, samples: Int[np.ndarray, "S B"]) -> Int[np.ndarray, "S B"]:
        if len(self._source_starts) == 2 and self.config.max_rows_per_product is None:
            return np.zeros_like(samples)  # each is shown once
        return occurrence(samples.ravel()).reshape(samples.shape)

    def _alone(self, epoch: int) -> _Stream:
        stream = _Stream(*self.order(epoch))
        return self._grouped(stream, self._counts[:, 0], [self.config.seed, epoch, _GROUPING])

    def _mixed(self, epoch: int) -> _Stream:
        """The rows of all sources, a batch after the other, each from the place where its source is."""
        parts = []
        for source in range(len(self._source_starts) - 1):
            counts = self._counts[:, source]
            part = self._stretch(source, epoch * int(counts.sum()), int(counts.sum()))
            seed = [self.config.seed, epoch, _GROUPING, source]
            parts.append(self._grouped(part, counts, seed))
        rng = np.random.default_rng([self.config.seed, epoch, _MIXING])
        return _join(parts).take(interleave(self._counts, rng))

    def _stretch(self, source: int, start: int, count: int) -> _Stream:
        """Rows from `start` on of a source that is shuffled anew, with a counter of its own, as it ends."""
        low, high = self._source_starts[source : source + 2]
        first, size = start // int(high - low), int(high - low)
        shards = np.flatnonzero((self._shard_starts[:-1] >= low) & (self._shard_starts[:-1] < high))
        passes = []
        for number in range(first, -(-(start + count) // size)):
            rng = np.random.default_rng([self.config.seed, number, source + 1])
            samples = self._permute_shards(shards, rng)
            slots = self._draw_slots(samples, rng)
            passes.append(_Stream(samples, slots))
        begin = start - first * size
        return _join(passes).take(np.arange(begin, begin + count))

    def _grouped(
        self, stream: _Stream, counts: Int[np.ndarray, " S"], seed: Sequence[int]
    ) -> _Stream:
        if self.config.group_by is None:
            return stream
        if self._groups is None:
            raise ValueError(
                f"groups of '{self.config.group_by}' are asked for, and none are given"
            )
        products = self._products[self._link_starts[stream.samples] + stream.slots]
        # As many rows as are read together anyway, and enough for groups of every value to form.
        rows_per_shard = len(self._link_starts) // max(1, len(self._shard_starts) - 1)
        span = max(16 * self.config.batch_size, self.config.window_shards * rows_per_shard)
        return stream.take(
            arrange_groups(
                self._groups[products],
                products,
                counts=counts,
                share=self.config.group_share,
                size=self.config.group_size,
                limit=self.config.max_rows_per_product,
                span=span,
                rng=np.random.default_rng(seed),
            )
        )

    def _deal(self, products: Int[np.ndarray, " N"]) -> Int[np.ndarray, "S B"]:
        steps, size = self.steps_per_epoch, self.config.batch_size
        limit = self.config.max_rows_per_product
        if limit is None:
            return np.arange(steps * size).reshape(steps, size)
        counts = np.bincount(products)
        while np.minimum(counts, limit).sum() < size:
            limit += 1
        return deal_capped(products, num_batches=steps, batch_size=size, limit=limit)

    def product_of(self, row: Row) -> int:
        """The number of the product that stands for a row."""
        return int(self._products[self._link_starts[row.sample] + row.slot])


def _starts(sizes: Sequence[int]) -> Int[np.ndarray, " N"]:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _check_ranges(config: SamplerConfig) -> None:
    check_ranges(config, "sampler.")
    if config.group_by is None:
        return
    if not config.group_size <= config.group_share * config.batch_size <= config.batch_size:
        raise UserError(
            f"--sampler.group-share {config.group_share}: expected at most 1, and at least one group of "
            f"{config.group_size} rows in a batch of {config.batch_size}"
        )


class RankBatches:
    """One rank's slices of the global batches from (epoch, t) to the end of `num_epochs`: a batch sampler.

    Raises `UserError` when the world size does not divide the global batch.
    """

    def __init__(
        self,
        batches: GlobalBatches,
        *,
        rank: int,
        world_size: int,
        num_epochs: int,
        start_epoch: int = 0,
        start_step: int = 0,
    ) -> None:
        size = batches.config.batch_size
        check_world_size(size, world_size)
        self._batches = batches
        self._slice = slice(rank * size // world_size, (rank + 1) * size // world_size)
        self._start = (start_epoch, start_step)
        self._num_epochs = num_epochs

    def __len__(self) -> int:
        epoch, step = self._start
        return max(0, (self._num_epochs - epoch) * self._batches.steps_per_epoch - step)

    def __iter__(self) -> Iterator[list[Row]]:
        epoch, step = self._start
        for number in range(epoch, self._num_epochs):
            plan = self._batches.epoch(number)
            for t in range(step if number == epoch else 0, len(plan)):
                yield plan.rows(t, self._slice)


def check_world_size(batch_size: int, world_size: int, *, group_rows: int = 1) -> None:
    """Raise `UserError` when ranks cannot have equal parts of a global batch, of whole groups of rows."""
    if batch_size % world_size:
        raise UserError(
            f"--sampler.batch-size {batch_size} cannot be cut into {world_size} equal parts; "
            f"give a multiple of the number of processes"
        )
    if batch_size // world_size % group_rows:
        raise UserError(
            f"--sampler.batch-size {batch_size} gives each of {world_size} processes "
            f"{batch_size // world_size} rows, and --augment.mix mixes {group_rows} at a time; give a "
            f"multiple of {world_size * group_rows}"
        )


def draw_some(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """So many of `count` numbers at random, in order; all of them where there are fewer."""
    if count <= wanted:
        return list(range(count))
    return sorted(rng.choice(count, wanted, replace=False).tolist())
