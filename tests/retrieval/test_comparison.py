"""Runs side by side: what is beyond chance, what is refused, what the text and the page say."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import EVIL, Page

from mmrec import cli
from mmrec.errors import UserError
from mmrec.retrieval.comparison import compare_folders, comparison_text, name_runs
from mmrec.retrieval.metrics import METRIC_NAMES, holm, paired_bootstrap, per_query, summarise
from mmrec.retrieval.query_results import SCHEMA, write_results

NUM_QUERIES = 200


def write_run(folder: Path, ranks: np.ndarray, **changes: Any) -> Path:
    """A folder as `mmrec evaluate` leaves it, of one right product a query at the given ranks."""
    folder.mkdir(parents=True)
    warm = np.arange(len(ranks)) % 4 > 0
    slices = {"all": np.ones(len(ranks), bool), "warm": warm, "cold": ~warm, f"x: {EVIL}": warm}
    table = {
        "content_id": [f"c{row}" for row in range(len(ranks))],
        "title": [None if row == 7 else f"{EVIL} {row}" for row in range(len(ranks))],
        "product_ids": [["p0"]] * len(ranks),
        "rank": ranks.tolist(),
        "ranks": [[rank] for rank in ranks.tolist()],
        "margin": [0.0] * len(ranks),
        "top_ids": [["p1"] if rank > 1 else ["p0"] for rank in ranks.tolist()],
        "top_scores": [[0.5]] * len(ranks),
        "slices": [
            [name for name, mask in slices.items() if mask[row]] for row in range(len(ranks))
        ],
    }
    metrics = {
        "gallery": 300,
        "queries": len(ranks),
        "slices": summarise(per_query([np.array([rank]) for rank in ranks]), slices),
        "encoder": f"encoder of {folder.name}",
        "shards": "5a4d",
        "split": "test",
    }
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    write_results(folder, pa.table(table, schema=SCHEMA))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run, one that is better by far on every third query, and one that only drew other luck."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    ranks = generator.integers(2, 60, NUM_QUERIES)
    better = np.where(np.arange(NUM_QUERIES) % 3 == 0, 1, ranks)
    luck = np.maximum(1, ranks + generator.integers(-3, 4, NUM_QUERIES))
    names = {"plain": ranks, "better <b>": better, "luck": luck}
    return [write_run(folder / name, own) for name, own in names.items()]


def test_differences_equal_the_paired_bootstrap_and_holm(runs: list[Path]) -> None:
    compared = compare_folders(runs)
    first, better, luck = (run["name"] for run in compared["runs"])
    assert compared["first"] == first == "plain"
    told = compared["differences"]
    assert set(told) == {better, luck}
    ranks = np.array([own[0] for own in read_ranks(runs[1])])
    plain = np.array([own[0] for own in read_ranks(runs[0])])
    expected = paired_bootstrap(1 / ranks, 1 / plain)
    found = told[better]["all"]["MRR"]
    assert found["difference"] == pytest.approx(expected.difference)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert (found["verdict"], told[luck]["all"]["MRR"]["verdict"]) == (
        "beyond chance",
        "within chance",
    )
    whole = [own for slices in told.values() for own in slices["all"].values()]
    parts = [
        own
        for slices in told.values()
        for name, metrics in slices.items()
        for own in metrics.values()
        if name != "all"
    ]
    for family, every in (("all", whole), ("slices", parts)):
        assert compared["comparisons"][family] == len(every)
        assert [own["p_holm"] for own in every] == pytest.approx(holm([own["p"] for own in every]))
    assert len(parts) == 3 * len(whole) == 3 * 2 * len(METRIC_NAMES)
    for own in whole + parts:
        assert own["low"] <= own["difference"] <= own["high"]
        beyond = (own["low"] > 0 or own["high"] < 0) and own["p_holm"] < 0.05
        assert (own["verdict"] == "beyond chance") == beyond
    means = compared["slices"]["cold"][better]
    assert means["R@1"] - compared["slices"]["cold"][first]["R@1"] == pytest.approx(
        told[better]["cold"]["R@1"]["difference"]
    )


def read_ranks(folder: Path) -> list[list[int]]:
    return pq.read_table(folder / "queries.parquet")["ranks"].to_pylist()


def test_what_one_comparison_shows_many_may_not(tmp_path: Path) -> None:
    ranks = np.full(NUM_QUERIES, 30)
    slightly = ranks.copy()
    slightly[:7] = 1  # p of seven equal signs is 1/64: below 0.05 alone, and not times six.
    compared = compare_folders(
        [write_run(tmp_path / "a", ranks), write_run(tmp_path / "b", slightly)]
    )
    found = compared["differences"]["b"]["all"]["R@1"]
    assert found["p"] == pytest.approx(1 / 64, abs=0.005)
    assert found["low"] > 0
    assert found["verdict"] == "unsure"
    assert "0.035 +0.035~" in comparison_text(compared)


def test_queries_that_differ_most_are_listed(runs: list[Path]) -> None:
    compared = compare_folders(runs[:2])
    better = compared["runs"][1]["name"]
    sides = compared["differing"][better]
    assert sides["lost"] == []
    assert len(sides["gained"]) == 10
    ranks = [own[0] for own in read_ranks(runs[0])]
    changes = sorted((1 - 1 / rank for row, rank in enumerate(ranks) if row % 3 == 0), reverse=True)
    for query, change in zip(sides["gained"], changes, strict=False):
        row = int(query["content_id"][1:])
        assert (query["rank_first"], query["rank"]) == (ranks[row], 1)
        assert 1 - 1 / query["rank_first"] == pytest.approx(change)
        assert (query["found_first"], query["found"]) == ("p1", "p0")
    turned = compare_folders([runs[1], runs[0]])
    assert turned["differing"]["plain"]["gained"] == []
    assert {query["content_id"] for query in turned["differing"]["plain"]["lost"]} == {
        query["content_id"] for query in sides["gained"]
    }


def test_titles_do_not_steer_a_terminal(runs: list[Path]) -> None:
    compared = compare_folders(runs[:2])
    for query in compared["differing"][compared["runs"][1]["name"]]["gained"]:
        query["title"] = "clear\x1b[2J\nall " + "x" * 200
    text = comparison_text(compared)
    assert text.replace("\n", "").isprintable()
    assert "clear [2J all xxx" in text
    assert all(len(line) < 200 for line in text.splitlines()[-3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": "beef"}, "evaluated with shards beef, and .*a with shards 5a4d"),
        ({"split": "val"}, "evaluated with split val, and .*a with split test"),
        ({"gallery": 299}, "evaluated with gallery 299, and .*a with gallery 300"),
        ({"queries": 3}, r"metrics.json is of 3 queries and queries.parquet of 200"),
    ],
)
def test_runs_of_something_else_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ranks = np.ones(NUM_QUERIES, np.int64)
    folders = [write_run(tmp_path / "a", ranks), write_run(tmp_path / "b", ranks, **changes)]
    with pytest.raises(UserError, match=message) as error:
        compare_folders(folders)
    assert "\n" not in str(error.value)


def test_folders_without_an_evaluation_are_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected two or more folders"):
        compare_folders(runs[:1])
    with pytest.raises(UserError, match=r"metrics.json: no such file; `mmrec evaluate"):
        compare_folders([runs[0], tmp_path])
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="does not say its shards, split, gallery, queries, slices"):
        compare_folders([runs[0], tmp_path])
    (tmp_path / "metrics.json").write_text((runs[0] / "metrics.json").read_text())
    with pytest.raises(UserError, match=r"queries.parquet: no such file; evaluate again"):
        compare_folders([runs[0], tmp_path])
    with pytest.raises(UserError, match="given twice"):
        compare_folders([runs[0], runs[0] / "."])
    with pytest.raises(UserError, match=r"--out .*: is a folder"):
        compare_folders(runs, out=tmp_path)


def test_names_are_as_short_as_they_can_be() -> None:
    folders = [Path("/r/a/test"), Path("/r/b/test"), Path("/r/c")]
    assert name_runs(folders) == ["a/test", "b/test", "r/c"]
    assert name_runs([Path("/r/a"), Path("/r/b")]) == ["a", "b"]


def test_page_is_whole_escaped_and_asks_for_nothing(runs: list[Path], tmp_path: Path) -> None:
    compared = compare_folders(runs, out=tmp_path / "new" / "compare.html")
    html = (tmp_path / "new" / "compare.html").read_text()
    page = Page(html)
    assert page.open == []
    assert not page.attributes("script")
    assert not page.attributes("img")
    assert "http" not in html.replace("http-equiv", "")
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    better = compared["runs"][1]["name"]
    own = compared["differences"][better]["all"]["R@1"]
    title = compared["differing"][better]["gained"][0]["title"]
    assert EVIL in title
    for text in (better, f"X: {EVIL}", title, f"{own['difference']:+.3f}", "Unsure"):
        assert text in page.text
    assert f"{100 * own['difference']:+.1f} points from plain" in page.text
    assert page.text.count("beyond chance") > 3
    assert len(page.attributes("polyline")) == len(runs)


def test_command_prints_text_or_json(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "compare.html"
    monkeypatch.setattr(sys, "argv", ["mmrec", "compare", *map(str, runs), "--out", str(out)])
    cli.main()
    text = capsys.readouterr().out
    assert "200 queries of split test, gallery of 300 products, shards 5a4d" in text
    assert f"report: {out}" in text
    assert "queries that differ most:" in text
    assert "beyond chance on other slices:" in text
    assert out.is_file()
    monkeypatch.setattr(sys, "argv", ["mmrec", "compare", *map(str, runs), "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out) == compare_folders(runs)
    monkeypatch.setattr(sys, "argv", ["mmrec", "compare", str(runs[0])])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("error: compare: expected two or more folders")
