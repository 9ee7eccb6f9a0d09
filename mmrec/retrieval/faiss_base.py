"""What an index asks of FAISS: build by factory string, map from the disk, search some rows, carry rows over.

Shape letters: Q queries, N rows of the base, M rows asked for, K matches, D width, L inverted lists.

FAISS's kinds of index differ in what they can do: some take no selector, HNSW cannot forget a row, an
inverted file renumbers nothing. The differences end here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from mmrec.bars import clock
from mmrec.errors import UserError
from mmrec.retrieval.exact import Found

# The type stubs that come with FAISS lack parts of it.
_faiss: Any = faiss

# FAISS's own defaults (one list, 16 candidates) find too little; tuning replaces these.
_PROBED_SHARE = 8
_HNSW_CANDIDATES = 64
# With more candidates a graph is slower than comparing everything.
MOST_CANDIDATES = 8_192
# Rounds of OPQ, of its quantizer within each, and of that in the first; and vectors to learn from.
_OPQ_ROUNDS = (8, 2, 8)
_OPQ_VECTORS = 16_384
# The kinds of index that can be filtered, changed and compacted.
_SERVED = (
    *(faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexScalarQuantizer, faiss.IndexRaBitQ),
    *(faiss.IndexPQ, faiss.IndexPQFastScan, _faiss.IndexRaBitQFastScan),
    *(faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ, faiss.IndexIVFRaBitQ),
    *(faiss.IndexIVFPQFastScan, _faiss.IndexIVFRaBitQFastScan),
    *(faiss.IndexHNSWFlat, faiss.IndexHNSWSQ),
)
# The kinds of index that keep every vector as it was given.
_LOSSLESS = (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)
_RABITQ = (faiss.IndexIVFRaBitQ, faiss.IndexRaBitQ)
# More vectors than this say no more of a mean error.
_SAMPLE = 10_000
_ROWS_AT_ONCE = 65_536
# FAISS makes a table of distances for each row that a product quantizer encodes: 64 KB with 64 codes.
ENCODED_AT_ONCE = 1_024


def build_base(vectors: Float32[np.ndarray, "N D"], factory: str) -> Any:
    """A FAISS index for inner products, trained on the vectors and holding them."""
    base = new_base(vectors.shape[1], factory)
    with unfit_refused(factory, len(vectors)):
        with clock(f"train {factory}"):
            train_base(base, vectors)
        # In one call: FAISS begins with the rows of a graph's upper levels, and finds more for it.
        with clock(f"index {len(vectors):,} rows as {factory}"):
            base.add(vectors)
    return base


def new_base(width: int, factory: str) -> Any:
    """An untrained FAISS index for inner products. Raises `UserError` for a factory that cannot be served."""
    try:
        base = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"'{factory}' is not a FAISS factory for inner products of width {width} "
            f"({reason_of(error)}); try Flat, HNSW32, or, of some thousands of vectors, IVF64,Flat"
        ) from None
    _refuse_kind(base, factory)
    if _decodes_badly(core_of(base)) and not isinstance(base, faiss.IndexRefine):
        raise UserError(
            f"factory '{factory}' keeps codes that FAISS cannot read back; add a refinement, such as "
            f"'{factory},RFlat' or '{factory},Refine(SQfp16)'"
        )
    _set_effort(base)
    return base


def _refuse_kind(base: Any, factory: str) -> None:
    """Raises `UserError` for a kind that cannot be searched in every state: filtered, changed, compacted."""
    core = core_of(base)
    if core.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(
            f"factory '{factory}' makes an index of another metric than inner product; "
            "try HNSW32, or HNSW32_SQ8, whose codes are a byte for each component"
        )
    if isinstance(base, faiss.IndexIDMap) or type(core) not in _SERVED:
        raise UserError(
            f"factory '{factory}' makes an index that cannot be searched with filters and deletions; "
            "expected Flat, SQ, PQ or RaBitQ, each with or without IVF, or HNSW with Flat or SQ"
        )


@contextmanager
def unfit_refused(factory: str, count: int) -> Iterator[None]:
    """Training and adding: FAISS's complaint of too few vectors, or of this kind, becomes a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"factory '{factory}' cannot be built from {count} vectors ({reason_of(error)}); "
            "Flat and HNSW32 need no training and take any number"
        ) from None


