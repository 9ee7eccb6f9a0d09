r"""Bring Amazon reviews to sessions: what each user reviewed, in time order, and the products' titles.

Input, one of:

- A folder with sequences.txt (a line a user: user id, then item numbers in time order) and items.csv
  (item_id, asin, title): the S3-Rec preprocessing of Amazon 2014 5-core, on which TIGER and most papers
  report. It has no times.
- McAuley's public files, plain or .gz: reviews as JSON lines (reviews_Beauty_5.json.gz of 2014,
  Beauty_5.json.gz of 2018, All_Beauty.jsonl.gz of 2023) and, for titles, the metadata file of the same year.

Output: a folder of sessions (see mmrec/generative/sessions.py).

    python data_prep/amazon_reviews.py --source data/amazon2014_seqrec/beauty --out runs/beauty/sessions
    python data_prep/amazon_reviews.py --source reviews_Beauty_5.json.gz --meta meta_Beauty.json.gz \
        --out runs/beauty-raw/sessions

Takes seconds; prints how many users, products and events there are.
"""

import ast
import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import tyro

from mmrec.cli import run_program
from mmrec.errors import UserError
from mmrec.generative.sessions import KIND, Sessions, write_sessions
from mmrec.manifest import check_output, new_folder
from mmrec.ranges import CountOrZero, check_ranges

# User, product and time of a review: until 2018 (seconds), and in 2023 (milliseconds).
_FIELDS = (
    ("reviewerID", "asin", "unixReviewTime", 1),
    ("user_id", "parent_asin", "timestamp", 1000),
)


@dataclass(frozen=True, kw_only=True)
class AmazonReviewsConfig:
    """What to read and where to write."""

    source: Path
    """A folder with sequences.txt and items.csv, or a file of reviews as JSON lines, plain or .gz."""
    out: Path
    """The folder to write."""
    meta: Path | None = None
    """The metadata file beside a file of reviews: titles by asin."""
    core: CountOrZero = 5
    """Of a file of reviews: users and products with fewer events are left out, again and again."""
    overwrite: bool = False
    """Replace `out` when it is already there."""


def main(config: AmazonReviewsConfig) -> Sessions:
    """Read the source and write its sessions."""
    check_ranges(config)
    check_output(config.out, kind=KIND, overwrite=config.overwrite, inputs=[config.source])
    if config.source.is_dir():
        products, sessions, dropped = read_folder(config.source)
    else:
        products, sessions, dropped = read_reviews(config)
    num_events = sum(len(row["item_ids"]) for row in sessions)
    sizes = {"users": len(sessions), "products": len(products), "events": num_events}
    with new_folder(config.out, kind=KIND, overwrite=config.overwrite) as folder:
        written = write_sessions(
            folder,
            products=pa.Table.from_pylist(products),
            sessions=pa.Table.from_pylist(sessions),
            config=asdict(config),
            counts={"out": sizes, "dropped": dict(dropped)},
        )
    untitled = sum(title is None for title in written.titles)
    print(
        f"{config.out}: {sizes['users']:,} users, {sizes['products']:,} products ({untitled:,} without a "
        f"title), {num_events:,} events"
    )
    for reason, count in dropped.items():
        print(f"  dropped: {reason}: {count:,}")
    return written


# ---------------------------------------------------------------- sequences.txt and items.csv


def read_folder(source: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Products and sessions of a preprocessed folder; product ids are ASINs."""
    for name in ("sequences.txt", "items.csv"):
        if not (source / name).is_file():
            raise UserError(f"{source}: has no {name}; expected sequences.txt and items.csv")
    with open(source / "items.csv", encoding="utf-8", newline="") as file:
        items = {row["item_id"]: row for row in csv.DictReader(file)}
    sessions = []
    for row, line in enumerate((source / "sequences.txt").read_text("utf-8").splitlines(), 1):
        user, *taken = line.split()
        unknown = next((number for number in taken if number not in items), None)
        if unknown is not None:
            raise UserError(
                f"{source}/sequences.txt: row {row}: item {unknown} is not in items.csv"
            )
        sessions.append({"user_id": user, "item_ids": [items[number]["asin"] for number in taken]})
    products = [
        {"product_id": row["asin"], "title": row.get("title") or None} for row in items.values()
    ]
    return products, sessions, Counter()


# ---------------------------------------------------------------- reviews as JSON lines


def read_reviews(
    config: AmazonReviewsConfig,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Products and sessions of a file of reviews, oldest first, each product once a user."""
    dropped: Counter[str] = Counter()
    events = keep_core(list(_read_events(config.source, dropped)), config.core, dropped)
    if not events:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "no line"
        raise UserError(
            f"{config.source}: no review is left ({reasons}); expected JSON lines with reviewerID, asin and "
            "unixReviewTime, or user_id, parent_asin and timestamp"
        )
    # Sorting keeps the file's order among equal times.
    by_user: dict[str, list[tuple[int, str]]] = {}
    for user, product, time in sorted(events, key=lambda event: event[2]):
        by_user.setdefault(user, []).append((time, product))
    sessions = [
        {
            "user_id": user,
            "item_ids": [product for _, product in taken],
            "times": [time for time, _ in taken],
        }
        for user, taken in sorted(by_user.items())
    ]
    titles = _read_titles(config.meta) if config.meta else {}
    names = dict.fromkeys(product for row in sessions for product in row["item_ids"])
    products = [{"product_id": name, "title": titles.get(name)} for name in names]
    return products, sessions, dropped


def keep_core(
    events: list[tuple[str, str, int]], core: int, dropped: Counter[str]
) -> list[tuple[str, str, int]]:
    """Leave out users and products with fewer than `core` events, again and again until all have so many."""
    kept = events
    while True:
        users = Counter(user for user, _, _ in kept)
        products = Counter(product for _, product, _ in kept)
        left = [event for event in kept if users[event[0]] >= core and products[event[1]] >= core]
        if len(left) == len(kept):
            break
        kept = left
    if len(kept) < len(events):
        dropped[f"outside the {core}-core"] += len(events) - len(kept)
    return kept


def _read_events(path: Path, dropped: Counter[str]) -> Iterator[tuple[str, str, int]]:
    seen: set[tuple[str, str]] = set()
    for line in _lines(path):
        try:
            review = json.loads(line)
            event = _event(review)
        except (ValueError, TypeError, AttributeError):
            dropped["line that is not a review"] += 1
            continue
        if event is None:
            dropped["no user, product or time"] += 1
        elif event[:2] in seen:
            dropped["reviewed before by the same user"] += 1
        else:
            seen.add(event[:2])
            yield event


def _event(review: dict[str, Any]) -> tuple[str, str, int] | None:
    for user, product, time, unit in _FIELDS:
        if review.get(user) and review.get(product) and review.get(time) is not None:
            return str(review[user]), str(review[product]), int(review[time]) // unit
    return None


def _read_titles(path: Path) -> dict[str, str]:
    """Titles by product. The metadata of 2014 is written as Python literals, later ones as JSON."""
    titles = {}
    for line in _lines(path):
        try:
            entry = json.loads(line)
        except ValueError:
            try:
                entry = ast.literal_eval(line)
            except (ValueError, SyntaxError):
                continue
        product = entry.get("parent_asin") or entry.get("asin")
        if product and entry.get("title"):
            titles[product] = str(entry["title"])
    if not titles:
        raise UserError(f"{path}: no line has an asin and a title; expected the metadata file")
    return titles


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from (line for line in file if line.strip())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as JSON lines: {error}") from None


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(AmazonReviewsConfig)))
