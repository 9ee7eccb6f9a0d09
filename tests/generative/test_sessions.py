"""Sessions on disk, and how they are split."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_sessions import write_small

from mmrec.errors import UserError
from mmrec.generative.sessions import (
    Sequences,
    encode_history,
    leave_one_out,
    read_sessions,
    sample_queries,
    sequences_of,
    split_sessions,
    time_split,
)
from mmrec.manifest import read_manifest


def letters(sequences: Sequences) -> list[str]:
    return ["".join("abcdefgh"[item] for item in row) for row in sequences]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = write_small(tmp_path, ["abc", "bd"], times=[[1, 2, 3], [4, 4]])
    read = read_sessions(tmp_path)
    assert letters(read.events) == ["abc", "bd"]
    assert read.times is not None
    assert read.times.tolist() == [1, 2, 3, 4, 4]
    assert (
        read.fingerprint == written.fingerprint == read_manifest(tmp_path, "sessions").fingerprint
    )
    assert read_manifest(tmp_path).details["catalogue"] == read.catalogue


def test_unknown_products_and_empty_users_are_left_out_and_counted(tmp_path: Path) -> None:
    read = write_small(tmp_path, ["axbc", "yy", "", "cd"], times=[[1, 2, 3, 4], [1, 2], [], [5, 6]])
    assert letters(read.events) == ["abc", "cd"]
    assert read.user_ids == ["u0", "u3"]
    assert read.times is not None
    assert read.times.tolist() == [1, 3, 4, 5, 6]
    assert read.dropped == {"unknown product id": 3, "user without products": 2}


@pytest.mark.parametrize(
    ("lists", "times", "complaint"),
    [
        (["xyz"], None, "no session has a product of products.parquet"),
        (["ab"], [[2, 1]], "row 1: times go backwards"),
        (["ab"], [[1]], "row 1: 1 times for 2 products"),
    ],
)
def test_bad_sessions_are_refused(
    tmp_path: Path, lists: list[str], times: list[list[int]] | None, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        write_small(tmp_path, lists, times=times)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; expected a folder of sessions"):
        read_sessions(tmp_path)
    write_small(tmp_path, ["ab"])
    pq.write_table(pa.table({"user": ["u"]}), tmp_path / "sessions.parquet")
    with pytest.raises(UserError, match="missing column 'user_id'; found user"):
        read_sessions(tmp_path)
    with pytest.raises(UserError, match="row 2: duplicate product_id 'a', first in row 1"):
        write_small(tmp_path / "twice", ["ab"], products="aab")


SECONDS = pa.list_(pa.timestamp("s"))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"user_id": ["u", None]}, "sessions.parquet: row 2: user_id is null"),
        ({"item_ids": ["a b", "c"]}, "item_ids: expected lists of product ids, found string"),
        ({"times": [[1, None], [1]]}, r"row 1: times \[1, None\]: expected a number for each"),
        ({"times": [[1, float("nan")], [1]]}, r"row 1: times \[1.0, nan\]: expected a number"),
        (
            {"times": pa.array([[1, 2], [3]], SECONDS)},
            r"times: expected lists of numbers \(seconds",
        ),
        ({"times": [1, 2]}, "times: expected lists of numbers .*, found int64"),
        ({"positions": [["1", "2"], ["3"]]}, r"positions: expected lists of numbers \(places"),
        ({"positions": [[1, None], [1]]}, r"row 1: positions \[1, None\]: expected a number"),
    ],
)
def test_columns_of_another_form_are_refused(
    tmp_path: Path, columns: dict[str, Any], complaint: str
) -> None:
    write_small(tmp_path, ["ab", "c"])
    given = {"user_id": ["u", "v"], "item_ids": [["a", "b"], ["c"]]} | columns
    pq.write_table(pa.table(given), tmp_path / "sessions.parquet")
    with pytest.raises(UserError, match=complaint):
        read_sessions(tmp_path)


def test_ids_may_be_whole_numbers_but_not_null(tmp_path: Path) -> None:
    pq.write_table(pa.table({"product_id": [7, 8]}), tmp_path / "products.parquet")
    given = pa.table({"user_id": [1], "item_ids": [[8, 7, 9]]})
    pq.write_table(given, tmp_path / "sessions.parquet")
    read = read_sessions(tmp_path)
    assert read.product_ids == ["7", "8"]
    assert read.user_ids == ["1"]
    assert read.events.items.tolist() == [1, 0]
    assert read.dropped == {"unknown product id": 1}
    pq.write_table(pa.table({"product_id": [None, "8"]}), tmp_path / "products.parquet")
    with pytest.raises(UserError, match="row 1: product_id is null"):
        read_sessions(tmp_path)


def test_a_history_of_strangers_is_refused() -> None:
    assert encode_history(["b", "x"], ["a", "b"]) == (np.array([1]), 1)
    with pytest.raises(UserError, match="such as a; none of its 2 ids is in the catalogue"):
        encode_history(["x", "y"], ["a", "b"])
    with pytest.raises(UserError, match="found none"):
        encode_history([], ["a", "b"])


def test_sequences_are_taken_and_thinned() -> None:
    rows = sequences_of([[3, 1], [], [5, 6, 7]])
    assert [row.tolist() for row in rows.take(np.array([2, 1, 0, 2]))] == [
        [5, 6, 7],
        [],
        [3, 1],
        [5, 6, 7],
    ]
    assert [row.tolist() for row in rows.keep(rows.items != 6)] == [[3, 1], [], [5, 7]]
    assert rows.places_from_end.tolist() == [1, 0, 2, 1, 0]


def test_leave_one_out_by_hand(tmp_path: Path) -> None:
    sessions = write_small(tmp_path, ["abcd", "ef", "gab"])
    val, test = leave_one_out(sessions, "val"), leave_one_out(sessions, "test")
    assert letters(val.train) == letters(test.train) == ["ab", "ef", "g"]
    assert letters(test.before) == ["abc", "ef", "ga"]
    assert letters(val.before) == letters(val.train)
    assert val.queries.tolist() == test.queries.tolist() == [0, 2]
    assert letters(val.histories) == ["ab", "g"]
    assert letters(test.histories) == ["abc", "ga"]
    assert val.targets.tolist() == [2, 0]
    assert test.targets.tolist() == [3, 1]


def test_leave_one_out_needs_three(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="three products or more"):
        leave_one_out(write_small(tmp_path, ["ab", "cd"]), "test")


def test_a_time_split_by_hand(tmp_path: Path) -> None:
    # Cuts at 60% and 80% of ten events: at times 7 and 9.
    sessions = write_small(
        tmp_path, ["abcd", "efg", "hab"], times=[[1, 3, 7, 9], [2, 4, 8], [5, 6, 10]]
    )
    val = time_split(sessions, "val", val=0.2, test=0.2)
    test = time_split(sessions, "test", val=0.2, test=0.2)
    assert letters(val.train) == letters(test.train) == ["ab", "ef", "ha"]
    assert val.queries.tolist() == [0, 1]
    assert letters(val.histories) == ["ab", "ef"]
    assert val.targets.tolist() == [2, 6]
    assert letters(test.before) == ["abc", "efg", "ha"]
    assert test.queries.tolist() == [0, 2]
    assert letters(test.histories) == ["abc", "ha"]
    assert test.targets.tolist() == [3, 1]


def test_no_time_split_learns_from_what_comes_after_a_query(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    times = [sorted(generator.integers(0, 100, size=6).tolist()) for _ in range(40)]
    lists = ["".join(generator.choice(list("abcdefgh"), 6)) for _ in range(40)]
    sessions = write_small(tmp_path, lists, times=times)
    assert sessions.times is not None
    for held_out in ("val", "test"):
        split = time_split(sessions, held_out, val=0.2, test=0.2)
        assert len(split.queries) > 5
        latest = np.sort(sessions.times)[len(split.before.items) - 1]
        for user, history, target in zip(
            split.queries, split.histories, split.targets, strict=True
        ):
            own = sessions.events[user]
            assert history.tolist() == own[: len(history)].tolist()
            assert own[len(history)] == target
            assert times[user][len(history)] > latest


def test_a_time_split_needs_times(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no times; use leave-one-out"):
        time_split(write_small(tmp_path / "a", ["abc"]), "test")
    same = write_small(tmp_path / "b", ["abc"], times=[[5, 5, 5]])
    with pytest.raises(UserError, match="0 events before the first cut"):
        time_split(same, "test")


def test_a_sample_of_queries_is_part_of_the_split(tmp_path: Path) -> None:
    lists = ["abcd", "bcde", "ab", "cdef", "defg", "efgh"]
    sessions = write_small(
        tmp_path, lists, times=[[*range(row, row + len(own))] for row, own in enumerate(lists)]
    )
    whole = split_sessions(sessions, "leave-one-out", "test")
    assert letters(whole.histories) == letters(leave_one_out(sessions, "test").histories)
    assert letters(split_sessions(sessions, "time", "val").train) == letters(
        time_split(sessions, "val").train
    )
    sample = sample_queries(whole, 3, seed=1)
    assert sample.queries.tolist() == sample_queries(whole, 3, seed=1).queries.tolist()
    assert len(sample.queries) == len(set(sample.queries)) == 3
    for user, history, target in zip(
        sample.queries, letters(sample.histories), sample.targets, strict=True
    ):
        assert lists[user] == history + "abcdefgh"[target]
    assert letters(sample.train) == letters(whole.train)
    assert sample_queries(whole, 9, seed=1) is whole