def _set_effort(base: Any) -> None:
    """Set what the factory string leaves open; FAISS saves these with the index."""
    core = core_of(base)
    if hasattr(core, "do_polysemous_training"):
        # It renumbers a product quantizer's codes for a search by Hamming distance, which is not
        # done here, and takes nine tenths of the training time.
        core.do_polysemous_training = False
    if isinstance(core, faiss.IndexIVF):
        core.nprobe = max(1, core.nlist // _PROBED_SHARE)
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efSearch = _HNSW_CANDIDATES


def train_base(base: Any, vectors: Float32[np.ndarray, "N D"]) -> None:
    """Train an index; an OPQ rotation in fewer rounds, on fewer vectors, with codes as long as the index's.

    FAISS learns it in 50 rounds over 65,536 vectors with 8-bit codes: minutes for what is soon found.
    """
    rotations = _rotations(base)
    # FAISS holds no reference to a quantizer that it is handed.
    quantizers = []
    for rotation in rotations:
        rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = _OPQ_ROUNDS
        rotation.max_train_points = _OPQ_VECTORS
        bits = core_of(base).pq.nbits if hasattr(core_of(base), "pq") else 8
        quantizers.append(faiss.ProductQuantizer(rotation.d_out, rotation.M, bits))
        rotation.pq = quantizers[-1]
    base.train(vectors)
    for rotation in rotations:
        rotation.pq = None


def _rotations(base: Any) -> list[Any]:
    """The OPQ rotations before an index."""
    chains = [(chain, number) for chain in _chains(base) for number in range(chain.size())]
    transforms = [faiss.downcast_VectorTransform(chain.at(number)) for chain, number in chains]
    return [transform for transform in transforms if isinstance(transform, faiss.OPQMatrix)]


def _chains(base: Any) -> list[Any]:
    """The transforms before an index, under any refinement."""
    base = faiss.downcast_index(base)
    if isinstance(base, faiss.IndexRefine):
        return _chains(base.base_index)
    return [base.chain, *_chains(base.index)] if isinstance(base, faiss.IndexPreTransform) else []


def set_search(base: Any, parameters: Mapping[str, float]) -> None:
    """Set nprobe, efSearch and k_factor, those that are given; FAISS saves them with the index."""
    core = core_of(base)
    if "nprobe" in parameters:
        core.nprobe = int(parameters["nprobe"])
    if "efSearch" in parameters:
        core.hnsw.efSearch = int(parameters["efSearch"])
    if "k_factor" in parameters:
        base.k_factor = float(parameters["k_factor"])


def search_range(base: Any) -> tuple[str, int] | None:
    """The parameter that trades speed for recall, and its largest value; None where search is exhaustive."""
    core = core_of(base)
    if isinstance(core, faiss.IndexIVF):
        return "nprobe", core.nlist
    if isinstance(core, faiss.IndexHNSW):
        return "efSearch", max(1, min(base.ntotal, MOST_CANDIDATES))
    return None


def is_refined(base: Any) -> bool:
    """Whether matches are scored again by a second stage, for which k_factor times as many are fetched."""
    return isinstance(faiss.downcast_index(base), faiss.IndexRefine)


def size_of(base: Any) -> int:
    """The bytes that `write_base` would write."""
    written = 0

    def count(part: bytes) -> int:
        nonlocal written
        written += len(part)
        return len(part)

    faiss.write_index(base, _faiss.PyCallbackIOWriter(count))
    return written


def read_base(path: Path) -> Any:
    """Open a FAISS file; codes and graphs stay on the disk and are mapped into memory."""
    try:
        base = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"{path}: not a FAISS index that can be read ({reason_of(error)})"
        ) from None
    if base.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(f"{path}: is a FAISS index of another metric than inner product")
    return base


def write_base(base: Any, path: Path) -> None:
    """Write a FAISS file; equal indexes give equal bytes."""
    _forget_places(base)
    faiss.write_index(base, str(path))


def _forget_places(base: Any) -> None:
    """Drop what `reconstruct` leaves behind: where in its list each vector lies."""
    core = core_of(base)
    if isinstance(core, faiss.IndexIVF):
        core.set_direct_map_type(faiss.DirectMap.NoMap)  # pyright: ignore


def core_of(base: Any) -> Any:
    """The index that is searched first, under any transform, id map or refinement."""
    while True:
        wrapped = getattr(base, "index", None) or getattr(base, "base_index", None)
        if wrapped is None:
            return base
        base = faiss.downcast_index(wrapped)


def reason_of(error: Exception) -> str:
    """FAISS's complaint without the C++ signature and source line before it."""
    return str(error).rsplit(": ", 1)[-1].strip()


# ---------------------------------------------------------------------------------------- searching


