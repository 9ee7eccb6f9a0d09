"""One rank's loader over a few rows: see `small_loader`."""

from collections.abc import Iterable

import torch

from mmrec.data.batches import PairBatch, PairDataset, pair_loader
from mmrec.data.sampler import GlobalBatches, RankBatches, SamplerConfig
from mmrec.data.shards import ShardReader


def letters(texts: list[str]) -> torch.Tensor:
    """A stand-in for a tokenizer: character codes, 12 a text."""
    return torch.tensor([[ord(c) for c in text.ljust(12)[:12]] for text in texts])


def small_loader(
    rows: PairDataset,
    reader: ShardReader,
    *,
    batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterable[PairBatch]:
    """Two epochs of `rows`, which are those of `reader`; no limit asks which products they are."""
    batches = GlobalBatches(
        SamplerConfig(batch_size=batch_size),
        shard_sizes=reader.shard_sizes,
        products=[[0] * len(ids) for ids in reader.product_ids],
        weights=reader.weights,
    )
    return pair_loader(
        rows,
        RankBatches(batches, rank=rank, world_size=world_size, num_epochs=2),
        tokenizer=letters,
        num_workers=num_workers,
        pin_memory=False,
    )
