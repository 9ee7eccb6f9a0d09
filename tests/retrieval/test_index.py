"""ProductIndex against numpy's argsort, on disk, and against what users get wrong."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import faiss
import jaxtyping
import numpy as np
import pyarrow as pa
import pytest

from mmrec.errors import UserError
from mmrec.manifest import Parent, read_manifest
from mmrec.retrieval import base, generations
from mmrec.retrieval.index import ProductIndex, measure_recall
from mmrec.retrieval.intake import check_ids

WIDTH = 32
FACTORIES = ["Flat", "HNSW32", "IVF64,Flat", "IVF64,PQ16"]


def unit_vectors(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"sku-{number:05d}" for number in range(count)]


def table_of(ids: list[str]) -> pa.Table:
    """Attributes in another order than the ids, with one product more."""
    rows = [
        {"price": 1.5 * number, "product_id": product_id, "title": f"Product {number}"}
        for number, product_id in enumerate([*ids, "not indexed"])
    ]
    return pa.Table.from_pylist(rows[::-1])


@pytest.fixture(scope="module")
def catalogue() -> tuple[list[str], np.ndarray]:
    return names(3000), unit_vectors(3000)


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """FAISS threads spin while they wait: more of them than free cores make it ten times slower."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def indexes(catalogue) -> Callable[[str], ProductIndex]:
    """Indexes of the catalogue by factory, each built once."""
    ids, vectors = catalogue
    attributes = table_of(ids)
    return cache(
        lambda factory: ProductIndex.build(ids, vectors, factory=factory, attributes=attributes)
    )


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as users make them, with nothing between them and our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ids = names(20)
    index = ProductIndex.build(ids, unit_vectors(20), attributes=table_of(ids))
    index.save(tmp_path / "index")
    return tmp_path / "index"


def generation_of(folder: Path) -> Path:
    return folder / "generations" / "000001"


# ---------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize(("count", "k"), [(1, 1), (50, 7), (3000, 100)])
def test_flat_search_is_exact(count, k):
    vectors, queries = unit_vectors(count), unit_vectors(9, seed=1)
    result = ProductIndex.build(names(count), vectors).search(queries, k)
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-scores, axis=1)[:, :k]
    assert result.ids == [[names(count)[row] for row in rows] for rows in order]
    np.testing.assert_allclose(result.scores, np.take_along_axis(scores, order, axis=1), atol=1e-6)
    assert result.scores.dtype == np.float32


def test_k_is_cut_to_the_catalogue():
    index = ProductIndex.build(names(5), unit_vectors(5))
    result = index.search(unit_vectors(2, seed=1), 50)
    assert result.scores.shape == (2, 5)
    assert [sorted(ids) for ids in result.ids] == [names(5)] * 2


def test_no_queries_give_no_matches():
    index = ProductIndex.build(names(5), unit_vectors(5))
    result = index.search(np.zeros((0, WIDTH), np.float32), 3)
    assert result.ids == []
    assert result.scores.shape == (0, 3)


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_kind_finds_most_of_the_exact_matches(factory, catalogue, indexes):
    ids, vectors = catalogue
    # Queries near products, as those of a trained encoder are; random ones have no neighbours.
    queries = vectors[:200] + 0.5 * unit_vectors(200, seed=1)
    index = indexes(factory)
    assert (len(index), index.width, index.factory) == (3000, WIDTH, factory)
    least = {"Flat": 1.0, "HNSW32": 0.9, "IVF64,Flat": 0.4, "IVF64,PQ16": 0.35}[factory]
    recall = measure_recall(index, queries, 10, vectors=vectors)
    assert least <= recall <= 1.0

    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = index.search(queries, 10).ids
    hits = [
        len({ids[row] for row in rows} & set(row_ids))
        for rows, row_ids in zip(exact, found, strict=True)
    ]
    assert recall == pytest.approx(np.mean(hits) / 10)


def test_matches_that_an_approximate_index_lacks_are_not_made_up():
    ids, vectors = names(100), unit_vectors(100)
    index = ProductIndex.build(ids, vectors, factory="IVF16,Flat")  # looks into 2 of its 16 lists
    result = index.search(vectors, 100)
    for row, found in enumerate(result.ids):
        assert found[0] == ids[row]
        assert len(found) == len(set(found)) < 100
        assert np.isfinite(result.scores[row, : len(found)]).all()
        assert np.isneginf(result.scores[row, len(found) :]).all()


