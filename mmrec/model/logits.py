r"""What a loss needs of a matrix of logits, a chunk of rows at a time; the matrix is never held.

The logits :math:`x_{ij} = s\, r_i \cdot c_j` of all rows against all columns are by far the largest thing in
a contrastive loss. Both functions here compute a chunk of rows, reduce it while it is in the cache, and drop
it. Backward computes the chunk again from rows and columns (gradient checkpointing, Chen et al. 2016), where
the vectors of logsumexps saved by forward give the probabilities of both directions at once, as in
FlashAttention (Dao et al. 2022). So forward costs one matrix product, backward three, and what is saved is
the features and a few vectors.

Shape letters: B rows, C columns, D width, M links of a row, P entries of the matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Entries:
    """Places in a matrix of logits, ordered by row."""

    rows: Int[Tensor, " P"]
    columns: Int[Tensor, " P"]

    def __len__(self) -> int:
        return len(self.rows)


def find_entries(
    links: Int[Tensor, "B M"], ids: Int[Tensor, " C"]
) -> tuple[Entries, Int[Tensor, " P"]]:
    """Every (i, j) such that row i links to column j's id, and for each its place in the flat links.

    Negative links are padding. Sorting makes it O((B M + C) log C) and as much memory as there are
    entries, where comparing all with all would take B M C.
    """
    ordered, order = ids.sort(stable=True)
    flat = links.flatten().contiguous()  # (B*M,)
    first = torch.searchsorted(ordered, flat)
    counts = torch.searchsorted(ordered, flat, right=True) - first
    counts = counts.masked_fill(flat < 0, 0)
    which = torch.arange(len(flat), device=flat.device).repeat_interleave(counts)  # (P,)
    # The place of an entry among those of its link.
    nth = torch.arange(len(which), device=flat.device) - (counts.cumsum(0) - counts)[which]
    columns = order[first[which] + nth]
    return Entries(which // max(1, links.shape[1]), columns), which


def logsumexps(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "C D"],
    scale: Float[Tensor, ""],
    *,
    picked: Entries,
    excluded: Entries | None = None,
    column_shift: Float[Tensor, " C"] | None = None,
    row_shift: Float[Tensor, " B"] | None = None,
    chunk_rows: int,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " C"], Float[Tensor, " P"]]:
    r"""The logsumexp of every row and of every column, and the picked logits; all differentiable.

    .. math::
        a_i = \log \sum_j e^{x_{ij} + u_j}, \qquad b_j = \log \sum_i e^{x_{ij} + v_i}

    over the entries that are not excluded, with :math:`u` the column shift and :math:`v` the row shift,
    which are constants. A sum over nothing is -inf. The results are float32, or float64 for such input.
    """
    walk = _Walk(chunk_rows, picked, excluded)
    return _LogSumExps.apply(rows, columns, scale, column_shift, row_shift, walk)  # pyright: ignore


def softplus_sums(
    rows: Float[Tensor, "B D"],
    columns: Float[Tensor, "C D"],
    scale: Float[Tensor, ""],
    offset: Float[Tensor, " C"],
    *,
    picked: Entries,
    excluded: Entries | None = None,
    chunk_rows: int,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " P"]]:
    r"""Every row's :math:`\sum_j \log(1 + e^{x_{ij} + o_j})`, and the picked :math:`x_{ij} + o_j`.

    The sum is over entries that are neither excluded nor picked; both results are differentiable, by
    the offset :math:`o` too. They are float32, or float64 for such input.
    """
    walk = _Walk(chunk_rows, picked, excluded)
    return _SoftplusSums.apply(rows, columns, scale, offset, walk)  # pyright: ignore


@dataclass(frozen=True)
class _Walk:
    """The chunks of a matrix of logits, and the entries of each."""

    chunk_rows: int
    picked: Entries
    excluded: Entries | None

    def chunks(
        self, rows: Tensor, columns: Tensor, scale: Tensor
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "b C"], Float[Tensor, "b C"]]]:
        """The rows and the picked entries of each chunk, its logits, and room for as many more.

        Both matrices are overwritten by the next chunk.
        """
        if not len(rows) or not len(columns):
            return
        size = min(self.chunk_rows, len(rows))
        starts = range(0, len(rows), size)
        dtype = _dtype_of_logits(rows)
        factors = _dtype_of_factors(rows)
        turned = columns.to(factors).T  # (D, C)
        # Memory that is asked for anew is filled with zeros by the system first: once is enough.
        buffer, spare = rows.new_empty(2, size, len(columns), dtype=dtype)
        picked = _bounds(self.picked, len(rows), size)
        excluded = _bounds(self.excluded, len(rows), size) if self.excluded else None
        for number, start in enumerate(starts):
            part = slice(start, min(start + size, len(rows)))
            count = part.stop - part.start
            logits = _multiply(rows[part].to(factors), turned, scale, out=buffer[:count])
            if self.excluded and excluded:
                places = slice(*excluded[number : number + 2])
                where = self.excluded.rows[places] - start, self.excluded.columns[places]
                logits[where] = -torch.inf
            yield part, slice(*picked[number : number + 2]), logits, spare[:count]

    def places(self, entries: slice, first: int) -> tuple[Tensor, Tensor]:
        """Where picked entries lie in the chunk that begins at row `first`."""
        return self.picked.rows[entries] - first, self.picked.columns[entries]


class _LogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        column_shift: Tensor | None,
        row_shift: Tensor | None,
        walk: _Walk,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _dtype_of_logits(rows)
        lowest = torch.finfo(dtype).min
        by_row = rows.new_full((len(rows),), -torch.inf, dtype=dtype)
        largest = rows.new_full((len(columns),), -torch.inf, dtype=dtype)
        total = torch.zeros_like(largest)
        chosen = rows.new_zeros(len(walk.picked), dtype=dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for part, entries, logits, spare in walk.chunks(rows, columns, scale):
                chosen[entries] = logits[walk.places(entries, part.start)]
                shifted = logits
                if column_shift is not None:
                    shifted = torch.add(logits, column_shift, out=spare)
                top = shifted.amax(1, keepdim=True).clamp_(min=lowest)  # (b, 1)
                torch.sub(shifted, top, out=spare).exp_()
                by_row[part] = spare.sum(1).log_().add_(top[:, 0])
                if row_shift is not None:
                    logits += row_shift[part, None]
                # The sum so far is held relative to the largest so far.
                before, largest = largest, torch.maximum(largest, logits.amax(0))
                finite = largest.clamp(min=lowest)
                spare = torch.sub(logits, finite, out=spare).exp_()
                total = total * (before - finite).exp_() + spare.sum(0)
        by_column = total.log_().add_(largest.clamp(min=lowest))
        ctx.walk = walk
        ctx.save_for_backward(rows, columns, scale, column_shift, row_shift, by_row, by_column)
        return by_row, by_column, chosen

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, columns, scale, column_shift, row_shift, by_row, by_column = ctx.saved_tensors
        for_row, for_column, for_chosen = gradients
        lowest = torch.finfo(by_row.dtype).min
        by_row, by_column = by_row.clamp(min=lowest), by_column.clamp(min=lowest)
        sums = _Gradients(rows, columns, scale)
        with torch.autocast(rows.device.type, enabled=False):
            for part, entries, logits, spare in ctx.walk.chunks(rows, columns, scale):
                torch.sub(logits, by_row[part, None], out=spare)
                if column_shift is not None:
                    spare += column_shift
                gradient = spare.exp_().mul_(for_row[part, None])  # (b, C)
                if row_shift is not None:
                    logits += row_shift[part, None]
                gradient.addcmul_(logits.sub_(by_column).exp_(), for_column)
                where = ctx.walk.places(entries, part.start)
                gradient.index_put_(where, for_chosen[entries], accumulate=True)
                sums.add(part, gradient)
        return *sums.finish(), None, None, None


class _SoftplusSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, offset: Tensor, walk: _Walk
    ) -> tuple[Tensor, Tensor]:
        dtype = _dtype_of_logits(rows)
        by_row = rows.new_zeros(len(rows), dtype=dtype)
        chosen = rows.new_zeros(len(walk.picked), dtype=dtype)
        with torch.autocast(rows.device.type, enabled=False):
            for part, entries, logits, _ in walk.chunks(rows, columns, scale):
                logits += offset
                where = walk.places(entries, part.start)
                chosen[entries] = logits[where]
                logits[where] = -torch.inf
                by_row[part] = softplus(logits).sum(1)
        ctx.walk = walk
        ctx.save_for_backward(rows, columns, scale, offset)
        return by_row, chosen

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, columns, scale, offset = ctx.saved_tensors
        for_row, for_chosen = gradients
        sums = _Gradients(rows, columns, scale)
        for_offset = torch.zeros_like(offset)
        with torch.autocast(rows.device.type, enabled=False):
            for part, entries, logits, _ in ctx.walk.chunks(rows, columns, scale):
                where = ctx.walk.places(entries, part.start)
                logits += offset
                logits[where] = -torch.inf
                gradient = logits.sigmoid_().mul_(for_row[part, None])  # (b, C)
                gradient.index_put_(where, for_chosen[entries], accumulate=True)
                for_offset += gradient.sum(0)
                sums.add(part, gradient)
        return *sums.finish(), for_offset, None


class _Gradients:
    """The gradients of rows, columns and scale, added up over chunks of the logits' gradient."""

    def __init__(self, rows: Tensor, columns: Tensor, scale: Tensor) -> None:
        self._rows, self._columns, self._scale = rows, columns, scale
        self._factors = _dtype_of_factors(rows)
        dtype = _dtype_of_logits(rows)
        self._converted = columns.to(self._factors)
        # Of the product r_i . c_j, so the scale is still to be multiplied in.
        self._for_rows = torch.zeros_like(rows, dtype=dtype)
        self._for_columns = torch.zeros_like(columns, dtype=dtype)

    def add(self, part: slice, gradient: Float[Tensor, "b C"]) -> None:
        """Add a chunk: its gradient against the columns, and against its rows."""
        gradient = gradient.to(self._factors)
        chunk = self._rows[part].to(self._factors)
        if gradient.dtype == self._for_rows.dtype:
            torch.mm(gradient, self._converted, out=self._for_rows[part])
            self._for_columns.addmm_(gradient.T, chunk)
        else:
            self._for_rows[part] = _wide_mm(gradient, self._converted)
            self._for_columns += _wide_mm(gradient.T, chunk)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of rows, columns and scale, each as precise as what it belongs to."""
        for_scale = (self._rows * self._for_rows).sum()
        for_rows = self._for_rows.mul_(self._scale).to(self._rows.dtype)
        for_columns = self._for_columns.mul_(self._scale).to(self._columns.dtype)
        return for_rows, for_columns, for_scale.to(self._scale.dtype)


def _bounds(entries: Entries, num_rows: int, size: int) -> list[int]:
    """Where each chunk's entries begin, and where the last one's end."""
    starts = torch.arange(0, num_rows + size, size, device=entries.rows.device)
    return torch.searchsorted(entries.rows, starts).tolist()


def _dtype_of_logits(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _dtype_of_factors(rows: Tensor) -> torch.dtype:
    """What is multiplied: bfloat16 on a GPU where that is what came or what autocast asks for.

    float16 is not: it has too little range for the gradients of a large batch. The sums are float32.
    """
    if rows.device.type == "cuda" and rows.dtype != torch.float64:
        asked = (
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else rows.dtype
        )
        if torch.bfloat16 in (asked, rows.dtype):
            return torch.bfloat16
    return _dtype_of_logits(rows)


def _multiply(
    rows: Float[Tensor, "b D"],
    columns: Float[Tensor, "D C"],
    scale: Float[Tensor, ""],
    *,
    out: Float[Tensor, "b C"],
) -> Float[Tensor, "b C"]:
    if rows.dtype == out.dtype:
        return torch.mm(rows * scale, columns, out=out)
    # Scaled afterwards: bfloat16 would round the scaled rows once more.
    return torch.mul(_wide_mm(rows, columns), scale, out=out)


def _wide_mm(left: Float[Tensor, "a b"], right: Float[Tensor, "b c"]) -> Float[Tensor, "a c"]:
    """The product of bfloat16 matrices in float32, which torch offers on GPUs alone."""
    return torch.mm(left, right, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
