"""What a user watched since the last purchase, to be learned from and as a source of candidates.

Sessions whose table has content_ids and content_times say what was watched and when.
Shape letters: Q queries, N catalogue size, C contents that are embedded, D width, U users,
P pairs of a query and a content.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Int64
from scipy import sparse

from mmrec.errors import UserError
from mmrec.generative.sessions import Sequences, Sessions, Split


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Pairs of a query and a content that was watched before it was asked, the last one last."""

    queries: Int[np.ndarray, " P"]
    contents: Int[np.ndarray, " P"]
    """Rows of the contents' embeddings."""
    num_queries: int
    without_embedding: int
    """Contents watched that have no embedding, and were left out."""


def watched_before(sessions: Sessions, split: Split, content_ids: Sequence[str]) -> Watched:
    """What each query's user watched after the last product of the history and up to the target's moment.

    See `watched_at`.
    """
    ends = sessions.events.offsets[split.queries] + split.histories.lengths
    return watched_at(sessions, ends, content_ids)


def watched_at(
    sessions: Sessions, targets: Int[np.ndarray, " Q"], content_ids: Sequence[str]
) -> Watched:
    """What was watched after the event before each target and up to its moment.

    `targets` are places in `sessions.events.items`, none of them a user's first. `content_ids` are those of
    the embeddings. Raises `UserError` for sessions that do not say what was watched and when.
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
    owners = sessions.events.owners[targets]
    ordered = {
        user: sorted(zip(moments[user] or (), names[user] or (), strict=True), key=_moment)
        for user in np.unique(owners).tolist()
    }
    for query, (user, end) in enumerate(zip(owners.tolist(), targets.tolist(), strict=True)):
        watched = ordered[user]
        first, last = (bisect_right(watched, times[i], key=_moment) for i in (end - 1, end))
        own = [name for _, name in watched[first:last]]
        found = [rows[name] for name in own if name in rows]
        without += len(own) - len(found)
        queries += [query] * len(found)
        contents += found
    return Watched(
        queries=np.array(queries, np.int64),
        contents=np.array(contents, np.int64),
        num_queries=len(targets),
        without_embedding=without,
    )


def last_watched(
    sessions: Sessions, split: Split, content_ids: Sequence[str]
) -> Int64[np.ndarray, " U"]:
    """The row of the last content that each user watched before the query; -1 for none, and no query."""
    watched = watched_before(sessions, split, content_ids)
    last = np.full(len(sessions.events), -1)
    # Of several contents of a user the last one stays.
    last[split.queries[watched.queries]] = watched.contents
    return last


def watched_sequences(
    sessions: Sessions,
    train: Sequences,
    rows: Int64[np.ndarray, " N"],
    content_ids: Sequence[str],
) -> list[tuple[Int64[np.ndarray, " _"], Int64[np.ndarray, " _C"]]]:
    """Each training product with those before it, and the contents watched since the one right before it.

    `train` holds the first products of every user, such as `Split.train` does: none later is learned, and of
    contents none that was watched after a product that is. Products are given by their entry in `rows`,
    without those whose entry is -1; what nothing was watched before is left out, and so are first products.
    """
    owners = train.owners
    places = np.arange(len(train.items)) - train.offsets[owners]
    later = np.flatnonzero(places > 0)
    watched = watched_at(
        sessions, sessions.events.offsets[owners[later]] + places[later], content_ids
    )
    parts = np.split(watched.contents, np.searchsorted(watched.queries, np.arange(1, len(later))))
    found = rows[train.items]
    known = found >= 0
    # Sequences are views of this one, since those of a long history are many.
    products = found[known]
    ends = np.cumsum(known)
    starts = (ends - known)[train.offsets[:-1][owners]]
    return [
        (products[starts[item] : ends[item]], contents)
        for item, contents in zip(later, parts, strict=False)
        if len(contents) and known[item]
    ]


def _moment(watched: tuple[int, str]) -> int:
    return watched[0]


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
