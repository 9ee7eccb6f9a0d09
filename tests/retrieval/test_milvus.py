"""A catalogue in Milvus, by milvus-lite in this process: the same answers as from a folder."""

import datetime
import random
import socket
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from vectors import unit_vectors

from mmrec.errors import UserError
from mmrec.manifest import Parent
from mmrec.retrieval import milvus_push
from mmrec.retrieval.backend import CatalogueIndex
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.milvus import MilvusIndex, Server
from mmrec.retrieval.milvus_push import push_index

pytest.importorskip("pymilvus", reason="Milvus is an extra: pip install 'mmrec[milvus]'")
pytest.importorskip("milvus_lite", reason="pip install --no-deps milvus-lite")

COUNT = 200
ENCODER = "e" * 16
# Ids and words that would end a string, or hide in a pattern.
NASTY = ("plain", "it's", 'say "so"', "back\\slash", "a\nb", "é%", "x_y", "", "50%")


def sku(number: int) -> str:
    return f"sku '{number:04d}\"\\"


def catalogue(count: int = COUNT) -> pa.Table:
    rng = random.Random(3)

    def sometimes(value: object) -> object:
        return None if rng.random() < 0.15 else value

    rows = [
        {
            "product_id": sku(number),
            "title": sometimes(rng.choice(NASTY)),
            "price": sometimes(rng.choice([-1.5, 0.0, 0.1, 29.999, 30.0, 30.5, 1e9])),
            "Stock": sometimes(rng.randrange(-3, 4)),
            "available": sometimes(rng.random() < 0.5),
            "single": sometimes(rng.choice([0.1, 2.5])),
            "in": sometimes(rng.choice(["red", "blue"])),
            "day": sometimes(datetime.date(2026, 1, 1 + rng.randrange(9))),
            "cost": sometimes(Decimal(rng.randrange(99)) / 4),
            "tags": sometimes([rng.choice(NASTY)] * rng.randrange(3)),
        }
        for number in range(count)
    ]
    types = [pa.string(), pa.string(), pa.float64(), pa.int32(), pa.bool_(), pa.float32()]
    types += [pa.string(), pa.date32(), pa.decimal128(8, 2), pa.list_(pa.string())]
    return pa.Table.from_pylist(rows, schema=pa.schema(list(zip(rows[0], types, strict=True))))


