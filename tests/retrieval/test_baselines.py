"""The baselines against plain reference code, and their ties."""

import math

import numpy as np
import pytest

from mmrec.retrieval import baselines
from mmrec.retrieval.baselines import (
    color_histogram,
    histogram_intersection,
    popularity_scores,
    title_overlap_scores,
)
from mmrec.retrieval.metrics import rank_relevant_scores


def test_popularity_is_the_same_for_every_query_and_ties_cold_products():
    scores = popularity_scores(np.array([5, 0, 9, 0]), 3)
    assert scores.tolist() == [[5, 0, 9, 0]] * 3
    ranks = rank_relevant_scores(scores, [np.array([2]), np.array([0]), np.array([1])])
    assert [query.tolist() for query in ranks] == [[1], [2], [4]]


def reference_bm25(query: list[str], title: list[str], titles: list[list[str]]) -> float:
    mean_length = sum(map(len, titles)) / len(titles)
    score = 0.0
    for word in query:
        holding = sum(word in other for other in titles)
        rarity = math.log(1 + (len(titles) - holding + 0.5) / (holding + 0.5))
        count = title.count(word)
        score += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(title) / mean_length))
    return score


def test_title_scores_equal_reference_bm25():
    products = ["red wool scarf", "Red red SHOES, red laces", "blue shoes", "mug"]
    queries = ["my red shoes", "a blue blue mug", "nothing here"]
    words = [title.lower().replace(",", "").split() for title in products]
    expected = [
        [reference_bm25(query.split(), title, words) for title in words] for query in queries
    ]
    np.testing.assert_allclose(title_overlap_scores(queries, products), expected, rtol=1e-6)


def test_missing_titles_score_zero_and_rank_last():
    scores = title_overlap_scores([None, "tea"], ["tea", None, ""])
    assert scores[0].tolist() == [0, 0, 0]
    assert scores[1, 0] > 0
    assert scores[1, 1:].tolist() == [0, 0]
    assert rank_relevant_scores(scores, [np.array([0])] * 2)[0].tolist() == [3]
    assert not title_overlap_scores(["tea"], [None, None]).any()


def test_equal_titles_get_equal_scores():
    titles = ["ceramic tea mug", "blue lamp", "mug, tea: ceramic"]
    scores = title_overlap_scores(["tea in a ceramic mug on a lamp"], titles)
    assert scores[0, 0] == scores[0, 2]


def test_titles_in_scripts_without_spaces_share_characters():
    scores = title_overlap_scores(["这款红色连衣裙太好看了"], ["红色连衣裙", "蓝色牛仔裤"])
    assert scores[0, 0] > scores[0, 1]


def test_histogram_counts_pixels_of_known_colours():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = (255, 0, 0)
    black = np.zeros((5, 3, 3), np.uint8)
    histogram = color_histogram([image, black])
    assert histogram.shape == (512,)
    assert histogram[7 * 64] == pytest.approx(0.125)
    assert histogram[0] == pytest.approx(0.875)
    assert histogram.sum() == pytest.approx(1)
    assert not color_histogram([]).any()


def test_intersection_equals_dense_reference(monkeypatch):
    monkeypatch.setattr(baselines, "_PRODUCT_BLOCK", 4)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (6, 9, 3)).astype(np.uint8) for _ in range(14)]
    histograms = np.stack([color_histogram([image]) for image in images])
    queries, products = histograms[:3], histograms[3:]
    expected = np.minimum(queries[:, None], products[None]).sum(axis=-1)
    np.testing.assert_allclose(histogram_intersection(queries, products), expected, atol=1e-6)
    own = histogram_intersection(products, products)
    assert own.argmax(axis=1).tolist() == list(range(len(products)))
    np.testing.assert_allclose(own.diagonal(), 1, atol=1e-6)