def test_threads_get_the_answers_of_one(indexes):
    index = indexes("IVF64,Flat")
    batches = [unit_vectors(8, seed=seed) for seed in range(16)]
    expected = [index.search(batch, 5).ids for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda batch: index.search(batch, 5).ids, batches)) == expected


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.ones((2, 7), np.float32), r"shape \(2, 7\); this index expects \(Q, 32\)"),
        (np.ones(WIDTH, np.float32), r"shape \(32,\)"),
        (np.full((3, WIDTH), np.nan, np.float32), "3 queries are zero, NaN.*row 0"),
        (np.eye(WIDTH, dtype=np.float32) * (np.arange(WIDTH) != 2), "1 queries are zero.*row 2"),
        (np.full((2, WIDTH), 3e38), "2 queries .*too large to score.*row 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_queries_are_refused(queries, message):
    index = ProductIndex.build(names(5), unit_vectors(5))
    with pytest.raises(UserError, match=message):
        index.search(queries, 3)


def test_k_below_one_is_refused():
    index = ProductIndex.build(names(5), unit_vectors(5))
    with pytest.raises(UserError, match="k is 0; expected at least 1"):
        index.search(unit_vectors(1), 0)


# --------------------------------------------------------------------------- vectors and attributes


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF64,Flat"])
def test_vectors_come_back_as_they_were(factory, catalogue, indexes):
    ids, vectors = catalogue
    index = indexes(factory)
    rows = [7, 2999, 0, 7]
    assert index.keeps_vectors
    for _ in range(2):
        np.testing.assert_array_equal(index.vectors([ids[row] for row in rows]), vectors[rows])


def test_compressed_vectors_come_back_approximately(catalogue, indexes):
    ids, vectors = catalogue
    index = indexes("IVF64,PQ16")
    assert not index.keeps_vectors
    back = index.vectors(ids[:100])
    cosines = np.einsum("nd,nd->n", back, vectors[:100]) / np.linalg.norm(back, axis=1)
    assert cosines.min() > 0.85
    with pytest.raises(UserError, match="hand measure_recall those that it was built from"):
        measure_recall(index, vectors[:5], 10)


def test_attributes_are_joined_by_id():
    ids = names(20)
    index = ProductIndex.build(ids, unit_vectors(20), attributes=table_of(ids))
    assert index.ids == ids
    for number in (0, 7, 19):
        assert index.attributes(ids[number]) == {
            "price": 1.5 * number,
            "title": f"Product {number}",
        }
    only_ids = table_of(ids).select(["product_id"])
    assert ProductIndex.build(ids, unit_vectors(20), attributes=only_ids).attributes(ids[3]) == {}
    assert ProductIndex.build(ids, unit_vectors(20)).attributes(ids[3]) == {}


def test_unknown_ids_are_named():
    index = ProductIndex.build(names(5), unit_vectors(5))
    with pytest.raises(UserError, match="not in this index of 5 products: 'x'"):
        index.attributes("x")
    with pytest.raises(UserError, match=r"'x', 'y'$"):
        index.vectors(["sku-00001", "x", "y"])


def test_bad_attributes_are_refused():
    ids, vectors = names(5), unit_vectors(5)
    table = table_of(ids)
    with pytest.raises(UserError, match="no column 'product_id'; found price, title"):
        ProductIndex.build(ids, vectors, attributes=table.drop_columns("product_id"))
    with pytest.raises(UserError, match=r"no row for 'sku-00003', 'sku-00004'$"):
        ProductIndex.build(ids, vectors, attributes=table_of(ids[:3]))
    with pytest.raises(UserError, match="more than one row for 'not indexed', 'sku-00004'"):
        ProductIndex.build(ids, vectors, attributes=pa.concat_tables([table, table]))
    with pytest.raises(UserError, match=r"'\\ud83d': holds half of a character"):
        ProductIndex.build([*ids[:-1], "\ud83d"], vectors)


# ----------------------------------------------------------------------------------------- building


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "NaN or infinity: 'sku-00002', 'sku-00004', 'sku-00005' and 1 more"),
        (np.inf, "NaN or infinity: 'sku-00002'"),
        (0.0, "length zero: 'sku-00002'"),
        (2.0, "not of unit length: 'sku-00002'"),
    ],
)
def test_bad_vectors_are_named(value, message):
    vectors = unit_vectors(10)
    vectors[[2, 4, 5, 9]] = value
    with pytest.raises(UserError, match=message):
        ProductIndex.build(names(10), vectors)


def test_half_precision_is_of_unit_length_still():
    vectors = unit_vectors(10)
    index = ProductIndex.build(names(10), vectors.astype(np.float16))
    assert [ids[0] for ids in index.search(vectors, 1).ids] == names(10)


