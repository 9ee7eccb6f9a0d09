"""Filters: the same matches as filter first, then search exactly; and what may not be asked."""

from decimal import Decimal

import faiss
import numpy as np
import pyarrow as pa
import pytest
from vectors import names, unit_vectors

from mmrec.errors import UserError
from mmrec.retrieval import view
from mmrec.retrieval.faiss_base import set_search
from mmrec.retrieval.filters import matching_rows
from mmrec.retrieval.index import ProductIndex

COUNT = 2_000
CONDITION = "price < 30 and category = 'shoes' and available"


def catalogue(count: int = COUNT) -> pa.Table:
    rng = np.random.default_rng(1)
    return pa.table(
        {
            "product_id": names(count),
            "price": [None if number % 97 == 0 else float(number % 60) for number in range(count)],
            "category": rng.choice(["shoes", "hats", "mugs"], count),
            "available": rng.random(count) < 0.5,
        }
    )


def meets(row: dict) -> bool:
    cheap = row["price"] is not None and row["price"] < 30
    return bool(cheap and row["category"] == "shoes" and row["available"])


def build(factory: str) -> ProductIndex:
    index = ProductIndex.build(
        names(COUNT), unit_vectors(COUNT), factory=factory, attributes=catalogue()
    )
    if isinstance(index._view.base.index, faiss.IndexIVF):
        index._view.base.index.nprobe = 8
    return index


def filtered(
    index: ProductIndex, queries: np.ndarray, k: int, chosen: list[str]
) -> list[list[str]]:
    scores = queries.astype(np.float64) @ index.vectors(chosen).T
    return [[chosen[place] for place in row] for row in np.argsort(-scores, axis=1)[:, :k]]


def test_a_condition_selects_the_rows_that_meet_it():
    table = catalogue()
    assert matching_rows(table, CONDITION).tolist() == [meets(row) for row in table.to_pylist()]


@pytest.mark.parametrize("exact_rows", [20_000, 0])
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "HNSW32"])
def test_matches_are_those_of_filter_then_exact_search(factory, exact_rows, monkeypatch):
    """By comparing few rows one by one, and by FAISS's selectors; base, tombstones and delta alike."""
    monkeypatch.setattr(view, "_EXACT_ROWS", exact_rows)
    index, queries = build(factory), unit_vectors(20, seed=4)
    index.delete(names(COUNT)[:100])
    late = catalogue().slice(0, 50)
    index.upsert(names(50), unit_vectors(50, seed=9), late)
    rows = index.products.to_pylist()
    chosen = [row["product_id"] for row in rows if meets(row)]
    assert 100 < len(chosen) < 400
    found = index.search(queries, 15, where=CONDITION).ids
    right = filtered(index, queries, 15, chosen)
    assert all(set(row) <= set(chosen) for row in found)
    if factory == "Flat" or exact_rows:
        assert found == right
    else:
        hits = [len({*a} & {*b}) / 15 for a, b in zip(found, right, strict=True)]
        assert np.mean(hits) > 0.9


def test_kinds_without_selectors_and_without_vectors_are_right_too():
    index, queries = build("PQ16x4"), unit_vectors(5, seed=4)
    chosen = {row["product_id"] for row in catalogue().to_pylist() if meets(row)}
    found = index.search(queries, COUNT, where=CONDITION).ids
    assert all(set(row) == chosen and len(row) == len(chosen) for row in found)


TUNED = [
    ("IVF102,SQ8", {"nprobe": 10.0}),
    ("OPQ16_32,IVF102,PQ16x4fs,Refine(SQ8)", {"nprobe": 10.0, "k_factor": 2.0}),
    ("RR32,IVF102,RaBitQ,Refine(SQfp16)", {"nprobe": 10.0, "k_factor": 4.0}),
    ("IVF102_HNSW8,Flat", {"nprobe": 10.0}),
    ("HNSW32", {"efSearch": 16.0}),
    ("HNSW32_SQfp16", {"efSearch": 16.0}),
    ("HNSW32_SQ8", {"efSearch": 16.0}),
]


