"""An index that is changed: against a plain dictionary of what it should hold, for every kind of base."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import psutil
import pyarrow as pa
import pytest
from vectors import names, unit_vectors

from mmrec.errors import UserError
from mmrec.retrieval import base, changes, exact
from mmrec.retrieval.changes import Change, Delta
from mmrec.retrieval.delta_lists import Lists
from mmrec.retrieval.index import ProductIndex

WIDTH = 32
COUNT = 1_500
# Approximate kinds probe everything, so that what they find is what is there.
EXACT = ["Flat", "IVF8,Flat", "HNSW16"]
CODED = [
    "SQ8",
    "IVF8,SQ8",
    "HNSW16_SQ8",
    "PCA24,HNSW16",
    "IVF8,PQ8x4",
    "OPQ8_32,IVF8,PQ8x4,RFlat",
    "RR32,IVF8,RaBitQ",
    "RR32,IVF8,RaBitQ,Refine(SQfp16)",
    "IVF8,PQ16x4fs,RFlat",
    "PQ16x4",
]


def probe_all(index: ProductIndex) -> None:
    from mmrec.retrieval.faiss_base import core_of

    core = core_of(index._view.base.index)
    if isinstance(core, faiss.IndexIVF):
        core.nprobe = core.nlist
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efSearch = 600


def attributes_of(ids: list[str], price: float) -> pa.Table:
    return pa.table({"product_id": ids, "price": [price] * len(ids)})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ids = names(COUNT)
    index = ProductIndex.build(ids, unit_vectors(COUNT), attributes=attributes_of(ids, 1.0))
    index.save(tmp_path / "index")
    return tmp_path / "index"


def change(index: ProductIndex) -> dict[str, np.ndarray]:
    """Deletes, replacements and new products; returns what the index holds then."""
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    truth = dict(zip(ids, vectors, strict=True))
    assert index.delete(ids[100:400]) == 300
    for id_ in ids[100:400]:
        del truth[id_]
    late = unit_vectors(200, seed=5)
    index.upsert(ids[350:550], late)  # fifty come back, the others are replaced
    truth |= dict(zip(ids[350:550], late, strict=True))
    new = [f"new-{number}" for number in range(80)]
    fresh = unit_vectors(80, seed=6)
    index.upsert(new, fresh, attributes_of(new, 2.0))
    truth |= dict(zip(new, fresh, strict=True))
    assert index.delete([*new[:10], ids[360], "never there"]) == 11
    for id_ in [*new[:10], ids[360]]:
        del truth[id_]
    return truth


def expected(truth: dict[str, np.ndarray], queries: np.ndarray, k: int) -> list[list[str]]:
    ids = np.array(list(truth), object)
    scores = queries.astype(np.float64) @ np.stack(list(truth.values())).T
    return ids[np.argsort(-scores, axis=1)[:, :k]].tolist()


# ------------------------------------------------------------------------- every kind, every state


@pytest.mark.parametrize("factory", EXACT)
def test_changes_compaction_and_reloads_leave_the_exact_matches(factory, tmp_path):
    ids = names(COUNT)
    index = ProductIndex.build(
        ids, unit_vectors(COUNT), factory=factory, attributes=attributes_of(ids, 1.0)
    )
    index.save(tmp_path / "index")
    base = (tmp_path / "index/generations/000001/base.faiss").read_bytes()
    probe_all(index)
    with index:
        truth = change(index)
        queries = unit_vectors(40, seed=9)
        right = expected(truth, queries, 20)
        assert index.search(queries, 20).ids == right
        assert (tmp_path / "index/generations/000001/base.faiss").read_bytes() == base
        loaded = ProductIndex.load(tmp_path / "index", device="cpu", verify=True)
        probe_all(loaded)
        assert loaded.search(queries, 20).ids == right
        assert index.compact()
        probe_all(index)
        compacted = ProductIndex.load(tmp_path / "index", device="cpu", verify=True)
        probe_all(compacted)
        # The reader that was there before still answers from its generation.
        for opened in (index, compacted, loaded):
            assert opened.search(queries, 20).ids == right
            assert len(opened) == len(truth) == len(opened.ids)
            assert set(opened.ids) == set(truth)
            np.testing.assert_array_equal(
                opened.vectors(ids[350:353]), [truth[i] for i in ids[350:353]]
            )
            assert opened.attributes("new-50") == {"price": 2.0}
            assert opened.attributes(ids[500]) == {"price": 1.0}  # replaced by its vector alone
            assert ids[150] not in opened
            assert opened.products["product_id"].to_pylist() == opened.ids
        assert compacted.status().delta == compacted.status().tombstones == 0
        assert not index.compact()


@pytest.mark.parametrize("factory", CODED)
def test_compressed_kinds_take_changes_and_carry_their_codes_over(factory, tmp_path):
    ids = names(COUNT)
    ProductIndex.build(ids, unit_vectors(COUNT), factory=factory).save(tmp_path / "index")
    with ProductIndex.load(tmp_path / "index", device="cpu") as index:
        probe_all(index)
        untouched = [*ids[:100], *ids[550:]]
        before = index.vectors(untouched[::50])
        truth = {id_: vector for id_, vector in change_without_attributes(index).items()}
        queries = np.stack([truth[id_] for id_ in list(truth)[::40]])
        for _ in range(2):
            found = index.search(queries, 30).ids
            assert all(set(row) <= set(truth) for row in found)
            assert all(len(row) == len(set(row)) == 30 for row in found)
            hits = [
                len({*a} & {*b}) for a, b in zip(found, expected(truth, queries, 30), strict=True)
            ]
            # One bit a component, of 32 components, is not much.
            assert np.mean(hits) / 30 > (0.25 if "RaBitQ" in factory else 0.35)
            np.testing.assert_array_equal(index.vectors(untouched[::50]), before)
            index.compact()
            probe_all(index)
        assert index.status().base == len(truth)


def change_without_attributes(index: ProductIndex) -> dict[str, np.ndarray]:
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    truth = dict(zip(ids, vectors, strict=True))
    index.delete(ids[100:400])
    late = unit_vectors(200, seed=5)
    index.upsert(ids[350:550], late)
    kept = {id_: vector for id_, vector in truth.items() if not 100 <= ids.index(id_) < 400}
    return kept | dict(zip(ids[350:550], late, strict=True))


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "PQ16x4", "SQ8"])
@pytest.mark.parametrize("share", [0.02, 0.9])
def test_tombstones_at_the_top_do_not_shorten_answers(factory, share, tmp_path):
    """A query's forty nearest are deleted, beside many others: k live ones come back all the same."""
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    index = ProductIndex.build(ids, vectors, factory=factory)
    probe_all(index)
    queries = unit_vectors(12, seed=3)
    nearest = {id_ for row in index.search(queries, 40).ids for id_ in row}
    others = [id_ for id_ in ids[: int(share * COUNT)] if id_ not in nearest]
    index.delete([*nearest, *others])
    gone = nearest | set(others)
    result = index.search(queries, 10)
    for found in result.ids:
        assert len(set(found)) == 10
        assert not set(found) & gone
    assert (np.diff(result.scores, axis=1) <= 0).all()
    if factory != "HNSW16":  # a graph does not reach every row
        assert len(index.search(queries, COUNT).ids[0]) == COUNT - len(gone)


