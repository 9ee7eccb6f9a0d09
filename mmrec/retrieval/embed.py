"""From an encoder and shards to a folder of embeddings on disk: see parts.py for how it lies there.

One part a shard. Shape letters: N rows, D embedding width, W a narrower one.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32

import mmrec
from mmrec import distributed
from mmrec.bars import progress_bar
from mmrec.data.batches import item_loader
from mmrec.data.shards import ShardReader, open_shards
from mmrec.data.storage import Place, is_file, write_bytes_whole
from mmrec.errors import UserError
from mmrec.manifest import (
    FILE_NAME,
    Manifest,
    check_output,
    parent_of,
    read_manifest,
    refuse_other_settings,
    write_manifest,
)
from mmrec.model.encoder import VIEWS, Encoder, Side
from mmrec.retrieval.base import narrowed
from mmrec.retrieval.intake import name_ids
from mmrec.retrieval.parts import (
    Parts,
    check_distinct,
    check_files,
    checked_part,
    fingerprint_read,
    is_written,
    joined_metadata,
    open_parts,
    read_metadata,
    read_stretches,
    write_part,
    write_record,
)

Split = Literal["train", "val", "test", "catalog"]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A folder of embeddings, read whole."""

    folder: Path
    manifest: Manifest
    ids: list[str]
    """product_id or content_id of each row."""
    vectors: Float32[np.ndarray, "N D"]
    metadata: pa.Table
    """id, title, attributes (a JSON object as text), and for contents product_ids; of others as it is."""
    parts: Parts


