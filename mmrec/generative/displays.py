"""Lists of products that users were shown, and how much the position in a list decides what is taken.

The position-based model (Richardson et al. 2007; Craswell et al. 2008): a product is taken where it is wanted
and looked at, and whether it is looked at depends on its position alone. That chance, the propensity, is had
from lists in random order, where every position holds products that are wanted alike (Joachims, Swaminathan
and Schnabel 2017). What is learned from weighs 1 / propensity, so that on average positions leave no trace.

A folder of sessions may hold displays.parquet, a row a list:

| column   | what                                                                            |
|----------|---------------------------------------------------------------------------------|
| user_id  | who was shown it                                                                |
| item_ids | the products, in the order shown                                                |
| taken    | the position, from 1, of the one that was taken; 0 where none was               |
| shuffled | whether the order was random; some must be, the more the surer the propensities |

Its sessions.parquet then has positions beside item_ids: for each product taken the position at which it was
shown, 0 where it was not taken from a list. Shape letters: S lists, P positions, Q queries.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from mmrec.data.storage import Place, is_file, local_copy, place
from mmrec.errors import UserError
from mmrec.generative.sessions import DISPLAYS, Sessions, Split

_COLUMNS = ("item_ids", "taken", "shuffled")
# Fewer products taken of shuffled lists say little: the share of a position is off by a tenth at best.
_FEWEST_TAKEN = 100


@dataclass(frozen=True, kw_only=True)
class Displays:
    """Lists that were shown."""

    lengths: Int[np.ndarray, " S"]
    """Products of each list."""
    taken: Int[np.ndarray, " S"]
    """The position, from 1, of the product that was taken; 0 where none was."""
    shuffled: Bool[np.ndarray, " S"]
    """Whether the order was random."""


def read_displays(folder: Place | str) -> Displays:
    """Read the lists that lie beside sessions.

    Raises `UserError` for a missing table or column, and a position that its list does not have.
    """
    path = place(folder) / DISPLAYS
    if not is_file(path):
        raise UserError(
            f"{path}: no such file; the sessions have positions, and what a position is worth is had from "
            "the lists that were shown: give them, or --ranker.largest-weight 1 to leave positions out"
        )
    try:
        table = pq.read_table(local_copy(path), columns=list(_COLUMNS))
        lengths = np.array([len(items) for items in table["item_ids"].to_pylist()], np.int64)
        taken = np.array(table["taken"].to_pylist(), np.int64)
        shuffled = np.array(table["shuffled"].to_pylist(), bool)
    except (pa.ArrowException, OSError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: expected {', '.join(_COLUMNS)} in every row: {reason}") from None
    if len(bad := np.flatnonzero((taken < 0) | (taken > lengths))):
        row = bad[0]
        raise UserError(
            f"{path}: row {row + 1}: taken {taken[row]}: expected 0 to {lengths[row]}, the length of its list"
        )
    return Displays(lengths=lengths, taken=taken, shuffled=shuffled)


def position_propensities(displays: Displays) -> Float[np.ndarray, " P"]:
    """How likely each position is to be looked at, relative to the first, which is 1.

        propensity(p) = taken at p / taken at 1, of shuffled lists of at least p products

    Where too little was taken of such lists to tell, or nothing at p, a position has the propensity of the
    one before it. Since positions are looked at less and less that is too much rather than too little:
    nothing weighs more than is known, at the price of a little bias, as with clipped propensities (Strehl et
    al. 2010). Raises `UserError` where too little was taken of all shuffled lists together.
    """
    taken, lengths = displays.taken[displays.shuffled], displays.lengths[displays.shuffled]
    if not _tells(taken):
        raise UserError(
            f"{DISPLAYS}: {np.count_nonzero(taken)} products taken of {len(taken):,} lists in random order, "
            f"expected {_FEWEST_TAKEN} or more to tell what a position is worth; show more lists shuffled, "
            "or give --ranker.largest-weight 1 to leave positions out"
        )
    found = np.ones(int(displays.lengths.max()))
    for position in range(2, len(found) + 1):
        own = taken[lengths >= position]
        found[position - 1] = found[position - 2]
        if _tells(own) and (own == position).any():
            found[position - 1] = np.count_nonzero(own == position) / np.count_nonzero(own == 1)
    return found


def _tells(taken: Int[np.ndarray, " S"]) -> bool:
    """Whether enough was taken of shuffled lists to compare their positions with the first."""
    return bool(np.count_nonzero(taken) >= _FEWEST_TAKEN and (taken == 1).any())


def target_weights(
    sessions: Sessions, split: Split, propensities: Float[np.ndarray, " P"], largest: float
) -> Float[np.ndarray, " Q"]:
    """1 / propensity of the position at which each target was taken, at most `largest`; 1 outside of lists.

    The limit costs a little bias for a variance that one lucky product far down cannot blow up. Raises
    `UserError` for a position that no list has.
    """
    assert sessions.positions is not None
    ends = sessions.events.offsets[split.queries] + split.histories.lengths
    positions = sessions.positions[ends]
    if positions.max(initial=0) > len(propensities):
        raise UserError(
            f"sessions: a product was taken at position {positions.max()}, and the longest list of "
            f"{DISPLAYS} has {len(propensities)}"
        )
    chances = np.concatenate([[1.0], propensities])[positions]
    return np.minimum(1 / np.maximum(chances, 1e-12), largest)