@pytest.mark.parametrize("exact_rows", [20_000, 100])
@pytest.mark.parametrize(("factory", "parameters"), [*TUNED, ("IVF102,Flat", {"nprobe": 10.0})])
def test_kinds_and_settings_that_tuning_takes_find_what_a_filter_leaves(
    factory, parameters, exact_rows, monkeypatch
):
    """All of it where k is as much, in one place or scattered; and of more what they find unfiltered."""
    monkeypatch.setattr(view, "_EXACT_ROWS", exact_rows)
    count = 4_000
    centers, near = unit_vectors(80, seed=2), np.arange(count) // 50
    vectors = centers[near] + 1.5 * unit_vectors(count, seed=3)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = centers[::2] + 1.5 * unit_vectors(40, seed=4)
    places, ids = np.arange(count), np.array(names(count), object)
    mixed = np.random.default_rng(5).permutation(count)
    table = pa.table({"product_id": names(count), "n": places, "mixed": mixed})
    index = ProductIndex.build(names(count), vectors, factory=factory, attributes=table)
    set_search(index._view.base.index, parameters)

    def recall(chosen, where):
        found = index.search(queries, 10, where=where).ids
        right = np.argsort(-(queries @ vectors[chosen].T), axis=1)[:, :10]
        pairs = zip(found, ids[chosen[right]].tolist(), strict=True)
        return np.mean([len({*ours} & {*true}) / 10 for ours, true in pairs])

    target = recall(places, None)
    assert target > 0.5
    for where, few in (("n < 5", places < 5), ("mixed < 7", mixed < 7)):
        found = index.search(queries, 10, where=where).ids
        assert all(sorted(row) == sorted(ids[few]) for row in found)
    for share in (1_200, 400):
        for where, many in ((f"n < {share}", places < share), (f"mixed < {share}", mixed < share)):
            assert recall(places[many], where) > target - 0.03, where
    index.delete(names(count)[:3_900])
    assert all(len(row) == 100 for row in index.search(queries, 100).ids)


def test_few_and_no_rows():
    index = build("Flat")
    assert (
        index.search(unit_vectors(2), 5, where="product_id = 'sku-00007'").ids
        == [["sku-00007"]] * 2
    )
    result = index.search(unit_vectors(2), 5, where="price > 1000")
    assert (result.ids, result.scores.shape) == ([[], []], (2, 0))


def test_columns_of_later_products_can_be_asked_for():
    index = build("Flat")
    new = pa.table({"product_id": ["n"], "colour": ["red"], "price": [5]})
    index.upsert(["n"], unit_vectors(1, seed=3), new)
    assert index.search(unit_vectors(1), 5, where="colour = 'red'").ids == [["n"]]
    assert index.search(unit_vectors(1), 5, where="colour = 'red' and price = 5").ids == [["n"]]
    assert len(index.search(unit_vectors(1), COUNT, where="colour is null").ids[0]) == COUNT


def test_a_filter_is_evaluated_once_a_generation(monkeypatch):
    index, calls = build("Flat"), []
    monkeypatch.setattr(
        view, "matching_rows", lambda *given: calls.append(given) or matching_rows(*given)
    )
    before = index.search(unit_vectors(1), 5, where=CONDITION).ids
    index.delete(["sku-00001"])
    assert index.search(unit_vectors(1), 5, where=CONDITION).ids == before
    assert len(calls) == 1
    for number in range(100):
        index.search(unit_vectors(1), 5, where=f"price = {number}")
    assert len(index._view.base.filters) <= 32
    assert len(index._view._selections) <= 32


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("prize < 3", 'column "prize" not found'),
        ("price <", "syntax error"),
        ("", "SELECT clause"),
        ("available; drop table products", "modifiers"),
        ("1 = 1) union select 1 --", "syntax error"),
        ("category = 3", "Could not convert"),
        ("sum(price) > 3", "aggregates"),
        ("price < (select max(price) from products)", "cannot hold a query"),
        ("category in (select content from read_text('/etc/hostname'))", "cannot hold a query"),
        ("read_text('/etc/hostname') = 'x'", "read_text"),
        ("price < $1", "parameter"),
        *(
            (where, "function .* is not for conditions")
            for where in (
                *("pg_sleep(3) is null", "sleep_ms(10) is null", "write_log('x') is null"),
                *("random() < 0.5", "Now() > date '2020-01-01'", "len(range(10000000000)) > 1"),
            )
        ),
        ('"mmrec row" < 3', "'mmrec row' is not a column"),
        ("current_date > date '2020-01-01'", "'current_date' is not a column"),
        ("current_user = 'x'", "'current_user' is not a column"),
        ("row_number() over () < 3", "cannot hold a window"),
        ("columns(*) is null", "cannot hold a star"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line_with_the_columns(where, message):
    index = build("Flat")
    with pytest.raises(UserError, match=message) as caught:
        index.search(unit_vectors(1), 3, where=where)
    text = str(caught.value)
    assert "\n" not in text
    assert (
        "columns: product_id (string), price (double), category (string), available (bool)" in text
    )


def test_the_engine_reads_no_files(tmp_path):
    """Even past our own check for queries within."""
    (tmp_path / "secret.csv").write_text("a\n1\n")
    from mmrec.retrieval import filters

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "_parsed", lambda *_: {})
        for source in (
            f"read_csv('{tmp_path}/secret.csv')",
            f"'{tmp_path}/secret.csv'",
            "catalogue",
        ):
            with pytest.raises(UserError, match=r"columns: product_id"):
                matching_rows(catalogue(), f"exists (select 1 from {source})")