@pytest.mark.parametrize("shape", [(9, WIDTH), (10,), (10, 0), (10, 2, 3)])
@pytest.mark.usefixtures("unchecked")
def test_vectors_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"expected \(10, D\)"):
        ProductIndex.build(names(10), np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 2], "1 is int"), (["a", None], "None is NoneType"), ("ab", "found the text 'ab'")],
)
def test_ids_that_are_not_text_are_refused(ids, message):
    with pytest.raises(UserError, match=message):
        check_ids(ids)


def test_duplicate_ids_are_named():
    with pytest.raises(UserError, match="more than once: 'b', 'a'"):
        ProductIndex.build(["b", "a", "b", "a", "c"], unit_vectors(5))


def test_an_empty_catalogue_is_refused():
    with pytest.raises(UserError, match="no products"):
        ProductIndex.build([], np.zeros((0, WIDTH), np.float32))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flot", "'Flot' is not a FAISS factory.*could not parse index string Flot"),
        ("", "'' is not a FAISS factory"),
        ("PQ15", "width 32 .*multiple of the number of subquantizers"),
        ("LSH", "'LSH' is not a FAISS factory for inner products"),
        ("HNSW8_PQ8x4", "another metric than inner product; try HNSW32"),
        *(
            (factory, f"'{factory}' makes an index that cannot be searched with filters")
            for factory in ("RQ4x4", "IVF8,RQ4x4", "LSQ4x4", "PRQ2x2x4", "NSG16", "IDMap,Flat")
        ),
        ("IVF64,Flat", r"cannot be built from 10 vectors .*training points \(10\)"),
        ("IVF4,PQ16", "cannot be built from 10 vectors"),
    ],
)
def test_bad_factories_are_refused(factory, message):
    with pytest.raises(UserError, match=message):
        ProductIndex.build(names(10), unit_vectors(10), factory=factory)


def test_recall_needs_queries():
    index = ProductIndex.build(names(5), unit_vectors(5))
    assert measure_recall(index, unit_vectors(3, seed=1), 2) == 1.0
    with pytest.raises(UserError, match="without queries"):
        measure_recall(index, np.zeros((0, WIDTH), np.float32), 2)


# ------------------------------------------------------------------------------------------ on disk


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_loaded_index_answers_as_the_one_saved(factory, catalogue, indexes, tmp_path):
    ids, _ = catalogue
    queries = unit_vectors(20, seed=1)
    built = indexes(factory)
    built.save(tmp_path / "index")
    loaded = ProductIndex.load(tmp_path / "index", device="cpu", verify=True)
    assert (len(loaded), loaded.width, loaded.factory) == (3000, WIDTH, factory)
    assert loaded.ids == ids
    assert loaded.device == "cpu"
    assert loaded.keeps_vectors == built.keeps_vectors
    before, after = built.search(queries, 10), loaded.search(queries, 10)
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(loaded.vectors(ids[:9]), built.vectors(ids[:9]))
    assert loaded.attributes(ids[9]) == {"price": 13.5, "title": "Product 9"}


def test_the_folder_and_its_manifest(tmp_path):
    parent = Parent(kind="embeddings", fingerprint="0123456789abcdef", path="../embeddings")
    index = ProductIndex.build(names(20), unit_vectors(20))
    assert index.manifest is None
    manifest = index.save(
        tmp_path / "index",
        parents=[parent],
        config={"factory": "Flat"},
        counts={"in": 21, "out": 20, "dropped": {"no image": 1}},
        details={"recall": {"R@10": 1.0}},
    )
    assert index.manifest == manifest == read_manifest(tmp_path / "index", "index")
    assert ProductIndex.load(tmp_path / "index").manifest == manifest
    assert manifest.parents == [parent]
    assert manifest.details == {"factory": "Flat", "width": WIDTH, "recall": {"R@10": 1.0}}
    assert manifest.counts["dropped"] == {"no image": 1}
    files = [path for path in (tmp_path / "index").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "index")) for path in files) == [
        "CURRENT",
        "generations/000001/base.faiss",
        "generations/000001/generation.json",
        "generations/000001/keys.npy",
        "generations/000001/manifest.json",
        "generations/000001/products.arrow",
        "generations/000001/seal.json",
        "manifest.json",
    ]
    assert (tmp_path / "index" / "CURRENT").read_text() == "000001\n"


