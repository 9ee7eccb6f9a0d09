"""ProductIndex: which products lie nearest to a query, by inner product, on FAISS.

Shape letters: Q queries, N products, K matches, D embedding width.

On disk an index is a folder of generations, of which `CURRENT` names the live one:

    manifest.json                           kind "index"
    CURRENT                                 000001
    generations/000001/base.faiss           the FAISS index, always a CPU one
    generations/000001/products.parquet     product_id and attributes, in the base's row order
    generations/000001/generation.json      factory, width, count; size and hash of the files above

A generation is never changed. What FAISS calls an id is a row of the base, and no row leaves this
module: callers hand in product ids and get product ids.
"""

import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Float32, Int64

from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    fingerprint_of,
    hash_file,
    new_folder,
    read_manifest,
    write_manifest,
)

Device = Literal["auto", "cpu", "cuda"]

FIRST_GENERATION = "000001"
_BASE, _PRODUCTS, _RECORD = "base.faiss", "products.parquet", "generation.json"

# Unit length as float16 and bfloat16 can hold it; what is further off was never normalised.
_LENGTH_TOLERANCE = 0.01
# FAISS refuses a larger k on a GPU; such a search runs on the CPU.
_MAX_GPU_K = 2048
# FAISS's own defaults (one list, 16 candidates) find too little; tuning replaces these.
_PROBED_SHARE = 8
_HNSW_CANDIDATES = 64
# The kinds of index that keep every vector as it was given.
_LOSSLESS = (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The products nearest to each query, best first."""

    ids: list[list[str]]
    """K product ids for each query; fewer where an approximate index came upon fewer."""
    scores: Float32[np.ndarray, "Q K"]
    """The inner products of the same matches; -inf past the end of a shorter row of ids."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generation.json` holds."""

    factory: str
    width: int
    count: int
    files: dict[str, dict[str, Any]]
    """For each file its size in `bytes` and its `sha256`."""
    metric: str = "inner_product"


class ProductIndex:
    """An index of product vectors, joined to ids and attributes.

    Made by `build` or `load`. Searching from several threads at once is safe.
    """

    def __init__(
        self, base: Any, products: pa.Table, *, factory: str, manifest: Manifest | None = None
    ) -> None:
        """Join a FAISS index to a table in its row order; for `build` and `load` to call."""
        self.factory = factory
        self.products = products
        """product_id and the attributes, one row for each product."""
        self.ids: list[str] = products["product_id"].to_pylist()
        self.manifest = manifest
        """None until the index is saved."""
        self.device: Literal["cpu", "cuda"] = "cpu"
        """Where searches run."""
        self._base = base
        self._searcher = base
        self._rows = {product_id: row for row, product_id in enumerate(self.ids)}
        self._lock = threading.Lock()

    @classmethod
    def build(
        cls,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        *,
        factory: str = "Flat",
        attributes: pa.Table | None = None,
    ) -> "ProductIndex":
        """Index unit-length vectors, in memory.

        `factory` is a FAISS factory string: "Flat" is exact; "HNSW32", "IVF64,Flat" and
        "IVF64,PQ16" trade recall for speed or memory, and are trained on the vectors where they
        need training. `attributes` has a product_id column that holds every id, in any order.

        Raises `UserError`, naming ids, for duplicate ids and for vectors that are not finite or not
        of unit length; for products without a row of attributes; and for a factory string that
        FAISS does not know, or that needs more vectors to train on.
        """
        vectors = _checked_vectors(ids, vectors)
        products = _join_attributes(ids, attributes)
        return cls(_build_base(vectors, factory), products, factory=factory)

    @classmethod
    def load(
        cls, folder: Path | str, *, device: Device = "auto", verify: bool = False
    ) -> "ProductIndex":
        """Open a saved index.

        `device`: "cpu"; "cuda" for a copy on every GPU; "auto" for that where there is a GPU and
        it takes this kind of index, and else the CPU. `verify` reads the files once more to compare
        their hashes; sizes are always compared.

        Raises `UserError` naming the file when one is missing, truncated or not what was saved, and
        when "cuda" is asked for and cannot be had.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, "index")
        generation = _live_generation(folder)
        record = _read_record(generation, verify=verify)
        base = _read_base(generation / _BASE)
        products = _read_products(generation / _PRODUCTS)
        if (base.d, base.ntotal, len(products)) != (record.width, record.count, record.count):
            raise UserError(
                f"{generation}: {_RECORD} says {record.count} vectors of width {record.width}, but "
                f"{_BASE} holds {base.ntotal} of width {base.d}, {_PRODUCTS} {len(products)} rows"
            )
        index = cls(base, products, factory=record.factory, manifest=manifest)
        index._move(device)
        return index

    def save(
        self,
        out: Path | str,
        *,
        parents: Sequence[Parent] = (),
        config: Mapping[str, Any] | None = None,
        counts: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Manifest:
        """Publish the index as a folder whose first generation is all of it.

        `details` go into the manifest, for what was measured of this index. Raises `UserError` when
        `out` is there already and is not to be overwritten.
        """
        with new_folder(out, kind="index", overwrite=overwrite) as folder:
            generation = folder / "generations" / FIRST_GENERATION
            generation.mkdir(parents=True)
            with self._lock:
                record = self._write_generation(generation)
            (folder / "CURRENT").write_text(f"{FIRST_GENERATION}\n", encoding="utf-8")
            manifest = Manifest(
                kind="index",
                config=dict(config or {}),
                counts=dict(counts or {"out": len(self)}),
                fingerprint=fingerprint_of(
                    {name: file["sha256"] for name, file in record.files.items()}
                ),
                parents=list(parents),
                details={"factory": self.factory, "width": self.width, **(details or {})},
            )
            write_manifest(folder, manifest)
        self.manifest = manifest
        return manifest

    def __len__(self) -> int:
        """The number of products."""
        return len(self.ids)

    @property
    def width(self) -> int:
        """D, the width of its vectors."""
        return self._base.d

    def search(self, queries: Float[np.ndarray, "Q D"], k: int) -> SearchResult:
        """The k products of highest inner product with each query; k is cut to N.

        Raises `UserError` for k < 1, and for queries of another width or that are not finite.
        """
        if k < 1:
            raise UserError(f"k is {k}; expected at least 1")
        queries = self._checked_queries(queries)
        k = min(k, len(self))
        if self.device == "cuda" and k <= _MAX_GPU_K:
            with self._lock:  # a GPU index has one scratch space for all threads
                scores, rows = self._searcher.search(queries, k)
        else:
            scores, rows = self._base.search(queries, k)
        # FAISS fills up with row -1 where an approximate index found fewer than k.
        ids = [[self.ids[row] for row in found if row >= 0] for found in rows.tolist()]
        return SearchResult(ids=ids, scores=np.where(rows >= 0, scores, np.float32(-np.inf)))

    def attributes(self, product_id: str) -> dict[str, Any]:
        """A product's title and other columns. Raises `UserError` for an id that is not here."""
        (row,) = self._rows_of([product_id])
        columns = self.products.slice(row, 1).to_pylist()[0]
        del columns["product_id"]
        return columns

    def vectors(self, ids: Sequence[str]) -> Float32[np.ndarray, "Q D"]:
        """The vectors of products, in the order of `ids`; approximate where the index compresses.

        Raises `UserError` for an id that is not here, and for an index that keeps no vectors.
        """
        rows = self._rows_of(ids)
        try:
            with self._lock:
                core = _core(self._base)
                if isinstance(core, faiss.IndexIVF):
                    core.make_direct_map()  # where each vector lies; a second call does nothing
                return self._base.reconstruct_batch(rows)
        except RuntimeError as error:
            raise UserError(
                f"an index of factory '{self.factory}' does not give its vectors back "
                f"({_reason(error)})"
            ) from None

    @property
    def keeps_vectors(self) -> bool:
        """Whether `vectors` gives back exactly what was indexed."""
        return isinstance(self._base, _LOSSLESS)

    def _move(self, device: Device) -> None:
        """Derive the copy that searches run on; the CPU index stays the master."""
        num_gpus = faiss.get_num_gpus()
        if device == "cpu" or (device == "auto" and not num_gpus):
            return
        if not num_gpus:
            raise UserError("device is 'cuda', but FAISS finds no GPU here; use 'auto' or 'cpu'")
        try:
            self._searcher = faiss.index_cpu_to_all_gpus(self._base)
        except RuntimeError as error:
            if device == "auto":
                return
            raise UserError(
                f"an index of factory '{self.factory}' cannot be moved to the GPU "
                f"({_reason(error)}); use 'auto' or 'cpu'"
            ) from None
        self.device = "cuda"

    def _rows_of(self, ids: Sequence[str]) -> Int64[np.ndarray, " Q"]:
        missing = [product_id for product_id in ids if product_id not in self._rows]
        if missing:
            raise UserError(f"not in this index of {len(self)} products: {_name(missing)}")
        return np.array([self._rows[product_id] for product_id in ids], np.int64)

    def _checked_queries(self, queries: np.ndarray) -> Float32[np.ndarray, "Q D"]:
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise UserError(
                f"queries have shape {queries.shape}; this index expects (Q, {self.width})"
            )
        queries = np.ascontiguousarray(queries, np.float32)
        bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
        if len(bad):
            raise UserError(f"{len(bad)} queries hold NaN or infinity; the first is row {bad[0]}")
        return queries

    def _write_generation(self, folder: Path) -> Generation:
        core = _core(self._base)
        if isinstance(core, faiss.IndexIVF):
            # What `vectors` leaves behind; equal indexes are to have equal bytes.
            core.set_direct_map_type(faiss.DirectMap.NoMap)  # pyright: ignore
        faiss.write_index(self._base, str(folder / _BASE))
        pq.write_table(self.products, folder / _PRODUCTS)
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
            for name in (_BASE, _PRODUCTS)
        }
        record = Generation(factory=self.factory, width=self.width, count=len(self), files=files)
        text = json.dumps(asdict(record), indent=2)
        (folder / _RECORD).write_text(text + "\n", encoding="utf-8")
        return record