@dataclass(frozen=True, kw_only=True)
class EmbedSummary:
    """What a run of `embed_shards` did."""

    rows: int
    width: int
    new_rows: int
    """Rows that this run embedded; the others it found."""
    processes: int
    first: bool
    """Whether this is the process that speaks for all."""
    seconds: float
    """From the first batch to the end; the encoder was loaded before."""

    def line(self) -> str:
        """The summary as text."""
        found = self.rows - self.new_rows
        again = f" ({found:,} of them found)" if found else ""
        rate = self.new_rows / max(self.seconds, 1e-9)
        return (
            f"embedded {self.rows:,} items{again}, {self.width} wide, {rate:,.0f} items/s on "
            f"{self.processes} process{'es' if self.processes > 1 else ''}"
        )


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
    shown = progress is not None and rank == 0
    with progress_bar(total=len(own), desc=progress, unit=side, shown=shown) as bar:
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
    restart: bool = False,
) -> EmbedSummary:
    """Embed a split of shards (`catalog`: the products) with a saved encoder into a folder of embeddings.

    Under `accelerate launch` or torchrun the shards are shared out among the processes. No batch holds
    rows of two shards, so that a part has the same bytes whichever process makes it. A run that was
    killed and is started again goes on: parts lie in `.<out>.unfinished` until all are there, and none
    is made twice. Torch's sums depend on the number of its threads: all processes take that of the first,
    and a run that goes on takes that of the run before. `restart` throws these away. `width` keeps that many
    numbers of each embedding; it must be one that the encoder was trained at.

    Raises `UserError` when it is not, the encoder or the split is missing, `out` is there already,
    unfinished work is of other settings, an id occurs twice, or an item has neither a picture nor a title.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError("expected --batch-size of at least 1 and --num-workers of at least 0")
    with distributed.launched_group():
        encoder = Encoder.load(encoder_folder, device=pick_device(device))
        width = encoder.width if width is None else width
        if width not in encoder.widths:
            known = ", ".join(map(str, encoder.widths))
            raise UserError(
                f"--width {width}: {encoder_folder} was trained at {known}; give one of these"
            )
        reader = open_split(shards, split)
        ids = _ids_of(reader)
        check_distinct(ids)
        work = _Work(out)
        settings = {
            "encoder": encoder.fingerprint,
            "shards": read_manifest(shards).fingerprint,
            "split": split,
            "dtype": dtype,
            "width": width,
            "batch_size": batch_size,
            "mmrec": mmrec.__version__,
        }
        sizes = [size for size in reader.shard_sizes if size]
        missing, threads = _agreed(
            lambda: work.start(
                settings,
                len(sizes),
                overwrite=overwrite,
                restart=restart,
                inputs=(encoder_folder, shards),
            )
        )
        own = missing[distributed.rank() :: distributed.world_size()]
        started = time.monotonic()
        with _on_threads(threads):
            made = embed_parts(
                encoder,
                reader,
                own,
                batch_size=batch_size,
                num_workers=num_workers,
                progress=f"embed {split}",
            )
            for number, vectors in made:
                rows = _rows_of_part(sizes, number)
                part = narrowed(vectors, width)
                _check_lengths(part, ids[rows.start : rows.stop])
                work.write(number, part.astype(dtype), _metadata(reader, rows))
        _agreed(
            lambda: work.publish(
                Manifest(
                    kind="embeddings",
                    config={
                        "split": split,
                        "dtype": dtype,
                        "num_frames": encoder.config.num_frames,
                    },
                    counts={"in": len(reader), "out": len(reader), "dropped": {}},
                    parents=[
                        parent_of(out, encoder_folder, "encoder"),
                        parent_of(out, shards, "shards"),
                    ],
                    fingerprint="",
                    details={"width": width, "family": reader.family, "parts": len(sizes)},
                ),
                len(sizes),
            )
        )
        return EmbedSummary(
            rows=len(reader),
            width=width,
            new_rows=sum(sizes[number] for number in missing),
            processes=distributed.world_size(),
            first=distributed.rank() == 0,
            seconds=time.monotonic() - started,
        )


def embed_parts(
    encoder: Encoder,
    reader: ShardReader,
    numbers: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    progress: str,
) -> Iterator[tuple[int, Float32[np.ndarray, "N D"]]]:
    """Embed the samples of some of a split's shards, those without samples not counted, one by one.

    Yields a shard's number and its vectors. One loader runs through all of them, so that no worker waits
    at the end of a shard.
    """
    sizes = [size for size in reader.shard_sizes if size]
    stretches = [_rows_of_part(sizes, number) for number in numbers]
    rows = np.concatenate([np.zeros(0, np.int64), *map(np.array, stretches)])
    loader = item_loader(
        reader,
        rows.tolist(),
        preprocess=encoder.preprocess,
        tokenizer=encoder.tokenizer,
        num_frames=encoder.config.num_frames,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=encoder.device.type == "cuda",
        stretches=[sizes[number] for number in numbers],
    )
    side: Side = "content" if reader.family == "contents" else "product"
    rank, world = distributed.rank(), distributed.world_size()
    name = progress if world == 1 else f"{progress}, 1 of {world} processes"
    encoder.eval()
    batches = iter(loader) if len(rows) else iter(())
    with progress_bar(total=len(rows), desc=name, unit=side, shown=rank == 0) as bar:
        for number in numbers:
            vectors = np.empty((sizes[number], encoder.width), np.float32)
            filled = 0
            while filled < len(vectors):
                batch = next(batches)
                with torch.inference_mode():
                    embedded = encoder.embed(batch.to(encoder.device), side).cpu().numpy()
                vectors[filled : filled + len(embedded)] = embedded
                filled += len(embedded)
                bar.update(len(embedded))
            yield number, vectors


@contextmanager
def _on_threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows_of_part(sizes: Sequence[int], number: int) -> range:
    start = sum(sizes[:number])
    return range(start, start + sizes[number])


def _agreed(step: Callable[[], Result]) -> Result:
    """What the first process has of a step once all have come to it; its `UserError` is everybody's."""
    error = result = None
    distributed.gather_objects(None)
    if distributed.rank() == 0:
        try:
            result = step()
        except UserError as raised:
            error = str(raised)
    result, error = distributed.gather_objects((result, error))[0]
    if error is not None:
        raise UserError(error)
    return result


