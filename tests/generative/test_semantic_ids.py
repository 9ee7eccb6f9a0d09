"""Semantic IDs: unique, reproducible, never changed, and honest about how good they are."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmrec.errors import UserError
from mmrec.generative.ids_report import describe_ids, draw_report, format_report, relative_error
from mmrec.generative.quantize import balanced_assignment, residual_kmeans
from mmrec.generative.semantic_ids import (
    SemanticIdConfig,
    SemanticIds,
    build_ids,
    cell_numbers,
)

SMALL = SemanticIdConfig(levels=3, codebook_size=8)


def clusters(number: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Unit vectors around six directions, and the direction of each."""
    generator = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((6, 16))
    kinds = generator.integers(6, size=number)
    vectors = centers[kinds] + 0.3 * generator.standard_normal((number, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), [f"kind {kind}" for kind in kinds]


def names(number: int, prefix: str = "p") -> list[str]:
    return [f"{prefix}{row}" for row in range(number)]


def nearest_codes(ids: SemanticIds, vectors: np.ndarray) -> np.ndarray:
    """Codes by the definition, one vector and one level at a time."""
    found = []
    for vector in vectors.astype(np.float64):
        residual, codes = vector.copy(), []
        for centroids in ids.codebook.centroids.astype(np.float64):
            codes.append(int(np.argmin(((centroids - residual) ** 2).sum(1))))
            residual -= centroids[codes[-1]]
        found.append(codes)
    return np.array(found)


def test_codes_are_the_nearest_residuals_and_ids_are_distinct() -> None:
    vectors, _ = clusters(300)
    ids = build_ids(names(300), vectors, SMALL)
    assert np.array_equal(ids.codes[:, :-1], nearest_codes(ids, vectors))
    assert len(np.unique(ids.codes, axis=0)) == 300
    assert (ids.codes < np.array(ids.sizes)).all()
    # Appended codes of a cell count up from 0, in the order of the products.
    cells: dict[tuple[int, ...], int] = {}
    for *prefix, last in ids.codes.tolist():
        assert last == cells.get(tuple(prefix), 0)
        cells[tuple(prefix)] = last + 1


def test_the_same_embeddings_give_the_same_ids() -> None:
    vectors, _ = clusters(200)
    one, two = (build_ids(names(200), vectors, SMALL) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    other = build_ids(names(200), vectors, SemanticIdConfig(levels=3, codebook_size=8, seed=1))
    assert other.fingerprint != one.fingerprint


def test_each_level_lessens_the_error() -> None:
    vectors, _ = clusters(300)
    codebook, codes = residual_kmeans(vectors, levels=3, size=8)
    errors = [relative_error(codebook, vectors, codes, levels) for levels in (1, 2, 3)]
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    told = sum(codebook.centroids[level][codes[:, level]] for level in range(3))
    expected = ((vectors - told) ** 2).sum() / ((vectors - vectors.mean(0)) ** 2).sum()
    assert errors[2] == pytest.approx(expected, rel=1e-5)


def test_balanced_cells_hold_no_more_than_their_share() -> None:
    vectors, _ = clusters(203)
    plain, balanced = (
        build_ids(names(203), vectors, SemanticIdConfig(levels=2, codebook_size=8, balanced=on))
        for on in (False, True)
    )
    for level in range(2):
        most = np.bincount(balanced.codes[:, level], minlength=8).max()
        assert most <= 26 < np.bincount(plain.codes[:, level], minlength=8).max()
    assert len(np.unique(balanced.codes, axis=0)) == 203


def test_balanced_assignment_takes_the_nearest_first() -> None:
    rows = np.array([[0.0], [0.2], [0.3], [5.0]], np.float32)
    own = balanced_assignment(rows, np.array([[0.0], [4.0]], np.float32), room=2)
    assert own.tolist() == [0, 0, 1, 1]


def test_new_products_change_no_old_id() -> None:
    vectors, kinds = clusters(250)
    ids = build_ids(names(200), vectors[:200], SMALL, categories=kinds[:200])
    more = ids.extended(names(250), vectors, kinds)
    assert np.array_equal(more.codes[:200], ids.codes)
    assert more.product_ids[:200] == ids.product_ids
    assert len(np.unique(more.codes, axis=0)) == len(more) == 250
    assert np.array_equal(more.codes[200:, :-1], nearest_codes(ids, vectors[200:]))
    assert more.root == ids.fingerprint != more.fingerprint
    again = more.extended(["q"], vectors[:1])
    assert again.root == ids.fingerprint
    assert again.codes[-1, :-1].tolist() == ids.codes[0, :-1].tolist()


def test_a_full_cell_sends_its_late_comers_to_the_next() -> None:
    vectors, _ = clusters(100)
    equal = np.repeat(vectors[:1], 20, axis=0)
    config = SemanticIdConfig(levels=2, codebook_size=4, appended=30)
    ids = build_ids(names(100), vectors, config)
    small = SemanticIds(codebook=ids.codebook, product_ids=[], codes=ids.codes[:0], appended=8)
    full = small.extended(names(20), equal)
    assert len(np.unique(full.codes, axis=0)) == 20
    assert full.codes[:, -1].max() == 7
    assert len(np.unique(full.codes[:, 0])) == 1
    assert np.bincount(np.unique(full.codes[:, 1], return_inverse=True)[1]).tolist().count(8) == 2
    more = full.extended(names(8, "q"), equal[:8])
    assert len(np.unique(more.codes, axis=0)) == 28
    with pytest.raises(UserError, match="no ID is left under codes"):
        more.extended(names(5, "r"), equal[:5])


def test_contents_share_the_codebook() -> None:
    vectors, _ = clusters(200)
    contents, _ = clusters(40, seed=5)
    ids = build_ids(
        names(200), vectors, SMALL, content_ids=names(40, "c"), content_vectors=contents
    )
    assert ids.content_codes is not None
    assert np.array_equal(ids.content_codes, nearest_codes(ids, contents))
    report = describe_ids(ids, vectors)
    shared = np.isin(ids.content_codes[:, 0], ids.codes[:, 0]).mean()
    assert report["content_products_of_codes"][0] == pytest.approx(shared)


def test_a_folder_gives_the_ids_back(tmp_path: Path) -> None:
    vectors, kinds = clusters(120)
    ids = build_ids(
        names(120), vectors, SMALL, content_ids=["c"], content_vectors=vectors[:1], categories=kinds
    )
    ids.save(tmp_path / "ids")
    loaded = SemanticIds.load(tmp_path / "ids")
    assert loaded.fingerprint == loaded.root == ids.fingerprint
    assert loaded.categories == kinds
    assert loaded.config == SMALL
    assert loaded.known(["p3", "unknown", "p1"]) == ([3, 1], 1)
    loaded.extended(["new"], vectors[:1]).save(tmp_path / "more")
    assert SemanticIds.load(tmp_path / "more").root == ids.fingerprint
    manifest = json.loads((tmp_path / "ids/manifest.json").read_text())
    table = (tmp_path / "more/products.parquet").read_bytes()
    (tmp_path / "ids/products.parquet").write_bytes(table)
    with pytest.raises(UserError, match=f"not {manifest['fingerprint']}"):
        SemanticIds.load(tmp_path / "ids")
    (tmp_path / "ids/products.parquet").write_bytes(table[:100])
    with pytest.raises(UserError, match="cannot be read"):
        SemanticIds.load(tmp_path / "ids")


def test_the_report_agrees_with_counting(tmp_path: Path) -> None:
    vectors, kinds = clusters(90)
    ids = build_ids(names(90), vectors, SMALL, categories=kinds)
    report = describe_ids(ids, vectors)
    codes = [tuple(row) for row in ids.codes[:, :-1].tolist()]
    crowd = [code for code in codes if codes.count(code) > 1]
    assert report["collisions"]["products"] == len(crowd)
    assert report["cells"] == len(set(codes))
    for depth, level in enumerate(report["levels"], 1):
        column = [code[depth - 1] for code in codes]
        shares = [column.count(code) / 90 for code in set(column)]
        assert level["entropy_bits"] == pytest.approx(-sum(s * np.log2(s) for s in shares))
        assert level["used"] == pytest.approx(len(set(column)) / 8)
        heads = {code[: depth - 1] for code in codes}
        assert level["fan_out"] == pytest.approx(len({c[:depth] for c in codes}) / len(heads))
        chances = []
        for row in range(90):
            mates = [o for o in range(90) if o != row and codes[o][:depth] == codes[row][:depth]]
            if mates:
                chances.append(np.mean([kinds[o] == kinds[row] for o in mates]))
        assert level["same_category"] == pytest.approx(np.mean(chances))
    assert report["levels"][0]["same_category"] > 2 * report["same_category_by_chance"]
    assert "same category" in format_report(report)
    draw_report(ids, report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_rq_vae_gives_a_plain_codebook(tmp_path: Path) -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="pip install 'mmrec[generative]'")
    vectors, _ = clusters(400)
    config = SemanticIdConfig(levels=2, codebook_size=8, method="rq-vae", latent=8, steps=150)
    ids = build_ids(names(400), vectors, config)
    errors = [relative_error(ids.codebook, vectors, ids.codes[:, :-1], n) for n in (1, 2)]
    assert 0.5 > errors[0] > errors[1]
    ids.save(tmp_path / "ids")
    loaded = SemanticIds.load(tmp_path / "ids")
    assert np.array_equal(loaded.codebook.assign(vectors), ids.codes[:, :-1])


def test_vectors_that_are_not_numbers_or_not_as_many_are_refused() -> None:
    vectors, _ = clusters(20)
    bad = vectors.copy()
    bad[3, 5], bad[7, 0] = np.nan, np.inf
    ids = build_ids(names(20), vectors, SMALL)
    with pytest.raises(UserError, match="vectors with NaN or infinity: 'p3', 'p7'"):
        build_ids(names(20), bad, SMALL)
    with pytest.raises(UserError, match="vectors with NaN or infinity: 'c3', 'c7'"):
        build_ids(names(20), vectors, SMALL, content_ids=names(20, "c"), content_vectors=bad)
    with pytest.raises(UserError, match="vectors with NaN or infinity: 'q3', 'q7'"):
        ids.extended(names(20, "q"), bad)
    with pytest.raises(UserError, match="21 ids and 20 vectors"):
        build_ids(names(21), vectors, SMALL)
    with pytest.raises(UserError, match="2 ids and 1 vectors"):
        ids.extended(["q", "r"], vectors[:1])


def test_no_new_products_leave_the_ids_as_they_are() -> None:
    vectors, _ = clusters(20)
    ids = build_ids(names(20), vectors, SMALL)
    for same in (ids.extended([], vectors[:0]), ids.extended(names(20), vectors)):
        assert same.fingerprint == ids.fingerprint
        assert same.categories is None


def test_what_cannot_work_is_refused_in_one_line() -> None:
    vectors, _ = clusters(20)
    with pytest.raises(UserError, match="20 embeddings are too few for a codebook of 64"):
        build_ids(names(20), vectors, SemanticIdConfig(codebook_size=64))
    with pytest.raises(UserError, match="occur more than once: 'p0'"):
        build_ids(["p0"] * 20, vectors, SMALL)
    with pytest.raises(UserError, match="of another encoder"):
        build_ids(names(20), vectors, SMALL).extended(["q"], vectors[:1, :8])
    with pytest.raises(UserError, match="2 embeddings are too few for a codebook of 8"):
        build_ids(
            names(2), vectors[:2], SMALL, content_ids=names(18, "c"), content_vectors=vectors[2:]
        )
    with pytest.raises(UserError, match="8 levels of 256 codes are more cells"):
        # Cells come before k-means, for which these products are too few.
        build_ids(names(20), vectors, SemanticIdConfig(levels=8, codebook_size=256))
    with pytest.raises(UserError, match="more cells than can be numbered"):
        cell_numbers(np.zeros((1, 8), np.int32), 65_536)
