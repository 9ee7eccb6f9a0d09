"""The order in which a generator's training sees sequences of products.

Shape letters: B sequences of a batch, S products of a sequence, E codes of an ID, V width of a content's
embedding, C contents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from mmrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """Sequences of equal or nearly equal length, padded on the right.

    After a content the last product alone is learned: those before it were taken before it was watched.
    """

    rows: Int64[Tensor, "B S"]
    """Rows of products in the table of IDs; 0 for padding."""
    learned: Bool[Tensor, "B S"]
    """Products that the loss counts; padding is not among them."""
    contents: Float[Tensor, "B V"] | None
    """The content that led to each sequence, zeros for none; None where no content is given at all."""

    def __len__(self) -> int:
        return len(self.rows)


class SequenceBatches:
    """Batches of training: batch t of an epoch is a pure function of (seed, epoch, t).

    A sequence of more than `max_items` products is cut into windows at places that change with the epoch, as
    TIGER slides one over it. `drop_items` leaves that share of each window's products out at random, so that
    products meet that stood some places apart. Batches hold sequences of like lengths, and come in any order.
    """

    def __init__(
        self,
        sequences: Sequence[Int64[np.ndarray, " _"]],
        *,
        batch_size: int,
        max_items: int,
        drop_items: float = 0.0,
        pairs: Sequence[tuple[int, int]] = (),
        watched: Sequence[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _C"]]] = (),
        contents: Float32[np.ndarray, "C V"] | None = None,
        seed: int = 0,
    ) -> None:
        """`pairs` are rows of `contents` and of a product that each leads to.

        `watched` are products that were taken one after another, and rows of the contents that were watched
        before the last of them: it is learned with those before it and one content, another one each epoch.
        Raises `UserError` where there are fewer sequences than a batch holds.
        """
        self._sequences = [own for own in sequences if len(own)]
        self._pairs, self._watched = list(pairs), list(watched)
        self._contents = contents
        self._batch_size, self._max_items = batch_size, max_items
        self._drop_items, self._seed = drop_items, seed
        windows = sum(math.ceil(len(own) / max_items) for own in self._sequences)
        self.num_rows = windows + len(self._pairs) + len(self._watched)
        self.steps_per_epoch = self.num_rows // batch_size
        if not self.steps_per_epoch:
            raise UserError(
                f"{self.num_rows:,} training sequences do not fill a batch of {batch_size:,}; give a smaller "
                "--batch-size"
            )

    def plan(self, epoch: int) -> list[list[tuple[Int64[np.ndarray, " _"], int]]]:
        """The batches of an epoch: products of each sequence, and the row of its content or -1."""
        generator = np.random.default_rng((self._seed, epoch))
        rows = [(own, -1) for own in self._windows(generator)]
        rows += [(np.array([product]), content) for content, product in self._pairs]
        for number, (own, choices) in enumerate(self._watched):
            content = int(choices[(epoch + number) % len(choices)])
            rows.append((self._after_dropping(own[-self._max_items :], generator), content))
        # Equal lengths lie together, in an order of their own each epoch.
        keys = np.array([len(own) for own, _ in rows]) + generator.random(len(rows))
        order = np.argsort(keys)[generator.integers(len(rows) % self._batch_size + 1) :]
        starts = generator.permutation(self.steps_per_epoch) * self._batch_size
        return [[rows[i] for i in order[start : start + self._batch_size]] for start in starts]

    def _windows(self, generator: np.random.Generator) -> list[Int64[np.ndarray, " _"]]:
        found = []
        for own in self._sequences:
            count = math.ceil(len(own) / self._max_items)
            # As many windows as ever, of nearly equal lengths, cut at other places.
            room = count * self._max_items - len(own)
            shift = int(generator.integers(min(room, self._max_items - 1) + 1)) if count > 1 else 0
            cuts = [self._max_items * place - shift for place in range(1, count)]
            found += np.split(own, cuts)
        if not self._drop_items:
            return found
        kept = []
        for own in found:
            mask = generator.random(len(own)) >= self._drop_items
            kept.append(own[mask] if mask.any() else own)
        return kept

    def _after_dropping(
        self, own: Int64[np.ndarray, " _"], generator: np.random.Generator
    ) -> Int64[np.ndarray, " _"]:
        """Without a share of the products before the last."""
        kept = generator.random(len(own)) >= self._drop_items
        kept[-1] = True
        return own[kept]

    def collate(self, rows: Sequence[tuple[Int64[np.ndarray, " _"], int]]) -> SequenceBatch:
        """Sequences as tensors."""
        longest = max(len(own) for own, _ in rows)
        padded = torch.zeros(len(rows), longest, dtype=torch.int64)
        learned = torch.zeros(len(rows), longest, dtype=torch.bool)
        for number, (own, content) in enumerate(rows):
            padded[number, : len(own)] = torch.from_numpy(own)
            learned[number, 0 if content < 0 else len(own) - 1 : len(own)] = True
        contents = None
        if self._contents is not None:
            contents = rows_or_zeros(self._contents, np.array([content for _, content in rows]))
        return SequenceBatch(rows=padded, learned=learned, contents=contents)


def rows_or_zeros(
    contents: Float32[np.ndarray, "C V"], rows: Int64[np.ndarray, " B"]
) -> Float[Tensor, "B V"]:
    """The embeddings of these contents; zeros, which stand for none, where a row is -1."""
    return torch.from_numpy(np.where(rows[:, None] >= 0, contents[rows], 0).astype(np.float32))
