"""What a query comes back with: tables, pictures, and why, without an encoder; and how lists are read."""

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import ROOT
from small_towers import small_encoder

from mmrec.data.batches import collate_items
from mmrec.data.media import encode_jpeg
from mmrec.errors import UserError
from mmrec.retrieval.matches import Match, Matches, Why
from mmrec.retrieval.queries import embed_parts_of, encode, queries_of
from mmrec.terminal import one_line

JPEG = encode_jpeg(np.full((20, 30, 3), 90, np.uint8), 85)
COLOURS = re.compile(r"#[0-9a-fA-F]{3,8}\b|\b(white|black|gr[ae]y|rgb)\b")


def found(number: int, **attributes: Any) -> Match:
    return Match(
        product_id=f"p{number}",
        score=1 - number / 10,
        title=None if number == 2 else f"mug {number}",
        attributes=attributes,
        image=JPEG,
    )


@pytest.fixture
def matches() -> Matches:
    return Matches(
        matches=[
            found(0, price=3.5, stock=2, new=True, colour=None),
            found(1, price=None, stock=None, new=None, colour=None),
            found(2, price=4.0, stock=1, new=False, colour=None),
        ],
        title="<script>alert(1)</script> & $5 or $6",
        frames=[JPEG] * 3,
        schema=pa.schema(
            [
                ("product_id", pa.string()),
                ("title", pa.string()),
                ("price", pa.float32()),
                ("stock", pa.int16()),
                ("new", pa.bool_()),
                ("colour", pa.dictionary(pa.int32(), pa.string())),
            ]
        ),
    )


def test_matches_are_a_sequence(matches: Matches) -> None:
    assert len(matches) == 3
    assert matches[0].product_id == "p0"
    assert [match.product_id for match in matches[1:]] == ["p1", "p2"]
    assert repr(matches).splitlines() == [
        "  1  1.000  p0  mug 0",
        "  2  0.900  p1  mug 1",
        "  3  0.800  p2",
    ]
    assert repr(Matches(matches=[])) == "no matches"


def test_titles_of_others_do_not_steer_a_terminal() -> None:
    title = "red\x1b[2J\x9b31m\r\nmug \u202eevil\u2028 " + "x" * 200
    line = repr(Matches(matches=[replace(found(0), title=title, product_id="p\x07\n1")]))
    assert line.startswith("  1  1.000  p 1  red [2J 31m mug evil xxx")
    assert line.isprintable()
    assert line.endswith("x…")
    assert len(line) < 130
    assert repr(Why(product_id="p\n\x1b", score=0.5)).splitlines() == ["p: score 0.500"]
    assert one_line("mère 👩\u200d🍳 \xa0 שלום") == "mère 👩\u200d🍳 שלום"


def test_tables_have_the_types_of_the_index(matches: Matches) -> None:
    table = matches.to_arrow()
    assert table.schema.field("place").type == pa.int32()
    assert table.schema.field("price").type == pa.float32()
    assert table.schema.field("stock").type == pa.int16()
    assert table.schema.field("colour").type == pa.dictionary(pa.int32(), pa.string())
    assert table["place"].to_pylist() == [1, 2, 3]
    assert table["stock"].to_pylist() == [2, None, 1]
    assert table["title"].to_pylist() == ["mug 0", "mug 1", None]
    frame = matches.to_pandas()
    assert frame["stock"].dtype == pd.Int16Dtype()
    assert frame["new"].tolist() == [True, pd.NA, False]
    assert frame["price"].dtype == np.float32
    assert frame["place"].dtype == np.int32
    assert Matches(matches=[], schema=matches.schema).to_arrow().schema == table.schema


def test_an_attribute_called_like_a_column_stays_behind() -> None:
    own = Matches(matches=[found(0, score=7.0, place="shelf 3")])
    assert own.to_arrow().column_names == ["place", "product_id", "score", "title"]
    assert own.to_arrow()["score"].to_pylist() == [1.0]
    assert Matches(matches=[found(0)], key="content_id").to_arrow().column_names[1] == "content_id"


def test_the_gallery_escapes_and_describes(matches: Matches) -> None:
    page = matches._repr_html_()
    assert "<script>" not in page
    assert page.count("<img") == page.count("alt='") == 6
    assert "alt='query picture 2 of 3'" in page
    assert "alt='picture of mug 1'" in page
    assert "stock 2" in page
    assert "colour" not in page.replace("currentColor", "")  # None says nothing.
    assert "no matches" in Matches(matches=[])._repr_html_()


def test_a_card_lists_what_is_filled_in() -> None:
    own = {f"n{number}": number for number in range(4)}
    match = found(0, tags=["<b>", "x"], none=None, empty="", nothing=[], **own, weight=1.23456789)
    page = Matches(matches=[match])._repr_html_()
    assert "tags &lt;b&gt;, x · n0 0 · n1 1 · n2 2 · n3 3 · weight 1.23457<" in page
    assert (
        "and 1 more"
        in Matches(matches=[replace(match, attributes={**match.attributes, "z": 1})])._repr_html_()
    )


def test_what_notebooks_show_has_no_colour_of_its_own(matches: Matches) -> None:
    why = Why(product_id="p", score=0.5, frame_losses=(0.1, -0.1), video_alone=0.4, frames=[JPEG])
    for page in (matches._repr_html_(), why._repr_html_()):
        styles = " ".join(re.findall(r"style='([^']*)'", page))
        assert not COLOURS.search(styles)
        assert "<style" not in page


def test_a_plot_shows_the_query_and_every_match(matches: Matches, tmp_path: Path) -> None:
    figure = matches.plot(columns=2)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["query", "", "1 · 1.000\nmug 0", "2 · 0.900\nmug 1", "3 · 0.800\np2"]
    figure.savefig(tmp_path / "matches.png")  # A title with dollar signs is no formula.
    with pytest.raises(UserError, match="columns is 0"):
        matches.plot(columns=0)


