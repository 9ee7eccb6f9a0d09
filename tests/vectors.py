"""Ids and unit vectors for tests of the index."""

import numpy as np


def unit_vectors(count: int, seed: int = 0, width: int = 32) -> np.ndarray:
    """Random directions, the same for the same seed."""
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    """sku-00000 and on."""
    return [f"sku-{number:05d}" for number in range(count)]
