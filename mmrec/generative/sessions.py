"""Sessions: what each user took, in time order; how they are kept on disk and split.

A folder of sessions holds two tables and a manifest:

| table    | columns                                                                                  |
|----------|------------------------------------------------------------------------------------------|
| products | product_id, title (may be null); further columns are kept                                 |
| sessions | user_id, item_ids (product ids, oldest first), times (list of seconds since 1970, optional); |
|          | content_ids and content_times (what was watched, the same way, optional); positions       |
|          | (where in a list each product was shown, see displays.py, optional)                       |

Shape letters: U users, V = U + 1, E events of all users together, Q queries, W = Q + 1, N catalogue size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from mmrec.data.storage import Place, is_file, local_copy, place
from mmrec.errors import UserError
from mmrec.manifest import Manifest, Parent, fingerprint_of, hash_file, write_manifest

KIND = "sessions"
FILES = ("products", "sessions")
DISPLAYS = "displays.parquet"
HeldOut = Literal["val", "test"]
SplitBy = Literal["leave-one-out", "time"]


@dataclass(frozen=True)
class Sequences:
    """Lists of catalogue rows, end to end in one array."""

    items: Int[np.ndarray, " E"]
    offsets: Int[np.ndarray, " V"]
    """Sequence u is `items[offsets[u]:offsets[u + 1]]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int | np.integer) -> Int[np.ndarray, " _"]:
        return self.items[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[Int[np.ndarray, " _"]]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> Int[np.ndarray, " U"]:
        """How many items each sequence has."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> Int[np.ndarray, " E"]:
        """The number of the sequence that each item belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def places_from_end(self) -> Int[np.ndarray, " E"]:
        """How many items of the same sequence come after each item: 0 for the last one."""
        return self.offsets[1:][self.owners] - 1 - np.arange(len(self.items))

    def keep(self, mask: Bool[np.ndarray, " E"]) -> "Sequences":
        """The same sequences with the marked items alone; some may become empty."""
        lengths = np.bincount(self.owners[mask], minlength=len(self))
        return Sequences(self.items[mask], _offsets(lengths))

    def take(self, numbers: Int[np.ndarray, " Q"]) -> "Sequences":
        """The sequences of these numbers, in that order."""
        lengths = self.lengths[numbers]
        offsets = _offsets(lengths)
        starts = np.repeat(self.offsets[numbers] - offsets[:-1], lengths)
        return Sequences(self.items[starts + np.arange(offsets[-1])], offsets)


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """A catalogue, and what users took of it."""

    product_ids: list[str]
    """Id of each catalogue row."""
    titles: list[str | None]
    user_ids: list[str]
    events: Sequences
    """The catalogue rows that each user took, oldest first."""
    times: Int[np.ndarray, " E"] | None
    """Seconds since 1970 of each event, where they are known."""
    positions: Int[np.ndarray, " E"] | None
    """From 1: where in a list each product was shown that was taken; 0 for one taken elsewhere."""
    products: pa.Table
    """The products' table with all its columns, in catalogue order."""
    table: pa.Table
    """The sessions' table as the file has it, for the users that are left."""
    dropped: dict[str, int]
    """How much of the file was not used, by reason."""
    fingerprint: str
    """Hash of the files' bytes."""

    @property
    def catalogue(self) -> str:
        """A fingerprint of the product ids in their order: what a table of semantic IDs belongs to."""
        return catalogue_fingerprint(self.product_ids)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Queries, and what may be learned from before they are asked."""

    train: Sequences
    """One sequence a user, without what validation and test ask for."""
    before: Sequences
    """The same and, of a test split, what validation asked for: known when the test is asked."""
    queries: Int[np.ndarray, " Q"]
    """The number of the user that each query is of."""
    histories: Sequences
    """What the user took before the target; never empty."""
    targets: Int[np.ndarray, " Q"]
    """The catalogue row that was taken next."""


def sequences_of(lists: Sequence[Sequence[int]]) -> Sequences:
    """Sequences from lists of catalogue rows."""
    items = np.array([item for row in lists for item in row], np.int64)
    return Sequences(items, _offsets(np.array([len(row) for row in lists], np.int64)))


def check_same_sessions(
    made: Manifest, sessions: Sessions, folder: Path | None, *, what: str, mend: str
) -> None:
    """Raise `UserError` for what was made from other sessions: it may have seen the targets of these.

    `what` names it and how it was made, such as "DIR: was cut from"; what came from no sessions passes.
    """
    earlier = made.parent("sessions")
    if earlier is not None and earlier.fingerprint != sessions.fingerprint:
        raise UserError(
            f"{what} sessions {earlier.fingerprint}, and {folder} is {sessions.fingerprint}; {mend}"
        )


def catalogue_fingerprint(product_ids: Sequence[str]) -> str:
    """A hash of product ids in their order."""
    return fingerprint_of({"product_ids": "\0".join(product_ids)})


def write_sessions(
    folder: Path,
    *,
    products: pa.Table,
    sessions: pa.Table,
    config: dict[str, Any],
    counts: dict[str, Any],
    parents: Sequence[Parent] = (),
    displays: pa.Table | None = None,
) -> Sessions:
    """Write the tables and a manifest, and read them back, checked as any others."""
    for name, table in (("products", products), ("sessions", sessions)):
        pq.write_table(table, folder / f"{name}.parquet")
    if displays is not None:
        pq.write_table(displays, folder / DISPLAYS)
    read = read_sessions(folder)
    write_manifest(
        folder,
        Manifest(
            kind=KIND,
            config=config,
            counts=counts,
            fingerprint=read.fingerprint,
            parents=list(parents),
            details={"catalogue": read.catalogue},
        ),
    )
    return read


def read_sessions(folder: Place | str) -> Sessions:
    """Read and check a folder of sessions, local or remote.

    Product ids that are not in the catalogue are left out, and so are users with nothing left; `dropped`
    counts both. Ids may be whole numbers, and become text. Raises `UserError` for a missing table or column,
    a column of another type, an id that is null, a product id that is empty or occurs twice, times that are
    not as many as products or go backwards, positions that are not as many or below 0, and a folder in which
    nothing is left.
    """
    folder = place(folder)
    paths = {name: folder / f"{name}.parquet" for name in FILES}
    products = _read_table(paths["products"], ("product_id",))
    table = _read_table(paths["sessions"], ("user_id", "item_ids"))
    product_ids = [str(name) for name in products["product_id"].to_pylist()]
    _check_products(paths["products"], product_ids)
    titles: list[str | None] = (
        products["title"].to_pylist()
        if "title" in products.column_names
        else [None] * len(product_ids)
    )
    events, known = encode_histories(_read_items(paths["sessions"], table), product_ids)
    times = _read_times(paths["sessions"], table, known)
    positions = _read_positions(paths["sessions"], table, known)
    left = np.flatnonzero(events.lengths)
    if not len(left):
        raise UserError(
            f"{paths['sessions']}: no session has a product of {paths['products'].name}; expected "
            "item_ids to be product ids of that table"
        )
    dropped = {
        "unknown product id": int(np.count_nonzero(~known)),
        "user without products": len(events) - len(left),
    }
    if len(left) < len(events):
        events, table = events.take(left), table.take(pa.array(left))
    shown = folder / DISPLAYS
    read = paths | ({"displays": shown} if is_file(shown) else {})
    return Sessions(
        product_ids=product_ids,
        titles=titles,
        user_ids=[str(user) for user in table["user_id"].to_pylist()],
        events=events,
        times=times,
        positions=positions,
        products=products,
        table=table,
        dropped={reason: count for reason, count in dropped.items() if count},
        fingerprint=fingerprint_of({name: hash_file(path) for name, path in read.items()}),
    )


def encode_histories(
    histories: Sequence[Sequence[str] | None], product_ids: Sequence[str]
) -> tuple[Sequences, Bool[np.ndarray, " _"]]:
    """Lists of product ids as catalogue rows, without those that are not in the catalogue.

    Also returns, for every id that was given, in order, whether it is known.
    """
    rows = {product: row for row, product in enumerate(product_ids)}
    lengths = np.array([len(history or ()) for history in histories], np.int64)
    found = np.array(
        [rows.get(product, -1) for history in histories for product in history or ()], np.int64
    )
    known = found >= 0
    return Sequences(found, _offsets(lengths)).keep(known), known


def encode_history(
    history: Sequence[str], product_ids: Sequence[str]
) -> tuple[Int[np.ndarray, " _"], int]:
    """One user's product ids as catalogue rows, and how many were left out as unknown.

    Raises `UserError` when nothing is left to recommend from.
    """
    events, known = encode_histories([history], product_ids)
    unknown = int(np.count_nonzero(~known))
    if not len(events.items):
        found = f"none of its {unknown} ids is in the catalogue" if unknown else "found none"
        raise UserError(
            f"history: expected product ids of the catalogue, such as {product_ids[0]}; {found}"
        )
    return events.items, unknown


def split_sessions(sessions: Sessions, by: SplitBy, held_out: HeldOut) -> Split:
    """`leave_one_out` or `time_split`, by name."""
    return (leave_one_out if by == "leave-one-out" else time_split)(sessions, held_out)


def sample_queries(split: Split, most: int, *, seed: int) -> Split:
    """The split with at most so many of its queries, drawn by the seed."""
    if len(split.queries) <= most:
        return split
    drawn = np.random.default_rng(seed).choice(len(split.queries), most, replace=False)
    numbers = np.sort(drawn)
    return replace(
        split,
        queries=split.queries[numbers],
        histories=split.histories.take(numbers),
        targets=split.targets[numbers],
    )


def leave_one_out(sessions: Sessions, held_out: HeldOut) -> Split:
    """Each user's last product is the test target, the one before it the validation target.

    The protocol of SASRec (Kang and McAuley, 2018), S3-Rec and TIGER. Training sequences end before the
    validation target in both cases; a test query's history holds that target. Users with fewer than three
    products ask nothing, and all that they took is learned from.
    """
    events = sessions.events
    asks = events.lengths >= 3
    after = np.where(asks[events.owners], events.places_from_end, 2)
    queries = np.flatnonzero(asks)
    if not len(queries):
        raise UserError("leave-one-out: expected users with three products or more, found none")
    place_of_target = 1 if held_out == "val" else 0
    targets = events.items[events.offsets[1:][queries] - 1 - place_of_target]
    histories = events.keep(events.places_from_end > place_of_target).take(queries)
    return Split(
        train=events.keep(after >= 2),
        before=events.keep(after > place_of_target),
        queries=queries,
        histories=histories,
        targets=targets,
    )


def time_split(
    sessions: Sessions, held_out: HeldOut, *, val: float = 0.1, test: float = 0.1
) -> Split:
    """Cut at two moments: a user's first event after a cut is the target, all before it the history.

    The last `test` of all events in time are of the test split, `val` before them of validation, and what
    comes before both is learned from: nothing that happened after a target was asked. Events at the moment
    of a cut are after it. A user with no event before the target asks nothing. Raises `UserError` where
    times are not known, or where a cut leaves nothing on one of its sides.
    """
    events, times = sessions.events, sessions.times
    if times is None:
        raise UserError("time split: the sessions have no times; use leave-one-out")
    ordered = np.sort(times)
    cuts = [
        ordered[min(len(ordered) - 1, int(len(ordered) * share))]
        for share in (1 - val - test, 1 - test)
    ]
    first, last = (cuts[0], cuts[1]) if held_out == "val" else (cuts[1], np.inf)
    train = events.keep(times < cuts[0])
    inside = np.flatnonzero((times >= first) & (times < last))
    users, places = np.unique(events.owners[inside], return_index=True)
    positions = inside[places]
    asks = positions > events.offsets[:-1][users]
    users, positions = users[asks], positions[asks]
    if not len(users) or not len(train.items):
        raise UserError(
            f"time split: {len(train.items)} events before the first cut and {len(users)} queries of "
            f"{held_out}; expected both, so times are too alike or too few users come back"
        )
    before = np.arange(len(events.items)) < np.repeat(
        _spread(users, positions, len(events)), events.lengths
    )
    histories = events.keep(before).take(users)
    return Split(
        train=train,
        before=events.keep(times < first),
        queries=users,
        histories=histories,
        targets=events.items[positions],
    )


def _spread(
    users: Int[np.ndarray, " Q"], positions: Int[np.ndarray, " Q"], num_users: int
) -> Int[np.ndarray, " _"]:
    """The position of each user's target, and 0 for users without one."""
    spread = np.zeros(num_users, np.int64)
    spread[users] = positions
    return spread


def _offsets(lengths: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _read_table(path: Place, required: tuple[str, ...]) -> pa.Table:
    if not is_file(path):
        raise UserError(
            f"{path}: no such file; expected a folder of sessions, such as those that "
            "data_prep/amazon_reviews.py writes"
        )
    try:
        table = pq.read_table(local_copy(path))
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as Parquet: {reason}") from None
    for column in required:
        if column not in table.column_names:
            found = ", ".join(table.column_names) or "none"
            raise UserError(f"{path}: missing column '{column}'; found {found}")
    if (ids := table[required[0]]).null_count:
        row = ids.is_null().to_pylist().index(True) + 1
        raise UserError(f"{path}: row {row}: {required[0]} is null; every row needs one")
    return table


def _read_items(path: Place, table: pa.Table) -> list[list[str] | None]:
    """The product ids of each session as text."""
    items = table["item_ids"]
    of = _type_in_lists(items)
    if of is None:
        raise UserError(f"{path}: item_ids: expected lists of product ids, found {items.type}")
    return (items.cast(pa.list_(pa.string())) if pa.types.is_integer(of) else items).to_pylist()


def _type_in_lists(column: pa.ChunkedArray) -> pa.DataType | None:
    """What the lists of a column hold; None for a column of anything else."""
    kind = column.type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return kind.value_type if any(is_one(kind) for is_one in lists) else None


def _check_products(path: Place, product_ids: Sequence[str]) -> None:
    rows: dict[str, int] = {}
    for row, product in enumerate(product_ids, 1):
        if not product.strip():
            raise UserError(f"{path}: row {row}: product_id is empty")
        if product in rows:
            raise UserError(
                f"{path}: row {row}: duplicate product_id '{product}', first in row {rows[product]}"
            )
        rows[product] = row


def _read_times(
    path: Place, table: pa.Table, known: Bool[np.ndarray, " _"]
) -> Int[np.ndarray, " _"] | None:
    """Times of the known events; None where the table has none."""
    timed = _beside_products(path, table, "times")
    if timed is None:
        return None
    for row, times in enumerate(timed, 1):
        if any(later < earlier for earlier, later in pairwise(times)):
            raise UserError(
                f"{path}: row {row}: times go backwards; expected the oldest product first"
            )
    return np.array([moment for times in timed for moment in times], np.int64)[known]


def _read_positions(
    path: Place, table: pa.Table, known: Bool[np.ndarray, " _"]
) -> Int[np.ndarray, " _"] | None:
    """Positions of the known events; None where the table has none."""
    placed = _beside_products(path, table, "positions")
    if placed is None:
        return None
    for row, positions in enumerate(placed, 1):
        if any(position < 0 for position in positions):
            raise UserError(
                f"{path}: row {row}: positions {positions}: expected 1 or more, and 0 outside of lists"
            )
    return np.array([position for own in placed for position in own], np.int64)[known]


def _beside_products(path: Place, table: pa.Table, column: str) -> list[list[Any]] | None:
    """A column with a number for each product taken; None where the table has none."""
    if column not in table.column_names or table[column].null_count == len(table):
        return None
    of = _type_in_lists(table[column])
    if of is None or not (pa.types.is_integer(of) or pa.types.is_floating(of)):
        what = "seconds since 1970" if column == "times" else "places from 1"
        raise UserError(
            f"{path}: {column}: expected lists of numbers ({what}), found {table[column].type}"
        )
    taken = table["item_ids"].to_pylist()
    found = [cell or [] for cell in table[column].to_pylist()]
    for row, (products, own) in enumerate(zip(taken, found, strict=True), 1):
        if len(products or ()) != len(own):
            raise UserError(
                f"{path}: row {row}: {len(own)} {column} for {len(products or ())} products"
            )
        if not all(number is not None and math.isfinite(number) for number in own):
            raise UserError(
                f"{path}: row {row}: {column} {own}: expected a number for each product"
            )
    return found
