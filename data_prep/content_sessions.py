"""Generate sessions on a catalogue and its contents: who watched what, and what they bought.

Each user has a latent taste: a liking for every value of every attribute of the products (colour, category
and so on). At each of several moments a user watches some contents, drawn by how much their products
are liked, and then buys: mostly one of the products just watched, else one from the whole catalogue by taste.
So what comes next can be told from what was bought before, from what was watched, and best from both.

Input: a folder of tables whose products have attributes, such as data_prep/synthetic.py writes. Output: a
folder of sessions (mmrec/generative/sessions.py), with content_ids, content_times and positions beside what
was bought and, for whoever wants to look, the attribute values that each user likes best; the lists are in
displays.parquet. Same seed, same bytes.

    python data_prep/content_sessions.py --tables runs/demo/tables --out runs/demo/sessions

Takes seconds. Contents keep to their splits: before its last purchase a user watches contents of the test
split, before the one that precedes it of the validation split, else of the training split. So under
leave-one-out an encoder trained on the tables has seen nothing of what a test query shows.

Shape letters: N catalogue size, C contents of a split, P products of a content.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from jaxtyping import Float, Int

from mmrec.cli import run_program
from mmrec.data.tables import SPLITS, Tables, read_tables, tables_manifest
from mmrec.errors import UserError
from mmrec.generative.sessions import KIND, Sessions, write_sessions
from mmrec.manifest import Parent, check_output, new_folder, relative_path
from mmrec.ranges import Count, CountOrZero, NonNegative, Range, Share, check_ranges

# An attribute with more values than this says who a product is, not what it is like.
MAX_VALUES = 100
# 2025-01-01, when the first of them may begin.
FIRST_SECOND = 1_735_689_600
DAY = 86_400
DISPLAY_SCHEMA = pa.schema(
    {
        "user_id": pa.string(),
        "time": pa.int64(),
        "item_ids": pa.list_(pa.string()),
        "taken": pa.int64(),
        "shuffled": pa.bool_(),
    }
)


@dataclass(frozen=True, kw_only=True)
class ContentSessionsConfig:
    """What to generate."""

    tables: Path
    """The folder of tables."""
    out: Path
    """The folder to write."""
    num_users: Count = 2000
    min_events: Annotated[int, Range(3)] = 4
    """Products that a user buys at least; three are needed for a test and a validation target."""
    max_events: Count = 10
    """Products that a user buys at most; each user buys a product once."""
    watched: Count = 3
    """Contents watched before each purchase."""
    follow: Share = 0.7
    """Share of the purchases that are of a product just watched."""
    shown: Count = 10
    """Products of a list; fewer where a small catalogue has fewer that the user has not bought."""
    position_bias: NonNegative = 1.0
    """How fast looking falls with the position; 0 looks at all of a list."""
    shuffled: Share = 0.2
    """Share of the lists that are in random order, which tells what a position is worth."""
    taste: NonNegative = 1.5
    """Standard deviation of a user's liking for a value; 0 makes all users alike, without any taste."""
    seed: CountOrZero = 0
    """Decides everything: the same seed gives the same bytes."""
    overwrite: bool = False
    """Replace `out` when it is already there."""


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The contents of one split, and the products that they lead to."""

    content_ids: list[str]
    products: Int[np.ndarray, "C P"]
    """Catalogue rows of each content's products; the first one again where there are fewer."""


@dataclass(frozen=True, kw_only=True)
class ShownList:
    """Products that a user was shown."""

    products: list[int]
    """Catalogue rows, in the order shown."""
    taken: int
    """The position, from 1, of the one that was bought; 0 for none."""
    shuffled: bool


def main(config: ContentSessionsConfig) -> Sessions:
    """Generate sessions and say how many there are."""
    _check(config)
    tables = read_tables(config.tables)
    attributes = attribute_codes(tables)
    shelves = shelve_contents(tables)
    product_ids = tables.products["product_id"].to_pylist()
    if len(tables.products) < config.max_events:
        raise UserError(
            f"--max-events {config.max_events}: expected at most {len(tables.products)}, the number of "
            "products"
        )
    # By the seed alone; three numbers, so that no user draws the same.
    shop_order = np.random.default_rng([config.seed, 0, 1]).permutation(len(product_ids))
    drawn = [
        draw_user(config, number, product_ids, attributes, shelves, shop_order)
        for number in range(config.num_users)
    ]
    rows = [row for row, _ in drawn]
    lists = [one for _, own in drawn for one in own]
    counts = {
        "users": len(rows),
        "products": len(tables.products),
        "events": sum(len(row["item_ids"]) for row in rows),
        "watched": sum(len(row["content_ids"]) for row in rows),
        "lists": len(lists),
    }
    parent = Parent(
        kind="tables",
        fingerprint=tables_manifest(tables).fingerprint,
        path=relative_path(config.out, config.tables),
    )
    with new_folder(config.out, kind=KIND, overwrite=config.overwrite) as folder:
        sessions = write_sessions(
            folder,
            products=tables.products,
            sessions=pa.Table.from_pylist(rows),
            config=asdict(config),
            counts={"out": counts},
            parents=[parent],
            displays=pa.Table.from_pylist(lists, DISPLAY_SCHEMA),
        )
    print(
        f"{config.out}: {counts['users']:,} users bought {counts['events']:,} times and watched "
        f"{counts['watched']:,} contents and {counts['lists']:,} lists"
    )
    return sessions


