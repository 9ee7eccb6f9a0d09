"""The commands of an index, filters and batches through Matcher, and both ways of matching."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmrec import Matcher, ProductIndex, cli
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.retrieval.embed import embed_shards, read_embeddings
from mmrec.retrieval.matcher import build_index


@pytest.fixture
def own(index: Path, tmp_path: Path) -> Path:
    """The index beside its ancestors, to be changed by one test alone."""
    copy = index.parent / f"index-{tmp_path.name}"
    shutil.copytree(index, copy)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture(scope="module")
def contents(index: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings of the test contents."""
    out = index.parent / "test-contents"
    embed_shards(index.parent / "train/encoder", tiny_shards, out, split="test")
    return out


def test_upsert_delete_compact_status_and_verify(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ProductIndex.load(own).ids
    lines = [f" {before[0]}\t", *before[1:3], "no such\u2028product", ""]
    (tmp_path / "ids.txt").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    cli.index_delete(index=own, ids=tmp_path / "ids.txt")
    printed = capsys.readouterr().out
    assert "deleted 3" in printed
    assert "1 of the ids were not there" in printed
    assert set(ProductIndex.load(own).ids) == set(before[3:])
    cli.index_upsert(index=own, embeddings=own.parent / "embeddings")
    assert f"upserted {len(before)}" in capsys.readouterr().out
    cli.index_status(own, json=True)
    status = json.loads(capsys.readouterr().out)
    assert (status["products"], status["delta"], status["tombstones"]) == (
        *(len(before), len(before)),
        len(before),
    )
    cli.index_status(own)
    assert "compact (mmrec index compact)" in capsys.readouterr().out
    cli.index_compact(index=own)
    assert "generation 000002" in capsys.readouterr().out
    cli.index_verify(own)
    assert "generation 000002 and 0 changes are whole" in capsys.readouterr().out
    assert set(ProductIndex.load(own).ids) == set(before)
    cli.inspect(own)
    assert "embeddings  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 0}, "--width 0: expected at least 1"),
        ({"memory_gb": 0.0}, "--memory-gb 0: expected a number above 0"),
        ({"memory_gb": float("nan")}, "--memory-gb nan: expected"),
        ({"memory_budget": "", "recall_target": 0.9}, "'' is not a number of bytes"),
        ({"memory_budget": ""}, "go with --recall-target"),
        ({"k": 5}, "go with --recall-target"),
        ({"tuning_sample": 5}, "go with --recall-target"),
        ({"seed": 0}, "go with --recall-target"),
    ],
)
def test_flags_that_say_nothing_are_refused(
    flags: dict[str, Any], message: str, index: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cli.index_build(embeddings=index.parent / "embeddings", out=tmp_path / "i", **flags)


def test_where_holds_matches_to_a_condition(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matcher = Matcher.load(index)
    table = matcher.index.products.to_pylist()
    colour = table[0]["colour"]
    right = {row["product_id"] for row in table if row["colour"] == colour}
    matches = matcher.match(text="anything", k=50, where=f"colour = '{colour}'")
    assert {match.product_id for match in matches} == right
    cli.search(index=index, text="anything", k=50, where=f"colour = '{colour}'", json=True)
    assert len(json.loads(capsys.readouterr().out)["matches"]) == len(right)
    with pytest.raises(UserError, match="columns: product_id"):
        matcher.match(text="anything", where="hue = 1")


def test_products_like_a_product(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matcher = Matcher.load(index)
    ids = matcher.index.ids
    vectors = matcher.index.vectors(ids)
    order = np.argsort(-(vectors @ vectors[4]))
    matches = matcher.match(product_id=ids[4], k=3)
    assert [match.product_id for match in matches] == [ids[row] for row in order if row != 4][:3]
    cli.search(index=index, product_id=ids[4], k=3)
    assert matches[0].product_id in capsys.readouterr().out
    with pytest.raises(UserError, match="not in this index"):
        matcher.match(product_id="nothing")
    with pytest.raises(UserError, match="k is -1; expected"):
        matcher.match(product_id=ids[4], k=-1)


def test_an_index_of_contents_is_asked_with_products(
    index: Path, contents: Path, tiny_tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = index.parent / "contents-index"
    built = build_index(contents, out)
    assert built.key == "content_id"
    matcher = Matcher.load(out)
    assert matcher.side == "product"
    product = pq.read_table(tiny_tables / "products.parquet").to_pylist()[0]
    picture = tiny_tables / product["images"][0]
    matches = matcher.match(images=[picture], title=product["title"], k=3)
    stored = read_embeddings(index.parent / "embeddings")
    vector = matcher.embed(matcher.read(images=[picture]), product["title"])
    assert float(vector @ stored.vectors[stored.ids.index(product["product_id"])]) > 0.98
    assert {match.product_id for match in matches} <= set(read_embeddings(contents).ids)
    assert all(match.image and match.image[:2] == b"\xff\xd8" for match in matches)
    assert "content_id" in matcher.index.products.column_names
    asked, *_ = matcher.index.ids
    like = matcher.match(content_id=asked, k=3)
    assert asked not in like.to_arrow()["content_id"].to_pylist()
    assert len(like.why(2).frame_losses) >= 2
    cli.search(index=out, content_id=asked, k=3)
    assert capsys.readouterr().out == f"{like!r}\n"
    with pytest.raises(UserError, match="this index holds contents; give the content_id of one"):
        cli.search(index=out, product_id=product["product_id"])
    with pytest.raises(
        UserError, match="holds products, and this index has the column 'content_id'"
    ):
        cli.index_upsert(index=out, embeddings=index.parent / "embeddings")


def test_a_table_of_queries(
    index: Path, tiny_tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = pq.read_table(tiny_tables / "contents.parquet").to_pylist()[:6]
    rows = [
        {"content_id": row["content_id"], "title": row["title"], "video": row["video"]}
        for row in contents
    ]
    rows[2]["video"] = "media/gone.mp4"
    rows[3] |= {"title": " ", "video": None}
    queries = tiny_tables / "queries.parquet"
    pq.write_table(pa.Table.from_pylist(rows), queries)
    cli.search(index=index, queries=queries, out=tmp_path / "matches.parquet", k=4)
    printed = capsys.readouterr().out
    assert "16 matches of 6 queries" in printed
    assert "dropped: no video, images or title: 1" in printed
    table = pq.read_table(tmp_path / "matches.parquet").to_pylist()
    matcher = Matcher.load(index)
    for row in (rows[0], rows[5]):
        single = matcher.match(video=tiny_tables / row["video"], title=row["title"], k=4)
        found = [match for match in table if match["query"] == row["content_id"]]
        assert [match["rank"] for match in found] == [1, 2, 3, 4]
        assert [match["product_id"] for match in found] == [match.product_id for match in single]
        np.testing.assert_allclose(
            [match["score"] for match in found], [match.score for match in single], atol=1e-5
        )
    pq.write_table(pa.table({"words": ["x"]}), queries)
    with pytest.raises(UserError, match="expected a column title, video or images; found words"):
        cli.search(index=index, queries=queries, out=tmp_path / "matches.parquet")
    with pytest.raises(UserError, match="--queries and --out go together"):
        cli.search(index=index, queries=queries)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": [1, 2]}, "column 'title' holds int64; expected text"),
        ({"title": ["a", "b"], "video": [1, 2]}, "column 'video' holds int64; expected text"),
        ({"video": [b"a", b"b"]}, "column 'video' holds binary; expected text"),
        ({"images": ["a.jpg", "b.jpg"]}, "column 'images' holds string; expected lists of text"),
        ({"images": [[1], [2]]}, "column 'images' holds list.*; expected lists of text"),
    ],
)
def test_columns_of_queries_that_are_not_text(
    columns: dict[str, list], message: str, index: Path, tmp_path: Path
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "q.parquet")
    with pytest.raises(UserError, match=message):
        cli.search(index=index, queries=tmp_path / "q.parquet", out=tmp_path / "m.parquet")


def test_ids_and_images_of_queries_and_where_matches_go(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, out = tmp_path / "q.parquet", tmp_path / "m.parquet"
    rows = [
        {"id": 7, "title": "a mug", "images": None},
        {"id": 8, "title": "a mug", "images": ["a.jpg", None]},
        {"id": None, "title": "a mug", "images": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), queries)
    cli.search(index=index, queries=queries, out=out, k=2)
    printed = capsys.readouterr().out
    assert "dropped: an image is null: 1" in printed
    assert "dropped: no id: 1" in printed
    assert pq.read_table(out)["query"].to_pylist() == ["7", "7"]
    with pytest.raises(UserError, match="is a folder; give --out the name of a file"):
        cli.search(index=index, queries=queries, out=tmp_path)
    with pytest.raises(UserError, match="holds the queries"):
        cli.search(index=index, queries=queries, out=tmp_path / "../" / tmp_path.name / "q.parquet")


def test_embeddings_as_queries(index: Path, contents: Path, tmp_path: Path) -> None:
    cli.search(index=index, queries=contents, out=tmp_path / "matches.parquet", k=3)
    loaded = read_embeddings(contents)
    right = ProductIndex.load(index).search(loaded.vectors, 3)
    table = pq.read_table(tmp_path / "matches.parquet")
    assert table["query"].to_pylist() == [id_ for id_ in loaded.ids for _ in range(3)]
    assert table["product_id"].to_pylist() == [id_ for found in right.ids for id_ in found]


def test_embeddings_of_another_encoder_are_refused(
    own: Path, contents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec.retrieval import batch, matcher

    manifest = read_manifest(own / "../embeddings")
    parents = [
        replace(p, fingerprint="f" * 16) if p.kind == "encoder" else p for p in manifest.parents
    ]

    def read_as_of_another(folder: Path, **how: Any):
        loaded = read_embeddings(folder, **how)
        return replace(loaded, manifest=replace(loaded.manifest, parents=parents))

    monkeypatch.setattr(matcher, "read_embeddings", read_as_of_another)
    monkeypatch.setattr(batch, "read_embeddings", read_as_of_another)
    with pytest.raises(UserError, match=f"this encoder is {'f' * 16}.*mmrec index build"):
        cli.index_upsert(index=own, embeddings=own.parent / "embeddings")
    with pytest.raises(UserError, match=f"this encoder is {'f' * 16}"):
        cli.search(index=own, queries=contents, out=tmp_path / "matches.parquet")


def test_a_narrow_index_by_the_command_line(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = index.parent / "narrow"
    cli.index_build(embeddings=index.parent / "embeddings", out=out, width=32, rerank=True)
    assert "32 wide" in capsys.readouterr().out
    whole, narrow = Matcher.load(index), Matcher.load(out)
    # Four candidates for each match are the whole of this catalogue, so order and scores agree.
    one, two = (matcher.match(text="a red mug", k=4) for matcher in (whole, narrow))
    assert [match.product_id for match in one] == [match.product_id for match in two]
    assert one[0].score == pytest.approx(two[0].score, abs=2e-3)


@pytest.fixture
def in_milvus(index: Path, tmp_path: Path) -> str:
    """The index, pushed to a file of milvus-lite."""
    pytest.importorskip("pymilvus", reason="Milvus is an extra: pip install 'mmrec[milvus]'")
    pytest.importorskip("milvus_lite", reason="pip install --no-deps milvus-lite")
    uri = str(tmp_path / "catalogue.db")
    cli.index_push(index=index, uri=uri)
    return uri


def test_push_and_search_in_milvus(
    index: Path,
    in_milvus: str,
    contents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    products = len(ProductIndex.load(index))
    cli.index_push(index=index, uri=in_milvus)  # Once more, in place of the first.
    assert f"pushed {products} products: collection 'products' at" in capsys.readouterr().out
    there = {"backend": "milvus", "uri": in_milvus}
    where = "price < 30 or colour is null"
    printed = []
    for place in ({"index": index}, there):
        cli.search(**place, text="a red mug", k=4, where=where, json=True)
        printed.append(json.loads(capsys.readouterr().out)["matches"])
    scores = [[match.pop("score") for match in matches] for matches in printed]
    assert printed[0] == printed[1]
    np.testing.assert_allclose(*scores, atol=1e-5)
    cli.search(**there, queries=contents, out=tmp_path / "matches.parquet", k=3)
    right = ProductIndex.load(index).search(read_embeddings(contents).vectors, 3)
    found = pq.read_table(tmp_path / "matches.parquet")["product_id"].to_pylist()
    assert found == [id_ for row in right.ids for id_ in row]
    matcher = Matcher.load(uri=in_milvus)
    like = matcher.match(product_id=right.ids[0][0], k=2)
    assert len(like) == 2
    assert all(match.image for match in like)
    for wrong in (
        {"index": index, "backend": "milvus"},
        {"uri": in_milvus},
        {},
        {**there, "index": index},
    ):
        with pytest.raises(UserError, match="give --index FOLDER, or --backend milvus --uri URI"):
            cli.search(text="x", **wrong)
    with pytest.raises(UserError, match="and not both"):
        Matcher.load(index, uri=in_milvus)


def test_a_collection_is_changed_by_the_command_line(
    index: Path, in_milvus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ProductIndex.load(index).ids
    (tmp_path / "ids.txt").write_text("\n".join([*ids[:3], "no such product"]))
    cli.index_delete(uri=in_milvus, ids=tmp_path / "ids.txt")
    assert f"deleted 3; {in_milvus} holds {len(ids) - 3}" in capsys.readouterr().out
    cli.index_upsert(uri=in_milvus, embeddings=index.parent / "embeddings")
    assert f"upserted {len(ids)}; {in_milvus} holds {len(ids)}" in capsys.readouterr().out
    cli.index_status(uri=in_milvus)
    assert f"products: {len(ids)}" in capsys.readouterr().out
    with pytest.raises(UserError, match="give an index folder, or the URI of Milvus"):
        cli.index_status(index, uri=in_milvus)


def test_the_encoder_is_that_of_the_live_generation(own: Path) -> None:
    """A writer killed before it copied the manifest leaves the folder with that of the generation before."""
    path = own / "manifest.json"
    encoder = read_manifest(own).parent("encoder")
    assert encoder
    path.write_text(path.read_text().replace(encoder.fingerprint, "f" * 16))
    assert Matcher.load(own).encoder.fingerprint == encoder.fingerprint


def test_a_foreign_or_lost_encoder_in_milvus(
    index: Path, in_milvus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec.retrieval import matcher
    from mmrec.retrieval.milvus import MilvusIndex

    with MilvusIndex.open(in_milvus) as there:
        assert matcher.upsert_embeddings(there, index.parent / "embeddings") == len(there)
        manifest = there.manifest
        assert manifest
        there.manifest = replace(
            manifest, parents=[replace(p, fingerprint="f" * 16) for p in manifest.parents]
        )
        with pytest.raises(UserError, match=f"built with encoder {'f' * 16}"):
            matcher.upsert_embeddings(there, index.parent / "embeddings")
    monkeypatch.setattr(MilvusIndex, "find_parent", lambda *_: None)
    with pytest.raises(UserError, match="not there now; give it with --encoder"):
        Matcher.load(uri=in_milvus)
    matches = Matcher.load(uri=in_milvus, encoder=index.parent / "train/encoder").match(text="x")
    assert all(match.image is None for match in matches)
