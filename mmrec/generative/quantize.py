"""Residual quantization: an embedding as a few codes, each of what the codes before it left over.

Residual k-means by FAISS, with cells of equal size as an option; `rq_vae.py` learns the space as well.
Shape letters: N rows, D embedding width, Z latent width, L levels, K codes a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Int32, Int64

from mmrec.errors import UserError

# The type stubs that come with FAISS lack parts of it.
_faiss: Any = faiss
# Rounds of balanced assignment and new means after FAISS's own rounds; the cells hardly move after.
_BALANCED_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear layer; all but the last of a stack are followed by a ReLU."""

    weight: Float32[np.ndarray, "outputs inputs"]
    bias: Float32[np.ndarray, " outputs"]


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """The frozen part of semantic IDs: what turns any embedding of the same encoder into codes."""

    centroids: Float32[np.ndarray, "L K Z"]
    encoder: tuple[Layer, ...] = ()
    """From embeddings to latents; nothing for k-means, whose latents are the embeddings."""
    decoder: tuple[Layer, ...] = ()
    """From sums of centroids back to embeddings; nothing for k-means."""

    @property
    def levels(self) -> int:
        """L."""
        return self.centroids.shape[0]

    @property
    def size(self) -> int:
        """K."""
        return self.centroids.shape[1]

    @property
    def width(self) -> int:
        """D, of the embeddings that it takes."""
        return self.encoder[0].weight.shape[1] if self.encoder else self.centroids.shape[2]

    def latents(self, vectors: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, "N Z"]:
        """What is quantized. Raises `UserError` for vectors of another width."""
        if vectors.shape[1] != self.width:
            raise UserError(
                f"the codebook is of embeddings {self.width} wide, and these are {vectors.shape[1]} "
                "wide: they are of another encoder"
            )
        return _through(self.encoder, vectors)

    def assign(self, vectors: Float32[np.ndarray, "N D"]) -> Int32[np.ndarray, "N L"]:
        """The codes of embeddings: at each level the nearest centroid to the residual."""
        residual = self.latents(vectors)
        codes = []
        for centroids in self.centroids:
            nearest, _ = nearest_centroids(residual, centroids)
            codes.append(nearest)
            residual = residual - centroids[nearest]
        return np.stack(codes, axis=1).astype(np.int32)

    def reconstruct(
        self, codes: Int32[np.ndarray, "N L"], levels: int
    ) -> Float32[np.ndarray, "N D"]:
        """Embeddings as the first `levels` codes tell them."""
        latents = np.zeros((len(codes), self.centroids.shape[2]), np.float32)
        for level in range(levels):
            latents += self.centroids[level][codes[:, level]]
        return _through(self.decoder, latents)

    def last_residual(
        self, vectors: Float32[np.ndarray, "N D"], codes: Int32[np.ndarray, "N L"]
    ) -> Float32[np.ndarray, "N Z"]:
        """What the last level has to tell, given the codes before it."""
        residual = self.latents(vectors).copy()
        for level in range(self.levels - 1):
            residual -= self.centroids[level][codes[:, level]]
        return residual


def _through(
    layers: Sequence[Layer], rows: Float32[np.ndarray, "N inputs"]
) -> Float32[np.ndarray, "N outputs"]:
    for number, layer in enumerate(layers):
        rows = rows @ layer.weight.T + layer.bias
        if number < len(layers) - 1:
            rows = np.maximum(rows, 0)
    return rows