def build(folder: Path, *, count: int = COUNT, encoder: str = ENCODER, seed: int = 0) -> Path:
    table = catalogue(count)
    index = ProductIndex.build(
        table["product_id"].to_pylist(), unit_vectors(count, seed), attributes=table
    )
    index.save(folder, parents=[Parent(kind="encoder", fingerprint=encoder, path="../encoder")])
    return folder


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder and the collection that it was pushed to; neither is changed by a test."""
    folder = tmp_path_factory.mktemp("milvus")
    uri = str(folder / "catalogue.db")
    push_index(build(folder / "index"), uri)
    return folder / "index", uri


@pytest.fixture(scope="module")
def both(pushed: tuple[Path, str]) -> Iterator[tuple[ProductIndex, MilvusIndex]]:
    folder, uri = pushed
    with MilvusIndex.open(uri) as there:
        yield ProductIndex.load(folder, device="cpu"), there


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[ProductIndex, MilvusIndex]]:
    """The same, to be changed."""
    push_index(build(tmp_path / "index", count=60), str(tmp_path / "own.db"))
    with (
        ProductIndex.load(tmp_path / "index", device="cpu") as here,
        MilvusIndex.open(str(tmp_path / "own.db")) as there,
    ):
        yield here, there


def same_matches(
    here: ProductIndex, there: MilvusIndex, k: int = 10, where: str | None = None
) -> None:
    queries = unit_vectors(7, seed=5)
    ours, theirs = (index.search(queries, k, where=where) for index in (here, there))
    assert theirs.ids == ours.ids
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-5)


def test_both_have_the_interface(both: tuple[ProductIndex, MilvusIndex]) -> None:
    assert all(isinstance(index, CatalogueIndex) for index in both)


def test_matches_vectors_attributes_and_ids_are_those_of_the_folder(
    both: tuple[ProductIndex, MilvusIndex],
) -> None:
    here, there = both
    same_matches(here, there)
    same_matches(here, there, k=COUNT + 50)
    assert sorted(there.ids) == sorted(here.ids)
    some = here.ids[::37]
    np.testing.assert_array_equal(there.vectors(some), here.vectors(some))
    assert there.attributes_of(some) == [here.attributes(id_) for id_ in some]
    assert there.attributes(some[3]) == here.attributes(some[3])
    assert (len(there), there.width, there.key) == (COUNT, 32, "product_id")
    assert some[0] in there
    assert "nothing" not in there
    status = there.status()
    assert (status.products, status.encoder, status.kind) == (COUNT, ENCODER, "FLAT")
    assert "products: 200, 32 wide" in status.lines()
    assert there.vectors([]).shape == (0, 32)


def test_ids_come_in_pages(
    both: tuple[ProductIndex, MilvusIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec.retrieval import milvus

    monkeypatch.setattr(milvus, "MOST_MATCHES", 100)
    assert both[1].ids == sorted(both[0].ids)


ATOMS = (
    "price < 30",
    "30 <= price",
    "price = 0.1",
    "price != 1e9",
    "price between 0 and 30",
    "price in (0.1, 30, null)",
    "single = 0.1",
    "single < 2.5",
    "stock < 1.5",
    "Stock >= -2.5",
    "stock = 2.0",
    "stock = 0.5",
    "stock != 0.5",
    "stock in (1, -1)",
    "stock not in (1, null)",
    "available",
    "available = false",
    "available is true",
    "available is distinct from true",
    "title = 'it''s'",
    "title <> 'say \"so\"'",
    "title in ('back\\slash', 'a\nb', 'x_y')",
    "title like 'a%'",
    "title not like '%s%'",
    "starts_with(title, 's')",
    "contains(title, 'b')",
    "title >= 'b'",
    "title = ''",
    "\"in\" = 'red'",
    "title is null",
    "day is not null",
    "price = null",
    "product_id is null",
    "product_id > 'sku ''03'",
    "true",
    "false",
)


def test_every_condition_and_its_contrary_meets_the_rows_that_duckdb_finds(
    both: tuple[ProductIndex, MilvusIndex],
) -> None:
    rng, query = random.Random(4), unit_vectors(1, seed=8)
    conditions = [where for atom in ATOMS for where in (atom, f"not ({atom})")]
    conditions += [condition(rng, 3) for _ in range(10)]
    met = 0
    with duckdb.connect() as connection:
        connection.register("catalogue", catalogue())
        for where in conditions:
            rows = connection.execute(f"select product_id from catalogue where {where}").fetchall()
            found = both[1].search(query, COUNT, where=where).ids[0]
            assert sorted(found) == sorted(id_ for (id_,) in rows), where
            met += 0 < len(rows) < COUNT
    assert met > len(ATOMS)


def condition(rng: random.Random, depth: int) -> str:
    """A random tree of the atoms."""
    if depth == 0:
        return rng.choice(ATOMS)
    left, right = condition(rng, depth - 1), condition(rng, depth - 1)
    return rng.choice([f"({left} and {right})", f"({left} or {right})", f"not ({left})"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("prize < 3", 'column "prize" not found.*columns: product_id'),
        ("price <", "syntax error"),
        ("price < (select 1)", "cannot hold a query"),
        ("price < stock", "compares two columns"),
        ("price + 1 < 3", "computes with columns"),
        ("price < 1 + 1", "computes the value"),
        ("day > date '2026-01-01'", "computes the value"),
        ("day > '2026-01-01'", r"day \(date32\[day\]\) is kept as JSON"),
        ("price < '30'", "price holds numbers"),
        ("available = 1", "available holds true or false"),
        ("stock", "for true or false"),
        ("title like 'x_y'", "more than %"),
        ("contains(title, '%')", "more than %"),
        ("title ilike 'a%'", "calls ~~"),
        ("upper(title) = 'A'", "computes with columns"),
        ("price < 0.12345678901234567", "more digits"),
        ("case when available then true end", "it holds"),
    ],
)
def test_what_milvus_would_answer_otherwise_is_refused_in_one_line(
    both: tuple[ProductIndex, MilvusIndex], where: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        both[1].search(unit_vectors(1), 3, where=where)
    assert "\n" not in str(caught.value)


def test_other_refusals(both: tuple[ProductIndex, MilvusIndex]) -> None:
    there, queries = both[1], unit_vectors(1)
    for k, message in ((0, "expected at least 1"), (16_385, "at most 16,384 matches")):
        with pytest.raises(UserError, match=message):
            there.search(queries, k)
    with pytest.raises(UserError, match="leave out --rerank"):
        there.search(queries, 3, rerank=True)
    with pytest.raises(UserError, match=r"expects \(Q, 32\)"):
        there.search(unit_vectors(1, width=16), 3)
    with pytest.raises(UserError, match="not in this index of 200 products: 'nothing'"):
        there.vectors(["nothing"])


def test_upserts_and_deletes_are_found_at_once(own: tuple[ProductIndex, MilvusIndex]) -> None:
    here, there = own
    ids = [sku(number) for number in range(50, 70)]
    table = catalogue(70).slice(50).drop_columns(["cost"])
    for index in own:
        index.upsert(ids, unit_vectors(20, seed=11), table)
        assert index.delete([sku(3), "no such product", sku(65), sku(3)]) == 2
        # Vectors alone: what is known of a product stays.
        index.upsert([sku(5), "bare"], unit_vectors(2, seed=12))
        index.upsert([], np.zeros((0, 32), np.float32))
    assert len(there) == len(here) == 69
    same_matches(here, there)
    same_matches(here, there, k=70, where="price < 30 or title is null")
    assert [there.attributes(id_) for id_ in here.ids] == [here.attributes(id_) for id_ in here.ids]
    assert set(there.attributes("bare").values()) == {None}
    assert sku(3) not in there


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("colour", ["red"], "'colour' is no column of collection 'products'"),
        ("price", ["cheap"], "attribute 'price' is double"),
        ("price", [float("nan")], "'price' holds NaN.*: 'new'"),
        ("title", ["x" * 70_000], "'title' holds long strings.*: 'new'"),
    ],
)
def test_what_a_collection_cannot_hold_is_refused_by_name(
    own: tuple[ProductIndex, MilvusIndex], column: str, values: list, message: str
) -> None:
    table = pa.table({"product_id": ["new"], column: values})
    with pytest.raises(UserError, match=message):
        own[1].upsert(["new"], unit_vectors(1), table)
    with pytest.raises(UserError, match="NaN or infinity: 'new'"):
        own[1].upsert(["new"], np.full((1, 32), np.nan, np.float32))
    assert "new" not in own[1]


def test_a_push_goes_on_where_it_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, uri, calls = build(tmp_path / "index", count=250), str(tmp_path / "a.db"), []
    monkeypatch.setattr(milvus_push, "BATCH", 100)
    upsert_rows = milvus_push.upsert_rows

    def break_off(*given: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        upsert_rows(*given)

    monkeypatch.setattr(milvus_push, "upsert_rows", break_off)
    with pytest.raises(KeyboardInterrupt):
        push_index(folder, uri)
    with pytest.raises(UserError, match=r"has no collection 'products'.*being_pushed"):
        MilvusIndex.open(uri)
    done = push_index(folder, uri)
    assert (done.products, done.sent, done.resumed) == (250, 50, 200)
    with MilvusIndex.open(uri) as there:
        same_matches(ProductIndex.load(folder, device="cpu"), there)
        assert there._server.ask("list_collections") == ["products"]


def test_a_push_of_a_changed_index_replaces_what_was_there(tmp_path: Path) -> None:
    folder, uri = build(tmp_path / "index", count=40), str(tmp_path / "a.db")
    push_index(folder, uri)
    with ProductIndex.load(folder, device="cpu") as here:
        here.delete([sku(1)])
        new = pa.table({"product_id": [sku(2)], "colour": ["red"]})
        here.upsert([sku(2)], unit_vectors(1, seed=9), new)
        assert push_index(folder, uri).resumed == 0
        with MilvusIndex.open(uri) as there:
            same_matches(here, there)
            same_matches(here, there, where="colour = 'red'")


def priced(folder: Path, price: float) -> Path:
    """An index of forty products, of which one was given a price since."""
    build(folder, count=40)
    with ProductIndex.load(folder, device="cpu") as here:
        new = pa.table({"product_id": [sku(5)], "price": [price]})
        here.upsert([sku(5)], unit_vectors(1, seed=9), new)
    return folder


def break_off_before_the_end(
    folder: Path, uri: str, monkeypatch: pytest.MonkeyPatch, spoil: list[dict] | None = None
) -> None:
    """Leave all rows in the collection that is being filled, `spoil` written over some of them."""

    def stop(server: Server, staging: str, *_: object) -> None:
        milvus_push.upsert_rows(server, staging, spoil or [])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(milvus_push, "_verify", stop)
        with pytest.raises(KeyboardInterrupt):
            push_index(folder, uri)


def test_a_push_does_not_go_on_with_rows_of_another_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same base and as many changes since, but others."""
    uri = str(tmp_path / "a.db")
    break_off_before_the_end(priced(tmp_path / "one", 2.0), uri, monkeypatch)
    other = priced(tmp_path / "two", 99.0)
    assert push_index(other, uri).resumed == 0
    with MilvusIndex.open(uri) as there:
        assert there.attributes(sku(5))["price"] == 99.0


