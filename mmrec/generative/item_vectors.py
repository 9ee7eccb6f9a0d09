"""Vectors of products where no encoder is at hand: words of titles, and neighbours in sessions.

Both are truncated singular value decompositions: of titles' TF-IDF (latent semantic analysis, Deerwester et
al. 1990), and of positive pointwise mutual information between products near each other (Levy and
Goldberg 2014). The second must see training sessions alone: a product of none gets a zero row.
Shape letters: N products, V words, W width.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float32
from scipy import sparse
from scipy.sparse.linalg import svds

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def title_vectors(
    titles: Sequence[str | None], width: int, *, seed: int = 0
) -> Float32[np.ndarray, "N W"]:
    """Unit vectors of titles by their words and pairs of words; zero where a title has none that recurs."""
    terms = [_terms(title or "") for title in titles]
    numbers: dict[str, int] = {}
    rows, columns = [], []
    for row, own in enumerate(terms):
        for term in own:
            rows.append(row)
            columns.append(numbers.setdefault(term, len(numbers)))
    counts: Any = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(titles), max(1, len(numbers)))
    )
    documents = counts.getnnz(0)
    counts = counts[:, documents > 1]  # What one title alone has says nothing of the others.
    idf = np.log((1 + len(titles)) / (1 + documents[documents > 1])) + 1
    counts.data = 1 + np.log(counts.data)
    weighted: Any = sparse.csr_matrix(counts.multiply(idf[None, :]))
    return _decomposed(_unit_rows(weighted), width, seed)


def sequence_vectors(
    sequences: Sequence[Sequence[int]],
    num_products: int,
    width: int,
    *,
    window: int = 5,
    shift: float = 1.0,
    seed: int = 0,
) -> Float32[np.ndarray, "N W"]:
    """Unit vectors of products by what stands within `window` places in the same sequence, either side.

        m[i, j] = max(0, log(n_ij n / (n_i n_j^0.75)) - log shift),  n_ij weighted by 1 / distance

    The power lifts rare contexts less than plain PMI does (Levy, Goldberg and Dagan 2015). Zero for products
    that stand beside none.
    """
    rows, columns, weights = [], [], []
    flat = [np.asarray(sequence, np.int64) for sequence in sequences]
    for gap in range(1, window + 1):
        pairs = [(one[:-gap], one[gap:]) for one in flat if len(one) > gap]
        if not pairs:
            break
        left = np.concatenate([a for a, _ in pairs])
        right = np.concatenate([b for _, b in pairs])
        rows += [left, right]
        columns += [right, left]
        weights += [np.full(2 * len(left), 1 / gap)]
    if not rows:
        return np.zeros((num_products, width), np.float32)
    near = sparse.coo_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))),
        shape=(num_products, num_products),
    ).tocsr()
    near.setdiag(0)
    near.eliminate_zeros()
    sums = np.asarray(near.sum(1)).ravel()
    smooth = sums**0.75
    near = near.tocoo()
    mutual = np.log(near.data * smooth.sum() / (sums[near.row] * smooth[near.col])) - np.log(shift)
    kept = mutual > 0
    table: Any = sparse.csr_matrix(
        (mutual[kept], (near.row[kept], near.col[kept])), shape=(num_products, num_products)
    )
    return _decomposed(table.astype(np.float32), width, seed)


def joined_vectors(
    parts: Sequence[Float32[np.ndarray, "N _"]], *, seed: int = 0
) -> tuple[Float32[np.ndarray, "N D"], int]:
    """Unit vectors side by side, made unit again; rows that are zero in every part get a random direction.

    Returns them and how many of the latter there are: their IDs are chance.
    """
    whole = np.concatenate(parts, axis=1)
    empty = np.flatnonzero(np.linalg.norm(whole, axis=1) == 0)
    generator = np.random.default_rng(seed)
    whole[empty] = generator.standard_normal((len(empty), whole.shape[1]), np.float32)
    return whole / np.linalg.norm(whole, axis=1, keepdims=True), len(empty)


def _terms(title: str) -> list[str]:
    words = _WORD.findall(title.lower())
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def _decomposed(matrix: Any, width: int, seed: int) -> Float32[np.ndarray, "N W"]:
    """Left singular vectors of a sparse matrix by the roots of their values, rows of unit length or zero."""
    found = min(width, min(matrix.shape) - 1)
    vectors = np.zeros((matrix.shape[0], width), np.float32)
    if found > 0 and matrix.nnz:
        start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
        left: Any
        left, values, _ = svds(matrix.astype(np.float64), k=found, v0=start)
        # The root evens out the leading directions, which tell frequency more than kind.
        vectors[:, :found] = left[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0))
    # A row that the matrix leaves empty has rounding errors for a direction.
    vectors[np.diff(matrix.indptr) == 0] = 0
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(lengths > 1e-8, vectors / np.maximum(lengths, 1e-8), 0).astype(np.float32)


def _unit_rows(matrix: Any) -> Any:
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    scale: Any = sparse.diags(1 / np.maximum(lengths, 1e-12))
    return sparse.csr_matrix(scale @ matrix)