def nearest_centroids(
    rows: Float32[np.ndarray, "N Z"], centroids: Float32[np.ndarray, "K Z"]
) -> tuple[Int64[np.ndarray, " N"], Float32[np.ndarray, " N"]]:
    """The nearest centroid of each row, and its squared distance."""
    index = _faiss.IndexFlatL2(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    distances, found = index.search(np.ascontiguousarray(rows, np.float32), 1)
    return found[:, 0], distances[:, 0]


def residual_kmeans(
    vectors: Float32[np.ndarray, "N D"],
    *,
    levels: int,
    size: int,
    balanced: bool = False,
    iterations: int = 20,
    seed: int = 0,
) -> tuple[Codebook, Int32[np.ndarray, "N L"]]:
    """Learn a codebook level by level, each on the residuals of the one before; returns the rows' codes too.

    With `balanced` no code of a level has more than ceil(N / K) of these rows, and a row may not have its
    nearest centroid. Raises `UserError` where there are fewer rows than codes.
    """
    check_size(len(vectors), size)
    residual = np.ascontiguousarray(vectors, np.float32)
    centroids, codes = [], []
    for level in range(levels):
        means = _kmeans(residual, size, iterations, seed + level)
        if balanced:
            means, own = _balanced_kmeans(residual, means)
        else:
            own, _ = nearest_centroids(residual, means)
        centroids.append(means)
        codes.append(own)
        residual = residual - means[own]
    return Codebook(centroids=np.stack(centroids)), np.stack(codes, axis=1).astype(np.int32)


def check_size(rows: int, size: int) -> None:
    """Refuse a codebook larger than what it is learned from."""
    if rows < size:
        raise UserError(
            f"{rows:,} embeddings are too few for a codebook of {size:,} codes a level; give "
            f"--codebook-size {max(2, rows // 4)} or less"
        )


def _kmeans(
    rows: Float32[np.ndarray, "N Z"], size: int, iterations: int, seed: int
) -> Float32[np.ndarray, "K Z"]:
    # FAISS warns on stdout below 39 rows a centroid; small catalogues have fewer, and know it.
    kmeans = _faiss.Kmeans(
        rows.shape[1], size, niter=iterations, seed=seed, min_points_per_centroid=1
    )
    kmeans.train(rows)
    return np.ascontiguousarray(kmeans.centroids, np.float32)


def _balanced_kmeans(
    rows: Float32[np.ndarray, "N Z"], means: Float32[np.ndarray, "K Z"]
) -> tuple[Float32[np.ndarray, "K Z"], Int64[np.ndarray, " N"]]:
    """Lloyd's rounds in which no cell takes more than its share."""
    room = -(-len(rows) // len(means))
    own = balanced_assignment(rows, means, room)
    for _ in range(_BALANCED_ROUNDS):
        sums = np.zeros_like(means)
        np.add.at(sums, own, rows)
        counts = np.bincount(own, minlength=len(means))[:, None]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), means).astype(np.float32)
        own = balanced_assignment(rows, means, room)
    return means, own


def balanced_assignment(
    rows: Float32[np.ndarray, "N Z"], centroids: Float32[np.ndarray, "K Z"], room: int
) -> Int64[np.ndarray, " N"]:
    """Give each row a centroid so that none has more than `room` rows; near rows come first.

    In rounds: rows ask the nearest centroid that still has room, which takes the nearest of them. At least
    one centroid fills up in a round that refuses anyone, so there are at most K rounds.
    """
    assert room * len(centroids) >= len(rows)
    own = np.full(len(rows), -1, np.int64)
    left = np.full(len(centroids), room, np.int64)
    waiting = np.arange(len(rows))
    while len(waiting):
        open_ = np.flatnonzero(left)
        asked, distances = nearest_centroids(rows[waiting], centroids[open_])
        asked = open_[asked]
        order = np.lexsort((distances, asked))
        taken = order[place_in_group(asked[order]) < left[asked[order]]]
        own[waiting[taken]] = asked[taken]
        left -= np.bincount(asked[taken], minlength=len(centroids))
        waiting = waiting[own[waiting] < 0]
    return own


def place_in_group(groups: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
    """How many rows of the same group come before each, where equal groups lie side by side."""
    if not len(groups):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    lengths = np.diff(np.r_[starts, len(groups)])
    return np.arange(len(groups)) - np.repeat(starts, lengths)
