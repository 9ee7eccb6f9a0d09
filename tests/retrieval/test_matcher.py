"""Matcher: the same vectors as the flow's, and a gallery that escapes what it shows."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmrec import Matcher
from mmrec.data.media import FrameConfig, read_video
from mmrec.retrieval.embed import embed_shards, read_embeddings
from mmrec.retrieval.matcher import Match, Matches


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


def test_the_gallery_escapes_what_it_shows() -> None:
    match = Match(
        product_id="p",
        score=0.5,
        title="<script>alert(1)</script>",
        attributes={"colour": "<b>"},
        image=b"\xff\xd8",
    )
    page = Matches(matches=[match], title="<img src=x onerror=y>")._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page.replace("<b>1</b>", "")
    assert "<img src=x" not in page


def test_a_query_vector_has_unit_length(matcher: Matcher) -> None:
    assert np.linalg.norm(matcher.embed([], "words")) == pytest.approx(1, abs=1e-5)
