"""The page is whole, safe and self-contained; the charts are to scale; the picture opens."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmrec.retrieval import report
from mmrec.retrieval.metrics import bootstrap_intervals, evaluation, per_query, summarise
from mmrec.retrieval.report import Curve, MatchedProduct, QueryCard, draw_picture, render_report

EVIL = '<script>alert("x")</script>'
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def jpeg(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def card(
    *, right: int | None, title: str | None = "A <b>haul</b>", image: bytes | None = None
) -> QueryCard:
    matches = [
        MatchedProduct(
            product_id=f"p{place}",
            title=None if place == 4 else f"{EVIL} shoe {place}",
            score=0.9 - place / 10,
            image=image or jpeg((20 * place, 80, 90)),
            right=place == right,
            attributes={"brand": EVIL, "price": None, "colour": "Grün"},
        )
        for place in range(5)
    ]
    return QueryCard(
        content_id=f"c-{EVIL}",
        title=title,
        frames=[image or jpeg((200, 30 * place, 30), (30, 60)) for place in range(6)],
        slice="cold",
        right_titles=[EVIL, "Blue mug"],
        matches=matches,
    )


def small_metrics() -> dict:
    generator = np.random.default_rng(0)
    ranks = [np.array([rank]) for rank in generator.integers(1, 30, 60)]
    worse = [query + 20 for query in ranks]
    warm = np.arange(60) < 40
    slices = {"all": np.ones(60, bool), "warm": warm, "cold": ~warm, f"category {EVIL}": warm}
    values = per_query(ranks)
    return evaluation(
        gallery=12345,
        queries=60,
        slices=summarise(values, slices),
        intervals=bootstrap_intervals(values, slices, num_resamples=50),
        baselines={"title_overlap": summarise(per_query(worse), slices)},
    )


def small_page(**changes) -> str:
    parts = {
        "title": f"Report {EVIL}",
        "facts": {"machine": EVIL, "commands": "python a.py\npython b.py"},
        "metrics": small_metrics(),
        "curves": [Curve(name=f"Loss {EVIL}", steps=[0, 10, 20], values=[3.0, 2.0, 1.5])],
        "cards": [card(right=1), card(right=None, title=None)],
    }
    return render_report(**{**parts, **changes})


def test_text_from_outside_is_escaped_and_tags_are_balanced():
    html = small_page()
    page = Page(html)
    assert page.open == []
    assert not page.attributes("script")
    assert not page.attributes("b") or "A <b>haul</b>" in page.text
    for text in (f"Report {EVIL}", f"{EVIL} shoe 0", f"brand {EVIL}", f"category {EVIL}"):
        assert text in page.text


def test_page_asks_nothing_of_another_host():
    html = small_page()
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    page = Page(html)
    sources = [image["src"] or "" for image in page.attributes("img")]
    assert len(sources) == 2 * (6 + 5)
    prefix = "data:image/jpeg;base64,"
    assert all(source.startswith(prefix) for source in sources)
    assert base64.b64decode(sources[0].removeprefix(prefix)) == card(right=1).frames[0]
    assert all((link["href"] or "").startswith("#") for link in page.attributes("a"))
    assert any(
        "default-src 'none'" in (meta.get("content") or "") for meta in page.attributes("meta")
    )


def test_links_lead_to_sections_and_images_have_words():
    page = Page(small_page())
    anchors = {section["id"] for section in page.attributes("section")}
    assert {(link["href"] or "")[1:] for link in page.attributes("a")} == anchors
    assert all(image["alt"] for image in page.attributes("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.attributes("svg"))


def test_right_and_wrong_are_said_in_words():
    text = Page(small_page()).text
    assert text.count("✓ right") == 1
    assert text.count("✗ wrong") == 9
    assert "✓ Right at place 2" in text
    assert "✗ Missed in the first 5" in text
    assert f"Right would be: {EVIL}, Blue mug" in text
    assert "no title" in text


def test_tables_hold_the_figures():
    metrics = small_metrics()
    text = Page(small_page()).text
    assert "60 queries against the whole catalogue of 12,345 products" in text
    for summary in (metrics["slices"], metrics["baselines"]["title_overlap"]):
        for name in ("all", "warm", "cold"):
            assert f"{summary[name]['nDCG@10']:.3f}" in text
    low, high = metrics["intervals"]["cold"]["R@50"]
    assert f"{low:.3f}–{high:.3f}" in text


def test_parts_without_data_are_left_out():
    metrics = small_metrics()
    only = {"all": metrics["slices"]["all"]}
    bare = {**metrics, "slices": only, "intervals": {}, "baselines": {}}
    html = small_page(facts={}, curves=[], cards=[], metrics=bare)
    page = Page(html)
    assert page.open == []
    assert [section["id"] for section in page.attributes("section")] == ["results"]


def svg_points(curve: Curve) -> list[tuple[float, float]]:
    lines = Page(small_page(curves=[curve])).attributes("polyline")
    numbers = re.findall(r"([-\d.]+),([-\d.]+)", lines[0]["points"] or "")
    return [(float(x), float(y)) for x, y in numbers]


def test_curve_is_drawn_to_scale():
    points = svg_points(Curve(name="loss", steps=[0, 50, 100], values=[4.0, 1.0, 0.0]))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(3 / 4, abs=0.01)
    assert y2 > y0  # down the page is down in value


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [5e-4, float("nan"), 1e-6], [-3.0, -3.0], [1e9, 2e9], [1.0, float("inf")]],
)
def test_odd_curves_are_drawn_inside_the_chart(values):
    points = svg_points(Curve(name="x", steps=list(range(len(values))), values=values))
    assert len(points) == sum(np.isfinite(values))
    assert all(0 <= x <= 340 and 0 <= y <= 200 for x, y in points)


def test_curve_without_a_finite_value_is_left_out():
    page = Page(small_page(curves=[Curve(name="x", steps=[1], values=[float("nan")])]))
    assert not page.attributes("svg")


def test_long_curve_is_thinned_but_keeps_its_range():
    values = [1.0] * 5000
    values[2501] = 9.0
    curve = Curve(name="loss", steps=list(range(5000)), values=values)
    points = svg_points(curve)
    assert len(points) <= 240
    band = Page(small_page(curves=[curve])).attributes("polygon")[0]["points"] or ""
    heights = [float(y) for y in re.findall(r",([-\d.]+)", band)]
    assert min(heights) < min(y for _, y in points) - 50  # the spike of a single step is seen


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, ["0.0", "0.5", "1.0"]),
        (0.0, 5e-4, ["0", "0.0002", "0.0004", "0.0006"]),
        (0.0, 40_000.0, ["0", "10k", "20k", "30k", "40k"]),
        (99.2, 99.9, ["99.2", "99.4", "99.6", "99.8", "100.0"]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    ticks = report._y_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert report._tick_texts(ticks) == expected


def test_picture_opens_and_is_small(tmp_path):
    path = tmp_path / "picture.png"
    cards = [card(right=place, image=noise(place)) for place in range(5)]
    draw_picture([*cards, card(right=None, title=None, image=noise(9))], path)
    assert path.stat().st_size <= 600_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1200
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_picture_marks_right_green_and_wrong_red(tmp_path):
    path = tmp_path / "picture.png"
    draw_picture([card(right=0)], path)
    pixels = np.asarray(Image.open(path).convert("RGB"), np.int64)
    first = report._products_left()
    middle = report._HEADER_HEIGHT + 14 + report._PRODUCT // 2
    red, green, _ = pixels[middle, first + 1]
    assert green > 2 * red
    red, green, _ = pixels[middle, first + report._PRODUCT + 8 + 1]
    assert red > 2 * green


def test_picture_of_sparse_cards(tmp_path):
    sparse = QueryCard(
        content_id="c",
        title="Grönt 连衣裙 " * 20,
        frames=[],
        slice="warm",
        right_titles=[],
        matches=[],
    )
    draw_picture([sparse], tmp_path / "picture.png")
    with pytest.raises(ValueError, match="no cards"):
        draw_picture([], tmp_path / "none.png")