def test_the_fingerprint_is_of_content(tmp_path):
    def fingerprint(name: str, ids: list[str], vectors: np.ndarray) -> str:
        return ProductIndex.build(ids, vectors).save(tmp_path / name).fingerprint

    first = fingerprint("a", names(20), unit_vectors(20))
    assert fingerprint("b", names(20), unit_vectors(20)) == first
    assert fingerprint("c", names(20), unit_vectors(20, seed=1)) != first
    assert fingerprint("d", names(20)[::-1], unit_vectors(20)) != first


def test_reading_vectors_changes_no_fingerprint(indexes, tmp_path):
    index = indexes("IVF64,Flat")
    before = index.save(tmp_path / "before").fingerprint
    index.vectors(index.ids[:3])
    assert index.save(tmp_path / "after").fingerprint == before


def test_an_index_whose_folder_is_gone_is_saved_elsewhere(tmp_path):
    index = ProductIndex.build(names(20), unit_vectors(20))
    before = index.save(tmp_path / "index").fingerprint
    shutil.rmtree(tmp_path / "index")
    assert index.save(tmp_path / "other").fingerprint == before
    assert index.save(tmp_path / "index").fingerprint == before


def test_an_index_is_overwritten_only_on_request(saved):
    index = ProductIndex.build(names(3), unit_vectors(3))
    with pytest.raises(UserError, match="already exists"):
        index.save(saved)
    assert len(ProductIndex.load(saved)) == 20
    index.save(saved, overwrite=True)
    assert len(ProductIndex.load(saved)) == 3


