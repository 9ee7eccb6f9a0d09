"""How the rows of an epoch are dealt to batches: caps on a product, groups of an attribute, several sources.

Pure functions on arrays of row numbers, so that an epoch of ten million rows is planned in seconds.
Shape letters: N rows of an epoch, S batches, B rows of a batch, K sources, C groups, G rows of a group.
"""

from heapq import heappop, heappush

import numpy as np
from jaxtyping import Float, Int

_GOLDEN = (5**0.5 - 1) / 2
_AHEAD = 32  # rows looked at beyond those that are needed, so that a few refused ones cost no second look
_MOST_AHEAD = 2**16


def rows_of_sources(
    weights: Float[np.ndarray, " K"], *, batch_size: int, num_batches: int
) -> Int[np.ndarray, "S K"]:
    """How many rows each source gives to each batch: its share of a batch, rounded either way.

    Every batch is full, and over batches the mean is the share: what is left of whole rows is dealt by
    systematic sampling, with steps of the golden ratio as its offsets.
    """
    wanted = batch_size * weights / weights.sum()
    whole = np.floor(wanted).astype(np.int64)
    edges = np.concatenate([[0.0], np.cumsum(wanted - whole)])  # (K + 1,)
    edges[-1] = round(edges[-1])
    offsets = (np.arange(num_batches) * _GOLDEN % 1)[:, None]  # (S, 1)
    return whole + np.diff(np.floor(edges + offsets), axis=1).astype(np.int64)


