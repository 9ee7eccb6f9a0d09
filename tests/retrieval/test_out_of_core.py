"""Indexes built from parts: the same files as a build in memory gives, in little memory, faults refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_embeddings import write_foreign
from vectors import names, unit_vectors

from mmrec import ProductIndex
from mmrec.errors import UserError
from mmrec.retrieval import out_of_core
from mmrec.retrieval.matcher import build_index
from mmrec.retrieval.out_of_core import build_from_parts
from mmrec.retrieval.parts import open_parts

ROWS, WIDTH = 3_000, 32
FACTORIES = [
    "Flat",
    "SQfp16",
    "IVF16,Flat",
    "IVF16,PQ8x4",
    "IVF16,SQ8",
    "IVF16,RaBitQ",
    "PCA16,IVF16,PQ8x4",
    "IVF16,PQ8x4,RFlat",
    "IVF16,PQ16x4fs,Refine(SQfp16)",
    "HNSW16",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of unequal length, float32, with a price for each row."""
    out = tmp_path_factory.mktemp("parts") / "embeddings"
    return write_foreign(out, names(ROWS), unit_vectors(ROWS, width=WIDTH), [1700, 300, 1000])


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches that no part is a multiple of; all rows are trained on, as they are in memory."""
    monkeypatch.setattr(out_of_core, "_stretch", lambda memory_bytes, width: 701)
    monkeypatch.setattr(out_of_core, "_sample_size", lambda index, count, memory_bytes: count)


def files_of(index: Path) -> dict[str, str]:
    """The hash of each file of the live generation, by name."""
    generation = index / "generations" / (index / "CURRENT").read_text().strip()
    files = json.loads((generation / "generation.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items()}


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_files_are_those_of_a_build_in_memory(
    folder: Path, factory: str, tmp_path: Path
) -> None:
    for name, memory_gb in (("memory", 1.0), ("parts", 1e-9)):
        index = build_index(
            *(folder, tmp_path / name),
            factory=factory,
            ids="sku",
            memory_gb=memory_gb,
        )
        assert len(index) == ROWS
        assert index.attributes("sku-00042") == {"caption": "caption 42", "price": 42}
    one, two = (files_of(tmp_path / name) for name in ("memory", "parts"))
    if factory.startswith("HNSW"):
        # A graph depends on how many vectors are added at once.
        assert one.pop("base.faiss") != two.pop("base.faiss")
        queries = unit_vectors(20, seed=5, width=WIDTH)
        both = [ProductIndex.load(tmp_path / name, device="cpu") for name in ("memory", "parts")]
        found = [index.search(queries, 10).ids for index in both]
        shared = [len(set(a) & set(b)) for a, b in zip(*found, strict=True)]
        assert np.mean(shared) > 9
    assert one == two


def test_narrow_vectors_with_the_whole_ones_beside_them(folder: Path, tmp_path: Path) -> None:
    for name, memory_gb in (("memory", 1.0), ("parts", 1e-9)):
        build_index(
            *(folder, tmp_path / name),
            factory="IVF8,Flat",
            width=8,
            rerank=True,
            ids="sku",
            memory_gb=memory_gb,
        )
    one, two = (files_of(tmp_path / name) for name in ("memory", "parts"))
    assert len(one) == 4
    assert one == two


def test_the_quantization_error_is_that_of_vectors_not_trained_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_core, "_sample_size", lambda *_: 400)
    index = build_index(folder, tmp_path / "index", ids="sku", factory="PQ16", memory_gb=1e-9)
    with index:
        index.upsert([f"new-{n}" for n in range(500)], unit_vectors(500, seed=7, width=WIDTH))
        status = index.status()
    assert status.upserted_error
    assert status.quantization_error == pytest.approx(status.upserted_error, rel=0.15)
    assert not any("rebuild" in line for line in status.advice)


def test_it_is_published_over_an_older_one_and_can_be_changed(folder: Path, tmp_path: Path) -> None:
    old = build_index(folder, tmp_path / "index", ids="sku")
    built = build_index(
        *(folder, tmp_path / "index"),
        ids="sku",
        memory_gb=1e-9,
        factory="IVF8,Flat",
        overwrite=True,
    )
    assert old.factory == "Flat"
    assert built.factory == "IVF8,Flat"
    assert built.manifest
    assert built.manifest.parent("embeddings").fingerprint == (
        old.manifest.parent("embeddings").fingerprint
    )
    with built:
        built.delete(["sku-00000"])
        built.compact()
    assert len(ProductIndex.load(tmp_path / "index", device="cpu", verify=True)) == ROWS - 1
    with pytest.raises(UserError, match="already exists"):
        build_index(folder, tmp_path / "index", ids="sku", memory_gb=1e-9)


@pytest.mark.parametrize("memory_gb", [1.0, 1e-9])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", r"img_emb_1\.npy: vectors with NaN or infinity: 'sku-01705'"),
        ("zero", r"img_emb_1\.npy: vectors of length zero: 'sku-01705'"),
        ("long", r"img_emb_1\.npy: vectors that are not of unit length: 'sku-01705'"),
        ("twice", r"ids that occur more than once: 'sku-00003'"),
        ("width", r"img_emb_1\.npy: is 16 wide, and img_emb_0\.npy 32"),
        ("rows", r"img_emb_1\.npy: 299 vectors, and metadata for 300"),
        ("cut", r"img_emb_1\.npy: is \d+ bytes long, and its header asks for"),
        ("type", r"img_emb_1\.npy: expected float16 or float32 .*found float64"),
        ("missing", r"img_emb has 3 \.npy files and metadata 2"),
        ("null", r"metadata_1\.parquet: row 5 has no sku"),
    ],
)
def test_faults_are_refused_before_anything_is_published(
    tmp_path: Path, fault: str, message: str, memory_gb: float
) -> None:
    folder = write_foreign(
        tmp_path / "embeddings", names(ROWS), unit_vectors(ROWS, width=WIDTH), [1700, 300, 1000]
    )
    spoil(folder, fault)
    with pytest.raises(UserError, match=message):
        build_index(folder, tmp_path / "index", ids="sku", memory_gb=memory_gb)
    assert not (tmp_path / "index").exists()


def spoil(folder: Path, fault: str) -> None:
    """Put a fault into row 5 of part 1."""
    path, table = folder / "img_emb/img_emb_1.npy", folder / "metadata/metadata_1.parquet"
    vectors, rows = np.load(path), pq.read_table(table).to_pylist()
    if fault == "missing":
        return table.unlink()
    if fault == "cut":
        return path.write_bytes(path.read_bytes()[:-7]) and None
    if fault in ("twice", "null"):
        rows[5]["sku"] = "sku-00003" if fault == "twice" else None
    elif fault in ("width", "rows", "type"):
        changed = {"width": vectors[:, :16], "rows": vectors[1:], "type": vectors.astype("f8")}
        vectors = np.ascontiguousarray(changed[fault])
    else:
        vectors[5] *= {"nan": np.nan, "zero": 0, "long": 1.1}[fault]
    np.save(path, vectors)
    pq.write_table(pa.Table.from_pylist(rows), table)
    return None


def test_two_ids_of_one_hash_are_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.array([7, 7, 5], np.uint64)
    ids = pa.chunked_array([["a", "b", "c"]])
    out_of_core._check_distinct(out_of_core.order_hashes(hashes), ids)
    with pytest.raises(UserError, match="more than once: 'a'"):
        out_of_core._check_distinct(
            out_of_core.order_hashes(hashes), pa.chunked_array([["a", "a", "c"]])
        )


MEASURE = """
import re, sys
from pathlib import Path
from mmrec.retrieval.out_of_core import build_from_parts
from mmrec.retrieval.parts import open_parts
# Not ru_maxrss, which begins with what the process that started this one had.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder, out, factory, memory = sys.argv[1:]
parts = open_parts(folder, ids="sku")
before = peak()
build_from_parts(parts, Path(out), factory=factory, memory_bytes=int(memory) << 20, rerank=True)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat"])
def test_a_build_takes_less_memory_than_the_vectors(factory: str, tmp_path: Path) -> None:
    rows, width = 200_000, 512  # 410 MB as float32
    vectors = unit_vectors(4_000, width=width)
    folder = write_foreign(
        tmp_path / "embeddings", names(rows), np.tile(vectors, (50, 1)), [rows // 4] * 4
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "index", factory, "40"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Half of what the vectors alone would take, with ids, captions, and what libraries take at first use.
    assert int(done.stdout) < 200e6
    index = ProductIndex.load(tmp_path / "index", device="cpu")
    assert len(index) == rows


def test_the_manifest_of_parts_in_memory_and_out_of_core_agree(
    folder: Path, tmp_path: Path
) -> None:
    parts = open_parts(folder, ids="sku")
    manifest = build_from_parts(parts, tmp_path / "a", factory="Flat", memory_bytes=1)
    build_index(folder, tmp_path / "b", ids="sku")
    loaded = ProductIndex.load(tmp_path / "b", device="cpu").manifest
    assert loaded
    assert replace(manifest, parents=[], config={}, details={}, counts={}) == replace(
        loaded, parents=[], config={}, details={}, counts={}
    )