def attribute_codes(tables: Tables) -> dict[str, tuple[list[str], Int[np.ndarray, " N"]]]:
    """Each attribute that tastes can be about: its values, and the place of every product's value among them.

    A missing value is a value of its own. Raises `UserError` where no attribute has 2 to 100 values.
    """
    found = {}
    for name in tables.attribute_columns:
        column = tables.products[name]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            continue
        cells = ["" if cell is None else cell for cell in column.to_pylist()]
        values = sorted(set(cells))
        if 2 <= len(values) <= MAX_VALUES:
            number = {value: place for place, value in enumerate(values)}
            found[name] = (values, np.array([number[cell] for cell in cells]))
    if not found:
        raise UserError(
            f"{tables.root}: no attribute of its products has 2 to {MAX_VALUES} values in words, and tastes "
            "are about such; add a column such as category to the products' table"
        )
    return found


def shelve_contents(tables: Tables) -> dict[str, Shelf]:
    """The linked contents of each split; without splits all are on every shelf."""
    rows = {product: row for row, product in enumerate(tables.products["product_id"].to_pylist())}
    products: dict[str, list[int]] = defaultdict(list)
    split_of: dict[str, str | None] = {}
    for link in tables.links.to_pylist():
        products[link["content_id"]].append(rows[link["product_id"]])
        split_of[link["content_id"]] = link.get("split")
    shelves = {}
    for split in SPLITS:
        own = [content for content in products if split_of[content] in (split, None)]
        if not own:
            raise UserError(f"{tables.root}: no content of split {split} has a link")
        most = max(len(products[content]) for content in own)
        filled = [
            products[content] + products[content][:1] * (most - len(products[content]))
            for content in own
        ]
        shelves[split] = Shelf(content_ids=own, products=np.array(filled))
    return shelves


def draw_user(
    config: ContentSessionsConfig,
    number: int,
    product_ids: list[str],
    attributes: dict[str, tuple[list[str], Int[np.ndarray, " N"]]],
    shelves: dict[str, Shelf],
    shop_order: Int[np.ndarray, " N"],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row of the sessions' table, and rows of lists. A user depends on the seed and the number alone."""
    generator = np.random.default_rng([config.seed, number])
    liking = np.zeros(len(product_ids))
    likes = []
    for values, codes in attributes.values():
        of_value = generator.normal(0, config.taste, len(values))
        liking += of_value[codes]
        likes.append(values[int(of_value.argmax())])
    # What a content is watched for: the product in it that is liked best.
    appeal = {split: liking[shelf.products].max(axis=1) for split, shelf in shelves.items()}
    num_events = int(
        generator.integers(config.min_events, max(config.min_events, config.max_events) + 1)
    )
    moment = FIRST_SECOND + int(generator.integers(0, 365 * DAY))
    bought: list[int] = []
    times: list[int] = []
    watched: list[str] = []
    watch_times: list[int] = []
    positions: list[int] = []
    lists: list[dict[str, Any]] = []
    for place in range(num_events):
        split = {1: "test", 2: "val"}.get(num_events - place, "train")
        shelf = shelves[split]
        moment += int(generator.exponential(7 * DAY)) + 3600
        # The largest of utility plus Gumbel noise are a draw without replacement from its softmax.
        noisy = appeal[split] + generator.gumbel(size=len(appeal[split]))
        chosen = np.argsort(-noisy)[: config.watched].tolist()
        watched += [shelf.content_ids[content] for content in chosen]
        watch_times += [moment - 60 * (len(chosen) - i) for i in range(len(chosen))]
        new = [row for row in np.unique(shelf.products[chosen]).tolist() if row not in bought]
        if generator.random() < config.follow and new:
            bought.append(new[int((liking[new] + generator.gumbel(size=len(new))).argmax())])
            positions.append(0)
        else:
            shown = draw_lists(config, generator, liking, bought, shop_order)
            lists += [
                {
                    "user_id": f"u{number:05d}",
                    "time": moment - 5 * (len(shown) - 1 - turn),
                    "item_ids": [product_ids[row] for row in own.products],
                    "taken": own.taken,
                    "shuffled": own.shuffled,
                }
                for turn, own in enumerate(shown)
            ]
            positions.append(shown[-1].taken)
            bought.append(shown[-1].products[shown[-1].taken - 1])
        times.append(moment)
    row = {
        "user_id": f"u{number:05d}",
        "item_ids": [product_ids[row] for row in bought],
        "positions": positions,
        "times": times,
        "content_ids": watched,
        "content_times": watch_times,
        "likes": likes,
    }
    return row, lists


def draw_lists(
    config: ContentSessionsConfig,
    generator: np.random.Generator,
    liking: Float[np.ndarray, " N"],
    bought: list[int],
    shop_order: Int[np.ndarray, " N"],
) -> list[ShownList]:
    """The lists that a user is shown until something is bought of one, the last.

    What is wanted of a list depends on what it holds and not on the order, so of shuffled lists each position
    is taken from in proportion to how often it is looked at.
    """
    shown = []
    while True:
        noisy = liking + generator.gumbel(size=len(liking))
        noisy[bought] = -np.inf
        rows = np.argsort(-noisy)[: min(config.shown, len(liking) - len(bought))]
        shuffled = bool(generator.random() < config.shuffled)
        rows = generator.permutation(rows) if shuffled else rows[np.argsort(shop_order[rows])]
        position = 1 + int((liking[rows] + generator.gumbel(size=len(rows))).argmax())
        looked = generator.random() < position**-config.position_bias
        taken = position if looked else 0
        shown.append(ShownList(products=rows.tolist(), taken=taken, shuffled=shuffled))
        if looked:
            return shown


def _check(config: ContentSessionsConfig) -> None:
    check_ranges(config)
    if config.max_events < config.min_events:
        raise UserError(f"--max-events {config.max_events}: expected at least {config.min_events}")
    check_output(config.out, kind=KIND, overwrite=config.overwrite, inputs=[config.tables])


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(ContentSessionsConfig)))
