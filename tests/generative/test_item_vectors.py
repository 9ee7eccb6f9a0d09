"""Vectors from titles and sessions: like is near like, and what says nothing gets none."""

import numpy as np
import pytest

pytest.importorskip("scipy", reason="pip install 'mmrec[generative]'")

from mmrec.generative.item_vectors import joined_vectors, sequence_vectors, title_vectors


def test_titles_of_the_same_words_are_near() -> None:
    titles = ["red nail polish", "blue nail polish", "shampoo for dry hair", "hair shampoo", None]
    vectors = title_vectors(titles, 3)
    near = vectors @ vectors.T
    assert near[0, 1] > 0.9 > 0.1 > abs(near[0, 2])
    assert near[2, 3] > 0.9
    assert not vectors[4].any()
    assert np.linalg.norm(vectors[:4], axis=1) == pytest.approx(1, abs=1e-5)


def test_products_of_the_same_sessions_are_near() -> None:
    sequences = [[0, 1, 2], [2, 1, 0], [1, 0, 2], [3, 4, 5], [5, 3, 4], [4, 5, 3]] * 3
    vectors = sequence_vectors(sequences, 7, 2)
    near = vectors @ vectors.T
    assert near[:3, :3].min() > 0.9
    assert near[3:6, 3:6].min() > 0.9
    assert np.abs(near[:3, 3:6]).max() < 0.1
    assert not vectors[6].any()
    assert not sequence_vectors([[1], []], 3, 2).any()


def test_what_has_no_vector_gets_one_by_chance() -> None:
    one = np.array([[1, 0], [0, 0], [0, 0]], np.float32)
    two = np.array([[0, 1], [0, 1], [0, 0]], np.float32)
    vectors, empty = joined_vectors([one, two])
    assert empty == 1
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert vectors[0] @ vectors[1] == pytest.approx(np.sqrt(0.5))
    assert np.array_equal(vectors, joined_vectors([one, two])[0])
