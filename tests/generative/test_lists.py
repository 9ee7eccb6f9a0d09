"""Lists and ID tables from files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_sessions import write_small

from mmrec.errors import UserError
from mmrec.generative.evaluation import RankedProducts
from mmrec.generative.lists import list_shares, read_id_table, read_lists
from mmrec.generative.sessions import leave_one_out


def write_lists(path: Path, rows: dict[str, tuple[list[str], list[float]]]) -> Path:
    columns = {
        "user_id": list(rows),
        "item_ids": [items for items, _ in rows.values()],
        "scores": [scores for _, scores in rows.values()],
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_lists_stand_in_the_order_of_the_queries(tmp_path: Path) -> None:
    sessions = write_small(tmp_path, ["abc", "ab", "bcd", "cde"])
    split = leave_one_out(sessions, "test")
    rows = {"u2": (["h", "x", "a"], [3.0, 2.0, 1.0]), "u0": (["d"], [-1.0])}
    lists, dropped = read_lists(write_lists(tmp_path / "l.parquet", rows), sessions, split)
    assert lists.products.tolist() == [[3, -1, -1], [7, -1, 0], [-1, -1, -1]]
    assert lists.scores.tolist() == [[-1, 0, 0], [3, 2, 1], [0, 0, 0]]
    assert dropped == {"unknown product id": 1, "user without a list": 1}


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    sessions = write_small(tmp_path, ["abc"])
    split = leave_one_out(sessions, "test")
    with pytest.raises(UserError, match="expected Parquet with user_id, item_ids and scores"):
        read_lists(tmp_path / "products.parquet", sessions, split)
    with pytest.raises(UserError, match="has no list for any of 1 users"):
        read_lists(write_lists(tmp_path / "a.parquet", {"u9": (["a"], [1.0])}), sessions, split)
    with pytest.raises(UserError, match="user u0: 1 scores for 2 products"):
        read_lists(
            write_lists(tmp_path / "b.parquet", {"u0": (["a", "b"], [1.0])}), sessions, split
        )


def test_sessions_of_one_user_id_are_refused(tmp_path: Path) -> None:
    sessions = write_small(tmp_path, ["abc", "cde"])
    split = leave_one_out(sessions, "test")
    once = {"user_id": ["u0", "u1"], "item_ids": [["a"], ["b"]], "scores": [[1.0], [1.0]]}
    pq.write_table(pa.table(once), tmp_path / "once.parquet")
    pq.write_table(pa.table(once | {"user_id": ["u0", "u0"]}), tmp_path / "twice.parquet")
    same = replace(sessions, user_ids=["u0", "u0"])
    for file, of in (("once", same), ("twice", sessions)):
        with pytest.raises(UserError, match="two sessions with one user_id cannot be told apart"):
            read_lists(tmp_path / f"{file}.parquet", of, split)


def test_shares_of_a_list_are_a_softmax() -> None:
    products = np.array([[2, 0, 2], [1, -1, -1], [-1, -1, -1]])
    scores = np.array([[-1.0, -2.0, -700.0], [-900.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    shares = list_shares(RankedProducts(products=products, scores=scores), 4).toarray()
    odds = np.exp([-2.0, -1.0])
    np.testing.assert_allclose(shares[0, [0, 2]], odds / odds.sum())
    assert shares[1].tolist() == [0, 1, 0, 0]
    assert not shares[2].any()
    scores[1, 0] = -np.inf
    with pytest.raises(UserError, match="query 1: a list has the score -inf"):
        list_shares(RankedProducts(products=products, scores=scores), 4)


def test_an_id_table_loses_the_code_that_tells_equals_apart(tmp_path: Path) -> None:
    sessions = write_small(tmp_path / "sessions", ["abc"], products="abc")
    folder = tmp_path / "ids"
    folder.mkdir()
    names, codes = ["c", "a", "b"], [[1, 2, 0], [5, 5, 0], [1, 2, 1]]
    pq.write_table(pa.table({"product_id": names, "codes": codes}), folder / "products.parquet")
    assert read_id_table(folder, sessions).tolist() == [[5, 5], [1, 2], [1, 2]]
    other = write_small(tmp_path / "other", ["abd"], products="abd")
    with pytest.raises(
        UserError, match="another catalogue: 1 of 3 products have no ID, such as 'd'"
    ):
        read_id_table(folder, other)
    with pytest.raises(UserError, match="expected a table of semantic IDs"):
        read_id_table(tmp_path, sessions)
