"""The page is whole, safe and self-contained; the charts are to scale; the picture opens."""

import base64
import io
import re
from itertools import pairwise

import numpy as np
import pytest
from pages import EVIL, Page
from PIL import Image

from mmrec.retrieval.metrics import (
    bootstrap_intervals,
    evaluation,
    per_query,
    recall_curve,
    summarise,
)
from mmrec.retrieval.report import lines, picture
from mmrec.retrieval.report.evaluation_page import render_report
from mmrec.retrieval.report.gallery import MatchedProduct, QueryCard
from mmrec.retrieval.report.lines import Curve
from mmrec.retrieval.report.picture import draw_picture


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
        rank=None if right is None else right + 1,
        margin=0.125,
    )


def small_metrics() -> dict:
    generator = np.random.default_rng(0)
    ranks = [np.array([rank]) for rank in generator.integers(1, 30, 60)]
    worse = [query + 20 for query in ranks]
    warm = np.arange(60) < 40
    slices = {"all": np.ones(60, bool), "warm": warm, "cold": ~warm, f"category: {EVIL}": warm}
    values, others = per_query(ranks), per_query(worse)
    metrics = evaluation(
        gallery=12345,
        queries=60,
        slices=summarise(values, slices),
        intervals=bootstrap_intervals(values, slices, num_resamples=50),
        baselines={"title_overlap": summarise(others, slices)},
    )
    drawn = bootstrap_intervals({"R@1": others["R@1"]}, slices, num_resamples=50)
    metrics["system_intervals"] = {"title_overlap": drawn}
    metrics["recall_curves"] = {
        "trained": recall_curve(ranks).tolist(),
        "title_overlap": recall_curve(worse).tolist(),
    }
    return metrics


def asked_index() -> dict:
    times = {"median": 0.25, "p95": 0.5, "p99": 1.0}
    means = small_metrics()["slices"]["all"]
    return {
        "factory": f"IVF8,{EVIL}",
        "products": 12340,
        "missing": 5,
        "depth": 100,
        "recall": {"1": 0.875, "10": 0.9375},
        "slices": {"all": means},
        "differences": {name: {"difference": -0.01, "low": -0.02, "high": 0.0} for name in means},
        "latency_ms": {"index": times, "exact": times},
        "queries_per_s": {"index": 4321.0, "exact": 1234.0},
    }


def small_page(**changes) -> str:
    parts = {
        "title": f"Report {EVIL}",
        "facts": {"machine": EVIL, "commands": "python a.py\npython b.py"},
        "metrics": small_metrics(),
        "curves": [Curve(name=f"Loss {EVIL}", steps=[0, 10, 20], values=[3.0, 2.0, 1.5])],
        "galleries": {"all over": [card(right=1)], "worst": [card(right=None, title=None)]},
    }
    return render_report(**{**parts, **changes})


def test_text_from_outside_is_escaped_and_tags_are_balanced():
    html = small_page()
    page = Page(html)
    assert page.open == []
    assert not page.attributes("script")
    assert not page.attributes("b") or "A <b>haul</b>" in page.text
    for text in (f"Report {EVIL}", f"{EVIL} shoe 0", f"brand {EVIL}", EVIL):
        assert text in page.text


def test_page_asks_nothing_of_another_host():
    html = small_page()
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    page = Page(html)
    sources = [image["src"] or "" for image in page.attributes("img")]
    assert len(sources) == 2 * (4 + 5)
    prefix = "data:image/jpeg;base64,"
    assert all(source.startswith(prefix) for source in sources)
    # Small pictures stay as they are, and of six frames four are shown.
    assert base64.b64decode(sources[0].removeprefix(prefix)) == card(right=1).frames[0]
    assert base64.b64decode(sources[3].removeprefix(prefix)) == card(right=1).frames[5]
    assert all((link["href"] or "").startswith("#") for link in page.attributes("a"))
    assert any(
        "default-src 'none'" in (meta.get("content") or "") for meta in page.attributes("meta")
    )


def test_links_lead_to_sections_and_images_have_words():
    page = Page(small_page())
    anchors = {section["id"] for section in page.attributes("section")}
    anchors |= {heading["id"] for heading in page.attributes("h3") if "id" in heading}
    anchors |= {main["id"] for main in page.attributes("main")}
    assert {(link["href"] or "")[1:] for link in page.attributes("a")} == anchors
    assert all(image["alt"] for image in page.attributes("img"))
    for svg in page.attributes("svg"):
        assert (svg.get("role") == "img" and svg["aria-label"]) or svg["aria-hidden"] == "true"