@pytest.mark.parametrize("at_once", [8_192, 7])
@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("wide", [512, 8])
def test_base_and_delta_make_one_order(at_once, share, wide, monkeypatch):
    """One query or many, in one product of matrices or several, with few or most products in the delta."""
    monkeypatch.setattr(exact, "_VECTORS_AT_ONCE", 100 * at_once)
    monkeypatch.setattr(exact, "_QUERIES_AT_ONCE", at_once)
    for module in (exact, base):
        monkeypatch.setattr(module, "WIDE", wide)
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    late = int(share * COUNT)
    index = ProductIndex.build(ids[late:], vectors[late:])
    index.upsert(ids[:late], vectors[:late])
    queries = unit_vectors(30, seed=2)
    right = expected(dict(zip(ids, vectors, strict=True)), queries, 10)
    assert index.search(queries, 10).ids == right
    assert [index.search(query[None], 10).ids[0] for query in queries] == right
    scores = index.search(queries, 10).scores
    np.testing.assert_allclose(scores, -np.sort(-(queries @ vectors.T), axis=1)[:, :10], atol=1e-6)
    # More than the base holds.
    assert index.search(queries, COUNT).ids == expected(
        dict(zip(ids, vectors, strict=True)), queries, COUNT
    )


def test_a_delta_is_as_it_was_whatever_came_after():
    """Random changes: each moment is kept and compared with what it held, in a table of its own."""
    rng = np.random.default_rng(0)
    delta, truth, moments = Delta.empty(4, 4), {}, []
    pool = names(900)
    for step in range(120):
        ids = rng.choice(pool, rng.integers(1, 60), replace=False).tolist()
        if step % 3 == 2:
            delta = delta.without(ids)
            truth = {id_: value for id_, value in truth.items() if id_ not in ids}
        else:
            vectors = unit_vectors(len(ids), seed=step, width=4)
            table = pa.table({"product_id": ids, "step": [step] * len(ids)})
            delta = delta.with_upsert(
                Change(kind="upsert", products=table, vectors=vectors), vectors
            )
            truth |= {id_: (step, vector) for id_, vector in zip(ids, vectors, strict=True)}
        moments.append((delta, truth.copy()))
    assert delta.count < 4_000  # Dead rows are dropped now and then.
    for then, held in moments:
        rows = then.live_rows()
        assert len(then) == len(rows) == len(held)
        assert set(then.ids[rows].tolist()) == set(held)
        found = then.rows_of(pool)
        assert [id_ for id_, row in zip(pool, found, strict=True) if row >= 0] == sorted(held)
        steps, ids = (then.table[name].to_pylist() for name in ("step", "product_id"))
        for id_, row in zip(pool, found.tolist(), strict=True):
            if row >= 0:
                assert (ids[row], steps[row]) == (id_, held[id_][0])
                np.testing.assert_array_equal(then.vectors[row], held[id_][1])


