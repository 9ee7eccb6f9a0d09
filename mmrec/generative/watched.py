"""What a user watched since the last purchase, as a source of candidates: FAISS neighbours of those contents.

Sessions whose table has content_ids and content_times say what was watched and when.
Shape letters: Q queries, N catalogue size, C contents that are embedded, D width,
P pairs of a query and a content.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int
from scipy import sparse

from mmrec.errors import UserError
from mmrec.generative.sessions import Sessions, Split


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Pairs of a query and a content that was watched before it was asked."""

    queries: Int[np.ndarray, " P"]
    contents: Int[np.ndarray, " P"]
    """Rows of the contents' embeddings."""
    num_queries: int
    without_embedding: int
    """Contents watched that have no embedding, and were left out."""


def watched_before(sessions: Sessions, split: Split, content_ids: Sequence[str]) -> Watched:
    """What each query's user watched after the last product of the history and up to the target's moment.

    `content_ids` are those of the embeddings. Raises `UserError` for sessions that do not say what was
    watched and when.
    """
    table, times = sessions.table, sessions.times
    if times is None or not {"content_ids", "content_times"} <= set(table.column_names):
        raise UserError(
            "what was watched: expected sessions with times, content_ids and content_times, such as those "
            "that data_prep/content_sessions.py writes"
        )
    rows = {content: row for row, content in enumerate(content_ids)}
    names, moments = table["content_ids"].to_pylist(), table["content_times"].to_pylist()
    queries, contents, without = [], [], 0
    ends = sessions.events.offsets[split.queries] + split.histories.lengths
    for query, (user, end) in enumerate(zip(split.queries.tolist(), ends.tolist(), strict=True)):
        watched = zip(names[user] or (), moments[user] or (), strict=True)
        own = [name for name, moment in watched if times[end - 1] < moment <= times[end]]
        found = [rows[name] for name in own if name in rows]
        without += len(own) - len(found)
        queries += [query] * len(found)
        contents += found
    return Watched(
        queries=np.array(queries, np.int64),
        contents=np.array(contents, np.int64),
        num_queries=len(split.queries),
        without_embedding=without,
    )


def watched_scores(
    watched: Watched,
    contents: Float32[np.ndarray, "C D"],
    products: Float32[np.ndarray, "N D"],
    neighbours: int,
) -> sparse.csr_array:
    """Cosines of products near what was watched, where they are positive, (Q, N).

    Each content proposes its nearest products; one that several propose has the largest of their cosines.
    """
    import faiss

    index = faiss.IndexFlatIP(products.shape[1])
    index.add(_unit_rows(products))
    asked, which = np.unique(watched.contents, return_inverse=True)
    cosines, found = index.search(_unit_rows(contents[asked]), min(neighbours, len(products)))
    queries = np.repeat(watched.queries, found.shape[1])
    rows, values = found[which].ravel(), cosines[which].ravel()
    used = (rows >= 0) & (values > 0)
    queries, rows, values = queries[used], rows[used], values[used]
    # Of the same place the largest comes first, and is the one that is kept.
    order = np.lexsort((-values, rows, queries))
    places = (queries * len(products) + rows)[order]
    first = order[np.unique(places, return_index=True)[1]]
    return sparse.csr_array(
        (values[first].astype(np.float64), (queries[first], rows[first])),
        shape=(watched.num_queries, len(products)),
    )


def _unit_rows(vectors: Float32[np.ndarray, "C D"]) -> Float32[np.ndarray, "C D"]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(norms, 1e-12), np.float32)
