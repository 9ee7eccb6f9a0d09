"""The copy of an index that a GPU searches; the CPU's stays the master.

Flat and inverted files are copied as they are. A graph is not: HNSW has no form on a GPU, so cuVS builds
its own kind of graph, CAGRA, from the same vectors.
"""

import math
from typing import Any, Literal

import faiss
import numpy as np

from mmrec.errors import UserError
from mmrec.retrieval.faiss_base import core_of, reason_of, reconstruct

# The type stubs that come with FAISS lack parts of it.
_faiss: Any = faiss

Device = Literal["auto", "cpu", "cuda"]

# FAISS and cuVS refuse a larger k on a GPU; such a search runs on the CPU.
_MAX_K, _MAX_K_OF_GRAPHS = 2048, 256
# CAGRA keeps a list of candidates, in steps of 32; twice FAISS's default, for recall near that of HNSW.
_CANDIDATES, _CANDIDATE_STEP = 128, 32
_DEGREE, _INTERMEDIATE_DEGREE = 64, 128


class CagraCopy:
    """A CAGRA graph on one GPU, searched as other indexes are."""

    def __init__(self, index: Any) -> None:
        """Build the graph from the vectors of a CPU index."""
        self._resources = _faiss.StandardGpuResources()
        config = _faiss.GpuIndexCagraConfig()
        config.graph_degree = _DEGREE
        config.intermediate_graph_degree = _INTERMEDIATE_DEGREE
        self._graph = _faiss.GpuIndexCagra(
            self._resources, index.d, faiss.METRIC_INNER_PRODUCT, config
        )
        self._graph.train(reconstruct(index, np.arange(index.ntotal)))

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As FAISS's own `search`."""
        candidates = max(_CANDIDATES, _CANDIDATE_STEP * math.ceil(k / _CANDIDATE_STEP))
        parameters = _faiss.SearchParametersCagra(itopk_size=candidates)
        return self._graph.search(queries, k, params=parameters)


def largest_k(searcher: Any) -> int:
    """How many matches a copy on the GPU gives."""
    return _MAX_K_OF_GRAPHS if isinstance(searcher, CagraCopy) else _MAX_K


def copy_to_gpu(index: Any, device: Device, factory: str, *, cagra: bool = False) -> Any:
    """A copy of a CPU index on the GPU; None where searches are to run on the CPU.

    HNSW becomes CAGRA, and with `cagra` a flat index does. Raises `UserError` when "cuda" is asked for
    and there is no GPU, or it does not take this kind of index.
    """
    num_gpus = faiss.get_num_gpus()
    if device == "cpu" or (device == "auto" and not num_gpus):
        return None
    if not num_gpus:
        raise UserError("device is 'cuda', but FAISS finds no GPU here; use 'auto' or 'cpu'")
    try:
        if cagra or isinstance(core_of(index), faiss.IndexHNSW):
            return CagraCopy(index)
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError as error:
        if device == "auto":
            return None
        raise UserError(
            f"an index of factory '{factory}' cannot be moved to the GPU "
            f"({reason_of(error)}); use 'auto' or 'cpu'"
        ) from None
