"""Generate sessions on a catalogue and its contents: who watched what, and what they bought.

Each user has a latent taste: a liking for every value of every attribute of the products (colour, category
and so on). At each of several moments a user watches some contents, drawn by how much their products
are liked, and then buys: mostly one of the products just watched, else one from the whole catalogue by taste.
So what comes next can be told from what was bought before, from what was watched, and best from both.

Input: a folder of tables whose products have attributes, such as data_prep/synthetic.py writes. Output: a
folder of sessions (mmrec/generative/sessions.py), with content_ids and content_times beside what was bought
and, for whoever wants to look, the attribute values that each user likes best. Same seed, same bytes.

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
    rows = [
        draw_user(config, number, product_ids, attributes, shelves)
        for number in range(config.num_users)
    ]
    counts = {
        "users": len(rows),
        "products": len(tables.products),
        "events": sum(len(row["item_ids"]) for row in rows),
        "watched": sum(len(row["content_ids"]) for row in rows),
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
        )
    print(
        f"{config.out}: {counts['users']:,} users bought {counts['events']:,} times and watched "
        f"{counts['watched']:,} contents"
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
) -> dict[str, Any]:
    """One row of the sessions' table. A user depends on the seed and the number alone."""
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
    for place in range(num_events):
        split = {1: "test", 2: "val"}.get(num_events - place, "train")
        shelf = shelves[split]
        moment += int(generator.exponential(7 * DAY)) + 3600
        # The largest of utility plus Gumbel noise are a draw without replacement from its softmax.
        noisy = appeal[split] + generator.gumbel(size=len(appeal[split]))
        chosen = np.argsort(-noisy)[: config.watched].tolist()
        watched += [shelf.content_ids[content] for content in chosen]
        watch_times += [moment - 60 * (len(chosen) - i) for i in range(len(chosen))]
        shown = np.unique(shelf.products[chosen]).tolist()
        bought.append(_draw_purchase(generator, liking, shown, bought, config.follow))
        times.append(moment)
    return {
        "user_id": f"u{number:05d}",
        "item_ids": [product_ids[row] for row in bought],
        "times": times,
        "content_ids": watched,
        "content_times": watch_times,
        "likes": likes,
    }


def _draw_purchase(
    generator: np.random.Generator,
    liking: Float[np.ndarray, " N"],
    shown: list[int],
    bought: list[int],
    follow: float,
) -> int:
    """A product not bought before, one of those shown with chance `follow`."""
    noisy = liking + generator.gumbel(size=len(liking))
    noisy[bought] = -np.inf
    new = [product for product in shown if product not in bought]
    if generator.random() < follow and new:
        return max(new, key=lambda product: noisy[product])
    return int(noisy.argmax())


def _check(config: ContentSessionsConfig) -> None:
    check_ranges(config)
    if config.max_events < config.min_events:
        raise UserError(f"--max-events {config.max_events}: expected at least {config.min_events}")
    check_output(config.out, kind=KIND, overwrite=config.overwrite, inputs=[config.tables])


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(ContentSessionsConfig)))