@pytest.mark.parametrize("spoilt", ["vector", "price", "tags"])
def test_wrong_rows_are_sent_again_and_else_noticed(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, uri = build(tmp_path / "index", count=40), str(tmp_path / "a.db")
    here = ProductIndex.load(folder, device="cpu")
    columns = milvus_push.columns_of(here.products.schema)
    vector = here.vectors([sku(7)])
    (row,) = milvus_push.to_rows(here.products.slice(7, 1), vector, columns)
    row[spoilt] = {"vector": -vector[0], "price": 12.5, "tags": {"value": ["other"]}}[spoilt]
    break_off_before_the_end(folder, uri, monkeypatch, [row])
    with monkeypatch.context() as patch:
        patch.setattr(milvus_push, "_send", lambda *_: 40)
        with pytest.raises(UserError, match=r"other vectors or attributes .*: 'sku '0007"):
            push_index(folder, uri)
    assert push_index(folder, uri).resumed == 39
    with MilvusIndex.open(uri) as there:
        same_matches(here, there)
        assert there.attributes(sku(7)) == here.attributes(sku(7))


def test_rows_that_got_lost_are_noticed_before_they_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, uri = build(tmp_path / "index", count=40), str(tmp_path / "a.db")
    upsert_rows = milvus_push.upsert_rows
    monkeypatch.setattr(
        milvus_push, "upsert_rows", lambda s, name, rows: upsert_rows(s, name, rows[1:])
    )
    with pytest.raises(UserError, match="has 39 of 40 products"):
        push_index(folder, uri)
    with pytest.raises(UserError, match="has no collection"):
        MilvusIndex.open(uri)


def test_another_encoder_and_strange_collections_are_refused(
    pushed: tuple[Path, str], tmp_path: Path
) -> None:
    _, uri = pushed
    other = build(tmp_path / "other", count=20, encoder="f" * 16)
    with pytest.raises(UserError, match=f"encoder {ENCODER}.*{'f' * 16}.*another --collection"):
        push_index(other, uri)
    push_index(other, uri, collection="second")
    with MilvusIndex.open(uri, "second") as second:
        assert second.manifest
        assert second.manifest.parent("encoder").fingerprint == "f" * 16
        second._server.client.create_collection("theirs", dimension=4)
    for refuse in (
        lambda: MilvusIndex.open(uri, "theirs"),
        lambda: push_index(other, uri, collection="theirs"),
    ):
        with pytest.raises(UserError, match="'theirs' was not pushed by mmrec"):
            refuse()


@pytest.mark.parametrize("kind", ["HNSW", "IVF_FLAT", "IVF_SQ8"])
def test_other_kinds_find_nearly_the_same(kind: str, tmp_path: Path) -> None:
    folder = build(tmp_path / "index", count=400)
    push_index(folder, str(tmp_path / "a.db"), kind=kind)
    with MilvusIndex.open(str(tmp_path / "a.db")) as there:
        assert there.status().kind == kind
        queries = unit_vectors(20, seed=5)
        ours = ProductIndex.load(folder, device="cpu").search(queries, 10).ids
        theirs = there.search(queries, 10).ids
    assert np.mean([len({*a} & {*b}) / 10 for a, b in zip(ours, theirs, strict=True)]) > 0.9


def test_what_cannot_be_pushed(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.db")
    ids = [sku(number) for number in range(400)]
    ProductIndex.build(ids, unit_vectors(400), factory="IVF4,PQ8x4").save(tmp_path / "codes")
    with pytest.raises(UserError, match="keeps codes and no vectors"):
        push_index(tmp_path / "codes", uri)
    folder = build(tmp_path / "index", count=20)
    with pytest.raises(UserError, match="expected one of FLAT, HNSW"):
        push_index(folder, uri, kind="DISKANN")
    with pytest.raises(UserError, match="letters, digits and _"):
        push_index(folder, uri, collection="my products")


def test_lists_of_dates_do_not_come_back(tmp_path: Path) -> None:
    days = pa.array([[datetime.date(2026, 1, 1)], None], pa.list_(pa.date32()))
    table = pa.table({"product_id": ["a", "b"], "days": days})
    ProductIndex.build(["a", "b"], unit_vectors(2), attributes=table).save(tmp_path / "index")
    with pytest.raises(UserError, match=r"'days' \(list<.*does not come back from Milvus"):
        push_index(tmp_path / "index", str(tmp_path / "a.db"))


def test_where_nothing_answers_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mmrec.retrieval import milvus

    monkeypatch.setattr(milvus, "_CONNECT_S", 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(UserError, match=f"{uri}: no Milvus answers there") as caught:
        Server(uri)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"^{uri}: no Milvus answers there"):
        Server(uri.replace("//", "//me:secret@"))
    with pytest.raises(UserError, match="no such file"):
        MilvusIndex.open(str(tmp_path / "none.db"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"ends in \.db"):
        MilvusIndex.open(str(tmp_path / "folder"))
    assert capfd.readouterr().err == ""


def test_a_parent_is_found_where_it_was_and_as_it_was(
    both: tuple[ProductIndex, MilvusIndex], pushed: tuple[Path, str]
) -> None:
    folder, there = pushed[0], both[1]
    assert there.find_parent("index") == folder.resolve()
    assert there.find_parent("encoder") is None
    assert there.find_parent("shards") is None
    assert there.manifest
    assert Path(there.manifest.parents[1].path) == (folder / "../encoder").resolve()