@pytest.mark.parametrize("name", ["base.faiss", "products.arrow", "keys.npy"])
def test_damaged_files_are_named(name, saved):
    path = generation_of(saved) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match=f"{name}: is {len(whole) - 50} bytes long"):
        ProductIndex.load(saved)
    for place in (0, len(whole) // 2, -1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{name}: is not the file that was saved"):
            ProductIndex.load(saved)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        ProductIndex.load(saved)


@pytest.mark.parametrize("name", ["base.faiss", "products.arrow", "keys.npy", "manifest.json"])
def test_files_of_an_index_of_equal_size_are_named(name, saved, tmp_path):
    ids = names(20)[::-1]
    other = ProductIndex.build(ids, unit_vectors(20, seed=7), attributes=table_of(ids))
    other.save(tmp_path / "other")
    shutil.copy(generation_of(tmp_path / "other") / name, generation_of(saved) / name)
    with pytest.raises(UserError, match=f"{name}: is not the file that was saved"):
        ProductIndex.load(saved)


def test_blocks_of_a_large_file_are_compared_at_every_opening(saved, monkeypatch):
    """Its ends, and others between them; what lies elsewhere is found by `verify`."""
    monkeypatch.setattr(generations, "_BLOCK", 64)
    monkeypatch.setattr(generations, "_BLOCKS", 4)
    ProductIndex.build(names(20), unit_vectors(20)).save(saved, overwrite=True)
    path = saved / "generations/000002/base.faiss"
    whole = path.read_bytes()
    for place, at_once in ((0, True), (-1, True), ((len(whole) - 64) // 3, True), (100, False)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        if not at_once:
            ProductIndex.load(saved)
        with pytest.raises(UserError, match=r"base\.faiss: is not the file that was saved"):
            ProductIndex.load(saved, verify=not at_once)


@pytest.mark.parametrize("name", ["generation.json", "manifest.json"])
def test_an_edited_record_or_manifest_is_named(name, saved):
    for path in (saved / "manifest.json", generation_of(saved) / name):
        whole = path.read_text()
        path.write_text(whole.replace("20", "21"))
        with pytest.raises(UserError, match=f"{path.name}: is not "):
            ProductIndex.load(saved, verify=True)
        path.write_text(whole)
    ProductIndex.load(saved, verify=True)
    (generation_of(saved) / "seal.json").unlink()
    ProductIndex.load(saved)
    with pytest.raises(UserError, match=r"seal\.json: no such file"):
        ProductIndex.load(saved, verify=True)


def replace_base(folder: Path, base) -> None:
    """Put another FAISS index in, with a record that agrees, as an earlier version wrote it."""
    path = generation_of(folder) / "base.faiss"
    faiss.write_index(base, str(path))
    record_path = generation_of(folder) / "generation.json"
    record = json.loads(record_path.read_text())
    record["files"]["base.faiss"] = {"bytes": path.stat().st_size, "sha256": "unknown"}
    record_path.write_text(json.dumps(record))
    (generation_of(folder) / "seal.json").unlink(missing_ok=True)


def test_a_foreign_index_is_refused(saved):
    base = faiss.IndexFlatIP(WIDTH)
    base.add(unit_vectors(19))
    replace_base(saved, base)
    with pytest.raises(
        UserError, match=r"20 vectors of width 32, but base\.faiss holds 19 of width 32"
    ):
        ProductIndex.load(saved)
    base = faiss.IndexFlatL2(WIDTH)
    base.add(unit_vectors(20))
    replace_base(saved, base)
    with pytest.raises(UserError, match=r"base\.faiss: .*another metric"):
        ProductIndex.load(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "CURRENT").unlink(), "CURRENT: no such file"),
        (lambda folder: (folder / "CURRENT").write_text("000002"), "names generation '000002'"),
        (lambda folder: (folder / "CURRENT").write_text("../x"), "names generation '../x'"),
        (lambda folder: (folder / "CURRENT").write_text(""), "names generation ''"),
        (
            lambda folder: (generation_of(folder) / "generation.json").unlink(),
            r"generation\.json: no such file",
        ),
        (
            lambda folder: (generation_of(folder) / "generation.json").write_text("{"),
            r"generation\.json: not a record.*mmrec index build --overwrite",
        ),
        (
            lambda folder: (generation_of(folder) / "generation.json").write_text("[1]"),
            r"generation\.json: not a record",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_damaged_folders_are_refused(damage, message, saved):
    damage(saved)
    with pytest.raises(UserError, match=message):
        ProductIndex.load(saved)


def test_a_folder_of_another_kind_is_refused(saved, tmp_path):
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**manifest, "kind": "embeddings"}))
    with pytest.raises(UserError, match="expected index, found embeddings"):
        ProductIndex.load(saved)
    with pytest.raises(UserError, match="no such folder"):
        ProductIndex.load(tmp_path / "nothing here")


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.skipif(faiss.get_num_gpus() > 0, reason="needs a machine without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(saved):
    assert ProductIndex.load(saved, device="auto").device == "cpu"
    with pytest.raises(UserError, match="FAISS finds no GPU"):
        ProductIndex.load(saved, device="cuda")


@pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU")
@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat"])
def test_a_gpu_copy_answers_as_the_cpu(factory, catalogue, indexes, tmp_path):
    ids, vectors = catalogue
    queries = unit_vectors(64, seed=1)
    indexes(factory).save(tmp_path / "index")
    cpu = ProductIndex.load(tmp_path / "index", device="cpu")
    gpu = ProductIndex.load(tmp_path / "index", device="cuda")
    assert gpu.device == "cuda"
    expected, found = cpu.search(queries, 10), gpu.search(queries, 10)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    same = [len(set(a) & set(b)) for a, b in zip(expected.ids, found.ids, strict=True)]
    assert np.mean(same) >= 9.9  # rounding may swap near ties at the tenth place
    np.testing.assert_array_equal(gpu.vectors(ids[:9]), vectors[:9])


def test_what_cannot_be_opened_never_goes_live(tmp_path, monkeypatch):
    ProductIndex.build(names(10), unit_vectors(10)).save(tmp_path / "index")
    before = {p: p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file()}
    other = faiss.IndexFlatL2(WIDTH)
    other.add(unit_vectors(9))  # pyright: ignore[reportCallIssue]
    made = (other, "Flat", {})
    index = ProductIndex.assemble(names(9), unit_vectors(9), lambda indexed: made)
    with pytest.raises(UserError, match="another metric than inner product"):
        index.save(tmp_path / "index", overwrite=True)
    index.close()
    after = {p: p.read_bytes() for p in (tmp_path / "index").rglob("*") if p.is_file()}
    after.pop(tmp_path / "index/writer.lock")
    assert after.items() <= before.items() | {(tmp_path / "index/writer.lock", b"")}
    assert len(ProductIndex.load(tmp_path / "index", verify=True, device="cpu")) == 10


def test_saving_clears_away_what_gives_vectors_back_while_nobody_asks(tmp_path, monkeypatch):
    index = ProductIndex.build(names(500), unit_vectors(500), factory="IVF16,Flat")
    lock, held = index._view.base.lock, []
    write = base.write_base
    monkeypatch.setattr(base, "write_base", lambda *g: held.append(lock.locked()) or write(*g))
    index.save(tmp_path / "index")
    assert held == [True]


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ16x4fs,RFlat"])
def test_vectors_are_given_back_before_and_after_a_compaction_in_memory(factory):
    ids, vectors = names(500), unit_vectors(500)
    index = ProductIndex.build(ids, vectors, factory=factory)
    before = index.vectors(ids[100:])
    index.delete(ids[:7])
    index.upsert(["new"], unit_vectors(1, seed=5))
    assert index.compact()
    np.testing.assert_array_equal(index.vectors(ids[100:]), before)
