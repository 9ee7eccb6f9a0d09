"""Which samples make global batch t of an epoch: a pure function of (seed, epoch, t).

Shards are permuted and read in windows, samples are permuted inside a window, and rows are dealt to
batches so that no product fills more than its share. Ranks take slices of a global batch, so another
number of ranks or of loader workers sees the same batches, and a resume is two integers.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
from jaxtyping import Int

from mmrec.errors import UserError

# Shape letters: S steps in an epoch, B rows in a global batch.


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How an epoch is cut into global batches."""

    batch_size: int = 256
    """Rows of a global batch, over all ranks."""
    max_rows_per_product: int | None = None
    """At most this many rows of a global batch show the same product; None sets no limit."""
    unique_products: bool = False
    """Show a product once a global batch: the first of its rows brings it, and is the positive of all.

    The columns are then distinct products, as in a classifier's softmax, and pictures of the same
    product are not encoded twice. Off, every row brings its product, each with its own augmentation.
    """
    window_shards: int = 64
    """Shards whose samples are permuted together: larger mixes better, smaller reads closer together."""
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One row of a batch: which content, and which of its links stands for it."""

    epoch: int
    sample: int
    slot: int
    brings_product: bool = True
    """False where an earlier row of the global batch has brought the same product."""


class GlobalBatches:
    """The global batches of every epoch over one split.

    `shard_sizes` are the samples of each shard in order, `products` each sample's linked product
    numbers, and `weights` the weights of those links; a sample with several links is represented in
    an epoch by one of them, drawn by weight.

    Raises `UserError` when no full batch can be dealt, or a setting is out of its range.
    """

    def __init__(
        self,
        config: SamplerConfig,
        *,
        shard_sizes: Sequence[int],
        products: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
    ) -> None:
        self.config = config
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self._products = products
        # Only contents with several links need a draw; most have one.
        self._several = {i: np.cumsum(w) / np.sum(w) for i, w in enumerate(weights) if len(w) > 1}
        num_samples, batch_size = len(products), config.batch_size
        for name, least in (("batch_size", 1), ("window_shards", 1), ("seed", 0)):
            if getattr(config, name) < least:
                flag = name.replace("_", "-")
                raise UserError(
                    f"--sampler.{flag} {getattr(config, name)}: expected at least {least}"
                )
        if num_samples < batch_size:
            raise UserError(
                f"a batch of {batch_size} rows needs as many samples, found {num_samples}; "
                f"lower --sampler.batch-size"
            )
        self.steps_per_epoch = num_samples // batch_size
        if config.max_rows_per_product is not None:
            counts = Counter(slots[0] for slots in products)
            room = sum(min(count, config.max_rows_per_product) for count in counts.values())
            if room < batch_size:
                raise self._too_tight(f"at most {room} rows fit")

    def order(self, epoch: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """Every sample of the split in the order in which an epoch offers them, and the slots drawn."""
        rng = np.random.default_rng([self.config.seed, epoch])
        shards = rng.permutation(len(self._starts) - 1)
        parts = []
        for first in range(0, len(shards), self.config.window_shards):
            window = shards[first : first + self.config.window_shards]
            samples = np.concatenate([np.arange(*self._starts[s : s + 2]) for s in window])
            parts.append(rng.permutation(samples))
        samples = np.concatenate(parts)
        slots = np.zeros(len(samples), np.int64)
        draws = rng.random(len(samples))
        for i in np.flatnonzero(np.isin(samples, list(self._several))):
            slots[i] = np.searchsorted(self._several[int(samples[i])], draws[i], side="right")
        return samples, slots

    def epoch(self, epoch: int) -> list[list[Row]]:
        """All global batches of an epoch: `steps_per_epoch` lists of `batch_size` rows."""
        samples, slots = self.order(epoch)
        rows = [Row(epoch, int(i), int(s)) for i, s in zip(samples, slots, strict=True)]
        size, limit = self.config.batch_size, self.config.max_rows_per_product
        if limit is None:
            batches = [rows[t * size : (t + 1) * size] for t in range(self.steps_per_epoch)]
        else:
            batches = self._deal(rows, limit)
        if self.config.unique_products:
            batches = [self._show_once(batch) for batch in batches]
        return batches

    def _show_once(self, batch: list[Row]) -> list[Row]:
        shown = set[int]()
        marked = []
        for row in batch:
            product = self.product_of(row)
            marked.append(replace(row, brings_product=product not in shown))
            shown.add(product)
        return marked

    def _deal(self, rows: list[Row], limit: int) -> list[list[Row]]:
        """Fill batches in order; a row whose product is full waits for the next batch."""
        stream, waiting = deque(rows), deque[Row]()
        again = cycle(rows)
        batches = []
        for _ in range(self.steps_per_epoch):
            batch: list[Row] = []
            used = Counter[int]()
            chosen = set[int]()
            still_waiting = deque[Row]()
            for queue in (waiting, stream):
                while queue and len(batch) < self.config.batch_size:
                    row = queue.popleft()
                    if used[self.product_of(row)] < limit:
                        self._add(row, batch, used, chosen)
                    else:
                        still_waiting.append(row)
            waiting = still_waiting + waiting
            # Near the end only rows of over-full products wait: earlier rows are shown once more.
            for row in islice(again, len(rows) if len(batch) < self.config.batch_size else 0):
                if row.sample not in chosen and used[self.product_of(row)] < limit:
                    self._add(row, batch, used, chosen)
                if len(batch) == self.config.batch_size:
                    break
            batches.append(batch)
        shortest = min(len(batch) for batch in batches)
        if (
            shortest < self.config.batch_size
        ):  # Only where links' draws leave fewer products than counted.
            raise self._too_tight(f"a batch of epoch {rows[0].epoch} holds {shortest}")
        return batches

    def _too_tight(self, found: str) -> UserError:
        return UserError(
            f"--sampler.max-rows-per-product {self.config.max_rows_per_product} cannot fill a batch of "
            f"{self.config.batch_size} rows: {found}; raise it, or lower --sampler.batch-size"
        )

    def _add(self, row: Row, batch: list[Row], used: Counter[int], chosen: set[int]) -> None:
        batch.append(row)
        chosen.add(row.sample)
        used[self.product_of(row)] += 1

    def product_of(self, row: Row) -> int:
        """The number of the product that stands for a row."""
        return self._products[row.sample][row.slot]


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
        if size % world_size:
            raise UserError(
                f"a global batch of {size} rows cannot be cut into {world_size} equal parts"
            )
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
            for batch in self._batches.epoch(number)[step if number == epoch else 0 :]:
                yield batch[self._slice]
