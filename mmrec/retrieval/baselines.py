"""Score matrices of things that learn nothing: what an encoder has to beat.

Each returns scores (Q, N), higher being better, for `metrics.rank_relevant_scores`. Ties count
against a baseline as they do against the encoder: a query without a title, for one, scores every
product 0 and so ranks its right product last.

Shape letters: Q queries, N catalogue size, H W height and width of an image.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Real, UInt8

# Robertson and Zaragoza (2009): the values that Lucene and most papers use.
_BM25_K1 = 1.2
_BM25_B = 0.75
# Words, and single characters of scripts written without spaces (kana, Han, Hangul syllables):
# whole sentences would otherwise be one token that never occurs twice.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

_BINS_PER_CHANNEL = 8
HISTOGRAM_SIZE = _BINS_PER_CHANNEL**3
# Products compared at once: a block of minimums is at most 16 MB.
_PRODUCT_BLOCK = 8192


def popularity_scores(
    train_links: Real[np.ndarray, " N"], num_queries: int
) -> Float[np.ndarray, "Q N"]:
    """Score every product by its number of training links, the same for every query.

    A cold product has none, ties with all the other cold ones, and so is never found. The result
    is a read-only view of one row, and takes no more memory than that.
    """
    return np.broadcast_to(train_links.astype(np.float64), (num_queries, len(train_links)))


def title_overlap_scores(
    query_titles: Sequence[str | None], product_titles: Sequence[str | None]
) -> Float32[np.ndarray, "Q N"]:
    """BM25 of each query's title over the product titles (Robertson and Zaragoza, 2009).

    The standard strong baseline of text search: rare words weigh more, repeated words and long
    titles less. A title that is missing, or has no word in common, scores 0.
    """
    postings = _weigh_words([_tokens(title) for title in product_titles])
    scores = np.zeros((len(query_titles), len(product_titles)), np.float32)
    for row, title in enumerate(query_titles):
        # Sorted, so that products with the same words get bit-equal sums.
        for word, count in sorted(Counter(_tokens(title)).items()):
            if word in postings:
                products, weights = postings[word]
                scores[row, products] += count * weights
    return scores


def _tokens(title: str | None) -> list[str]:
    return _TOKEN.findall(unicodedata.normalize("NFKC", title or "").casefold())


def _weigh_words(titles: Sequence[list[str]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each word: the rows of the titles that hold it, and what it adds to their scores."""
    places: dict[str, list[tuple[int, int]]] = {}
    for row, words in enumerate(titles):
        for word, count in Counter(words).items():
            places.setdefault(word, []).append((row, count))
    lengths = np.array([len(words) for words in titles], np.float64)
    norms = _BM25_K1 * (1 - _BM25_B + _BM25_B * lengths / max(1.0, lengths.mean()))
    postings = {}
    for word, found in places.items():
        rows = np.array([row for row, _ in found])
        counts = np.array([count for _, count in found], np.float64)
        rarity = np.log1p((len(titles) - len(rows) + 0.5) / (len(rows) + 0.5))
        weights = rarity * counts * (_BM25_K1 + 1) / (counts + norms[rows])
        postings[word] = (rows, weights.astype(np.float32))
    return postings


def color_histogram(images: Sequence[UInt8[np.ndarray, "_H _W 3"]]) -> Float32[np.ndarray, " 512"]:
    """Share of the pixels in each of 8 x 8 x 8 RGB bins, averaged over images.

    Every image counts the same, whatever its size. The result sums to 1; without images it is 0.
    """
    total = np.zeros(HISTOGRAM_SIZE, np.float64)
    width = 256 // _BINS_PER_CHANNEL
    for image in images:
        red, green, blue = np.moveaxis(image.astype(np.int64) // width, -1, 0)
        bins = (red * _BINS_PER_CHANNEL + green) * _BINS_PER_CHANNEL + blue
        total += np.bincount(bins.ravel(), minlength=HISTOGRAM_SIZE) / bins.size
    return (total / max(1, len(images))).astype(np.float32)


def histogram_intersection(
    queries: Float[np.ndarray, "Q 512"], products: Float[np.ndarray, "N 512"]
) -> Float32[np.ndarray, "Q N"]:
    """Sum of the smaller share in each bin: 1 for equal colours, 0 for none in common.

    The measure of Swain and Ballard, "Color indexing" (1991).
    """
    scores = np.empty((len(queries), len(products)), np.float32)
    for start in range(0, len(products), _PRODUCT_BLOCK):
        columns = np.ascontiguousarray(products[start : start + _PRODUCT_BLOCK].T)
        for row, query in enumerate(queries):
            # Most bins of a picture are empty, and an empty bin adds nothing.
            filled = np.flatnonzero(query)
            block = np.minimum(query[filled, None], columns[filled])  # (filled, block)
            scores[row, start : start + _PRODUCT_BLOCK] = block.sum(axis=0)
    return scores
