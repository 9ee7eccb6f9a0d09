"""Base: the immutable part of a generation, in memory or mapped from its files.

Shape letters: Q queries, N rows, M rows asked for, K matches, D width, I indexed width, L inverted
lists.
"""

import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float16, Float32, Int32, Int64

from mmrec.errors import UserError
from mmrec.manifest import Manifest, read_manifest
from mmrec.retrieval.exact import WIDE, Found
from mmrec.retrieval.faiss_base import (
    candidates_of,
    core_of,
    flat_matrix,
    has_lists,
    keeps_vectors,
    read_base,
    reconstruct,
    row_lists,
    search_all,
    write_base,
)
from mmrec.retrieval.generations import (
    BASE,
    KEYS,
    PRODUCTS,
    RECORD,
    VECTORS,
    Generation,
    describe_files,
    finish_generation,
    hold_live_generation,
    read_record,
)
from mmrec.retrieval.gpu import Device, copy_to_gpu, largest_k
from mmrec.retrieval.keys import Keys, order_keys


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """The immutable part of a generation, in memory or mapped from its files."""

    record: Generation
    index: Any
    """The FAISS index, on the CPU."""
    keys: Keys
    products: pa.Table
    """Id and attributes, in the index's row order."""
    store: Float16[np.ndarray, "N D"] | None = None
    """Vectors at full width, where they are kept beside the index."""
    path: Path | None = None
    """The file that the index is mapped from; None while it is in memory alone."""
    held: IO[bytes] | None = None
    """Keeps the generation from being removed for as long as this object lives."""
    searcher: Any = None
    """A copy on the GPU, where there is one."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    filters: dict[tuple[str, ...], Bool[np.ndarray, " N"]] = field(default_factory=dict)
    """The last filters and the rows that meet them."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where searches run."""
        return "cpu" if self.searcher is None else "cuda"

    def search(self, queries: Float32[np.ndarray, "Q I"], k: int) -> Found:
        """The k nearest rows, dead ones too."""
        if self.searcher is None or k > largest_k(self.searcher):
            return search_all(self.index, queries, k)
        with self.lock:  # a GPU index has one scratch space for all threads
            return self.searcher.search(queries, k)

    def vectors(self, rows: Int64[np.ndarray, " M"]) -> Float32[np.ndarray, "M D"]:
        """The vectors of rows, at full width where a store keeps them, else as the index has them."""
        if self.store is not None:
            return self.store[rows].astype(np.float32)
        with self.lock:
            return reconstruct(self.index, rows)

    def indexed_vectors(self, rows: Int64[np.ndarray, " M"]) -> Float32[np.ndarray, "M I"]:
        """The vectors of rows at the indexed width, the best that there are."""
        if keeps_vectors(self.index) or self.store is None:
            with self.lock:
                return reconstruct(self.index, rows)
        return narrowed(self.store[rows].astype(np.float32), self.record.indexed_width)

    @cached_property
    def matrix(self) -> Float32[np.ndarray, "N I"] | None:
        """All vectors of a flat index, where numpy is to search them: see exact.py."""
        if self.searcher is not None or self.record.indexed_width >= WIDE:
            return None
        return flat_matrix(self.index)

    @cached_property
    def row_lists(self) -> Int32[np.ndarray, " N"] | None:
        """The inverted list of each row; None for an index without lists."""
        return row_lists(self.index)

    def lists_with(self, rows: Bool[np.ndarray, " N"]) -> Bool[np.ndarray, " L"] | None:
        """The inverted lists that hold any of some rows; None for an index without lists."""
        if self.row_lists is None:
            return None
        found = np.zeros(core_of(self.index).nlist, bool)
        found[self.row_lists[rows]] = True
        return found

    @cached_property
    def graph(self) -> bool:
        """Whether searches follow a graph."""
        return candidates_of(self.index) is not None

    @cached_property
    def approximate(self) -> bool:
        """Whether searches look at some of the rows alone: along a graph, or in inverted lists."""
        return self.graph or has_lists(self.index)

    @cached_property
    def exact(self) -> bool:
        """Whether rows can be compared one by one, by vectors that were not compressed."""
        return self.store is not None or keeps_vectors(self.index)


