"""Ranked lists on disk: what a generator recommends to users, in the rows of a split.

A file of lists is Parquet with user_id, item_ids (product ids, best first) and scores, as train/generator.py
writes it. Shape letters: Q queries, K places of a list, N catalogue size, L codes of an ID.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from scipy import sparse

from mmrec.errors import UserError
from mmrec.generative.evaluation import RankedProducts, check_id_table
from mmrec.generative.sessions import Sessions, Split


def write_lists(path: Path, ranked: RankedProducts, sessions: Sessions, split: Split) -> None:
    """Write the lists of a split's queries, to be read by `read_lists`; the folder is made."""
    listed = ranked.products >= 0
    items, scores = [], []
    for own, values, there in zip(ranked.products, ranked.scores, listed, strict=True):
        items.append([sessions.product_ids[row] for row in own[there]])
        scores.append(values[there].tolist())
    table = pa.table(
        {
            "user_id": [sessions.user_ids[user] for user in split.queries],
            "item_ids": pa.array(items, pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float64())),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def read_lists(
    path: Path, sessions: Sessions, split: Split
) -> tuple[RankedProducts, dict[str, int]]:
    """The lists of a file in the order of a split's queries, and how much of the file was not used.

    Product ids that are not in the catalogue are left out and counted, and so are queries without a list,
    which find nothing. Raises `UserError` for a file of another form, for scores that are not as many as
    products, for a user_id that occurs twice, and where no query has a list.
    """
    try:
        table = pq.read_table(path, columns=["user_id", "item_ids", "scores"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train/generator.py writes it at its end") from None
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: expected Parquet with user_id, item_ids and scores, found: {reason}"
        ) from None
    lists = {str(row["user_id"]): row for row in table.to_pylist()}
    rows = {product: row for row, product in enumerate(sessions.product_ids)}
    users = [sessions.user_ids[user] for user in split.queries]
    if len(lists) < len(table) or len(set(users)) < len(users):
        raise UserError(
            f"{path}: lists of two sessions with one user_id cannot be told apart; give each session its own"
        )
    wanted = [lists.get(user) for user in users]
    longest = max((len(row["item_ids"]) for row in wanted if row), default=0)
    products = np.full((len(wanted), longest), -1)
    scores = np.zeros((len(wanted), longest))
    unknown = 0
    for query, row in enumerate(wanted):
        if row is None:
            continue
        if len(row["item_ids"]) != len(row["scores"]):
            raise UserError(
                f"{path}: user {row['user_id']}: {len(row['scores'])} scores for "
                f"{len(row['item_ids'])} products"
            )
        found = np.array([rows.get(product, -1) for product in row["item_ids"]], np.int64)
        products[query, : len(found)] = found
        scores[query, : len(found)] = row["scores"]
        unknown += int(np.count_nonzero(found < 0))
    without = sum(row is None for row in wanted)
    if without == len(wanted):
        raise UserError(
            f"{path}: has no list for any of {len(wanted):,} users; is it of these sessions?"
        )
    dropped = {"unknown product id": unknown, "user without a list": without}
    return RankedProducts(products=products, scores=scores), {k: v for k, v in dropped.items() if v}


def list_shares(ranked: RankedProducts, num_products: int) -> sparse.csr_array:
    """The softmax of each list's scores, (Q, N): of log probabilities, a product's share of what was found.

    Positive for every listed product. One that a list names twice has the sum. Raises `UserError` for a score
    that is not finite.
    """
    listed = ranked.products >= 0
    if len(bad := np.argwhere(listed & ~np.isfinite(ranked.scores))):
        raise UserError(
            f"query {bad[0, 0]}: a list has the score {ranked.scores[tuple(bad[0])]}, expected finite numbers"
        )
    scores = np.where(listed, ranked.scores, -np.inf)
    best = scores.max(axis=1, keepdims=True, initial=-np.inf)
    best = np.where(np.isfinite(best), best, 0.0)
    # What is e^50 times less likely than the best would be rounded to nothing, and be no candidate.
    odds = np.where(listed, np.exp(np.maximum(scores - best, -50.0)), 0.0)
    shares = odds / np.maximum(odds.sum(axis=1, keepdims=True), 1e-300)
    queries = np.broadcast_to(np.arange(len(listed))[:, None], listed.shape)
    where = (queries[listed], ranked.products[listed])
    matrix = sparse.csr_array((shares[listed], where), shape=(len(listed), num_products))
    matrix.sum_duplicates()
    return matrix


def read_id_table(folder: Path, sessions: Sessions) -> Int[np.ndarray, "N L"]:
    """The semantic ID of each catalogue row, without the code that tells equal IDs apart.

    `folder` is one that train/semantic_ids.py writes. Raises `UserError` where it is of another catalogue.
    """
    path = folder / "products.parquet"
    try:
        table = pq.read_table(path, columns=["product_id", "codes"])
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: expected a table of semantic IDs, found: {reason}") from None
    codes = np.array(table["codes"].to_pylist(), np.int64)[:, :-1]
    order = check_id_table(table["product_id"].to_pylist(), sessions.product_ids, where=str(folder))
    return codes[order]