def measure_recall(
    index: ProductIndex,
    queries: Float[np.ndarray, "Q D"],
    k: int,
    *,
    vectors: Float[np.ndarray, "N D"] | None = None,
) -> float:
    """The share of each query's true k nearest products that `index` returns: a mean.

    The truth is exact inner product over `vectors`, in the order of `index.ids`: what the index was
    built from. Without them the index's own vectors serve. Raises `UserError` when it has only
    compressed ones: measured against these, recall would look better than it is.
    """
    if not len(queries):
        raise UserError("recall cannot be measured without queries")
    if vectors is None:
        if not index.keeps_vectors:
            raise UserError(
                f"an index of factory '{index.factory}' does not keep its vectors as they were; "
                "hand measure_recall those that it was built from"
            )
        vectors = index.vectors(index.ids)
    found = index.search(queries, k).ids
    exact = ProductIndex.build(index.ids, vectors).search(queries, k).ids
    pairs = zip(found, exact, strict=True)
    return float(np.mean([len(set(ours) & set(true)) / len(true) for ours, true in pairs]))


# ----------------------------------------------------------------------------------------- building


def _checked_vectors(ids: Sequence[str], vectors: np.ndarray) -> Float32[np.ndarray, "N D"]:
    if not len(ids):
        raise UserError("there are no products to index")
    if vectors.ndim != 2 or len(vectors) != len(ids) or not vectors.shape[1]:
        raise UserError(
            f"vectors have shape {vectors.shape}; expected ({len(ids)}, D), a row for each id"
        )
    twice = [product_id for product_id, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"ids that occur more than once: {_name(twice)}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    _refuse(ids, ~np.isfinite(lengths), "vectors with NaN or infinity")
    _refuse(ids, lengths == 0, "vectors of length zero")
    _refuse(ids, abs(lengths - 1) > _LENGTH_TOLERANCE, "vectors that are not of unit length")
    return vectors


def _refuse(ids: Sequence[str], bad: Bool[np.ndarray, " N"], what: str) -> None:
    if bad.any():
        raise UserError(f"{what}: {_name([ids[row] for row in np.flatnonzero(bad).tolist()])}")


def _name(ids: Sequence[str]) -> str:
    """The first few ids, for a message."""
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return ", ".join(f"'{product_id}'" for product_id in ids[:3]) + more


def _join_attributes(ids: Sequence[str], attributes: pa.Table | None) -> pa.Table:
    """A table of product_id and attributes, in the order of `ids`."""
    id_column = pa.array(ids, pa.string())
    if attributes is None:
        return pa.table({"product_id": id_column})
    if "product_id" not in attributes.column_names:
        found = ", ".join(attributes.column_names)
        raise UserError(f"attributes have no column 'product_id'; found {found or 'none'}")
    known = attributes["product_id"].cast(pa.string()).to_pylist()
    rows = {product_id: row for row, product_id in enumerate(known)}
    if len(rows) < len(known):
        twice = [product_id for product_id, count in Counter(known).items() if count > 1]
        raise UserError(f"attributes have more than one row for {_name(twice)}")
    missing = [product_id for product_id in ids if product_id not in rows]
    if missing:
        raise UserError(f"attributes have no row for {_name(missing)}")
    taken = attributes.take([rows[product_id] for product_id in ids])
    rest = [name for name in attributes.column_names if name != "product_id"]
    position = taken.column_names.index("product_id")
    return taken.set_column(position, "product_id", id_column).select(["product_id", *rest])


def _build_base(vectors: Float32[np.ndarray, "N D"], factory: str) -> Any:
    try:
        base = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"'{factory}' is not a FAISS factory for inner products of width {vectors.shape[1]} "
            f"({_reason(error)}); try Flat, HNSW32 or IVF64,Flat"
        ) from None
    _set_effort(base)
    try:
        base.train(vectors)
        base.add(vectors)
    except RuntimeError as error:
        raise UserError(
            f"factory '{factory}' cannot be built from {len(vectors)} vectors ({_reason(error)}); "
            "Flat and HNSW32 need no training and take any number"
        ) from None
    return base