def base_in_memory(
    record: Generation,
    index: Any,
    products: pa.Table,
    store: Float16[np.ndarray, "N D"] | None = None,
) -> Base:
    """A base that is not on the disk."""
    ids = _column(products)
    keys = Keys(ids, order_keys(ids.to_pylist()))
    return Base(record=record, index=index, keys=keys, products=products, store=store)


def write_files(generation: Path, base: Base) -> Generation:
    """Write a base's files into a generation's folder; returns its record, with their hashes."""
    with base.lock:  # What `reconstruct` needs is cleared away.
        write_base(base.index, generation / BASE)
    write_products(base.products, generation / PRODUCTS)
    np.save(generation / KEYS, base.keys.order, allow_pickle=False)
    if base.store is not None:
        np.save(generation / VECTORS, base.store, allow_pickle=False)
    return replace(base.record, files=describe_files(generation))


def finish_base(generation: Path, record: Generation, manifest: Manifest) -> None:
    """Finish a generation and open it as readers will: what cannot be opened never goes live."""
    finish_generation(generation, record, manifest)
    _open_base(generation, verify=False)


def write_products(products: pa.Table, path: Path) -> None:
    """Write ids and attributes as an Arrow file that can be mapped."""
    products = products.replace_schema_metadata(None)
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, products.schema) as writer,
    ):
        # In one piece, so that ids and rows are found without looking for theirs.
        writer.write_table(products.combine_chunks(), max_chunksize=max(1, len(products)))


def open_live_base(
    folder: Path, device: Device, *, cagra: bool = False, verify: bool = False
) -> tuple[Base, Manifest]:
    """Map the live generation of an index, hold it, and copy it to the GPU where that is asked for.

    Raises `UserError` naming the file that is not what was saved.
    """
    generation, held = hold_live_generation(folder)
    base = _open_base(generation, verify=verify)
    searcher = copy_to_gpu(base.index, device, base.record.factory, cagra=cagra)
    return replace(base, held=held, searcher=searcher), read_manifest(generation, "index")


def _open_base(generation: Path, *, verify: bool) -> Base:
    """Map a generation's files and hold them against its record."""
    record = read_record(generation, verify=verify)
    index = read_base(generation / BASE)
    products = _read_products(generation / PRODUCTS, record.key)
    order = _read_array(generation / KEYS, np.uint64, (2, record.count))
    store = None
    if VECTORS in record.files:
        store = _read_array(generation / VECTORS, np.float16, (record.count, record.width))
    expected = (record.indexed_width, record.count, record.count)
    if (index.d, index.ntotal, len(products)) != expected:
        raise UserError(
            f"{generation}: {RECORD} says {record.count} vectors of width {record.indexed_width}, but "
            f"{BASE} holds {index.ntotal} of width {index.d}, {PRODUCTS} {len(products)} rows"
        )
    return Base(
        record=record,
        index=index,
        keys=Keys(_column(products), order),
        products=products,
        store=store,
        path=generation / BASE,
    )


def _column(products: pa.Table) -> pa.Array:
    """The ids as one array."""
    column = products.column(0)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _read_products(path: Path, key: str) -> pa.Table:
    try:
        products = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        products.validate()
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).split("\n")[0]
        raise UserError(f"{path}: not an Arrow file that can be read ({first_line})") from None
    if products.column_names[:1] != [key]:
        raise UserError(f"{path}: its first column is not '{key}'")
    if not products.num_rows:
        # Of no rows Arrow keeps no chunks.
        products = products.schema.empty_table()
    return products


def _read_array(path: Path, kind: type[np.generic], shape: tuple[int, int]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a numpy file that can be read ({error})") from None
    if array.dtype != kind or array.shape != shape:
        raise UserError(
            f"{path}: expected {kind.__name__} of shape {shape}, found {array.dtype} {array.shape}"
        )
    return array


def narrowed(vectors: Float32[np.ndarray, "M D"], width: int) -> Float32[np.ndarray, "M I"]:
    """The leading components, brought back to length one; a vector with none there stays zero."""
    if vectors.shape[1] == width:
        return vectors
    cut = np.ascontiguousarray(vectors[:, :width])
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / np.where(lengths > 0, lengths, 1)
