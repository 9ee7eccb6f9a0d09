"""The program that cuts IDs: from embeddings, from tables, and added to."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_program
from small_embeddings import write_embeddings

from mmrec.errors import UserError
from mmrec.generative.semantic_ids import SemanticIdConfig, SemanticIds
from mmrec.manifest import Manifest, new_folder, write_manifest

SMALL = SemanticIdConfig(levels=2, codebook_size=4)


def cut(out: Path, **settings: object) -> Path:
    program = load_program("train/semantic_ids.py")
    return program.main(program.SemanticIdsProgram(out=out, **{"ids": SMALL, **settings}))


def unit_vectors(number: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((number, 8))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_ids_of_embeddings_know_their_encoder(tmp_path: Path) -> None:
    names = [f"p{row}" for row in range(30)]
    kinds = [f"kind {row % 3}" for row in range(30)]
    products = write_embeddings(tmp_path / "products", names, unit_vectors(30), categories=kinds)
    contents = write_embeddings(
        tmp_path / "contents", ["c0", "c1"], unit_vectors(2, 1), product_ids=[["p0"], ["p1"]]
    )
    out = cut(tmp_path / "ids", embeddings=products, contents=(contents,))
    ids = SemanticIds.load(out)
    assert ids.manifest is not None
    assert ids.manifest.encoder == "encoder"
    assert [parent.kind for parent in ids.manifest.parents] == [
        "embeddings",
        "encoder",
        "embeddings",
    ]
    assert ids.categories == kinds
    assert ids.content_ids == ["c0", "c1"]
    report = json.loads((out / "report.json").read_text())
    assert report["products"] == 30
    assert 0 <= report["content_products_of_codes"][0] <= 1
    assert (out / "report.png").exists()

    more = write_embeddings(tmp_path / "products2", [*names, "new"], unit_vectors(31, 2))
    extended = SemanticIds.load(cut(tmp_path / "more", embeddings=more, extend=out))
    assert extended.codes[:30].tolist() == ids.codes.tolist()
    assert extended.product_ids[30:] == ["new"]
    assert extended.root == ids.fingerprint


def test_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    names = [f"p{row}" for row in range(30)]
    products = write_embeddings(tmp_path / "products", names, unit_vectors(30))
    others = write_embeddings(
        tmp_path / "others", ["c"], unit_vectors(1), encoder="other", product_ids=[["p0"]]
    )
    with pytest.raises(UserError, match="embedded by another encoder"):
        cut(tmp_path / "wrong", embeddings=products, contents=(others,))
    ids = cut(tmp_path / "ids", embeddings=products)
    with pytest.raises(UserError, match="of encoder encoder, and these are of other"):
        cut(tmp_path / "wrong", embeddings=others, extend=ids)


def test_ids_of_tables_see_no_held_out_product(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="pip install 'mmrec[generative]'")

    def tables(name: str, last: str) -> Path:
        with new_folder(tmp_path / name, kind="tables") as folder:
            titles = [f"{'red' if n % 2 else 'blue'} thing {n % 3}" for n in range(9)]
            products = {"product_id": [str(n) for n in range(9)], "title": titles}
            pq.write_table(pa.table(products), folder / "products.parquet")
            sessions = [[str((start + n) % 9) for n in range(4)] + [last] for start in range(9)]
            table = pa.table({"user_id": [str(n) for n in range(9)], "item_ids": sessions})
            pq.write_table(table, folder / "sessions.parquet")
            write_manifest(folder, Manifest(kind="tables", config={}, counts={}, fingerprint=name))
        return tmp_path / name

    ids = [
        SemanticIds.load(cut(tmp_path / f"ids{last}", tables=tables(last, last), width=4))
        for last in ("0", "5")
    ]
    assert ids[0].fingerprint == ids[1].fingerprint
    whole = cut(tmp_path / "all", tables=tmp_path / "5", by=None, width=4)
    assert SemanticIds.load(whole).fingerprint != ids[1].fingerprint
    with pytest.raises(UserError, match="give --embeddings FOLDER, or --tables"):
        cut(tmp_path / "none")
