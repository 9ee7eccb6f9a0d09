"""What callers need of an index of products, wherever it lies: in a folder under FAISS, or in Milvus.

Shape letters: Q queries, N products, D embedding width.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32

from mmrec.manifest import Manifest
from mmrec.retrieval.index import SearchResult


@runtime_checkable
class Status(Protocol):
    """What `mmrec index status` prints of an index."""

    @property
    def advice(self) -> list[str]:
        """What should be done, each with its reason."""
        ...

    def lines(self) -> list[str]:
        """The status as text."""
        ...


@runtime_checkable
class CatalogueIndex(Protocol):
    """An index that can be searched and changed: `ProductIndex`, `MilvusIndex`; they say more of each."""

    manifest: Manifest | None
    """Where it came from; its parent of kind "encoder" has the fingerprint that queries must have."""

    @property
    def key(self) -> str:
        """The name of the id column: product_id, or content_id in an index of contents."""
        ...

    @property
    def width(self) -> int:
        """D, the width of its vectors and of queries."""
        ...

    @property
    def ids(self) -> list[str]:
        """Every product's id."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """Names and types of the id and the attributes."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, product_id: str) -> bool: ...

    def attributes(self, product_id: str) -> dict[str, Any]:
        """A product's title and other columns."""
        ...

    def attributes_of(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """The same of several products."""
        ...

    def vectors(self, ids: Sequence[str]) -> Float32[np.ndarray, "Q D"]:
        """The vectors of products, in the order of `ids`."""
        ...

    def search(
        self,
        queries: Float[np.ndarray, "Q D"],
        k: int,
        *,
        where: str | None = None,
        rerank: bool | None = None,
    ) -> SearchResult:
        """The k products of highest inner product with each query that meet a condition."""
        ...

    def upsert(
        self,
        ids: Sequence[str],
        vectors: Float[np.ndarray, "N D"],
        attributes: pa.Table | None = None,
    ) -> None:
        """Add products, or replace those that are here."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Take products out; returns how many were here."""
        ...

    def status(self) -> Status:
        """Counts, and what should be done."""
        ...

    def close(self) -> None:
        """Let go of what it holds open."""
        ...