def takes_selector(base: Any) -> bool:
    """Whether a search is well held to some rows.

    Product quantizers without lists cannot be. A graph can, but looks for them where its path leads, and
    takes the first that it comes upon for the nearest.
    """
    core = core_of(base)
    without = faiss.IndexPQ | faiss.IndexFastScan | faiss.IndexHNSW
    return isinstance(core, faiss.IndexIVF) or not isinstance(core, without)


def candidates_of(base: Any) -> int | None:
    """How many rows a search of a graph keeps in view; None for other kinds."""
    core = core_of(base)
    return core.hnsw.efSearch if isinstance(core, faiss.IndexHNSW) else None


def scores_rows(base: Any) -> bool:
    """Whether a few rows are best scored one by one, by what the base or its refinement keeps of them.

    To undo a transform costs more than to pass over what is not selected, and RaBitQ's codes score
    otherwise when they are decoded. Kinds that take no selector have no choice.
    """
    base = faiss.downcast_index(base)
    if isinstance(base, faiss.IndexRefine) or keeps_vectors(base) or not takes_selector(base):
        return True
    return not isinstance(base, faiss.IndexPreTransform) and not isinstance(core_of(base), _RABITQ)


def search_all(base: Any, queries: Float32[np.ndarray, "Q D"], k: int) -> Found:
    """Search among all rows, with no fewer candidates of a graph than are fetched.

    FAISS would fill up with what it met on its way.
    """
    if (candidates_of(base) or k) >= k:
        return base.search(queries, k)
    return base.search(queries, k, params=_parameters(base, None, None, 1.0, k))


def search_selected(
    base: Any,
    queries: Float32[np.ndarray, "Q D"],
    k: int,
    selected: Bool[np.ndarray, " N"],
    *,
    lists: Bool[np.ndarray, " L"] | None = None,
    effort: float = 1.0,
) -> Found:
    """Search among the selected rows alone.

    `lists` are the inverted lists that hold any of them: others are not probed. `effort` multiplies the
    lists probed; at infinity all are.
    """
    probed = None if lists is None else _selector(lists)
    return base.search(queries, k, params=_parameters(base, _selector(selected), probed, effort, k))


def _selector(selected: Bool[np.ndarray, " M"]) -> Any:
    return _faiss.IDSelectorBitmap(np.packbits(selected, bitorder="little"))


def _parameters(base: Any, selector: Any, lists: Any, effort: float, k: int) -> Any:
    """Search parameters with the index's own settings: an object of them replaces all at once."""
    base = faiss.downcast_index(base)
    if isinstance(base, faiss.IndexPreTransform):
        inner = _parameters(base.index, selector, lists, effort, k)
        return _faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(base, faiss.IndexRefine):
        fetched = int(np.ceil(k * base.k_factor))
        inner = _parameters(base.base_index, selector, lists, effort, fetched)
        return _faiss.IndexRefineSearchParameters(k_factor=base.k_factor, base_index_params=inner)
    if isinstance(base, faiss.IndexIVF):
        nprobe = int(min(base.nlist, np.ceil(base.nprobe * effort)))
        centers = _parameters(base.quantizer, lists, None, 1.0, nprobe)
        own: dict[str, Any] = {"nprobe": nprobe, "sel": selector, "quantizer_params": centers}
        if isinstance(base, faiss.IndexIVFRaBitQ):
            return _faiss.IVFRaBitQSearchParameters(**own, qb=base.qb)
        return _faiss.SearchParametersIVF(**own)
    if isinstance(base, faiss.IndexHNSW):
        return _faiss.SearchParametersHNSW(efSearch=max(k, base.hnsw.efSearch), sel=selector)
    return _faiss.SearchParameters(sel=selector)


# ------------------------------------------------------------------------------- vectors and codes


def keeps_vectors(base: Any) -> bool:
    """Whether `reconstruct` gives back exactly what was added."""
    base = faiss.downcast_index(base)
    if isinstance(base, faiss.IndexRefineFlat):
        return True
    return isinstance(base, _LOSSLESS)


def reconstruct(base: Any, rows: Int64[np.ndarray, " M"]) -> Float32[np.ndarray, "M D"]:
    """The vectors of rows, as the base keeps them. Raises `RuntimeError` where it cannot."""
    if isinstance(base, faiss.IndexRefine):
        base = faiss.downcast_index(base.refine_index)
    core = core_of(base)
    if isinstance(core, faiss.IndexIVF):
        core.make_direct_map()  # where each vector lies; a second call does nothing
    return base.reconstruct_batch(rows)