def test_the_cost_of_a_change_is_that_of_what_is_new(monkeypatch):
    """Rows of attributes that are copied for two thousand products upserted one by one, then by fifties."""
    copied = []
    join_tables = changes.join_tables

    def counted(tables):
        joined = join_tables(tables)
        copied.append(len(joined))
        return joined

    monkeypatch.setattr(changes, "join_tables", counted)
    for size in (1, 50):
        copied.clear()
        index = ProductIndex.build(names(10), unit_vectors(10))
        for start in range(0, 2_000, size):
            ids = [f"new-{start + place}" for place in range(size)]
            index.upsert(ids, unit_vectors(size), pa.table({"product_id": ids, "n": [1.0] * size}))
        assert sum(copied) < 2_000 * 16
        assert len(index._view.delta._tables) < 12


def test_an_index_may_become_empty_and_fill_again(saved):
    with ProductIndex.load(saved, device="cpu") as index:
        assert index.delete(names(COUNT)) == COUNT
        for _ in range(2):
            result = index.search(unit_vectors(3), 5)
            assert (len(index), result.ids, result.scores.shape) == (0, [[], [], []], (3, 0))
            index.compact()
        index = ProductIndex.load(saved, device="cpu") if index.close() else index
        index.upsert(["a", "b"], unit_vectors(2), attributes_of(["a", "b"], 3.0))
        assert index.search(unit_vectors(1), 9).ids[0][0] == "a"
        assert index.compact()
        assert index.attributes("b") == {"price": 3.0}


