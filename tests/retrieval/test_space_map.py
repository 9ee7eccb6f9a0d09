"""The map of the space: PCA against numpy, samples of shards, the gap between two kinds, and the page."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_towers import small_encoder
from vectors import unit_vectors

from mmrec.data.shards import open_shards
from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.retrieval.embed import embed_views
from mmrec.retrieval.space_map import (
    Points,
    map_of,
    modality_gap,
    points_of,
    principal_components,
)


def group(name: str, vectors: np.ndarray, title: str | None = None) -> Points:
    ids = [f"{name}{row}" for row in range(len(vectors))]
    return Points(
        name=name,
        ids=ids,
        titles=[title] * len(ids),
        vectors=vectors,
        pictures=[b"\xff\xd8\xff"] + [None] * (len(ids) - 1),
    )


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return small_encoder(tmp_path).eval()


def test_principal_components_are_those_of_the_covariance() -> None:
    vectors = unit_vectors(50, width=8)
    places, explained = principal_components(vectors)
    values, directions = np.linalg.eigh(np.cov(vectors.T.astype(np.float64)))
    right = (vectors - vectors.mean(0)) @ directions[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(places), np.abs(right), atol=1e-5)
    assert explained == pytest.approx(values[-2:].sum() / values.sum())
    np.testing.assert_allclose(places, principal_components(vectors[:, ::-1])[0], atol=1e-5)
    same, whole = principal_components(np.ones((4, 8), np.float32))
    assert not same.any()
    assert whole == 1.0


def test_points_are_a_sample_with_the_vectors_of_the_flow(
    encoder: Encoder, tiny_shards: Path
) -> None:
    catalog = open_shards(tiny_shards, "products", "catalog")
    views = embed_views(encoder, catalog)
    products = points_of(encoder, tiny_shards, "catalog", most=7)
    ids = [own[0] for own in catalog.product_ids]
    rows = [ids.index(id_) for id_ in products.ids]
    assert len(set(rows)) == len(products) == 7
    np.testing.assert_allclose(products.vectors, views["product"][rows], atol=1e-5)
    assert products.titles == [catalog.meta(row)["title"] for row in rows]
    assert all(jpeg and jpeg.startswith(b"\xff\xd8") for jpeg in products.pictures)
    titles = points_of(encoder, tiny_shards, "catalog", view="product_title")
    assert titles.name == "product titles"
    np.testing.assert_allclose(titles.vectors, views["product_title"], atol=1e-5)
    contents = points_of(encoder, tiny_shards, "test", most=3)
    assert (contents.name, len(contents)) == ("contents", 3)
    with pytest.raises(UserError, match="view 'video': catalog has product, image, product_title"):
        points_of(encoder, tiny_shards, "catalog", view="video")
    with pytest.raises(UserError, match="most is 1; expected at least 2"):
        points_of(encoder, tiny_shards, "catalog", most=1)


def test_the_gap_between_two_kinds() -> None:
    east, north = np.eye(4, dtype=np.float32)[:2]
    one, other = group("a", np.stack([east, east])), group("b", np.stack([north, north, north]))
    apart = modality_gap(one, other)
    assert apart.distance == pytest.approx(2**0.5)
    assert (apart.spread, apart.told_apart) == (0.0, 1.0)
    assert repr(apart) == "ModalityGap(distance=1.414, spread=0.000, told_apart=1.000)"
    vectors = unit_vectors(4000, width=16)
    none = modality_gap(group("a", vectors[:2000]), group("b", vectors[2000:]))
    assert none.distance < 0.1
    assert none.spread == pytest.approx(1, abs=0.01)  # Random unit vectors lie 1 from their mean.
    assert none.told_apart == pytest.approx(0.5, abs=0.05)


def test_a_map_shows_every_point_inside_its_field() -> None:
    vectors = unit_vectors(30, width=8)
    drawn = map_of([group("contents", vectors[:20], "<b>x"), group("products", vectors[20:])])
    assert [len(places) for places in drawn.places] == [20, 10]
    assert (drawn.method, repr(drawn)[:33]) == ("pca", "map of 20 contents and 10 product")
    page = drawn._repr_html_()
    # Reached by keyboard, too, and named there.
    focusable = "tabindex='0' role='img' aria-label='[^']+'"
    marks = re.findall(rf"<i class='g(\d)' {focusable} style='left:([\d.]+)%;top:([\d.]+)%'>", page)
    assert [kind for kind, _, _ in marks] == ["0"] * 20 + ["1"] * 10
    assert all(0 <= float(x) <= 100 and 0 <= float(y) <= 100 for _, x, y in marks)
    assert "<b>x" not in page
    assert page.count("<img") == 2
    assert "src='http" not in page
    assert "url(" not in page
    assert "aria-label='Map of 20 contents and 10 products, by PCA" in page
    assert [len(own.get_offsets()) for own in drawn.plot().axes[0].collections] == [20, 10]
    with pytest.raises(UserError, match="2 points make no map"):
        map_of([group("a", vectors[:2])])


def test_umap_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(5, width=8)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        map_of([group("a", vectors)], method="umap")
    asked = {}

    def fake(**settings: object) -> SimpleNamespace:
        asked.update(settings)
        return SimpleNamespace(fit_transform=lambda own: own[:, :2].astype(np.float64))

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=fake))
    drawn = map_of([group("a", vectors)], seed=3)
    assert (drawn.method, drawn.explained) == ("umap", None)
    np.testing.assert_array_equal(drawn.places[0], vectors[:, :2])
    assert asked == {"metric": "cosine", "random_state": 3}
    assert map_of([group("a", vectors)], method="pca").method == "pca"