def flat_matrix(base: Any) -> Float32[np.ndarray, "N D"] | None:
    """The vectors of a flat index, not copied; None for other kinds. Valid as long as `base` lives."""
    base = faiss.downcast_index(base)
    if not isinstance(base, faiss.IndexFlat) or not base.ntotal:
        return None
    return faiss.rev_swig_ptr(base.get_xb(), base.ntotal * base.d).reshape(base.ntotal, base.d)


def as_scored(base: Any, vectors: Float32[np.ndarray, "M D"]) -> Float32[np.ndarray, "M D"]:
    """What the base would score in the place of new vectors.

    New products wait outside the base. Scored exactly they would come before equally near ones whose
    codes lose some length, so they are scored by what these would be. Refinement scores exactly, and
    RaBitQ corrects the length that its codes lose.
    """
    base = faiss.downcast_index(base)
    rabitq = isinstance(core_of(base), _RABITQ)
    if keeps_vectors(base) or rabitq or isinstance(base, faiss.IndexRefine):
        return vectors
    decoded = _decoded(base, vectors)
    return vectors if decoded is None else decoded


def quantization_error(base: Any, vectors: Float32[np.ndarray, "M D"]) -> float | None:
    """Mean squared distance of vectors, of length one, from what the base's codec keeps of them.

    Of an index with refinement this is the error of its first, compressed stage. None where the kind
    has no codec that can be asked.
    """
    base = faiss.downcast_index(base)
    if isinstance(base, faiss.IndexRefine):
        base = faiss.downcast_index(base.base_index)
    step = max(1, len(vectors) // _SAMPLE)
    sample = np.ascontiguousarray(vectors[::step])
    decoded = sample if keeps_vectors(base) else _decoded(base, sample)
    if decoded is None or not len(sample):
        return None
    difference = decoded - sample
    return float(np.einsum("md,md->", difference, difference) / len(sample))


def _decoded(base: Any, vectors: np.ndarray) -> np.ndarray | None:
    """Vectors encoded and decoded."""
    base, core = faiss.downcast_index(base), core_of(base)
    if _decodes_badly(core):
        return None
    if isinstance(core, faiss.IndexHNSW):
        if isinstance(base, faiss.IndexPreTransform):
            inner = _decoded(base.index, through(base.chain, vectors))
            return None if inner is None else _back_through(base.chain, inner)
        base = faiss.downcast_index(core.storage)
    starts = range(0, len(vectors), ENCODED_AT_ONCE)
    blocks = (vectors[start : start + ENCODED_AT_ONCE] for start in starts)
    try:
        decoded = [base.sa_decode(base.sa_encode(block)) for block in blocks]
    except RuntimeError:
        return None
    return np.concatenate([vectors[:0], *decoded])


def _decodes_badly(core: Any) -> bool:
    """FAISS 1.15.1 crashes, or loses more, when it decodes codes packed for fast scans of lists."""
    return isinstance(core, faiss.IndexIVFFastScan)


def keeps_rows_in_lists(index: Any) -> bool:
    """Whether an index is inverted lists that hold a code and a number for each row."""
    return isinstance(index, faiss.IndexIVF) and not isinstance(index, faiss.IndexIVFFastScan)


def has_lists(base: Any) -> bool:
    """Whether an index has inverted lists, of which a search probes some."""
    return isinstance(core_of(base), faiss.IndexIVF)


def list_sizes(base: Any) -> Int64[np.ndarray, " L"]:
    """Rows in each inverted list; empty for an index without lists."""
    core = core_of(base)
    if not isinstance(core, faiss.IndexIVF):
        return np.zeros(0, np.int64)
    lists: Any = core.invlists
    return np.array([lists.list_size(number) for number in range(core.nlist)], np.int64)


def row_lists(base: Any) -> Int32[np.ndarray, " N"] | None:
    """The inverted list of each row; None for an index without lists."""
    core = core_of(base)
    if not isinstance(core, faiss.IndexIVF):
        return None
    lists: Any = core.invlists
    found = np.empty(core.ntotal, np.int32)
    for number, size in enumerate(list_sizes(base).tolist()):
        if size:
            found[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
    return found


def list_numbers(base: Any, vectors: Float32[np.ndarray, "M D"]) -> Int64[np.ndarray, " M"] | None:
    """The inverted list that each vector would be put in; None for an index without lists."""
    core = core_of(base)
    if not isinstance(core, faiss.IndexIVF):
        return None
    return core.quantizer.assign(_transformed(base, vectors), 1)[:, 0]  # pyright: ignore


def _transformed(base: Any, vectors: np.ndarray) -> np.ndarray:
    """Vectors as the innermost index sees them."""
    base = faiss.downcast_index(base)
    if isinstance(base, faiss.IndexRefine):
        return _transformed(base.base_index, vectors)
    if isinstance(base, faiss.IndexPreTransform):
        return _transformed(base.index, through(base.chain, vectors))
    return vectors


def through(chain: Any, vectors: np.ndarray) -> np.ndarray:
    """Vectors after a chain of transforms."""
    for number in range(chain.size()):
        vectors = faiss.downcast_VectorTransform(chain.at(number)).apply(vectors)
    return vectors


def _back_through(chain: Any, vectors: np.ndarray) -> np.ndarray:
    """Vectors as they were before a chain of transforms, as far as it can be undone."""
    for number in reversed(range(chain.size())):
        vectors = faiss.downcast_VectorTransform(chain.at(number)).reverse_transform(vectors)
    return vectors


def imbalance_of(sizes: Sequence[int] | Int64[np.ndarray, " L"]) -> float:
    """FAISS's imbalance factor: how much longer a search is than with lists of equal length."""
    sizes = np.asarray(sizes, np.float64)
    total = sizes.sum()
    return float(len(sizes) * (sizes**2).sum() / total**2) if total else 1.0


# -------------------------------------------------------------------------------------- carrying over


def carried_over(
    base: Any,
    rows: Int64[np.ndarray, " M"],
    vectors: Float32[np.ndarray, "N D"],
    *,
    path: Path | None = None,
) -> Any:
    """A new index of the same kind and training: some rows of `base` by their codes, then new vectors.

    The new rows are numbered from 0 in the order given; `rows` are in ascending order. Codes are copied,
    so that a product that stays is found as it was. A graph is built anew from what its storage keeps.
    `path` is the file that `base` is mapped from: what is mapped cannot be emptied, only read again.
    """
    new = faiss.read_index(str(path)) if path else faiss.clone_index(base)
    _forget_places(new)
    new.reset()
    _carry(faiss.downcast_index(base), new, rows, vectors)
    return new


def _carry(base: Any, new: Any, rows: np.ndarray, vectors: np.ndarray) -> None:
    if isinstance(base, faiss.IndexPreTransform):
        vectors = through(base.chain, vectors)
        _carry(faiss.downcast_index(base.index), faiss.downcast_index(new.index), rows, vectors)
    elif isinstance(base, faiss.IndexRefine):
        for stage in ("base_index", "refine_index"):
            old_part, new_part = (faiss.downcast_index(getattr(i, stage)) for i in (base, new))
            if _decodes_badly(core_of(old_part)):
                new_part.add(reconstruct(base, rows))
                new_part.add(vectors)
            else:
                _carry(old_part, new_part, rows, vectors)
    elif keeps_rows_in_lists(base):
        _carry_lists(base, new, rows)
        new.ntotal = len(rows)
        new.add(vectors)
    elif isinstance(base, faiss.IndexFlatCodes) and not isinstance(base, faiss.IndexFastScan):
        _carry_codes(base, new, rows)
        new.add(vectors)
    else:
        if len(rows):
            new.add(reconstruct(base, rows))
        new.add(vectors)
    new.ntotal = len(rows) + len(vectors)


def _carry_codes(base: Any, new: Any, rows: np.ndarray) -> None:
    """Copy the codes of rows, some at a time: they may be all of the memory there is."""
    if not len(rows):
        return
    codes = faiss.rev_swig_ptr(base.codes.data(), base.ntotal * base.code_size)
    codes = codes.reshape(base.ntotal, base.code_size)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        new.add_sa_codes(np.ascontiguousarray(codes[rows[start : start + _ROWS_AT_ONCE]]))


def _carry_lists(base: Any, new: Any, rows: np.ndarray) -> None:
    """Copy the codes of rows, list by list, under their new numbers."""
    numbers = np.full(base.ntotal, -1, np.int64)
    numbers[rows] = np.arange(len(rows))
    lists = base.invlists
    for number in range(base.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        old = faiss.rev_swig_ptr(lists.get_ids(number), size)
        kept = np.flatnonzero(numbers[old] >= 0)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * base.code_size)
        codes = np.ascontiguousarray(codes.reshape(size, base.code_size)[kept])
        ids = np.ascontiguousarray(numbers[old[kept]])
        new.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