def test_codes_of_new_products_do_not_outrank_old_ones(tmp_path):
    """Half of a catalogue in the base, half upserted: matches come from both halves alike."""
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    index = ProductIndex.build(ids[::2], vectors[::2], factory="IVF8,PQ8x4")
    probe_all(index)
    index.upsert(ids[1::2], vectors[1::2])
    late = set(ids[1::2])
    found = index.search(unit_vectors(100, seed=4), 10).ids
    share = np.mean([id_ in late for row in found for id_ in row])
    assert 0.4 < share < 0.6


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU")
@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16"])
def test_a_gpu_copy_serves_base_delta_and_tombstones(factory, tmp_path):
    ids = names(COUNT)
    index = ProductIndex.build(
        ids, unit_vectors(COUNT), factory=factory, attributes=attributes_of(ids, 1.0)
    )
    probe_all(index)
    index.save(tmp_path / "index")
    with index:
        truth = change(index)
        gpu = ProductIndex.load(tmp_path / "index", device="cuda")
        assert gpu.device == "cuda"
        queries = unit_vectors(40, seed=9)
        for k in (20, 300):
            found, right = gpu.search(queries, k).ids, expected(truth, queries, k)
            hits = [len({*a} & {*b}) / k for a, b in zip(found, right, strict=True)]
            assert np.mean(hits) > 0.97  # near ties, and what CAGRA does not come upon
            assert all(set(row) <= set(truth) for row in found)
        assert (
            gpu.search(queries, 5, where="price = 2").ids
            == index.search(queries, 5, where="price = 2").ids
        )
        index.compact()
        gpu.refresh()
        assert gpu.device == "cuda"


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU")
def test_a_flat_index_as_a_cagra_graph(tmp_path):
    vectors = unit_vectors(20_000)
    ProductIndex.build(names(20_000), vectors).save(tmp_path / "index")
    graph = ProductIndex.load(tmp_path / "index", device="cuda", cagra=True)
    queries = vectors[:200] + 0.1 * unit_vectors(200, seed=1)
    right = ProductIndex.load(tmp_path / "index", device="cpu").search(queries, 10)
    found = graph.search(queries, 10)
    hits = [len({*a} & {*b}) / 10 for a, b in zip(found.ids, right.ids, strict=True)]
    assert np.mean(hits) > 0.9
    np.testing.assert_allclose(found.scores[:, 0], right.scores[:, 0], atol=1e-3)


# ------------------------------------------------------------------------------ attributes, refusals


def test_attributes_of_upserts(saved):
    with ProductIndex.load(saved, device="cpu") as index:
        index.upsert(["x"], unit_vectors(1), pa.table({"product_id": ["x"], "colour": ["red"]}))
        index.upsert(["y"], unit_vectors(1), pa.table({"product_id": ["y"], "price": [7]}))
        index.upsert(["z"], unit_vectors(1))
        assert index.attributes("x") == {"price": None, "colour": "red"}
        assert index.attributes("y")["price"] == 7.0
        assert not any(index.attributes("z").values())
        wrong = pa.table({"product_id": ["w"], "price": ["cheap"]})
        with pytest.raises(
            UserError, match="attribute 'price' is double in this index, and here string"
        ):
            index.upsert(["w"], unit_vectors(1), wrong)
        assert "w" not in index
        index.compact()
        assert index.attributes("x") == {"price": None, "colour": "red"}
        assert index.attributes("sku-00003") == {"price": 1.0, "colour": None}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "NaN or infinity: 'b'"),
        (0.0, "length zero: 'b'"),
        (3.0, "not of unit length: 'b'"),
    ],
)
def test_bad_vectors_are_refused_with_their_ids(saved, value, message):
    vectors = unit_vectors(3)
    vectors[1] = value
    with ProductIndex.load(saved, device="cpu") as index:
        with pytest.raises(UserError, match=message):
            index.upsert(["a", "b", "c"], vectors)
        with pytest.raises(UserError, match=r"shape \(2, 7\); expected \(2, 32\).*'a', 'b'"):
            index.upsert(["a", "b"], unit_vectors(2, width=7))
        with pytest.raises(UserError, match="more than once: 'a'"):
            index.upsert(["a", "a"], unit_vectors(2))
        assert (len(index), index.status().changes) == (COUNT, 0)


