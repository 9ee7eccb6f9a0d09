"""Out of core: an index of more vectors than memory holds, built from parts on disk.

The parts are read three times, a stretch of rows at a time: to check them and draw a sample, to write the
FAISS index that was trained on it, and, for vectors at full width, to write those. What FAISS would
hold in memory (the vectors of a flat index, the codes in inverted lists) goes straight to the file, in
the bytes that `faiss.write_index` gives. Of kinds that have no such place (graphs, product quantizers
without lists) memory holds the index itself. Ids, titles and attributes are in memory, too.

Shape letters: M rows of a stretch, N rows of all, S rows of the sample, D width, I indexed width.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64, UInt64

from mmrec.bars import clock, progress_bar
from mmrec.manifest import Manifest, Parent
from mmrec.retrieval.base import finish_base, narrowed, write_products
from mmrec.retrieval.faiss_base import (
    ENCODED_AT_ONCE,
    core_of,
    imbalance_of,
    keeps_rows_in_lists,
    list_sizes,
    new_base,
    quantization_error,
    read_base,
    through,
    train_base,
    unfit_refused,
)
from mmrec.retrieval.filters import filterable
from mmrec.retrieval.generations import (
    BASE,
    KEYS,
    PRODUCTS,
    VECTORS,
    Generation,
    describe_files,
    manifest_of,
    published_generation,
)
from mmrec.retrieval.intake import checked_indexed
from mmrec.retrieval.keys import hash_ids, order_hashes
from mmrec.retrieval.parts import (
    Part,
    Parts,
    attributes_of,
    check_distinct,
    check_files,
    checked_part,
    fingerprint_read,
    joined_metadata,
    read_metadata,
    read_stretches,
)

# The type stubs that come with FAISS lack parts of it.
_faiss: Any = faiss

# Half of the memory is for a stretch: vectors as read, of unit length, narrowed, encoded, sorted.
# A sixth is for the sample, which is put together of pieces and so there twice.
_STRETCHES, _SAMPLES = 24, 6
_SMALLEST_STRETCH, _LARGEST_STRETCH = 1_024, 1_048_576
_FLOAT_BYTES = 4
# FAISS takes 256 vectors for each centroid, and a product quantizer has 256 of them.
_FOR_EACH_CENTROID, _SMALLEST_SAMPLE = 256, 65_536

# For so many vectors of the sample one is drawn that is not trained on.
_UNSEEN = 4

Stretches = Callable[[], Iterator[Float32[np.ndarray, "M I"]]]
"""Starts a pass over all vectors."""


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What the first pass over the parts found."""

    sample: Float32[np.ndarray, "S I"]
    """What the index is trained on."""
    unseen: Float32[np.ndarray, "M I"]
    """Others, which tell how well it keeps what it was not trained on; the same ones where there are none."""
    products: pa.Table
    order: UInt64[np.ndarray, "2 N"]
    fingerprint: str


def bytes_to_build(parts: Parts) -> int:
    """Memory that a build takes which reads all vectors at once: they, a copy, and the index."""
    return 3 * len(parts) * parts.width * np.dtype(np.float32).itemsize