def interleave(counts: Int[np.ndarray, "S K"], rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """An order of the sources' rows, laid end to end, that gives each batch its counts.

    Rows of a batch are shuffled, so that every rank has a part of each source.
    """
    steps = np.arange(len(counts))
    batches = np.concatenate([np.repeat(steps, counts[:, k]) for k in range(counts.shape[1])])
    return np.lexsort((rng.random(len(batches)), batches))


def occurrence(values: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """How many equal values stand before each one."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(first, len(values)))
    found = np.empty(len(values), np.int64)
    found[order] = np.arange(len(values)) - np.repeat(first, lengths)
    return found


def arrange_groups(
    groups: Int[np.ndarray, " N"],
    products: Int[np.ndarray, " N"],
    *,
    counts: Int[np.ndarray, " S"],
    share: float,
    size: int,
    limit: int | None,
    span: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " N"]:
    """An order of the rows in which up to `share` of each batch comes in groups of `size` rows.

    A group's rows have equal values in `groups`; a row of value -1 joins none. Groups are formed within
    stretches of `span` rows, so that what is read together stays together. Where few of them can be
    formed, they are spread evenly and the rest of a batch comes as it came. `counts` are the rows of each
    batch; rows that are left over stand at the end. Under a `limit` of rows a product, a group takes rows
    of as many products as there are.
    """
    formed, others, kept = [], [], 0
    for first in range(0, len(groups), span):
        stretch = slice(first, first + span)
        found, rest = _form_groups(groups[stretch], products[stretch], size, limit)
        found = rng.permutation(found)
        wanted = int(share * min(first + span, len(groups)) / size) - kept
        formed.append(first + found[:wanted])
        others.append(first + np.sort(np.concatenate([rest, found[wanted:].ravel()])))
        kept += len(formed[-1])
    chosen = np.concatenate(formed)  # (C, G)
    most = np.cumsum((share * counts).astype(np.int64) // size)  # (S,)
    used = min(len(chosen), int(most[-1]))
    per_batch = np.diff(most * used // max(1, int(most[-1])), prepend=0)  # (S,)
    pool = np.concatenate([*others, chosen[used:].ravel()])
    plain = counts - size * per_batch
    steps = np.arange(len(counts) + 1)
    left = len(groups) - int(counts.sum())
    rows = np.concatenate([chosen[:used].ravel(), pool])
    batches = np.concatenate(
        [np.repeat(steps[:-1], size * per_batch), np.repeat(steps, np.append(plain, left))]
    )
    return rows[np.lexsort((rng.random(len(rows)), batches))]


def _form_groups(
    groups: Int[np.ndarray, " N"], products: Int[np.ndarray, " N"], size: int, limit: int | None
) -> tuple[Int[np.ndarray, "C G"], Int[np.ndarray, " R"]]:
    """Whole groups of rows with equal values, and the rows that are in none."""
    turn = occurrence(products) // limit if limit else np.zeros(len(groups), np.int64)
    order = np.lexsort((turn, groups))
    ordered = groups[order]
    place = occurrence(ordered)
    _, which, lengths = np.unique(ordered, return_inverse=True, return_counts=True)
    whole = (ordered >= 0) & (place < lengths[which] // size * size)
    return order[whole].reshape(-1, size), order[~whole]


def deal_capped(
    products: Int[np.ndarray, " N"], *, num_batches: int, batch_size: int, limit: int
) -> Int[np.ndarray, "S B"]:
    """Row numbers of batches in which no product has more than `limit` rows.

    Batches are filled in order; a row whose product is full waits for the next batch, and those that
    wait come first there. When only rows of over-full products wait, earlier rows are shown once more, in
    their order. -1 stands in a batch that cannot be filled.
    """
    queue = _ProductQueues(products, limit)
    plan = np.full((num_batches, batch_size), -1, np.int64)
    for batch in plan:
        queue.fill(batch)
    return plan


class _ProductQueues:
    """The rows of an epoch, product by product.

    A product's rows are dealt in the order in which they come: a row is refused only while its product
    is full, and then those that wait are dealt before it in the next batch. So two places a
    product say what is dealt and what waits.
    """

    def __init__(self, products: Int[np.ndarray, " N"], limit: int) -> None:
        self._products = products
        self._limit = limit
        self._by_product = np.argsort(products, kind="stable")
        num_products = int(products.max()) + 1
        places = np.concatenate([[0], np.cumsum(np.bincount(products, minlength=num_products))])
        self._dealt = places[:-1].copy()  # where in _by_product the next row of a product stands
        self._passed = places[
            :-1
        ].copy()  # rows before this place have come by; they wait or are dealt
        self._waiting: list[tuple[int, int]] = []  # a heap: first waiting row and product
        self._used = np.zeros(num_products, np.int64)  # rows in the batch that is being filled
        self._next = 0
        self._again = 0
        self._chosen = np.zeros(len(products), bool)  # rows of the batch, while rows come again

    def fill(self, batch: Int[np.ndarray, " B"]) -> None:
        """Write a batch's rows into `batch`, and leave -1 where there is none."""
        count = self._take_waiting(batch)
        while count < len(batch) and self._next < len(self._products):
            count = self._take_next(batch, count)
        if count < len(batch):
            count = self._take_again(batch, count)
        self._used[self._products[batch[:count]]] = 0

    def _take_waiting(self, batch: Int[np.ndarray, " B"]) -> int:
        count, full = 0, []
        while self._waiting and count < len(batch):
            batch[count], product = heappop(self._waiting)
            count += 1
            self._used[product] += 1
            self._dealt[product] += 1
            place = self._dealt[product]
            if place < self._passed[product]:
                entry = (int(self._by_product[place]), product)
                if self._used[product] < self._limit:
                    heappush(self._waiting, entry)
                else:
                    full.append(entry)
        for entry in full:
            heappush(self._waiting, entry)
        return count

    def _take_next(self, batch: Int[np.ndarray, " B"], count: int) -> int:
        need = len(batch) - count
        products = self._products[self._next : self._next + need + _AHEAD]
        fits = self._used[products] + occurrence(products) < self._limit
        places = np.flatnonzero(fits)[:need]
        # Rows after the one that fills the batch have not come by yet.
        seen = len(products) if len(places) < need else int(places[-1]) + 1
        products, refused = products[:seen], products[:seen][~fits[:seen]]
        waited = self._dealt[refused] < self._passed[refused]
        taken = self._products[self._next + places]
        np.add.at(self._used, taken, 1)
        np.add.at(self._dealt, taken, 1)
        np.add.at(self._passed, products, 1)
        for product in np.unique(refused[~waited]).tolist():
            heappush(self._waiting, (int(self._by_product[self._dealt[product]]), product))
        batch[count : count + len(places)] = self._next + places
        self._next += seen
        return count + len(places)

    def _take_again(self, batch: Int[np.ndarray, " B"], count: int) -> int:
        left = num_rows = len(self._products)
        look = len(batch) + _AHEAD
        self._chosen[batch[:count]] = True
        while count < len(batch) and left:
            need = len(batch) - count
            rows = (self._again + np.arange(min(left, look))) % num_rows
            # Most rows may be of products that are full already: those are left out before any sorting.
            full = self._used[self._products[rows]] >= self._limit
            free = np.flatnonzero(~self._chosen[rows] & ~full)
            products = self._products[rows[free]]
            fits = self._used[products] + occurrence(products) < self._limit
            places = free[fits][:need]
            seen = len(rows) if len(places) < need else int(places[-1]) + 1
            np.add.at(self._used, self._products[rows[places]], 1)
            batch[count : count + len(places)] = rows[places]
            self._chosen[rows[places]] = True
            count += len(places)
            self._again = (self._again + seen) % num_rows
            left -= seen
            look = min(2 * look, _MOST_AHEAD)
        self._chosen[batch[:count]] = False
        return count