# ------------------------------------------------------------------------------ readers and writers


def test_a_second_writer_is_refused_until_the_first_is_closed(saved):
    first, second = (ProductIndex.load(saved, device="cpu") for _ in range(2))
    first.upsert(["a"], unit_vectors(1))
    for attempt in (
        lambda: second.upsert(["b"], unit_vectors(1)),
        lambda: second.delete(["a"]),
        second.compact,
        lambda: ProductIndex.build(["q"], unit_vectors(1)).save(saved, overwrite=True),
    ):
        with pytest.raises(UserError, match="being changed by another writer"):
            attempt()
    first.close()
    second.upsert(["b"], unit_vectors(1, seed=1))
    assert {"a", "b"} <= set(second.ids)
    second.close()


def test_a_reader_sees_changes_when_it_asks_for_them(saved):
    reader = ProductIndex.load(saved, device="cpu")
    query = unit_vectors(1, seed=7)
    with ProductIndex.load(saved, device="cpu") as writer:
        writer.upsert(["close"], query)
        assert reader.search(query, 1).ids != [["close"]]
        assert reader.refresh()
        assert reader.search(query, 1).ids == [["close"]]
        assert not reader.refresh()
        writer.compact()
        writer.delete(["close"])
        assert reader.search(query, 1).ids == [["close"]]
        assert reader.refresh()
        assert reader.search(query, 1).ids != [["close"]]
        assert reader.status().generation == "000002"


def test_old_generations_go_when_no_reader_needs_them(saved):
    def generations() -> list[str]:
        return sorted(path.name for path in (saved / "generations").iterdir())

    reader = ProductIndex.load(saved, device="cpu")
    before = reader.search(unit_vectors(3), 5).ids
    with ProductIndex.load(saved, device="cpu") as writer:
        for number in range(4):
            writer.upsert([f"n{number}"], unit_vectors(1, seed=50 + number))
            writer.compact()
    # The reader's own, and the last two for readers on other machines.
    assert generations() == ["000001", "000004", "000005"]
    assert reader.search(unit_vectors(3), 5).ids == before
    reader.refresh()
    with ProductIndex.load(saved, device="cpu") as writer:
        writer.upsert(["last"], unit_vectors(1, seed=60))
        writer.compact()
    assert generations() == ["000005", "000006"]


def test_a_rebuild_becomes_the_next_generation_for_readers(saved):
    reader = ProductIndex.load(saved, device="cpu")
    ProductIndex.build(["only"], unit_vectors(1)).save(saved, overwrite=True)
    assert len(reader) == COUNT
    assert reader.refresh()
    assert reader.ids == ["only"]