def _set_effort(base: Any) -> None:
    """Set what the factory string leaves open; FAISS saves these with the index."""
    core = _core(base)
    if hasattr(core, "do_polysemous_training"):
        # It renumbers a product quantizer's codes for a search by Hamming distance, which is not
        # done here, and takes nine tenths of the training time.
        core.do_polysemous_training = False
    if isinstance(core, faiss.IndexIVF):
        core.nprobe = max(1, core.nlist // _PROBED_SHARE)
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efSearch = _HNSW_CANDIDATES


def _core(base: Any) -> Any:
    """The index that holds the vectors, under any transform, id map or refinement."""
    while True:
        wrapped = getattr(base, "index", None) or getattr(base, "base_index", None)
        if wrapped is None:
            return base
        base = faiss.downcast_index(wrapped)


def _reason(error: Exception) -> str:
    """FAISS's complaint without the C++ signature and source line before it."""
    return str(error).rsplit(": ", 1)[-1].strip()


# ------------------------------------------------------------------------------------------ reading


def _live_generation(folder: Path) -> Path:
    path = folder / "CURRENT"
    if not path.is_file():
        raise UserError(f"{path}: no such file; it names the index's live generation")
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    generation = folder / "generations" / name
    if not re.fullmatch(r"\d{6}", name) or not generation.is_dir():
        raise UserError(f"{path}: names generation '{name[:40]}', which is not in {folder.name}")
    return generation


def _read_record(generation: Path, *, verify: bool) -> Generation:
    """Read `generation.json` and hold the files beside it against it."""
    path = generation / _RECORD
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        record = Generation(**json.loads(path.read_text(encoding="utf-8")))
        expected = {name: record.files[name] for name in (_BASE, _PRODUCTS)}
        sizes = {name: int(file["bytes"]) for name, file in expected.items()}
        hashes = {name: str(file["sha256"]) for name, file in expected.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a record that this version reads ({error!r})") from None
    for name, size in sizes.items():
        file = generation / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            raise UserError(f"{file}: no such file")
        if found != size:
            raise UserError(f"{file}: is {found} bytes long, and was saved with {size}")
        if verify and hash_file(file) != hashes[name]:
            raise UserError(f"{file}: is not the file that was saved: its SHA-256 differs")
    return record


def _read_base(path: Path) -> Any:
    try:
        base = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: not a FAISS index that can be read ({_reason(error)})") from None
    if base.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(f"{path}: is a FAISS index of another metric than inner product")
    return base


def _read_products(path: Path) -> pa.Table:
    try:
        products = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).split("\n")[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({first_line})") from None
    if "product_id" not in products.column_names:
        raise UserError(f"{path}: missing column 'product_id'")
    return products
