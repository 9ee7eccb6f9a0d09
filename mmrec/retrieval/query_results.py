"""What an evaluation found for each query: `queries.parquet`, which `mmrec compare` reads.

A row a query, in the order of the split. Shape letters: Q queries, N catalogue size, D embedding width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int

from mmrec.data.storage import write_bytes_whole
from mmrec.errors import UserError
from mmrec.retrieval.exact import nearest
from mmrec.retrieval.gallery import Gallery, Slices

FILE_NAME = "queries.parquet"
NUM_TOP = 10
SCHEMA = pa.schema(
    [
        ("content_id", pa.string()),
        ("title", pa.string()),
        ("product_ids", pa.list_(pa.string())),  # the right ones
        ("rank", pa.int64()),  # of the best right one
        ("ranks", pa.list_(pa.int64())),  # of all right ones, ascending
        ("margin", pa.float32()),  # score of the best right one less that of the best wrong one
        ("top_ids", pa.list_(pa.string())),
        ("top_scores", pa.list_(pa.float32())),
        ("slices", pa.list_(pa.string())),
    ]
)


def results_table(
    gallery: Gallery,
    slices: Slices,
    ranks: Sequence[Int[np.ndarray, " _R"]],
    queries: Float32[np.ndarray, "Q D"],
    products: Float32[np.ndarray, "N D"],
) -> pa.Table:
    """What was found for each query, as `SCHEMA` has it; margin is null where no product is wrong."""
    # One more than there can be right ones, so that the best wrong one is always among them.
    most_right = max((len(rows) for rows in gallery.relevant), default=0)
    scores, rows = nearest(queries, products, max(NUM_TOP, most_right + 1))
    ids = gallery.product_ids
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for query, right in enumerate(gallery.relevant):
        wrong = ~np.isin(rows[query], right)
        own = float((products[right] @ queries[query]).max())
        margin = own - float(scores[query][wrong].max()) if wrong.any() else None
        # As ranks do, a wrong product of an equal score comes before a right one.
        order = np.lexsort((~wrong, -scores[query]))[:NUM_TOP]
        meta = gallery.content_metas[query]
        row = {
            "content_id": meta["content_id"],
            "title": meta["title"],
            "product_ids": [ids[product] for product in right],
            "rank": int(ranks[query][0]),
            "ranks": ranks[query].tolist(),
            "margin": margin,
            "top_ids": [ids[product] for product in rows[query][order]],
            "top_scores": scores[query][order].tolist(),
            "slices": [name for name, mask in slices.items() if mask[query]],
        }
        for name, value in row.items():
            columns[name].append(value)
    return pa.table(columns, schema=SCHEMA)


def write_results(folder: Path, table: pa.Table) -> None:
    """Write `queries.parquet`, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_bytes_whole(folder / FILE_NAME, sink.getvalue().to_pybytes())


def read_results(folder: Path) -> pa.Table:
    """Read `queries.parquet`; raises `UserError` where it is missing or is something else."""
    path = folder / FILE_NAME
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; evaluate again to have it: "
            f"`mmrec evaluate --encoder ENCODER --shards SHARDS --out {folder}`"
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
    absent = [name for name in SCHEMA.names if name not in table.column_names]
    if absent:
        raise UserError(f"{path}: has no column {', '.join(absent)}; `mmrec evaluate` writes it")
    return table


def spread_queries(count: int, wanted: int) -> list[int]:
    """Rows evenly spaced over the split: not chosen by how well they went."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int)).tolist()


def best_queries(table: pa.Table, wanted: int) -> list[int]:
    """Rows of queries whose first product is right, by how far it leads the best wrong one."""
    ranks, margins = _ranks_and_margins(table)
    order = np.lexsort((-margins, ranks))
    return [int(row) for row in order[:wanted] if ranks[row] == 1]


def worst_queries(table: pa.Table, wanted: int) -> list[int]:
    """Rows of queries whose best right product stands last, by rank, then by how far it is behind."""
    ranks, margins = _ranks_and_margins(table)
    order = np.lexsort((margins, -ranks))
    return [int(row) for row in order[:wanted] if ranks[row] > 1]


def _ranks_and_margins(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    margins = table["margin"].to_numpy().astype(np.float64)
    return table["rank"].to_numpy(), np.nan_to_num(margins, nan=np.inf)