class _Work:
    """The folder of unfinished work beside the output: parts, and an entry for each that is whole."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.root = out.with_name(f".{out.name}.unfinished")
        self.folder = self.root / "embeddings"
        self._plan = self.root / "plan.json"

    def start(
        self,
        settings: Mapping[str, Any],
        parts: int,
        *,
        overwrite: bool,
        restart: bool,
        inputs: Iterable[Path],
    ) -> tuple[list[int], int]:
        """Begin, or go on where the same settings left off; returns the parts to be made, and threads for it.

        No parts are left, and none is published again, where a run was killed after it had published. Raises
        `UserError` for an output that cannot be written, and for unfinished work of other settings.
        """
        threads = torch.get_num_threads()
        if not restart and self._is_published(settings):
            return [], threads
        check_output(self.out, kind="embeddings", overwrite=overwrite, inputs=inputs)
        if restart:
            shutil.rmtree(self.root, ignore_errors=True)
        if not self._plan.is_file():
            self._write_plan({"settings": settings, "threads": threads})
        plan = self._read_plan()
        refuse_other_settings(self.root, plan.get("settings", {}), settings)
        entries = map(self._entry, range(parts))
        missing = [
            number
            for number, entry in enumerate(entries)
            if entry is None or not is_written(self.folder, number, entry)
        ]
        return missing, plan["threads"]

    def _is_published(self, settings: Mapping[str, Any]) -> bool:
        """Whether work of these settings is in its final place, and only the tidying is left."""
        plan = self._read_plan()
        if plan.get("settings") != settings or self.folder.exists():
            return False
        there = is_file(self.out / FILE_NAME) and read_manifest(self.out).fingerprint
        return there is not False and there == plan.get("fingerprint")

    def _read_plan(self) -> dict[str, Any]:
        return json.loads(self._plan.read_text(encoding="utf-8")) if self._plan.is_file() else {}

    def _write_plan(self, plan: Mapping[str, Any]) -> None:
        write_bytes_whole(self._plan, json.dumps(plan, indent=2).encode())

    def write(self, number: int, vectors: Float[np.ndarray, "N D"], metadata: pa.Table) -> None:
        """Write a part, and then its entry, which says that it is whole."""
        entry = write_part(self.folder, number, vectors, metadata)
        write_bytes_whole(self._entry_path(number), json.dumps(entry).encode())

    def publish(self, manifest: Manifest, parts: int) -> None:
        """Give the parts their final place, and remove the rest."""
        old = self.out.with_name(f".{self.out.name}.old")
        if not self._is_published(self._read_plan().get("settings", {})):
            self._put_in_place(manifest, parts, old)
        shutil.rmtree(old, ignore_errors=True)
        # The plan goes last: with it a run that is killed here is known to be done.
        shutil.rmtree(self.root / "whole", ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def _put_in_place(self, manifest: Manifest, parts: int, old: Path) -> None:
        entries = [entry for entry in map(self._entry, range(parts)) if entry is not None]
        assert len(entries) == parts
        # What a process that was killed was writing.
        for leftover in self.folder.rglob(".*.tmp-*"):
            leftover.unlink()
        fingerprint = write_record(self.folder, entries)
        write_manifest(self.folder, replace(manifest, fingerprint=fingerprint))
        self._write_plan(self._read_plan() | {"fingerprint": fingerprint})
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        self.folder.rename(self.out)

    def _entry(self, number: int) -> dict[str, Any] | None:
        path = self._entry_path(number)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _entry_path(self, number: int) -> Path:
        return self.root / "whole" / f"{number:06d}.json"


def read_embeddings(
    folder: Path | str, *, ids: str | None = None, queries: bool = False
) -> Embeddings:
    """Read a folder of embeddings into memory, ours or one that clip-retrieval wrote.

    `ids` names the column of ids in the metadata of the latter, which `queries` do without: see
    `open_parts`. Raises `UserError` when parts are
    missing, broken, not those that were written, or hold what cannot be indexed.
    """
    parts = open_parts(folder, ids=ids, queries=queries)
    names: list[str] = []
    vectors, tables, hashes = [], [], []
    for part in parts.parts:
        hashes.append(check_files(part))
        own, table = read_metadata(part, parts.id_column, len(names))
        (whole,) = read_stretches(part, part.rows)
        vectors.append(checked_part(part, own, whole))
        tables.append(table)
        names += own
    check_distinct(names)
    return Embeddings(
        folder=parts.folder,
        manifest=replace(parts.manifest, fingerprint=fingerprint_read(parts, hashes)),
        ids=names,
        vectors=np.concatenate(vectors),
        metadata=joined_metadata(parts.folder, tables),
        parts=parts,
    )


def open_split(shards: Place, split: Split) -> ShardReader:
    """Open a split by its name alone: `catalog` is the products, the others are contents."""
    return open_shards(shards, "products" if split == "catalog" else "contents", split)


def pick_device(device: str) -> str:
    """`auto` is the GPU where there is one, and each process's own where there are several of both.

    Raises `UserError` when a GPU is asked for and there is none.
    """
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"--device {device}: expected auto, cpu or cuda")
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU on this machine; use --device cpu")
    if device in ("auto", "cuda") and distributed.world_size() > 1:
        return f"cuda:{distributed.local_rank() % torch.cuda.device_count()}"
    return "cuda" if device == "auto" else device


def _check_lengths(vectors: Float[np.ndarray, "N D"], ids: Sequence[str]) -> None:
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) <= 1e-3))
    if len(bad):
        names = name_ids([ids[row] for row in bad.tolist()])
        raise UserError(
            f"{len(bad)} embeddings of a shard of {len(vectors)} have no direction: {names}; they "
            f"have neither pictures nor a title, or the encoder gives numbers that are not finite"
        )


def _ids_of(reader: ShardReader) -> list[str]:
    if reader.family == "contents":
        return reader.content_ids
    return [ids[0] for ids in reader.product_ids]


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
