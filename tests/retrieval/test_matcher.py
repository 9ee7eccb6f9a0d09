"""Matcher: the same vectors as the flow's, and a gallery that escapes what it shows."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmrec import Matcher
from mmrec.data.media import FrameConfig, read_video
from mmrec.errors import UserError
from mmrec.retrieval import matcher as matcher_module
from mmrec.retrieval.embed import embed_shards, read_embeddings
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.intake import checked_k
from mmrec.retrieval.matches import Why
from mmrec.retrieval.queries import queries_of


@pytest.fixture(scope="module")
def matcher(index: Path) -> Matcher:
    return Matcher.load(index)


def test_a_query_is_embedded_as_the_shards_are(
    matcher: Matcher, index: Path, tiny_shards: Path, tiny_tables: Path, tmp_path: Path
) -> None:
    """From the mp4 itself or through JPEGs in shards: nearly the same vector."""
    embed_shards(index.parent / "train/encoder", tiny_shards, tmp_path / "test", split="test")
    stored = read_embeddings(tmp_path / "test")
    contents = {
        c["content_id"]: c for c in pq.read_table(tiny_tables / "contents.parquet").to_pylist()
    }
    for row, content_id in enumerate(stored.ids):
        content = contents[content_id]
        frames = read_video(tiny_tables / content["video"], FrameConfig(num_frames=4)).frames
        vector = matcher.embed(frames, content["title"])
        assert float(vector @ stored.vectors[row]) > 0.98


def test_matches_carry_titles_attributes_and_pictures(matcher: Matcher) -> None:
    matches = matcher.match(text="anything", k=4)
    assert len(matches) == 4
    assert matches[0].score >= matches[3].score
    assert matches[0].title
    assert {"shape", "colour"} <= set(matches[0].attributes)
    assert all(match.image and match.image[:2] == b"\xff\xd8" for match in matches)
    table = matches.to_pandas()
    assert table["product_id"].tolist() == [match.product_id for match in matches]


def test_title_and_text_are_one_thing(matcher: Matcher) -> None:
    one, two = matcher.match(title="a red mug"), matcher.match(text="a red mug")
    assert one.matches == two.matches


def test_pictures_may_be_bytes(matcher: Matcher, tiny_tables: Path) -> None:
    path = next((tiny_tables / "media/products").glob("*.jpg"))
    assert matcher.match(images=[path]).matches == matcher.match(images=[path.read_bytes()]).matches


def test_a_query_vector_has_unit_length(matcher: Matcher) -> None:
    assert np.linalg.norm(matcher.embed([], "words")) == pytest.approx(1, abs=1e-5)


def numbers(why: Why) -> list[float]:
    return [why.score, why.video_alone or 0, why.title_alone or 0, *why.frame_losses]


def clips(tables: Path, count: int) -> list[Path]:
    return sorted((tables / "media/contents").glob("*.mp4"))[:count]


def test_lists_give_what_single_queries_give(
    matcher: Matcher, tiny_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher_module, "_READ", 2)
    monkeypatch.setattr(matcher_module, "_SEARCHED", 2)
    first, second = clips(tiny_tables, 2)
    many = matcher.match(
        video=[first, None, second.read_bytes(), None],
        title=["love this", "a red mug", None, "a red mug"],
        k=3,
    )
    single = [
        matcher.match(video=first, title="love this", k=3),
        matcher.match(text="a red mug", k=3),
        matcher.match(video=second, k=3),
    ]
    for own, alone in zip(many, [*single, single[1]], strict=True):
        assert [match.product_id for match in own] == [match.product_id for match in alone]
        assert [m.score for m in own] == pytest.approx([m.score for m in alone], abs=1e-5)
        assert (own.title, own.frames) == (alone.title, alone.frames)
        assert numbers(own.why(1)) == pytest.approx(numbers(alone.why(1)), abs=1e-5)
    assert matcher.match(title=[]) == []


def test_lists_of_pictures_are_lists_of_lists(matcher: Matcher, tiny_tables: Path) -> None:
    a, b, c = sorted((tiny_tables / "media/products").glob("*.jpg"))[:3]
    one = matcher.match(images=[a, b], k=2)
    assert len(one.frames) == 2
    both = matcher.match(images=[[a, b], [c]], k=2)
    assert [len(own.frames) for own in both] == [2, 1]
    assert [match.product_id for match in both[0]] == [match.product_id for match in one]
    assert matcher.match(images=c, k=2)[0].product_id == both[1][0].product_id


def test_a_file_that_cannot_be_read_is_named_with_its_place(
    matcher: Matcher, tiny_tables: Path, tmp_path: Path
) -> None:
    (clip,) = clips(tiny_tables, 1)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:200])
    with pytest.raises(UserError, match=r"^video\[1\]: .*broken.mp4: "):
        matcher.match(video=[clip, broken, clip])
    picture = next((tiny_tables / "media/products").glob("*.jpg"))
    with pytest.raises(UserError, match=r"^images\[1\]\[0\]: 3 bytes: "):
        matcher.match(images=[[picture], [b"abc"]])
    with pytest.raises(UserError, match=r"^images\[1\]: .*missing.jpg: file not found"):
        matcher.match(images=[picture, tmp_path / "missing.jpg"])
    with pytest.raises(UserError, match=rf"^{broken}: "):
        matcher.match(video=broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": Image.new("RGB", (2, 2))}, "images: .* bytes of image files, found Image"),
        ({"images": [Image.new("RGB", (2, 2))]}, "images: .* bytes of image files, found Image"),
        ({"images": [np.zeros((4, 4, 3))]}, r"images\[0\]: .* found ndarray"),
        ({"images": [["a.jpg"], [5]]}, r"images\[1\]: .* found int"),
        ({"video": 5}, "video: expected a path, a URL or bytes, found int"),
    ],
)
def test_what_is_no_file_is_refused_by_its_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        queries_of(**arguments)


def test_a_missing_entry_of_a_table_is_no_picture() -> None:
    queries, _ = queries_of(images=[["a.jpg"], None, float("nan")], title=["a", "b", "c"])
    assert [list(query.images) for query in queries] == [["a.jpg"], [], []]


def test_k_is_a_whole_number_of_any_kind(matcher: Matcher) -> None:
    k = checked_k(np.int64(3))
    assert (k, type(k)) == (3, int)
    for wrong in (2.5, "3", None):
        with pytest.raises(UserError, match="expected a whole number"):
            checked_k(wrong)
    with pytest.raises(UserError, match="k is 0; expected at least 1"):
        matcher.match(text="a mug", k=0)


def test_products_like_products(matcher: Matcher) -> None:
    ids = matcher.index.ids
    both = matcher.match(product_id=[ids[0], ids[3]], k=3)
    assert [len(own) for own in both] == [3, 3]
    alone = matcher.match(product_id=ids[3], k=3)
    assert both[1].matches == alone.matches
    assert ids[3] not in [match.product_id for match in alone]
    assert alone.title == matcher.index.attributes(ids[3])["title"]
    why = alone.why(0)
    assert why.score == pytest.approx(alone[0].score, abs=0.01)  # Its vectors are float16 on disk.
    assert len(why.frame_losses) >= 1
    with pytest.raises(
        UserError, match="content_id: this index holds products; give the product_id"
    ):
        matcher.match(content_id="c1")
    with pytest.raises(UserError, match="give product_id, or a video"):
        matcher.match(product_id=ids[0], text="mug")


def test_why_is_the_loss_of_score_without_a_part(
    matcher: Matcher, tiny_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (clip,) = clips(tiny_tables, 1)
    matches = matcher.match(video=clip, title="love this red mug", k=3)
    why = matches.why(2)
    product = matcher.index.vectors([matches[2].product_id])[0]
    product /= np.linalg.norm(product)
    frames = matcher.read(clip)

    def score(pictures: list[np.ndarray], title: str | None) -> float:
        return float(matcher.embed(pictures, title) @ product)

    whole = score(frames, "love this red mug")
    assert why.score == pytest.approx(whole, abs=1e-5)
    assert why.video_alone == pytest.approx(score(frames, None), abs=1e-5)
    assert why.title_alone == pytest.approx(score([], "love this red mug"), abs=1e-5)
    right = [
        whole - score(frames[:t] + frames[t + 1 :], "love this red mug") for t in range(len(frames))
    ]
    assert why.frame_losses == pytest.approx(right, abs=1e-5)
    assert why.match == matches[2]
    assert len(why.frames) == len(frames)
    words = matcher.match(text="mug").why(0)
    monkeypatch.setattr(matcher.encoder, "tower_outputs", None)
    assert matches.why(2) == why  # No tower ran again.
    assert (words.frame_losses, words.video_alone, words.title_share) == ((), None, 1.0)


def test_why_makes_vectors_anew_where_the_index_keeps_none(
    matcher: Matcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    matches = matcher.match(text="a red mug", k=2)
    kept = numbers(matches.why(1))

    def none_kept(index: ProductIndex, ids: list[str]) -> np.ndarray:
        raise UserError("an index of factory 'X' does not give its vectors back")

    monkeypatch.setattr(ProductIndex, "vectors", none_kept)
    assert numbers(matches.why(1)) == pytest.approx(kept, abs=0.01)
    monkeypatch.setattr(matcher, "_picture_rows", {})
    with pytest.raises(
        UserError, match="its shards are not where it remembers them; put them back"
    ):
        matches.why(1)


def test_tables_of_matches_have_the_columns_of_the_catalogue(matcher: Matcher) -> None:
    table = matcher.match(text="mug", k=3).to_arrow()
    own = matcher.index.schema
    assert set(own.names) | {"place", "score"} == set(table.column_names)
    assert table.schema.field("price").type == own.field("price").type