@pytest.mark.parametrize(
    ("factory", "count", "upserted", "turns", "compacted"),
    [("Flat", COUNT, 64, 5, 7), ("IVF64,Flat", 20_000, 300, 12, 40)],
)
def test_one_reader_at_full_speed_while_a_writer_changes_and_compacts(
    factory, count, upserted, turns, compacted, tmp_path, request, monkeypatch
):
    """Every answer is of one state: what was never touched is found, what was deleted first never is.

    The delta of the inverted lists grows until it has lists of its own. For an hour each:
    pytest --seconds 3600 --timeout 4000 -s tests/retrieval/test_updates.py -k full_speed
    """
    ids, vectors = names(count), unit_vectors(count)
    ProductIndex.build(ids, vectors, factory=factory).save(tmp_path / "index")
    saved, listed = tmp_path / "index", []
    in_lists = Lists.search
    monkeypatch.setattr(Lists, "search", lambda *args: (listed.append(1), in_lists(*args))[1])
    with ProductIndex.load(saved, device="cpu") as writer:
        writer.delete(ids[:100])
        reader = ProductIndex.load(saved, device="cpu")
        stop = time.monotonic() + request.config.getoption("--seconds")
        gone = set(ids[:100])
        process = psutil.Process()
        before = process.memory_info().rss

        def read() -> int:
            searches = 0
            while time.monotonic() < stop or searches < 10:
                result = reader.search(vectors[1_000:1_032], 5)
                assert [row[0] for row in result.ids] == ids[1_000:1_032]
                assert not gone & {id_ for row in result.ids for id_ in row}
                reader.refresh()
                searches += 1
            return searches

        def write() -> int:
            rounds = 0
            while time.monotonic() < stop or rounds < 16:
                some = unit_vectors(upserted, seed=100 + rounds)
                writer.upsert([f"r{rounds % turns}-{number}" for number in range(upserted)], some)
                writer.upsert(ids[200:264], some[:64])
                writer.delete([f"r{rounds % 3}-{number}" for number in range(upserted)])
                writer.search(some, 3)
                if rounds % compacted == compacted - 1:
                    writer.compact()
                rounds += 1
            return rounds

        with ThreadPoolExecutor(2) as pool:
            reads, writes = pool.submit(read), pool.submit(write)
        grown = (process.memory_info().rss - before) / 2**20
        print(
            f"{factory}: {reads.result()} searches, {writes.result()} rounds of changes, {grown:+.0f} MiB, "
            f"lists of a delta searched {len(listed)} times"
        )
        assert bool(listed) == (factory != "Flat")
        assert (
            grown < 512
        )  # A leak of a generation a compaction would pass this within a minute or two.
        reader.refresh()
        assert set(reader.ids) == set(writer.ids)


# ------------------------------------------------------------------------------ widths and reranking


def test_a_narrow_index_reranks_at_full_width(tmp_path):
    rng = np.random.default_rng(0)
    scale = np.linspace(1.0, 0.2, WIDTH)  # leading components say more, as in nested widths
    vectors, queries = (rng.standard_normal((count, WIDTH)) * scale for count in (COUNT, 50))
    vectors, queries = (
        (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
        for v in (vectors, queries)
    )
    ids = names(COUNT)
    ProductIndex.build(ids, vectors, indexed_width=8, rerank=True).save(tmp_path / "index")
    with ProductIndex.load(tmp_path / "index", device="cpu") as index:
        assert (index.width, index.rerank) == (WIDTH, True)
        right = expected(dict(zip(ids, vectors, strict=True)), queries, 10)

        def recall(**settings: bool) -> float:
            found = index.search(queries, 10, **settings).ids
            return float(
                np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, right, strict=True)])
            )

        narrow, reranked = recall(rerank=False), recall()
        assert narrow + 0.15 < reranked
        index.upsert(ids[:500], vectors[:500])
        assert recall() == pytest.approx(reranked, abs=0.02)
        index.compact()
        assert recall() == pytest.approx(reranked, abs=0.02)
        scores = index.search(queries, 10).scores
        assert (np.diff(scores, axis=1) <= 0).all()
        first = index.search(queries, 1)
        row = ids.index(first.ids[0][0])
        assert first.scores[0, 0] == pytest.approx(queries[0] @ vectors[row], abs=2e-3)
        np.testing.assert_allclose(index.vectors(ids[:5]), vectors[:5], atol=1e-3)


def test_a_narrow_index_without_vectors_says_so():
    index = ProductIndex.build(names(50), unit_vectors(50), indexed_width=8)
    with pytest.raises(UserError, match="keeps 8 of 32 components"):
        index.vectors(["sku-00001"])
    with pytest.raises(UserError, match="no vectors to score by; build it with --rerank"):
        index.search(unit_vectors(1), 3, rerank=True)
    with pytest.raises(UserError, match="width 40 cannot be made of vectors 32 wide"):
        ProductIndex.build(names(50), unit_vectors(50), indexed_width=40)


# ------------------------------------------------------------------------------------------- drift


