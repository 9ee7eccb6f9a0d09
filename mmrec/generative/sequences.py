"""Sessions as rows of products: reading them, and the order in which training sees them.

A table of sessions is a folder with sessions.parquet: user_id, item_ids (a list in time order).
Shape letters: B sequences of a batch, S products of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmrec.errors import UserError

SESSIONS, ITEMS = "sessions.parquet", "item_ids"


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """What each user came to, in time order."""

    user_ids: list[str]
    items: list[list[str]]


def read_sessions(folder: Path | str) -> Sessions:
    """Read a folder's table of sessions. Raises `UserError` where it is missing or of another form."""
    path = Path(folder) / SESSIONS
    try:
        table = pq.read_table(path, columns=["user_id", ITEMS])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a table of user_id and {ITEMS}") from None
    except (OSError, pa.ArrowException) as error:
        line = str(error).split("\n")[0]
        raise UserError(f"{path}: not a table of user_id and {ITEMS} ({line})") from None
    if not len(table):
        raise UserError(f"{path}: holds no session")
    users = table["user_id"].cast(pa.string()).to_pylist()
    items = table[ITEMS].cast(pa.list_(pa.string())).to_pylist()
    bad = next((row for row, own in enumerate(items) if own is None or None in own), None)
    if bad is not None:
        raise UserError(f"{path}: row {bad} has no {ITEMS}, or one of them is missing")
    return Sessions(user_ids=users, items=items)


def without_last(items: Sequence[Sequence[str]], held_out: int) -> list[list[str]]:
    """Sessions less their last products, which validation and test ask for."""
    return [list(own[: max(0, len(own) - held_out)]) for own in items]
