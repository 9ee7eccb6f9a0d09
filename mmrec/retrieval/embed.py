"""From an encoder and shards to embeddings on disk.

    <embeddings>/emb/emb_000000.npy              (rows, D) float16 or float32, unit length
    <embeddings>/metadata/metadata_000000.parquet   ids, titles and attributes of the same rows
    <embeddings>/manifest.json

One part a shard, named so that embedding-reader, autofaiss and clip-retrieval read them in the same order.
Shape letters: N rows, D embedding width, W a narrower one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float32
from tqdm import tqdm

from mmrec import distributed
from mmrec.data.batches import item_loader
from mmrec.data.shards import ShardReader, open_shards
from mmrec.data.storage import Place
from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    fingerprint_of,
    hash_file,
    new_folder,
    parent_of,
    read_manifest,
    write_manifest,
)
from mmrec.model.encoder import VIEWS, Encoder, Side

Split = Literal["train", "val", "test", "catalog"]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A folder of embeddings, read whole."""

    folder: Path
    manifest: Manifest
    ids: list[str]
    """product_id or content_id of each row."""
    vectors: Float32[np.ndarray, "N D"]
    metadata: pa.Table
    """id, title, attributes (a JSON object as text), and for contents product_ids."""


def embed_rows(
    encoder: Encoder,
    reader: ShardReader,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: str | None = None,
) -> Float32[np.ndarray, "N D"]:
    """Embed every sample of a split, pictures and title together; see `embed_views`."""
    views = embed_views(
        encoder, reader, batch_size=batch_size, num_workers=num_workers, progress=progress
    )
    return views["content" if reader.family == "contents" else "product"]


def embed_views(
    encoder: Encoder,
    reader: ShardReader,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: str | None = None,
) -> dict[str, Float32[np.ndarray, "N D"]]:
    """Embed every sample of a split as a whole, by its pictures alone, and by its title alone.

    Keys as in `Encoder.views`; where a sample has nothing of a view its row is zero. Under several
    processes each embeds an equal stretch and all get the whole result. `progress` names a progress
    bar. The encoder's mode is left as it was.
    """
    rank, world = distributed.rank(), distributed.world_size()
    own = range(len(reader) * rank // world, len(reader) * (rank + 1) // world)
    loader = item_loader(
        reader,
        own,
        preprocess=encoder.preprocess,
        tokenizer=encoder.tokenizer,
        num_frames=encoder.config.num_frames,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=encoder.device.type == "cuda",
    )
    side: Side = "content" if reader.family == "contents" else "product"
    parts: dict[str, list[np.ndarray]] = {name: [] for name in VIEWS[side]}
    was_training = encoder.training
    encoder.eval()
    with tqdm(
        total=len(own), desc=progress, unit=side, disable=progress is None or rank > 0
    ) as bar:
        for batch in loader:
            with torch.inference_mode():
                views = encoder.views(batch.to(encoder.device), side)
            for name, (vectors, _) in views.items():
                parts[name].append(vectors.float().cpu().numpy())
            bar.update(len(batch))
    encoder.train(was_training)
    empty = np.zeros((0, encoder.width), np.float32)
    local = {name: np.concatenate([empty, *arrays]) for name, arrays in parts.items()}
    gathered = distributed.gather_objects(local)
    return {name: np.concatenate([rank_part[name] for rank_part in gathered]) for name in local}


def narrowed(vectors: Float32[np.ndarray, "N D"], width: int) -> Float32[np.ndarray, "N W"]:
    """The first `width` numbers of each row, made unit vectors again; rows of zeros stay so."""
    if width == vectors.shape[1]:
        return vectors
    prefix = vectors[:, :width]
    lengths = np.linalg.norm(prefix, axis=1, keepdims=True)
    return prefix / np.where(lengths > 0, lengths, 1)


def embed_shards(
    encoder_folder: Path,
    shards: Path,
    out: Path,
    *,
    split: Split = "catalog",
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    dtype: Literal["float16", "float32"] = "float16",
    width: int | None = None,
    overwrite: bool = False,
) -> Embeddings:
    """Embed a split of shards (`catalog`: the products) with a saved encoder into a folder of embeddings.

    `width` keeps that many numbers of each; it must be one that the encoder was trained at. Raises
    `UserError` when it is not, the encoder or the split is missing, `out` is there already, or an item has
    neither a picture nor a title.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError("expected --batch-size of at least 1 and --num-workers of at least 0")
    encoder = Encoder.load(encoder_folder, device=pick_device(device))
    width = width or encoder.width
    if width not in encoder.widths:
        known = ", ".join(map(str, encoder.widths))
        raise UserError(
            f"--width {width}: {encoder_folder} was trained at {known}; give one of these"
        )
    reader = open_split(shards, split)
    inputs = (encoder_folder, shards)
    with new_folder(out, kind="embeddings", overwrite=overwrite, inputs=inputs) as folder:
        (folder / "emb").mkdir()
        (folder / "metadata").mkdir()
        vectors = embed_rows(
            encoder,
            reader,
            batch_size=batch_size,
            num_workers=num_workers,
            progress=f"embed {split}",
        )
        vectors = narrowed(vectors, width)
        _check_lengths(vectors, reader)
        start = 0
        for number, size in enumerate(reader.shard_sizes):
            rows = range(start, start + size)
            part = vectors[start : start + size].astype(dtype)
            np.save(folder / "emb" / f"emb_{number:06d}.npy", part, allow_pickle=False)
            pq.write_table(
                _metadata(reader, rows), folder / "metadata" / f"metadata_{number:06d}.parquet"
            )
            start += size
        config = {"split": split, "dtype": dtype, "num_frames": encoder.config.num_frames}
        write_manifest(
            folder,
            Manifest(
                kind="embeddings",
                config=config,
                counts={"in": len(reader), "out": len(vectors), "dropped": {}},
                parents=[
                    parent_of(out, encoder_folder, "encoder"),
                    parent_of(out, shards, "shards"),
                ],
                fingerprint=_fingerprint(folder),
                details={
                    "width": width,
                    "family": reader.family,
                    "parts": len(reader.shard_sizes),
                },
            ),
        )
    return read_embeddings(out)


def read_embeddings(folder: Path | str) -> Embeddings:
    """Read a folder of embeddings into memory.

    Raises `UserError` when parts are missing, broken, or not those that the manifest names.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "embeddings")
    paths = sorted((folder / "emb").glob("*.npy"))
    if len(paths) != manifest.details["parts"]:
        raise UserError(
            f"{folder}: expected {manifest.details['parts']} parts, found {len(paths)}; embed again"
        )
    if _fingerprint(folder) != manifest.fingerprint:
        raise UserError(f"{folder}: its parts are not those that were written; embed again")
    vectors, tables = [], []
    for path in paths:
        try:
            part = np.load(path, allow_pickle=False).astype(np.float32)
            metadata = path.name.replace("emb_", "metadata_").replace(".npy", ".parquet")
            table = pq.read_table(folder / "metadata" / metadata)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
        if len(part) != len(table):
            raise UserError(f"{path}: {len(part)} vectors, and metadata for {len(table)}")
        vectors.append(part)
        tables.append(table)
    whole = np.concatenate(vectors)
    # float16 on disk: bring each row back to unit length.
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    metadata = pa.concat_tables(tables)
    return Embeddings(
        folder=folder,
        manifest=manifest,
        ids=metadata["id"].to_pylist(),
        vectors=whole,
        metadata=metadata,
    )


