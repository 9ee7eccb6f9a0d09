"""What an evaluation measures and writes: slices, results of each query, an index beside exact search."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_shards import make_small_shards

from mmrec import cli
from mmrec.errors import UserError
from mmrec.manifest import parent_of
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.retrieval.approximation import ask_index
from mmrec.retrieval.evaluation import evaluate_to_folder
from mmrec.retrieval.evaluation_config import EvaluationConfig
from mmrec.retrieval.gallery import Gallery, column_slices, count_train_links, query_slices
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.metrics import METRIC_NAMES, per_query, rank_relevant, summarise
from mmrec.retrieval.query_results import (
    SCHEMA,
    best_queries,
    read_results,
    results_table,
    spread_queries,
    worst_queries,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    """Small shards, an encoder that learnt nothing, an exact index, and settings to measure them by."""
    folder = tmp_path_factory.mktemp("evaluation")
    shards = make_small_shards(folder, cold_products=0.3)
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))
    encoder.save(folder / "encoder", parents=[parent_of(folder / "encoder", shards)])
    cli.embed(encoder=folder / "encoder", shards=shards, out=folder / "embeddings")
    cli.index_build(embeddings=folder / "embeddings", out=folder / "index")
    return EvaluationConfig(
        encoder=folder / "encoder",
        shards=shards,
        out=folder / "report",
        split="train",
        index=folder / "index",
        slice_by=("price", "level"),
        num_cards=4,
    )


@pytest.fixture(scope="module")
def metrics(config: EvaluationConfig) -> dict[str, Any]:
    return evaluate_to_folder(config)


def test_files_agree_with_each_other(config: EvaluationConfig, metrics: dict[str, Any]) -> None:
    written = json.loads((config.out / "metrics.json").read_text())
    assert written == metrics
    table = read_results(config.out)
    assert table.schema.equals(SCHEMA)
    assert len(table) == metrics["queries"]
    ranks = [np.array(own) for own in table["ranks"].to_pylist()]
    assert table["rank"].to_pylist() == [int(own[0]) for own in ranks]
    slices = {
        name: np.array([name in own for own in table["slices"].to_pylist()])
        for name in metrics["slices"]
    }
    assert summarise(per_query(ranks), slices) == metrics["slices"]


def test_every_system_has_intervals_and_a_recall_curve(metrics: dict[str, Any]) -> None:
    others = {"video alone", "title alone", *metrics["baselines"]}
    assert {"untrained", "popularity", "title overlap", "color histogram"} < others
    assert set(metrics["system_intervals"]) == others
    assert set(metrics["recall_curves"]) == {"trained", *others}
    for name in metrics["slices"]:
        assert set(metrics["intervals"][name]) == set(METRIC_NAMES)
        for system in metrics["baselines"]:
            found = metrics["baselines"][system][name]
            for metric, (low, high) in metrics["system_intervals"][system][name].items():
                assert low - 1e-9 <= found[metric] <= high + 1e-9
    curve = metrics["recall_curves"]["trained"]
    assert len(curve) == metrics["gallery"]
    assert curve[0] == pytest.approx(metrics["slices"]["all"]["R@1"], abs=1e-6)
    assert curve[-1] == 1
    assert curve == sorted(curve)


def test_report_escapes_titles_and_shows_the_three_galleries(
    config: EvaluationConfig, metrics: dict[str, Any]
) -> None:
    html = (config.out / "report.html").read_text()
    assert "Product &lt;1&gt;" in html
    assert "Product <1>" not in html
    for heading in ("All over", "Best", "Worst", "R@1 by price", "R@1 by level"):
        assert f">{heading}" in html
    assert "http" not in html.replace("http-equiv", "")


def test_exact_index_finds_what_exact_search_finds(metrics: dict[str, Any]) -> None:
    index = metrics["index"]
    assert index["factory"] == "Flat"
    assert (index["products"], index["missing"]) == (metrics["gallery"], 0)
    assert set(index["recall"].values()) == {1.0}
    assert index["slices"] == metrics["slices"]
    assert all(own["difference"] == own["low"] == 0 for own in index["differences"].values())
    assert index["latency_ms"]["index"]["median"] > 0
    assert index["queries_per_s"]["exact"] > 0


def test_what_an_index_does_not_hold_or_find_is_missed() -> None:
    generator = np.random.default_rng(0)
    products = generator.normal(size=(40, 8)).astype(np.float32)
    products /= np.linalg.norm(products, axis=1, keepdims=True)
    queries = products + 0.1 * generator.normal(size=products.shape).astype(np.float32)
    ids = [f"p{row}" for row in range(40)]
    relevant = [np.array([row, (row + 1) % 40]) for row in range(40)]
    index = ProductIndex.build(ids[:30], products[:30])
    facts, ranks = ask_index(index, queries, products, ids, relevant)
    assert (facts["missing"], facts["depth"]) == (10, 40)
    exact = queries @ products.T
    order = np.argsort(-exact, axis=1)
    assert facts["recall"]["1"] == pytest.approx(np.mean(order[:, 0] < 30))
    # Of the ten best those below 30 are all that can be found, and all are: nothing stands before them.
    assert facts["recall"]["10"] == pytest.approx(np.mean(order[:, :10] < 30))
    for query, right in enumerate(relevant):
        held = [int(p) for p in order[query] if p < 30]
        expected = [place for place, p in enumerate(held, 1) if p in right]
        lost = 2 - len(expected)
        assert ranks[query].tolist() == expected + list(range(41 - lost, 41))


def test_index_of_other_products_or_of_another_encoder_is_refused(
    config: EvaluationConfig, tmp_path: Path
) -> None:
    vectors = np.eye(4, 8, dtype=np.float32)
    other = ProductIndex.build([f"x{row}" for row in range(4)], vectors)
    with pytest.raises(UserError, match="holds none of the 2 products"):
        ask_index(other, vectors, vectors[:2], ["a", "b"], [np.array([0])] * 4)
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))
    encoder.save(tmp_path / "encoder")
    stranger = replace(
        config, encoder=tmp_path / "encoder", out=tmp_path, untrained=False, baselines=False
    )
    with pytest.raises(UserError, match="their spaces differ"):
        evaluate_to_folder(stranger)
    assert not (tmp_path / "metrics.json").exists()


def test_slices_follow_their_definitions(config: EvaluationConfig) -> None:
    gallery = Gallery.open(config.shards, "train")
    links = count_train_links(config.shards, gallery.catalog)
    slices = query_slices(gallery, links, columns=("price",))
    assert all(mask.any() for mask in slices.values())
    products = [gallery.product_metas[rows[0]] for rows in gallery.relevant]
    assert slices["warm"].tolist() == [max(links[rows]) > 0 for rows in gallery.relevant]
    titled = [meta["title"] is not None for meta in gallery.content_metas]
    assert slices["with title"].tolist() == titled
    assert slices["no title"].tolist() == [not has for has in titled]
    for price in {product["attributes"]["price"] for product in products}:
        expected = [product["attributes"]["price"] == price for product in products]
        assert slices[f"price: {price}"].tolist() == expected
    assert "cold" not in slices  # In the train split all are warm.
    by_content = query_slices(gallery, links, columns=("day",))
    assert sum(mask.sum() for name, mask in by_content.items() if name.startswith("day: ")) == len(
        gallery.relevant
    )
    with pytest.raises(UserError, match=r"--slice-by brand: no product.*one of: day, level, price"):
        query_slices(gallery, links, columns=("brand",))


def test_warm_and_popular_queries_go_by_training_links(config: EvaluationConfig) -> None:
    gallery = Gallery.open(config.shards, "train")
    gallery = replace(gallery, relevant=[np.array([row]) for row in range(len(gallery.contents))])
    links = np.arange(len(gallery.catalog), dtype=np.float64)  # The first product has none.
    slices = query_slices(gallery, links)
    most = np.array([max(rows) for rows in gallery.relevant])
    middle = np.median(most[most > 0])
    for name, expected in (
        ("warm", most > 0),
        ("cold", most == 0),
        ("popular", most > middle),
        ("rare", (most > 0) & (most <= middle)),
    ):
        assert expected.any()
        assert slices[name].tolist() == expected.tolist()


def test_what_products_and_contents_lack_is_a_slice(
    config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = Gallery.open(config.shards, "train")
    links = count_train_links(config.shards, gallery.catalog)
    lacking = gallery.relevant[0][0]
    metas = [
        dict(meta, title=None if row == lacking else "x")
        for row, meta in enumerate(gallery.product_metas)
    ]
    assert gallery.content_metas  # Read before their tars' members are gone.
    monkeypatch.setitem(gallery.__dict__, "product_metas", metas)
    names = gallery.catalog.names
    monkeypatch.setattr(gallery.catalog, "names", lambda row: [] if row == lacking else names(row))
    monkeypatch.setattr(gallery.contents, "names", lambda row: ["p0.i0.jpg", "f00.jpg"][: 1 + row])
    slices = query_slices(gallery, links)
    without = [rows.tolist() == [lacking] for rows in gallery.relevant]
    assert slices["product without title"].tolist() == without
    assert slices["product with title"].tolist() == [not lacks for lacks in without]
    assert slices["product without pictures"].tolist() == without
    assert slices["no pictures"].tolist() == [row == 0 for row in range(len(without))]
    assert slices["with pictures"].tolist() == [row > 0 for row in range(len(without))]


def test_rare_values_of_a_column_are_one_slice() -> None:
    values = ["a", "b", "b", "c", "c", "c", None, "d", True]
    slices = column_slices("kind", values, 2)
    assert list(slices) == ["kind: b", "kind: c", "kind: other", "kind: missing"]
    assert [mask.sum() for mask in slices.values()] == [2, 3, 3, 1]
    assert np.sum(list(slices.values()), axis=0).tolist() == [1] * 9
    # A value that is called so joins the rest; all values are kept where there is room.
    assert column_slices("k", ["other", "other", "x", "y"], 1)["k: other"].sum() == 4
    assert list(column_slices("k", [10, 9, 10], 2)) == ["k: 9", "k: 10"]
    assert list(column_slices("k", ["", " ", "a"], 5)) == ["k: (empty)", "k: a"]


def test_many_numbers_are_cut_into_ranges() -> None:
    values: list[Any] = [*range(100), None]
    slices = column_slices("price", values, 20)
    assert list(slices) == [
        *(
            "price: 0 to 24.75",
            "price: 24.75 to 49.5",
            "price: 49.5 to 74.25",
            "price: 74.25 to 99",
        ),
        "price: missing",
    ]
    assert [mask.sum() for mask in slices.values()] == [25, 25, 25, 25, 1]


def test_results_and_choices_equal_brute_force(config: EvaluationConfig) -> None:
    gallery = Gallery.open(config.shards, "train")
    generator = np.random.default_rng(2)
    # Whole numbers tie often.
    products = generator.integers(-2, 3, (len(gallery.catalog), 3)).astype(np.float32)
    queries = generator.integers(-2, 3, (len(gallery.contents), 3)).astype(np.float32)
    ranks = rank_relevant(queries, products, gallery.relevant)
    table = results_table(gallery, {"all": np.ones(len(queries), bool)}, ranks, queries, products)
    rows = table.to_pylist()
    for query, row in enumerate(rows):
        scores = dict(zip(gallery.product_ids, (products @ queries[query]).tolist(), strict=True))
        right = {gallery.product_ids[number] for number in gallery.relevant[query]}
        expected = sorted(scores, key=lambda product_id: (-scores[product_id], product_id in right))
        found = row["top_ids"]
        assert row["top_scores"] == [scores[product_id] for product_id in expected[:10]]
        assert [product_id in right for product_id in found] == [
            product_id in right for product_id in expected[:10]
        ]
        best_wrong = max(score for product_id, score in scores.items() if product_id not in right)
        assert row["margin"] == max(scores[product_id] for product_id in right) - best_wrong
        assert set(row["product_ids"]) == right
    order = sorted(range(len(rows)), key=lambda q: (rows[q]["rank"], -rows[q]["margin"]))
    firsts = [query for query in order if rows[query]["rank"] == 1]
    assert [rows[q]["margin"] for q in best_queries(table, 3)] == [
        rows[q]["margin"] for q in firsts[:3]
    ]
    worst = worst_queries(table, 3)
    assert [(rows[q]["rank"], rows[q]["margin"]) for q in worst] == [
        (rows[q]["rank"], rows[q]["margin"])
        for q in sorted(order, key=lambda q: (-rows[q]["rank"], rows[q]["margin"]))[:3]
        if rows[q]["rank"] > 1
    ]
    assert spread_queries(10, 4) == [0, 3, 6, 9]
    assert spread_queries(2, 4) == [0, 1]


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; evaluate again to have it: `mmrec evaluate"):
        read_results(tmp_path)
    (tmp_path / "queries.parquet").write_bytes(b"noise")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read_results(tmp_path)
    pq.write_table(pa.table({"content_id": ["c"]}), tmp_path / "queries.parquet")
    with pytest.raises(UserError, match="has no column title, product_ids"):
        read_results(tmp_path)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(*flags: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["mmrec", *map(str, flags)])
        cli.main()

    return give


def test_command_prints_a_table_or_json(
    config: EvaluationConfig,
    command_line: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["evaluate", "--encoder", config.encoder, "--shards", config.shards, "--out"]
    fast = ["--split", "train", "--no-untrained", "--no-baselines", "--quiet"]
    command_line(*base, tmp_path, *fast, "--index", config.index)
    done = capsys.readouterr()
    assert done.err == ""
    assert "index Flat: finds 1.0000 of the first 1" in done.out
    assert str(tmp_path / "report.html") in done.out
    monkeypatch.chdir(tmp_path)
    command_line(*base, ".", *fast, "--json", "--slice-by", "price", "--max-values", "1")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "metrics.json").read_text())
    assert "price: other" in printed["slices"]
    assert f"<h1>{tmp_path.name}: matching" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("flag", ["--num-cards", "--batch-size", "--max-values"])
def test_numbers_that_cannot_be_are_refused_in_one_line(
    flag: str, command_line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line("evaluate", "--encoder", "a", "--shards", "b", "--out", "c", flag, "0")
    assert capsys.readouterr().err == f"error: {flag} 0: expected a number of at least 1\n"