def test_matches_travel_without_their_matcher(matches: Matches) -> None:
    asked = Matches(matches=matches.matches, explainer=lambda id_: Why(product_id=id_, score=0.5))
    assert asked.why(-1).match == matches[2]
    with pytest.raises(IndexError):
        asked.why(3)
    again = pickle.loads(pickle.dumps(asked))
    assert again == asked
    with pytest.raises(UserError, match="lost their matcher"):
        again.why(0)


def test_shares_of_video_and_title() -> None:
    why = Why(
        product_id="p",
        score=0.8,
        frame_losses=(0.05, -0.0001),
        video_alone=0.7,
        title_alone=0.5,
        title="<b>mug</b>",
        frames=[JPEG, JPEG],
    )
    assert why.video_loss == pytest.approx(0.3)
    assert why.title_loss == pytest.approx(0.1)
    assert why.video_share == pytest.approx(0.75)
    assert why.title_share == pytest.approx(0.25)
    assert why.to_dict()["frame_losses"] == [0.05, -0.0001]
    assert "video alone scores 0.700, carries 75%" in repr(why)
    assert "without frame 2 it loses +0.000" in repr(why)
    assert "carries <b>25%</b>" in why._repr_html_()
    assert "<b>mug</b>" not in why._repr_html_()
    words = Why(product_id="p", score=0.6, title_alone=0.6)
    assert (words.video_share, words.title_share) == (0.0, 1.0)
    assert "without each frame" not in words._repr_html_()
    neither = Why(product_id="p", score=-0.2, video_alone=-0.1, title_alone=-0.1)
    assert neither.video_share is None
    assert neither.title_share is None


@pytest.mark.parametrize("config", [{}, {"pooling": "attention"}, {"separate_towers": True}])
def test_parts_of_a_query_are_embedded_as_if_the_rest_had_never_been(
    config: dict[str, Any], tmp_path: Path
) -> None:
    encoder = small_encoder(tmp_path, **config).eval()
    torch.manual_seed(1)
    for parameter in (*encoder.gates.parameters(), *encoder.pools.parameters()):
        torch.nn.init.normal_(parameter)  # Equal gates and weights would hide what they do.
    pictures = list(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8).unbind())
    titles = ["a red mug", None, "a hat", None]
    given = [pictures[:3], pictures[:2], [], pictures[3:]]

    def embedded(own: list[torch.Tensor], title: str | None, side: Any) -> np.ndarray:
        batch = collate_items([own], [title], tokenizer=encoder.tokenizer, size=32)
        return encoder.embed(batch, side)[0].numpy()

    batch = collate_items(given, titles, tokenizer=encoder.tokenizer, size=32)
    for side in ("content", "product"):
        queries = encode(encoder, batch, side, width=16)
        for query, own, title in zip(queries, given, titles, strict=True):
            parts = embed_parts_of(encoder, query, width=16)
            expected = [(own, title), (own, None), ([], title)]
            expected += [(own[:t] + own[t + 1 :], title) for t in range(len(own))]
            right = np.stack([embedded(*part, side) for part in expected])
            np.testing.assert_allclose(parts, right, atol=1e-5)
            np.testing.assert_allclose(query.vector, right[0], atol=1e-5)
        assert not parts[3].any()  # Of the last query, a picture alone, nothing is left.


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to match"),
        ({"title": " "}, "nothing to match"),
        ({"title": "a", "text": "b"}, "give title or text, not both"),
        ({"video": "a.mp4", "images": ["b.jpg"]}, "give a video or images, not both"),
        ({"video": ["a.mp4"], "title": "x"}, "video: a list is many queries, so title has to be"),
        ({"title": ["x", "y"], "images": ["a", "b"]}, r"so images has to be .*\[\[a, b\], \[c\]\]"),
        ({"video": ["a"], "title": ["x", "y"]}, "found 1 of video, 2 of title"),
        ({"images": ["a", ["b"]]}, "images: expected the pictures of one query"),
        ({"title": ["x", None]}, r"query \[1\]: nothing to match"),
        ({"title": ["x", 3]}, r"title\[1\]: expected words, found int"),
        ({"text": 3}, "text: expected words, found int"),
        ({"video": 3}, "video: expected a path, a URL or bytes, found int"),
    ],
)
def test_queries_that_mean_nothing_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        queries_of(**asked)


def test_one_query_and_lists_of_queries() -> None:
    (one,), many = queries_of(images=["a.jpg", "b.jpg"], text="mug")
    assert (one.images, one.title, many) == (["a.jpg", "b.jpg"], "mug", False)
    queries, many = queries_of(images=(["a.jpg", "b.jpg"], ["c.jpg"], None), title=("x", None, "y"))
    assert [list(query.images) for query in queries] == [["a.jpg", "b.jpg"], ["c.jpg"], []]
    assert [query.title for query in queries] == ["x", None, "y"]
    assert many
    column = pd.Series(["a mug", None], dtype=object)
    queries, many = queries_of(title=pd.Series(["a", "b"]), video=[Path("a.mp4"), b"bytes"])
    assert [query.number for query in queries] == [0, 1]
    queries, _ = queries_of(title=column, video=[None, "b.mp4"])
    assert [query.title for query in queries] == ["a mug", None]
    assert queries_of(title=[]) == ([], True)
    assert queries_of(images="a.jpg")[0][0].images == ["a.jpg"]


def test_names_complete_before_they_are_loaded() -> None:
    code = "import mmrec, sys; print('Matcher' in dir(mmrec), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    assert (ROOT / "mmrec/py.typed").is_file()