@pytest.mark.parametrize(
    "where",
    [
        "lower(category) like 'SHO%' or category ilike 'sho%' or category in ('shoes')",
        "contains(category, 'hoe') and not category ~ 'x'",
        "products.category = 'shoes' and list_filter([1, 2], lambda x: x > 1) = [2]",
        "category = 'shoes' and date '2024-01-01' + interval 3 days < date '2025-01-01'",
        "case when category = 'shoes' then coalesce(price, 1) >= 0 or price is null else false end",
    ],
)
def test_text_lists_dates_and_cases_can_be_asked_for(where):
    table = catalogue()
    assert matching_rows(table, where).tolist() == [
        row["category"] == "shoes" for row in table.to_pylist()
    ]


def test_names_that_a_condition_cannot_tell_apart_are_refused():
    ids, vectors = names(2), unit_vectors(2)

    def build_with(**columns):
        table = pa.table({"product_id": ids, **columns})
        return ProductIndex.build(ids, vectors, attributes=table)

    with pytest.raises(UserError, match="'Price' and 'price' are one name in a condition"):
        build_with(Price=[1, 100], price=[100, 1])
    with pytest.raises(UserError, match="cannot be called 'mmrec row'"):
        build_with(**{"mmrec row": [1, 2]})
    index = build_with(price=[1, 100])
    with pytest.raises(UserError, match="'price' and 'Price' are one name"):
        index.upsert(["n"], vectors[:1], pa.table({"product_id": ["n"], "Price": [2]}))


def test_types_that_duckdb_does_not_read_are_cast_when_they_come_in():
    ids, vectors = names(2), unit_vectors(2)
    odd = {
        "half": pa.array(np.array([1, 2], np.float16)),
        "long": pa.array([Decimal("1.5"), None], pa.decimal256(50, 2)),
        "text": pa.array(["x", None], pa.string_view()),
    }
    table = pa.table({"product_id": ids, **odd})
    index = ProductIndex.build(ids, vectors, attributes=table)
    index.upsert(
        ["new"], unit_vectors(1, seed=3), table.slice(0, 1).set_column(0, "product_id", [["new"]])
    )
    for where in ("half < 2", "long = 1.5", "text = 'x'"):
        assert sorted(index.search(vectors[:1], 5, where=where).ids[0]) == ["new", ids[0]]


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("1" + "+1" * 495 + " > 0", "nested so deeply"),
        ("[" * 480 + "1" + "]" * 480 + " is null", "nested so deeply|nest"),
        (
            "len(list_filter(['a' || 'b'], lambda a: len(list_filter([a || a], lambda b: true)) > 0)) > 0",
            "a lambda within a lambda",
        ),
        ("lpad('a', 2000000000, 'b') = 'a'", "'lpad' is not for conditions"),
        ("replace(replace(title, 'x', 'yyyy'), 'y', 'zzzz') = ''", "'replace' is not for"),
    ],
)
def test_what_grows_or_nests_without_end_is_refused(where: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        matching_rows(pa.table({"product_id": ["a"], "title": ["x"]}), where)
