"""Amazon reviews in each of their layouts."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import load_program

from mmrec.errors import UserError
from mmrec.generative.sessions import Sessions

program = load_program("data_prep/amazon_reviews.py")


def run(source: Path, out: Path, **flags: Any) -> Sessions:
    return program.main(program.AmazonReviewsConfig(source=source, out=out, **flags))


def taken(sessions: Sessions) -> dict[str, list[str]]:
    return {
        user: [sessions.product_ids[item] for item in row]
        for user, row in zip(sessions.user_ids, sessions.events, strict=True)
    }


def write_folder(folder: Path, sequences: str = "1 1 2 3\n2 3 1 2\n") -> Path:
    folder.mkdir()
    (folder / "sequences.txt").write_text(sequences)
    (folder / "items.csv").write_text('item_id,asin,title\n1,B1,"Comb, red"\n2,B2,\n3,B3,Soap\n')
    return folder


def test_a_preprocessed_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = run(write_folder(tmp_path / "in"), tmp_path / "out")
    assert taken(read) == {"1": ["B1", "B2", "B3"], "2": ["B3", "B1", "B2"]}
    assert read.titles == ["Comb, red", None, "Soap"]
    assert read.times is None
    assert "2 users, 3 products (1 without a title), 6 events" in capsys.readouterr().out


def test_a_number_that_is_no_item_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", "1 1 2 3\n2 3 9\n")
    with pytest.raises(UserError, match="row 2: item 9 is not in items"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=r"has no sequences.txt"):
        run(tmp_path / "in", tmp_path / "out")


def test_files_of_2014(tmp_path: Path) -> None:
    reviews = [
        {"reviewerID": "A", "asin": "B2", "unixReviewTime": 20},
        {"reviewerID": "A", "asin": "B1", "unixReviewTime": 10},
        {"reviewerID": "A", "asin": "B1", "unixReviewTime": 30},
        {"reviewerID": "B", "asin": "B1", "unixReviewTime": 15},
        {"reviewerID": "B", "asin": "B2", "unixReviewTime": 15},
        {"reviewerID": "C", "asin": "B3", "unixReviewTime": 15},
        {"asin": "B3"},
    ]
    with gzip.open(tmp_path / "reviews.json.gz", "wt") as file:
        file.write("\n".join([*map(json.dumps, reviews), "no JSON"]))
    (tmp_path / "meta.json").write_text("{'asin': 'B1', 'title': \"Mum's comb\"}\n{'asin': 'B2'}\n")
    read = run(tmp_path / "reviews.json.gz", tmp_path / "out", meta=tmp_path / "meta.json", core=2)
    assert taken(read) == {"A": ["B1", "B2"], "B": ["B1", "B2"]}
    assert read.times is not None
    assert read.times.tolist() == [10, 20, 15, 15]
    assert dict(zip(read.product_ids, read.titles, strict=True)) == {"B1": "Mum's comb", "B2": None}


def test_files_of_2023(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"user_id": "A", "parent_asin": "B1", "timestamp": 1588687728923}]
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    read = run(tmp_path / "reviews.jsonl", tmp_path / "out", core=0)
    assert read.times is not None
    assert read.times.tolist() == [1588687728]
    assert "dropped: reviewed before by the same user: 1" in capsys.readouterr().out


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}\n[]\n')
    with pytest.raises(
        UserError, match=r"no review is left \(1 no user, product or time, 1 line that"
    ):
        run(tmp_path / "x.json", tmp_path / "out")
    (tmp_path / "x.gz").write_text("not gzip")
    with pytest.raises(UserError, match="cannot be read as JSON lines"):
        run(tmp_path / "x.gz", tmp_path / "out")
