"""Mined hard negatives: a table of products that an encoder takes for a content's, and that are not.

    <negatives>/negatives.parquet   content_id, product_ids (nearest first), scores
    <negatives>/manifest.json       the encoder and the shards that it was mined with

train/mine_negatives.py writes it; training draws some of a row's list each time it shows the row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmrec.data.catalog import Catalog
from mmrec.data.sampler import draw_some
from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    fingerprint_of,
    hash_file,
    read_manifest,
    write_manifest,
)

FILE_NAME = "negatives.parquet"
SCHEMA = pa.schema(
    [
        ("content_id", pa.string()),
        ("product_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
_MINE = "mine anew with train/mine_negatives.py"


@dataclass(frozen=True)
class HardNegatives:
    """What training rows draw their hard negatives from."""

    products: Sequence[Sequence[str]]
    """Each training content's mined products, nearest first; empty where none was kept."""
    catalog: Catalog
    """Where their titles and images are read."""
    numbers: Mapping[str, int]
    """Of every product in the table: those of the training links, and after them the others."""
    per_row: int
    """Negatives drawn for a row; fewer where fewer were kept."""

    def draw(self, sample: int, rng: np.random.Generator) -> list[str]:
        """Some of a row's negatives, each with equal chance."""
        known = self.products[sample]
        return [known[i] for i in draw_some(len(known), self.per_row, rng)]


def write_negatives(
    folder: Path,
    table: Mapping[str, tuple[Sequence[str], Sequence[float]]],
    *,
    parents: list[Parent],
    config: dict[str, Any],
    counts: dict[str, Any],
) -> None:
    """Write a table by content id, and the manifest; `folder` is one of `new_folder`."""
    columns = {
        "content_id": list(table),
        "product_ids": [list(ids) for ids, _ in table.values()],
        "scores": [list(scores) for _, scores in table.values()],
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE_NAME)
    fingerprint = fingerprint_of({FILE_NAME: hash_file(folder / FILE_NAME)})
    write_manifest(
        folder,
        Manifest(
            kind="negatives",
            config=config,
            counts=counts,
            parents=parents,
            fingerprint=fingerprint,
            details={"columns": SCHEMA.names},
        ),
    )


def read_negatives(
    folder: Path,
    *,
    shards: Sequence[Path],
    content_ids: Sequence[str],
    numbers: Mapping[str, int],
    per_row: int,
) -> HardNegatives:
    """Read a table for the training contents of these shards.

    Raises `UserError` when the table was mined with other shards, is not such a table, or names a
    product that the catalogues do not have.
    """
    check_negatives(folder, shards)
    table = _read_table(folder)
    lists = dict(
        zip(table["content_id"].to_pylist(), table["product_ids"].to_pylist(), strict=True)
    )
    catalog = Catalog.open(shards)
    every = dict(numbers)
    for product_id in sorted({product for products in lists.values() for product in products}):
        if product_id not in catalog:
            raise UserError(f"{folder}: product '{product_id}' is not in the catalogue; {_MINE}")
        every.setdefault(product_id, len(every))
    return HardNegatives([lists.get(name, []) for name in content_ids], catalog, every, per_row)


def check_negatives(folder: Path, shards: Sequence[Path]) -> Manifest:
    """Refuse a table that was mined with other shards; returns its manifest."""
    manifest = read_manifest(folder, "negatives")
    mined = sorted(parent.fingerprint for parent in manifest.parents if parent.kind == "shards")
    here = sorted(read_manifest(each, "shards").fingerprint for each in shards)
    if mined != here:
        raise UserError(
            f"{folder}: mined with shards {', '.join(mined) or 'of no name'}, and training reads "
            f"{', '.join(here)}; {_MINE}"
        )
    return manifest


def _read_table(folder: Path) -> pa.Table:
    path = folder / FILE_NAME
    try:
        table = pq.read_table(path)
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a table of negatives ({reason}); {_MINE}") from None
    return table