def test_tables_and_landmarks_are_named_for_a_screen_reader():
    html = small_page(metrics=small_metrics() | {"index": asked_index()})
    page = Page(html)
    assert len(page.attributes("main")) == len(page.attributes("header")) == 1
    assert len(page.attributes("caption")) == len(page.attributes("table")) == 6
    assert all(header["scope"] for header in page.attributes("th"))
    ids = {own["id"] for _, own in page.tags if own.get("id")}
    for tag in ("section", "nav", "div"):
        for own in page.attributes(tag):
            if tag != "div" or "role" in own:
                assert own.get("aria-label") or own.get("aria-labelledby") in ids
    # What scrolls is reached by keyboard.
    scrolled = [own for own in page.attributes("div") if own.get("class") == "scroll"]
    assert scrolled
    assert all(own["tabindex"] == "0" for own in scrolled)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_index_is_set_beside_exact_search():
    page = Page(small_page(metrics=small_metrics() | {"index": asked_index()}))
    assert f"IVF8,{EVIL}" in page.text
    assert "not 5 of these products" in page.text
    for figure in ("0.8750", "0.9375", "-0.0200 to +0.0000", "4,321", "0.250"):
        assert figure in page.text
    assert "index" not in {own["id"] for own in Page(small_page()).attributes("section")}


def test_recall_curves_are_drawn_to_scale_and_told_in_figures():
    metrics = small_metrics()
    page = Page(small_page(metrics=metrics, curves=[]))
    drawn = [line["points"] or "" for line in page.attributes("polyline")]
    assert [len(points.split()) for points in drawn] == [100, 100]
    # The trained encoder is drawn last, on top; from 0 at 250 to 1 at 10 pixels from above.
    curve = metrics["recall_curves"]["trained"]
    heights = [250 - 240 * share for share in curve]
    points = [tuple(map(float, point.split(","))) for point in drawn[1].split()]
    assert [y for _, y in points] == pytest.approx(heights, abs=0.06)
    # On the axis of K equal factors are equally far apart.
    left, ten, right = points[0][0], points[9][0], points[99][0]
    assert ten == pytest.approx((left + right) / 2, abs=0.1)
    for k in (1, 20, 100):
        assert f"{curve[k - 1]:.3f}" in page.text


def test_bars_tell_their_interval_and_the_best_baseline():
    metrics = small_metrics()
    text = Page(small_page(metrics=metrics)).text
    name = f"category: {EVIL}"
    low, high = metrics["intervals"][name]["R@1"]
    best = metrics["baselines"]["title_overlap"][name]["R@1"]
    assert f", 95% interval {low:.3f}–{high:.3f}, best baseline {best:.3f}" in text
    assert "R@1 by category" in text
    low, high = metrics["system_intervals"]["title_overlap"]["warm"]["R@1"]
    assert text.count(f"{low:.3f}–{high:.3f}") >= 2  # in the table and beside its bar


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_pictures_are_made_small_and_counted(kind):
    large = io.BytesIO()
    Image.new("RGB", (1600, 900), (9, 99, 9)).save(large, kind)
    page = Page(small_page(galleries={"best": [card(right=0, image=large.getvalue())]}))
    prefix = "data:image/jpeg;base64,"
    for image in page.attributes("img"):
        with Image.open(io.BytesIO(base64.b64decode((image["src"] or "")[len(prefix) :]))) as small:
            assert (small.format, small.size) == ("JPEG", (176, 99))
    assert "9 pictures of at most 176 pixels" in page.text


def test_picture_that_does_not_decode_becomes_a_grey_square():
    page = Page(small_page(galleries={"best": [card(right=0, image=b"noise" * 50)]}))
    data = (page.attributes("img")[0]["src"] or "").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as grey:
        assert grey.size == (32, 32)


def test_right_and_wrong_are_said_in_words():
    text = Page(small_page()).text
    assert text.count("✓ right") == 1
    assert text.count("✗ wrong") == 9
    assert "✓ Right at place 2, margin +0.125" in text
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
    html = small_page(facts={}, curves=[], galleries={}, metrics=bare)
    page = Page(html)
    assert page.open == []
    assert [section["id"] for section in page.attributes("section")] == ["results"]


def curve_page(curve: Curve) -> Page:
    """A page whose only drawing is this curve."""
    metrics = small_metrics()
    del metrics["recall_curves"]
    return Page(small_page(curves=[curve], metrics=metrics))


def svg_points(curve: Curve) -> list[tuple[float, float]]:
    drawn = curve_page(curve).attributes("polyline")
    numbers = re.findall(r"([-\d.]+),([-\d.]+)", drawn[0]["points"] or "")
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
    page = curve_page(Curve(name="x", steps=[1], values=[float("nan")]))
    assert not page.attributes("svg")


def test_long_curve_is_thinned_but_keeps_its_range():
    values = [1.0] * 5000
    values[2501] = 9.0
    curve = Curve(name="loss", steps=list(range(5000)), values=values)
    points = svg_points(curve)
    assert len(points) <= 240
    band = curve_page(curve).attributes("polygon")[0]["points"] or ""
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
    ticks = lines._y_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert lines._tick_texts(ticks) == expected


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
    first = picture._products_left()
    middle = picture._HEADER_HEIGHT + 14 + picture._PRODUCT // 2
    red, green, _ = pixels[middle, first + 1]
    assert green > 2 * red
    red, green, _ = pixels[middle, first + picture._PRODUCT + 8 + 1]
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