def open_split(shards: Place, split: Split) -> ShardReader:
    """Open a split by its name alone: `catalog` is the products, the others are contents."""
    return open_shards(shards, "products" if split == "catalog" else "contents", split)


def pick_device(device: str) -> str:
    """`auto` is the GPU where there is one.

    Raises `UserError` when a GPU is asked for and there is none.
    """
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"--device {device}: expected auto, cpu or cuda")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; use --device cpu")
    return device


def _fingerprint(folder: Path) -> str:
    files = (*folder.glob("emb/*"), *folder.glob("metadata/*"))
    return fingerprint_of({path.name: hash_file(path) for path in files})


def _check_lengths(vectors: Float[np.ndarray, "N D"], reader: ShardReader) -> None:
    bad = np.flatnonzero(np.abs(np.linalg.norm(vectors, axis=1) - 1) > 1e-3)
    if len(bad):
        meta = reader.meta(int(bad[0]))
        name = meta.get("content_id", meta.get("product_id"))
        raise UserError(
            f"{len(bad)} of {len(vectors)} embeddings have no direction, the first '{name}': it has "
            f"neither pictures nor a title, or the encoder gives numbers that are not finite"
        )


def _metadata(reader: ShardReader, rows: Sequence[int]) -> pa.Table:
    metas = [reader.meta(row) for row in rows]
    contents = reader.family == "contents"
    columns: dict[str, list[object]] = {
        "id": [meta["content_id" if contents else "product_id"] for meta in metas],
        "title": [meta["title"] for meta in metas],
        "attributes": [json.dumps(meta["attributes"], ensure_ascii=False) for meta in metas],
    }
    schema = [("id", pa.string()), ("title", pa.string()), ("attributes", pa.string())]
    if contents:
        columns["product_ids"] = [reader.product_ids[row] for row in rows]
        schema.append(("product_ids", pa.list_(pa.string())))
    return pa.table(columns, schema=pa.schema(schema))
