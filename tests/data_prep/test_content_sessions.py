"""Sessions generated on a catalogue: tastes show, and splits are kept."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import load_program

from mmrec.data.tables import read_tables
from mmrec.errors import UserError
from mmrec.generative.sessions import Sessions, leave_one_out, time_split
from mmrec.manifest import read_manifest

program = load_program("data_prep/content_sessions.py")


def run(tables: Path, out: Path, **flags: Any) -> Sessions:
    settings = {"num_users": 60, "max_events": 6, "watched": 2} | flags
    return program.main(program.ContentSessionsConfig(tables=tables, out=out, **settings))


def test_the_same_seed_gives_the_same_sessions(tiny_tables: Path, tmp_path: Path) -> None:
    first, second = (run(tiny_tables, tmp_path / name) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert run(tiny_tables, tmp_path / "c", seed=1).fingerprint != first.fingerprint
    parent = read_manifest(tmp_path / "a", "sessions").parent("tables")
    assert parent
    assert parent.fingerprint == read_manifest(tiny_tables).fingerprint


def test_sessions_are_in_order_and_buy_nothing_twice(tiny_tables: Path, tmp_path: Path) -> None:
    sessions = run(tiny_tables, tmp_path / "out")
    for row in sessions.table.to_pylist():
        assert 4 <= len(row["item_ids"]) <= 6
        assert len(set(row["item_ids"])) == len(row["item_ids"])
        assert row["content_times"] == sorted(row["content_times"])
        assert len(row["content_ids"]) == 2 * len(row["item_ids"])
        assert len(row["positions"]) == len(row["item_ids"])
        # The last two are watched after all other purchases and before the last.
        assert row["times"][-2] < row["content_times"][-2] < row["times"][-1]


def test_what_is_taken_of_a_list_stands_at_its_position(tiny_tables: Path, tmp_path: Path) -> None:
    sessions = run(tiny_tables, tmp_path / "out", follow=0.5, shown=5)
    lists = defaultdict(list)
    for row in pq.read_table(tmp_path / "out/displays.parquet").to_pylist():
        assert len(row["item_ids"]) == 5
        if row["taken"]:
            lists[row["user_id"]].append((row["taken"], row["item_ids"][row["taken"] - 1]))
    for row in sessions.table.to_pylist():
        taken = zip(row["positions"], row["item_ids"], strict=True)
        assert [pair for pair in taken if pair[0]] == lists[row["user_id"]]


def test_contents_keep_to_their_splits(tiny_tables: Path, tmp_path: Path) -> None:
    links = read_tables(tiny_tables).links.to_pylist()
    split_of = {link["content_id"]: link["split"] for link in links}
    for row in run(tiny_tables, tmp_path / "out").table.to_pylist():
        splits = [split_of[content] for content in row["content_ids"]]
        assert splits == ["train"] * (len(splits) - 4) + ["val"] * 2 + ["test"] * 2


def same_category(sessions: Sessions) -> float:
    """How often the last product is of a category bought before."""
    categories = sessions.products["category"].to_pylist()
    split = leave_one_out(sessions, "test")
    pairs = zip(split.histories, split.targets, strict=True)
    return float(np.mean([categories[t] in {categories[i] for i in h} for h, t in pairs]))


def test_tastes_can_be_told_from_what_was_bought(tiny_tables: Path, tmp_path: Path) -> None:
    flags = {"num_users": 600, "follow": 0.0, "min_events": 3, "max_events": 3}
    with_taste = run(tiny_tables, tmp_path / "a", taste=3.0, **flags)
    without = run(tiny_tables, tmp_path / "b", taste=0.0, **flags)
    assert same_category(with_taste) > same_category(without) + 0.05


def test_generated_sessions_can_be_split_by_time(tiny_tables: Path, tmp_path: Path) -> None:
    sessions = run(tiny_tables, tmp_path / "out")
    split = time_split(sessions, "test")
    assert sessions.times is not None
    assert len(split.queries) > 3
    assert len(split.before.items) + len(split.queries) <= len(sessions.times)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"max_events": 3}, "--max-events 3: expected at least 4"),
        ({"min_events": 2}, "--min-events 2: expected at least 3"),
        ({"max_events": 13}, "--max-events 13: expected at most 12, the number of products"),
        ({"follow": 1.5}, "--follow 1.5: expected 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tiny_tables: Path, tmp_path: Path, flags: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        run(tiny_tables, tmp_path / "out", **flags)