def test_status_says_when_to_compact_and_when_to_rebuild():
    ids = names(COUNT)
    # A catalogue on a few directions; what comes later lies elsewhere.
    planes = unit_vectors(4, seed=2)
    mixture = (
        np.abs(np.random.default_rng(0).standard_normal((COUNT, 4))).astype(np.float32) @ planes
    )
    vectors = mixture / np.linalg.norm(mixture, axis=1, keepdims=True)
    index = ProductIndex.build(ids, vectors, factory="IVF8,PQ8x4")
    status = index.status()
    assert (status.advice, status.upserted_error, status.products) == ([], None, COUNT)
    index.upsert(["same"], vectors[:1])
    assert index.status().advice == []
    new = [f"new-{number}" for number in range(300)]
    index.upsert(new, unit_vectors(300, seed=8))
    status = index.status()
    assert status.upserted_error > 1.25 * status.quantization_error > 0
    advice = " ".join(status.advice)
    assert "compact (mmrec index compact): the delta is 20% of the base" in advice
    assert "rebuild (mmrec index build): new products lose" in advice
    index.delete(ids[:400])
    assert "27% of the base are tombstones" in " ".join(index.status().lines())
    # Compaction trains nothing.
    assert index.compact()
    after = index.status()
    assert after.upserted_error == pytest.approx(status.upserted_error)
    assert [line[:7] for line in after.advice] == ["rebuild"]
    index.upsert(new, unit_vectors(300, seed=9))
    index.compact()
    assert "rebuild" in " ".join(index.status().advice)


def test_list_imbalance_is_noted():
    vectors = unit_vectors(COUNT)
    index = ProductIndex.build(names(COUNT), vectors, factory="IVF8,Flat")
    before = index.status().imbalance
    sizes = np.bincount(index._view.base.index.quantizer.assign(vectors, 1)[:, 0], minlength=8)
    assert before == pytest.approx(8 * (sizes**2).sum() / sizes.sum() ** 2)
    one_spot = vectors[:1] + 0.01 * unit_vectors(2_000, seed=1)
    one_spot /= np.linalg.norm(one_spot, axis=1, keepdims=True)
    index.upsert([f"n{number}" for number in range(2_000)], one_spot)
    status = index.status()
    assert status.imbalance_now > 1.5 * before
    assert any("lists are" in line for line in status.advice)


def list_imbalance(index: ProductIndex) -> float:
    vectors = index.vectors(index.ids)
    quantizer = index._view.base.index.quantizer
    sizes = np.bincount(quantizer.assign(vectors, 1)[:, 0], minlength=quantizer.ntotal)
    return len(sizes) * (sizes**2).sum() / sizes.sum() ** 2


def test_lists_are_those_of_what_is_alive_whoever_changed_it(tmp_path):
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    ProductIndex.build(ids, vectors, factory="IVF8,Flat").save(tmp_path / "index")
    one_spot = vectors[:1] + 0.01 * unit_vectors(2_000, seed=1)
    one_spot /= np.linalg.norm(one_spot, axis=1, keepdims=True)
    for start in range(0, 2_000, 500):
        with ProductIndex.load(tmp_path / "index", device="cpu") as index:
            new = [f"n{number}" for number in range(start, start + 500)]
            index.upsert(new, one_spot[start : start + 500])
    with ProductIndex.load(tmp_path / "index", device="cpu") as index:
        status = index.status()
        assert status.imbalance_now == pytest.approx(list_imbalance(index))
        assert any("lists are" in line for line in status.advice)
        index.upsert(ids[:100], vectors[:100])  # as they were
        index.delete([*ids[500:600], *new])
        status = index.status()
        assert status.imbalance_now == pytest.approx(list_imbalance(index))
        index.compact()
        assert index.status().imbalance_now == pytest.approx(status.imbalance_now)
        assert index.status().imbalance == status.imbalance


def test_upserting_what_is_here_already_leaves_the_lists_as_they_were():
    ids, vectors = names(COUNT), unit_vectors(COUNT)
    index = ProductIndex.build(ids, vectors, factory="IVF8,Flat")
    for _ in range(5):
        index.upsert(ids[:100], vectors[:100])
    assert index.status().imbalance_now == pytest.approx(index.status().imbalance)
