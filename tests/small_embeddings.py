"""Folders of embeddings as `mmrec embed` writes them, of made-up vectors."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmrec.manifest import Manifest, Parent, new_folder, write_manifest
from mmrec.retrieval.parts import write_part, write_record


def write_embeddings(
    folder: Path,
    ids: Sequence[str],
    vectors: np.ndarray,
    *,
    encoder: str = "encoder",
    categories: Sequence[str] | None = None,
    product_ids: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Of products, or of contents where `product_ids` says what they lead to."""
    attributes = [{"category": name} for name in categories] if categories else [{}] * len(ids)
    columns = {
        "id": list(ids),
        "title": [f"title of {id_}" for id_ in ids],
        "attributes": [json.dumps(own) for own in attributes],
    }
    if product_ids is not None:
        columns["product_ids"] = [list(own) for own in product_ids]
    family = "products" if product_ids is None else "contents"
    with new_folder(folder, kind="embeddings") as temporary:
        entry = write_part(temporary, 0, vectors.astype(np.float32), pa.table(columns))
        manifest = Manifest(
            kind="embeddings",
            config={},
            counts={"out": len(ids)},
            fingerprint=write_record(temporary, [entry]),
            parents=[Parent(kind="encoder", fingerprint=encoder, path="../encoder")],
            details={"width": vectors.shape[1], "family": family, "parts": 1},
        )
        write_manifest(temporary, manifest)
    return folder