def build_from_parts(
    parts: Parts,
    out: Path,
    *,
    factory: str,
    memory_bytes: int,
    indexed_width: int | None = None,
    rerank: bool = False,
    parents: Sequence[Parent] = (),
    config: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> Manifest:
    """Build and publish an index from parts, as `ProductIndex.build` and `save` do with all in memory.

    The index is trained on a random sample. `memory_bytes` is for vectors; see above for what else
    takes memory. Raises `UserError`, before anything is published, for what `ProductIndex.build`
    refuses, naming the file and the ids.
    """
    indexed = indexed_width or parts.width
    rows_at_once = _stretch(memory_bytes, parts.width)
    index = new_base(indexed, factory)
    with published_generation(out, overwrite=overwrite) as generation:
        survey = _survey(
            parts, indexed, _sample_size(index, len(parts), memory_bytes), rows_at_once, seed
        )
        with unfit_refused(factory, len(survey.sample)), clock(f"train {factory}"):
            train_base(index, survey.sample)
        error = quantization_error(index, survey.unseen) or 0.0

        def stretches() -> Iterator[Float32[np.ndarray, "M I"]]:
            return (narrowed(vectors, indexed) for vectors in _unit_vectors(parts, rows_at_once))

        with unfit_refused(factory, len(parts)):
            _write_index(index, generation / BASE, stretches, len(parts))
        write_products(survey.products, generation / PRODUCTS)
        np.save(generation / KEYS, survey.order, allow_pickle=False)
        if rerank:
            _write_vectors(parts, generation / VECTORS, rows_at_once)
        record = Generation(
            factory=factory,
            width=parts.width,
            indexed_width=indexed,
            count=len(parts),
            key=parts.key,
            rerank=rerank,
            quantization_error=error,
            imbalance=imbalance_of(list_sizes(read_base(generation / BASE))),
            files=describe_files(generation),
        )
        manifest = manifest_of(
            record,
            parents=[_completed(parent, survey.fingerprint) for parent in parents],
            config=dict(config or {}),
            counts={"in": len(parts), "out": len(parts), "dropped": {}},
            details=dict(details or {}),
        )
        finish_base(generation, record, manifest)
    return manifest


def _completed(parent: Parent, fingerprint: str) -> Parent:
    """The embeddings that others wrote have a fingerprint once they have been read."""
    return parent if parent.fingerprint else replace(parent, fingerprint=fingerprint)


def _stretch(memory_bytes: int, width: int) -> int:
    """Rows read at once."""
    fitting = memory_bytes // (_STRETCHES * width * _FLOAT_BYTES)
    return int(np.clip(fitting, _SMALLEST_STRETCH, _LARGEST_STRETCH))


def _sample_size(index: Any, count: int, memory_bytes: int) -> int:
    """Rows to train on: what FAISS would take, cut to what memory and the catalogue have."""
    fitting = memory_bytes // (_SAMPLES * index.d * _FLOAT_BYTES)
    lists = getattr(core_of(index), "nlist", 0)
    wanted = max(_SMALLEST_SAMPLE, _FOR_EACH_CENTROID * lists)
    return min(wanted, max(fitting, _SMALLEST_STRETCH), count)


# --------------------------------------------------------------------------------------- first pass


def _survey(
    parts: Parts, indexed_width: int, samples: int, rows_at_once: int, seed: int
) -> _Survey:
    """Check every file, id and vector, and draw a sample."""
    rng = np.random.default_rng(seed)
    unseen = min(samples // _UNSEEN, len(parts) - samples)
    drawn = rng.choice(len(parts), samples + unseen, replace=False)
    trained = np.zeros(len(parts), bool)
    trained[drawn[:samples]] = True
    drawn = np.sort(drawn)
    sample, hashes, tables, files = [], [], [], []
    start = 0
    for part in progress_bar(parts.parts, desc="check", unit="part"):
        files.append(check_files(part))
        ids, metadata = read_metadata(part, parts.id_column)
        hashes.append(hash_ids(ids))
        tables.append(attributes_of(parts, metadata, ids))
        for vectors, own in _checked_stretches(part, ids, rows_at_once):
            indexed = checked_indexed(own, vectors, indexed_width)
            end = start + len(vectors)
            first, last = np.searchsorted(drawn, [start, end])
            sample.append(indexed[drawn[first:last] - start])
            start = end
    products = filterable(joined_metadata(parts.folder, tables).combine_chunks())
    order = order_hashes(np.concatenate(hashes))
    _check_distinct(order, products.column(0))
    vectors, trained = np.concatenate(sample), trained[drawn]
    return _Survey(
        sample=vectors[trained],
        unseen=vectors[~trained] if unseen else vectors,
        products=products,
        order=order,
        fingerprint=fingerprint_read(parts, files),
    )


def _checked_stretches(
    part: Part, ids: Sequence[str], rows_at_once: int
) -> Iterator[tuple[Float32[np.ndarray, "M D"], Sequence[str]]]:
    """The vectors of a part with their ids."""
    start = 0
    for raw in read_stretches(part, rows_at_once):
        own = ids[start : start + len(raw)]
        yield checked_part(part, own, raw), own
        start += len(raw)


def _check_distinct(order: UInt64[np.ndarray, "2 N"], ids: pa.ChunkedArray) -> None:
    """Refuse ids that occur more than once, found by their hashes: those that are equal lie together."""
    hashes, rows = order
    shared = np.flatnonzero(hashes[1:] == hashes[:-1])
    candidates = rows[np.union1d(shared, shared + 1)].astype(np.int64)
    check_distinct(ids.take(pa.array(candidates)).to_pylist())


# -------------------------------------------------------------------------------------- later passes


def _unit_vectors(parts: Parts, rows_at_once: int) -> Iterator[Float32[np.ndarray, "M D"]]:
    """All vectors as float32 of length one; they have been checked."""
    for part in progress_bar(parts.parts, desc="index", unit="part"):
        for raw in read_stretches(part, rows_at_once):
            vectors = raw.astype(np.float32)
            yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write_vectors(parts: Parts, path: Path, rows_at_once: int) -> None:
    """Write what `np.save` of all vectors as float16 would."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (len(parts), parts.width)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for vectors in _unit_vectors(parts, rows_at_once):
            file.write(vectors.astype(np.float16).data)


def _write_index(index: Any, path: Path, stretches: Stretches, count: int) -> None:
    """Write a trained index as if all vectors had been added to it."""
    with path.open("wb") as file, tempfile.TemporaryDirectory(dir=path.parent) as spool:
        _stream(faiss.downcast_index(index), file, stretches, count, Path(spool))


def _stream(index: Any, file: IO[bytes], stretches: Stretches, count: int, spool: Path) -> None:
    """Write one index; those within it are written in turn, at the place that they have in its bytes."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = faiss.downcast_index(index.index)

        def transformed() -> Iterator[Float32[np.ndarray, "M I"]]:
            return (through(index.chain, vectors) for vectors in stretches())

        file.write(_before(index, [inner], count))
        _stream(inner, file, transformed, count, spool)
    elif isinstance(index, faiss.IndexRefine):
        stages = [faiss.downcast_index(stage) for stage in (index.base_index, index.refine_index)]
        factor = _bytes_of(index, 0)[-_FACTOR_BYTES:]
        file.write(_before(index, stages, count, after=_FACTOR_BYTES))
        for stage in stages:
            _stream(stage, file, stretches, count, spool)
        file.write(factor)
    elif keeps_rows_in_lists(index):
        _stream_lists(index, file, stretches, count, spool)
    elif isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        _stream_codes(index, file, stretches, count)
    else:
        for vectors in stretches():
            index.add(vectors)
        faiss.write_index(index, _faiss.PyCallbackIOWriter(file.write))


_FACTOR_BYTES = 4  # a refinement's k_factor, after both of its stages


def _bytes_of(index: Any, count: int) -> bytes:
    """An index without vectors as FAISS writes it, but for the number that it says it holds."""
    before = index.ntotal
    index.ntotal = count
    written = faiss.serialize_index(index).tobytes()
    index.ntotal = before
    return written


def _before(index: Any, inner: Sequence[Any], count: int, *, after: int = 0) -> bytes:
    """The bytes of an index that come before those of the ones within it."""
    written = _bytes_of(index, count)
    return written[: len(written) - after - sum(len(_bytes_of(one, 0)) for one in inner)]


def _stream_codes(index: Any, file: IO[bytes], stretches: Stretches, count: int) -> None:
    """Write codes in the order of rows: the last field, after their number."""
    flat = isinstance(index, faiss.IndexFlat)
    unit = 4 if flat else 1  # floats are counted in a flat index, bytes elsewhere
    file.write(_bytes_of(index, count)[:-8])
    file.write(np.uint64(count * index.code_size // unit).tobytes())
    for vectors in stretches():
        codes = vectors if flat else index.sa_encode(vectors)
        file.write(np.ascontiguousarray(codes).data)


# -------------------------------------------------------------------------------------- inverted lists


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A stretch's rows in the order of their lists, in the spooled files from row `first` on."""

    first: int
    ends: Int64[np.ndarray, " L"]
    """Where each list ends, counted from `first`."""


def _stream_lists(
    index: Any, file: IO[bytes], stretches: Stretches, count: int, spool: Path
) -> None:
    """Codes list by list, and in a list in the order of rows: stretches are sorted apart, then merged."""
    empty = _bytes_of(index, count)
    mark = b"ilar" + np.array([index.nlist, index.code_size], np.uint64).tobytes()
    if mark not in empty[-64:]:
        raise RuntimeError("this FAISS writes inverted lists in another form")
    with (
        (spool / "codes").open("w+b") as codes,
        (spool / "rows").open("w+b") as rows,
    ):
        runs, largest = [], 1
        for vectors in stretches():
            first = runs[-1].first + int(runs[-1].ends[-1]) if runs else 0
            runs.append(_spool(index, vectors, first, codes, rows))
            largest = max(largest, len(vectors))
        ends = np.sum([run.ends for run in runs], axis=0)
        sizes = np.diff(ends, prepend=0).astype(np.uint64)
        file.write(empty[: empty.rindex(mark) + len(mark)] + b"full")
        file.write(np.uint64(len(sizes)).tobytes() + sizes.tobytes())
        # As many lists at once as make a stretch, and one at least.
        start = 0
        while start < index.nlist:
            done = int(ends[start - 1]) if start else 0
            end = max(start + 1, int(np.searchsorted(ends, done + largest, side="right")))
            _merge(runs, start, end, index.code_size, codes, rows, file)
            start = end


def _spool(
    index: Any, vectors: Float32[np.ndarray, "M I"], first: int, codes: IO[bytes], rows: IO[bytes]
) -> _Run:
    """Encode a stretch and write it in the order of its lists."""
    vectors = np.ascontiguousarray(vectors)
    numbers = index.quantizer.assign(vectors, 1)[:, 0]
    encoded = np.zeros((len(vectors), index.code_size), np.uint8)
    for start in range(0, len(vectors), ENCODED_AT_ONCE):
        own = [array[start : start + ENCODED_AT_ONCE] for array in (vectors, numbers, encoded)]
        index.encode_vectors(*(len(own[0]), *map(faiss.swig_ptr, own)))
    order = np.argsort(numbers, kind="stable")
    codes.write(encoded[order].data)
    rows.write((order.astype(np.int64) + first).data)
    ends = np.searchsorted(numbers[order], np.arange(index.nlist), side="right")
    return _Run(first=first, ends=ends.astype(np.int64))


def _merge(
    runs: Sequence[_Run],
    start: int,
    end: int,
    code_size: int,
    codes: IO[bytes],
    rows: IO[bytes],
    file: IO[bytes],
) -> None:
    """Write the lists from `start` to `end`."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for run in runs:
        ends = run.ends[start:end]
        before = int(run.ends[start - 1]) if start else 0
        lists = np.repeat(np.arange(end - start), np.diff(ends, prepend=before))
        place, size = run.first + before, len(lists)
        own = _read_rows(codes, np.uint8, place, size, code_size)
        found.append((lists, own, _read_rows(rows, np.int64, place, size, 1)))
    lists, own_codes, own_rows = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(lists, kind="stable")
    own_codes, own_rows = own_codes[order], own_rows[order]
    last = 0
    for next_ in np.searchsorted(lists[order], np.arange(end - start), side="right").tolist():
        file.write(own_codes[last:next_].data)
        file.write(own_rows[last:next_].data)
        last = next_


def _read_rows(
    file: IO[bytes], kind: type[np.generic], first: int, count: int, width: int
) -> np.ndarray:
    found = np.empty((count, width), kind)
    file.seek(first * width * found.itemsize)
    # An empty array has no bytes to cast.
    if count:
        file.readinto(found.data.cast("B"))  # pyright: ignore[reportAttributeAccessIssue]
    return found
