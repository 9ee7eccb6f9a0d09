"""Embeddings as clip-retrieval's inference leaves them: img_emb_K.npy and metadata_K.parquet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_foreign(
    folder: Path, ids: Sequence[str], vectors: np.ndarray, sizes: Sequence[int]
) -> Path:
    """Parts of `sizes` rows, with columns caption, sku (the ids) and price; returns the folder."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    start = 0
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        np.save(folder / f"img_emb/img_emb_{number}.npy", vectors[start : start + size])
        table = pa.table(
            {
                "caption": [f"caption {row}" for row in rows],
                "sku": list(ids[start : start + size]),
                "price": list(rows),
            }
        )
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet")
        start += size
    return folder
