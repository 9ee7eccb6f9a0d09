"""What a run is shown as: one self-contained HTML page, and one picture for a README.

The page holds its style, charts and images inline and asks nothing of any host; its own content
policy forbids it. It needs no script, follows the reader's light or dark setting, prints, and says
in words whatever it says in colour. Every text that comes from outside is escaped.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mmrec.retrieval.metrics import METRIC_NAMES, systems

# The slices of the main table; all others go to the table of slices.
MAIN_SLICES = ("all", "warm", "cold")


@dataclass(frozen=True, kw_only=True)
class MatchedProduct:
    """One product that a query found."""

    product_id: str
    title: str | None
    score: float
    """Inner product with the query."""
    image: bytes
    """A JPEG."""
    right: bool
    """Whether the query's content links to it."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the product; the first three that are filled in are shown."""


@dataclass(frozen=True, kw_only=True)
class QueryCard:
    """One query and what it found, best first."""

    content_id: str
    title: str | None
    """None when the content has no title, or was asked for without it."""
    frames: Sequence[bytes]
    """JPEGs in the order of time."""
    slice: str
    """"warm" when a right product has training links, "cold" when none has."""
    right_titles: Sequence[str]
    """Titles of all the right products, shown when the query missed them."""
    matches: Sequence[MatchedProduct]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One number over the steps of a training run."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    """As many as steps; values that are not finite are left out of the line."""


def render_report(
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Any],
    curves: Sequence[Curve],
    cards: Sequence[QueryCard],
) -> str:
    """The whole page as text, to be written as UTF-8.

    `metrics` has the shape of `metrics.json`. `facts` says how the run was made (machine, date,
    wall time, commands, fingerprints); a value may have several lines. Parts without data are left
    out.
    """
    parts = {
        "Results": _results(metrics),
        "Slices": _slices(metrics),
        "Training": _training(curves),
        "Matches": _gallery(cards),
        "How it was made": _facts(facts),
    }
    parts = {heading: body for heading, body in parts.items() if body}
    links = " ".join(f'<a href="#{_anchor(heading)}">{heading}</a>' for heading in parts)
    sections = "\n".join(
        f'<section id="{_anchor(heading)}" aria-labelledby="{_anchor(heading)}-heading">\n'
        f'<h2 id="{_anchor(heading)}-heading">{heading}</h2>\n{body}\n</section>'
        for heading, body in parts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_headline(metrics)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _name(system: str) -> str:
    return escape(system.replace("_", " "))


# Headline


def _headline(metrics: Mapping[str, Any]) -> str:
    """One sentence that anybody can read, and a tile for each figure that matters."""
    first = metrics["slices"]["all"]["R@1"]
    sentence = (
        f"A right product comes first for <strong>{first:.1%}</strong> of "
        f"{metrics['queries']:,} queries, searched in all {metrics['gallery']:,} products."
    )
    best = _best_baseline(metrics, "all", "R@1")
    if best:
        sentence += f" {_name(best[0]).capitalize()}, which learns nothing, gets {best[1]:.1%}."
    wanted = [("all", "R@1"), ("all", "R@10"), ("all", "MRR"), ("cold", "R@10")]
    tiles = [_tile(metrics, *tile) for tile in wanted if tile[0] in metrics["slices"]]
    return f'<p class="lead">{sentence}</p>\n<ul class="tiles">{"".join(tiles)}</ul>'


def _tile(metrics: Mapping[str, Any], slice_name: str, metric: str) -> str:
    value = metrics["slices"][slice_name][metric]
    interval = metrics["intervals"].get(slice_name, {}).get(metric)
    label = metric if slice_name == "all" else f"{metric}, {slice_name} products"
    notes = [f'95% interval <span class="range">{_range(interval)}</span>'] if interval else []
    best = _best_baseline(metrics, slice_name, metric)
    if best:
        notes.append(f"best baseline {best[1]:.3f} ({_name(best[0])})")
    lines = "".join(f"<small>{note}</small>" for note in notes)
    return f'<li><span class="label">{escape(label)}</span><b>{value:.3f}</b>{lines}</li>'


def _best_baseline(
    metrics: Mapping[str, Any], slice_name: str, metric: str
) -> tuple[str, float] | None:
    scores = [
        (summary[slice_name][metric], name)
        for name, summary in metrics["baselines"].items()
        if slice_name in summary
    ]
    value, name = max(scores, default=(0.0, ""))
    return (name, value) if name else None


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f}\u2013{interval[1]:.3f}"


# Results


def _results(metrics: Mapping[str, Any]) -> str:
    """The main table, what its words mean, and bars for warm and cold."""
    names = [name for name in MAIN_SLICES if name in metrics["slices"]]
    head = "".join(f'<th scope="col">{metric}</th>' for metric in METRIC_NAMES)
    bodies = "".join(_result_rows(metrics, name) for name in names)
    note = (
        "R@K: share of queries with a right product within the first K. MRR: mean of 1 / rank of "
        "the first right product. nDCG@10: the first ten, weighted by place, against the best "
        "order. A product that ties with a right one stands before it. Warm: a right product has "
        "training links; cold: none has. Small figures are 95% bootstrap intervals over queries."
    )
    caption = (
        f"{metrics['queries']:,} queries against the whole catalogue of {metrics['gallery']:,} "
        "products, by exact search"
    )
    table = (
        '<table class="results"><thead><tr><th scope="col">System</th>'
        f"{head}</tr></thead>{bodies}</table>"
    )
    bars = "".join(_bar_chart(metrics, metric) for metric in ("R@1", "R@10"))
    return (
        f'<p class="note">{caption}.</p>\n{_scrolling(table, "Results")}\n'
        f'<p class="note">{note}</p>\n'
        f'<div class="charts">{bars}</div>'
    )


def _scrolling(table: str, label: str) -> str:
    """A wide table in a box of its own that scrolls, also by keyboard."""
    return (
        f'<div class="scroll" role="region" aria-label="{label} table" tabindex="0">{table}</div>'
    )


def _systems(metrics: Mapping[str, Any], slice_name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The encoder, the encoder with half of each query, then each baseline, on one slice."""
    return [
        (name, summary[slice_name])
        for name, summary in systems(metrics).items()
        if slice_name in summary
    ]


def _result_rows(metrics: Mapping[str, Any], slice_name: str) -> str:
    found = _systems(metrics, slice_name)
    best = {metric: max(means[metric] for _, means in found) for metric in METRIC_NAMES}
    rows = []
    for system, means in found:
        trained = system == "trained"
        intervals = metrics["intervals"].get(slice_name, {}) if trained else {}
        cells = "".join(
            _figure_cell(means[metric], means[metric] == best[metric], intervals.get(metric))
            for metric in METRIC_NAMES
        )
        kind = ' class="trained"' if trained else ""
        rows.append(f'<tr{kind}><th scope="row">{_name(system)}</th>{cells}</tr>')
    count = metrics["slices"][slice_name]["queries"]
    group = (
        f'<tr class="group"><th scope="rowgroup" colspan="{len(METRIC_NAMES) + 1}">'
        f"{escape(slice_name)} <small>{count:,} queries</small></th></tr>"
    )
    return f"<tbody>{group}{''.join(rows)}</tbody>"


def _figure_cell(value: float, best: bool, interval: Sequence[float] | None) -> str:
    figure = f"<b>{value:.3f}</b>" if best else f"{value:.3f}"
    small = f"<small>{_range(interval)}</small>" if interval else ""
    return f"<td>{figure}{small}</td>"


def _bar_chart(metrics: Mapping[str, Any], metric: str) -> str:
    """Bars of the encoder and the baselines, warm above cold.

    The bars are boxes, not SVG, so that their labels keep the page's text size on a small screen.
    """
    names = [name for name in ("warm", "cold") if name in metrics["slices"]] or ["all"]
    highs = [metrics["intervals"].get(name, {}).get(metric, (0.0, 0.0))[1] for name in names] + [
        means[metric] for name in names for _, means in _systems(metrics, name)
    ]
    top = _round_up(max(highs))
    groups = []
    for name in names:
        rows = "".join(
            _bar(system, means[metric], _interval_of(metrics, system, name, metric), top)
            for system, means in _systems(metrics, name)
        )
        groups.append(f"<h3>{name}</h3><ul>{rows}</ul>")
    return (
        f'<figure class="bars"><figcaption>{metric} <small>bars from 0 to {top:g}; line: 95% '
        f"interval</small></figcaption>{''.join(groups)}</figure>"
    )


def _interval_of(
    metrics: Mapping[str, Any], system: str, slice_name: str, metric: str
) -> Sequence[float] | None:
    return metrics["intervals"].get(slice_name, {}).get(metric) if system == "trained" else None


def _bar(system: str, value: float, interval: Sequence[float] | None, top: float) -> str:
    kind = "trained" if system == "trained" else "baseline"
    whisker = ""
    if interval:
        low, high = (100 * end / top for end in interval)
        whisker = f'<i class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
    return (
        f'<li><span>{_name(system)}</span><span class="track" aria-hidden="true">'
        f'<i class="{kind}" style="width:{100 * value / top:.2f}%"></i>{whisker}</span>'
        f"<span>{value:.3f}</span></li>"
    )


def _round_up(value: float) -> float:
    """The least tenth (below 0.1 the least hundredth) that holds the value."""
    step = 0.1 if value > 0.1 else 0.01
    return max(step, math.ceil(value / step - 1e-9) * step)


# Slices


def _slices(metrics: Mapping[str, Any]) -> str:
    """Every other slice of the evaluation: category, popularity, missing modality."""
    names = [name for name in metrics["slices"] if name not in MAIN_SLICES]
    if not names:
        return ""
    rows = "".join(_slice_row(metrics, name) for name in names)
    columns = ("Slice", "Queries", "R@1", "95% interval", "R@10", "MRR", "Best baseline R@1")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return (
        '<p class="note">The trained encoder on parts of the queries.</p>\n'
        f"{_scrolling(table, 'Slices')}"
    )


def _slice_row(metrics: Mapping[str, Any], name: str) -> str:
    means = metrics["slices"][name]
    interval = metrics["intervals"].get(name, {}).get("R@1")
    best = _best_baseline(metrics, name, "R@1")
    bar = f'<i class="meter" aria-hidden="true"><i style="width:{100 * means["R@1"]:.1f}%"></i></i>'
    return (
        f'<tr><th scope="row">{_name(name)}</th><td>{means["queries"]:,}</td>'
        f"<td>{bar}{means['R@1']:.3f}</td>"
        f"<td>{_range(interval) if interval else ''}</td>"
        f"<td>{means['R@10']:.3f}</td><td>{means['MRR']:.3f}</td>"
        f"<td>{f'{best[1]:.3f} <small>{_name(best[0])}</small>' if best else ''}</td></tr>"
    )


# Training curves

_CHART_WIDTH, _CHART_HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 40
Scale = Callable[[float], float]
"""From a value to its place in the drawing."""
# A line of more points than this is drawn as means of equal runs of points, over their range.
_MAX_POINTS = 240


def _training(curves: Iterable[Curve]) -> str:
    charts = [_line_chart(curve) for curve in curves]
    charts = [chart for chart in charts if chart]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _line_chart(curve: Curve) -> str:
    """One curve as an SVG with axes; an empty text when it has no finite value."""
    points = [
        (float(step), float(value))
        for step, value in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(value)
    ]
    if not points:
        return ""
    steps, values = zip(*points, strict=True)
    ticks = _y_ticks(min(values), max(values))
    x_low, x_high, x_ticks = _x_range(min(steps), max(steps))

    def x(step: float) -> float:
        return _LEFT + (step - x_low) / (x_high - x_low) * (_CHART_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _CHART_HEIGHT - _BOTTOM - share * (_CHART_HEIGHT - _TOP - _BOTTOM)

    axes = _x_axis(x_ticks, x)
    axes += _y_axis(ticks, y)
    lines = _band(points, x, y) if len(points) > _MAX_POINTS else _line(points, x, y)
    spoken = (
        f"{curve.name}: {_short(values[0])} at step {steps[0]:,.0f}, {_short(values[-1])} at step "
        f"{steps[-1]:,.0f}, lowest {_short(min(values))}, highest {_short(max(values))}"
    )
    return (
        f'<figure class="curve"><figcaption>{escape(curve.name)} '
        f"<small>last {_short(values[-1])}</small></figcaption>"
        f'<svg viewBox="0 0 {_CHART_WIDTH} {_CHART_HEIGHT}" role="img" '
        f'aria-label="{escape(spoken)}">{axes}{lines}</svg></figure>'
    )


def _x_axis(ticks: Sequence[float], x: Scale) -> str:
    bottom = _CHART_HEIGHT - _BOTTOM
    marks = "".join(
        f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'
        for tick, text in zip(ticks, _tick_texts(ticks), strict=True)
    )
    middle = (_LEFT + _CHART_WIDTH - _RIGHT) / 2
    return f'{marks}<text x="{middle}" y="{_CHART_HEIGHT - 6}" text-anchor="middle">step</text>'


def _y_axis(ticks: Sequence[float], y: Scale) -> str:
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_CHART_WIDTH - _RIGHT}" y1="{y(tick):.1f}" '
        f'y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
        for tick, text in zip(ticks, _tick_texts(ticks), strict=True)
    )


def _line(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    line = f'<polyline class="line" points="{path}"/>'
    # Few points are measurements, not a stream: mark where they were taken.
    marked = points if len(points) <= 30 else []
    dots = (f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6"/>' for step, value in marked)
    return line + "".join(dots)


def _band(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    """A long noisy curve: the range of each run of points, and the line of their means."""
    size = math.ceil(len(points) / _MAX_POINTS)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    means, lows, highs = [], [], []
    for run in runs:
        steps, values = zip(*run, strict=True)
        step = sum(steps) / len(run)
        means.append((step, sum(values) / len(run)))
        lows.append((step, min(values)))
        highs.append((step, max(values)))
    outline = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in [*highs, *lows[::-1]])
    return f'<polygon class="band" points="{outline}"/>{_line(means, x, y)}'


def _x_range(first: float, last: float) -> tuple[float, float, list[float]]:
    """The steps that the axis spans and its ticks; step 2,999 is drawn up to 3,000."""
    last = max(last, first + 1)
    ticks = _ticks(first, last)
    slack = 0.03 * (last - first)
    ticks = [tick for tick in ticks if first - slack <= tick <= last + slack]
    return min(first, ticks[0]), max(last, ticks[-1]), ticks


def _y_ticks(low: float, high: float) -> list[float]:
    """Ticks that enclose the values, from 0 when the values come near it."""
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    if 0 < low < 0.4 * high:
        low = 0.0
    return _ticks(low, high)


def _ticks(low: float, high: float, target: int = 4) -> list[float]:
    """About `target` steps of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Equal decimals on all ticks of an axis; powers of ten for tiny ones, k for thousands."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    largest = max(map(abs, ticks))
    if largest < 0.001:
        return [f"{tick:.3g}".replace("e-0", "e-") for tick in ticks]
    if largest >= 10_000:
        return [f"{tick / 1000:g}k" if tick else "0" for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def _short(value: float) -> str:
    """Three significant digits: 0.400, 2.50e-5; whole numbers from 1,000 on."""
    if value == 0 or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.3g}".removesuffix(".").replace("e-0", "e-").replace("e+0", "e")


# Matches


def _gallery(cards: Sequence[QueryCard]) -> str:
    if not cards:
        return ""
    found = sum(any(match.right for match in card.matches) for card in cards)
    shown = max(len(card.matches) for card in cards)
    intro = (
        f'<p class="note">Queries shown: {len(cards)}, each with its first {shown} products. '
        f"With a right one among these: {found}.</p>"
    )
    return intro + "\n".join(_card(card) for card in cards)


def _card(card: QueryCard) -> str:
    content = escape(card.content_id)
    frames = "".join(
        f'<li><img src="{_data_uri(frame)}" alt="Frame {place} of {len(card.frames)}"></li>'
        for place, frame in enumerate(card.frames, 1)
    )
    tiles = "".join(_product_tile(place, match) for place, match in enumerate(card.matches, 1))
    title = escape(card.title) if card.title else "<em>no title</em>"
    return (
        f'<article class="card"><div class="query"><h3>{title}</h3>'
        f'<p><span class="tag">{escape(card.slice)}</span> <small>{content}</small></p>'
        f'<ul class="frames">{frames}</ul>{_verdict(card)}</div>'
        f'<div class="arrow" aria-hidden="true"></div><ol class="matches">{tiles}</ol></article>'
    )


def _verdict(card: QueryCard) -> str:
    places = [place for place, match in enumerate(card.matches, 1) if match.right]
    if places:
        listed = ", ".join(map(str, places))
        return f'<p class="verdict right">\u2713 Right at place {listed}</p>'
    missed = ", ".join(escape(title) for title in card.right_titles) or "a product without a title"
    return (
        f'<p class="verdict wrong">\u2717 Missed in the first {len(card.matches)}</p>'
        f'<p class="sought">Right would be: {missed}</p>'
    )


def _product_tile(place: int, match: MatchedProduct) -> str:
    title = escape(match.title) if match.title else "<em>no title</em>"
    kind, sign = ("right", "\u2713 right") if match.right else ("wrong", "\u2717 wrong")
    filled = [(key, value) for key, value in match.attributes.items() if value not in (None, "")]
    attributes = "".join(f"<span>{escape(f'{key} {value}')}</span>" for key, value in filled[:3])
    return (
        f'<li class="{kind}"><div class="photo"><img src="{_data_uri(match.image)}" '
        f'alt="{escape(match.title or match.product_id)}">'
        f'<span class="badge">{sign}</span></div>'
        f'<p class="score"><span>{place}</span><span>{match.score:.3f}</span></p>'
        f'<p class="name">{title}</p>'
        + (f'<p class="attributes">{attributes}</p>' if attributes else "")
        + "</li>"
    )


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>' if rows else ""


_STYLE = """
:root {
  --paper: #ffffff; --panel: #f5f6f8; --ink: #16181d; --soft: #5b6270; --line: #dfe2e8;
  --accent: #2456c7; --accent-soft: #e8eefb; --muted: #a3abba;
  --right: #12754a; --wrong: #b0362c; --on-sign: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #111317; --panel: #1a1d23; --ink: #e9ebef; --soft: #a0a7b4; --line: #2d323b;
    --accent: #86abff; --accent-soft: #1b2540; --muted: #626b7b;
    --right: #4cc38a; --wrong: #f2877c; --on-sign: #0d0f12;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 48px 24px 80px; max-width: 1168px; background: var(--paper);
  color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "DejaVu Sans", sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
h1, h2, h3, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
ul, ol { list-style: none; }
h1 { font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; text-wrap: balance; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin-bottom: 16px; }
section { margin-top: 56px; scroll-margin-top: 16px; }
small, .note { color: var(--soft); font-size: 13px; }
small { font-weight: 400; }
b, strong { font-weight: 650; }
a { color: var(--accent); text-underline-offset: 3px; }
a:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
.lead { margin-top: 12px; max-width: 46em; font-size: 18px; color: var(--soft); }
.lead strong { color: var(--ink); }
nav { display: flex; flex-wrap: wrap; gap: 6px 20px; margin-top: 24px; font-size: 14px; }
.note { max-width: 58em; margin-top: 12px; }
h2 + .note { margin: -8px 0 12px; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px;
  margin-top: 28px; }
.tiles li { background: var(--panel); border-radius: 10px; padding: 16px 18px; }
.tiles .label { display: block; font-size: 13px; color: var(--soft); }
.tiles b { display: block; margin-bottom: 4px; font-size: 34px; line-height: 1.2;
  letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
.tiles small { display: block; line-height: 1.45; }
.range { white-space: nowrap; }

.scroll { overflow-x: auto; border-radius: 4px; }
table { width: 100%; border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child { position: sticky; left: 0; padding-left: 10px; text-align: left;
  background: var(--paper); }
th { font-weight: 400; }
thead th { border-bottom: 1px solid var(--ink); font-size: 13px; color: var(--soft); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 1px solid var(--line); }
.results small { display: block; font-size: 11px; }
.results .group th { padding-top: 18px; background: none; font-weight: 650;
  text-transform: capitalize; }
.results .group small { display: inline; margin-left: 6px; font-size: 13px; text-transform: none; }
.results .trained > * { background: var(--accent-soft); }
.results .trained th { color: var(--accent); font-weight: 650; }
.meter { display: inline-block; width: 96px; height: 8px; margin-right: 12px; border-radius: 2px;
  background: var(--line); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--accent); }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr));
  gap: 24px 28px; margin-top: 28px; }
h2 + .charts { margin-top: 0; }
figcaption { margin-bottom: 6px; font-weight: 650; }
figcaption small { margin-left: 6px; }
.bars { background: var(--panel); border-radius: 10px; padding: 16px 18px; }
.bars h3 { margin-top: 10px; font-size: 13px; font-weight: 400; color: var(--soft);
  text-transform: capitalize; }
.bars li { display: grid; grid-template-columns: 8.6em 1fr 3em; gap: 10px; align-items: center;
  font-size: 13px; font-variant-numeric: tabular-nums; padding: 2px 0; }
.bars li > span:first-child { overflow-wrap: anywhere; line-height: 1.3; }
.track { position: relative; height: 14px; border-left: 1px solid var(--soft); }
.track i { position: absolute; left: 0; top: 0; height: 100%; border-radius: 0 3px 3px 0; }
.track .trained { background: var(--accent); }
.track .baseline { background: var(--muted); }
.track .whisker { top: 6px; height: 2px; background: var(--ink); border-radius: 0; }

.curve svg { display: block; width: 100%; max-width: 480px; height: auto; overflow: visible; }
.curve text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--accent); opacity: 0.18; }
.curve circle { fill: var(--accent); }

.card { display: grid; grid-template-columns: minmax(0, 300px) 28px minmax(0, 1fr); gap: 16px;
  padding: 22px 0; border-top: 1px solid var(--line); break-inside: avoid; }
.note + .card { margin-top: 16px; }
.card h3 { font-size: 16px; line-height: 1.35; font-weight: 650; overflow-wrap: anywhere; }
.card em { color: var(--soft); font-weight: 400; }
.query > p { margin-top: 4px; overflow-wrap: anywhere; }
.tag { display: inline-block; padding: 0 8px; border: 1px solid var(--line); border-radius: 99px;
  color: var(--soft); font-size: 12px; line-height: 18px; }
.frames { display: grid; grid-template-columns: repeat(4, 1fr); gap: 4px; margin-top: 10px; }
.frames img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px;
  background: var(--panel); }
.query > .verdict { margin-top: 10px; font-size: 14px; font-weight: 650; }
.verdict.right { color: var(--right); }
.verdict.wrong { color: var(--wrong); }
.query > .sought { margin-top: 0; font-size: 14px; }
.arrow { align-self: start; margin-top: 92px; height: 2px; background: var(--muted);
  position: relative; }
.arrow::after { content: ""; position: absolute; right: 0; top: -4px; width: 10px; height: 10px;
  border: solid var(--muted); border-width: 2px 2px 0 0; transform: rotate(45deg); }
.matches { display: grid; gap: 14px 12px;
  grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
.photo { position: relative; border: 2px solid var(--line); border-radius: 8px; overflow: hidden;
  background: #ffffff; }
.photo img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; }
.right .photo { border-color: var(--right); box-shadow: 0 0 0 1px var(--right); }
.badge { position: absolute; left: 0; bottom: 0; padding: 1px 8px 2px; font-size: 12px;
  border-radius: 0 6px 0 0; line-height: 18px; }
.right .badge { background: var(--right); color: var(--on-sign); font-weight: 650; }
.wrong .badge { background: var(--paper); color: var(--wrong); }
.score { display: flex; justify-content: space-between; margin-top: 5px; color: var(--soft);
  font-size: 12px; font-variant-numeric: tabular-nums; }
.name { font-size: 13px; line-height: 1.35; overflow: hidden; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; line-clamp: 3; }
.attributes { margin-top: 2px; font-size: 12px; line-height: 1.4; color: var(--soft); }
.attributes span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }

.facts div { display: grid; grid-template-columns: 12em minmax(0, 1fr); gap: 4px 16px;
  padding: 9px 0; border-top: 1px solid var(--line); }
.facts dt { color: var(--soft); }
.facts dd { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }

@media screen and (max-width: 760px) {
  body { padding: 28px 16px 56px; }
  h1 { font-size: 26px; }
  .lead { font-size: 16px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tiles li { padding: 12px 14px; }
  .tiles b { font-size: 27px; }
  .card { grid-template-columns: minmax(0, 1fr); }
  .arrow { display: none; }
  .meter { display: none; }
  .matches { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .facts div { grid-template-columns: minmax(0, 1fr); }
}
@media print {
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 12px; }
  nav { display: none; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  section { margin-top: 28px; }
  h2, figcaption { break-after: avoid; }
  figure, tbody, tr, .tiles li { break-inside: avoid; }
  .note { break-after: avoid; }
  .scroll { overflow: visible; }
  th, td { padding: 4px 6px; }
  th:first-child { position: static; }
  .card { grid-template-columns: 200px 20px minmax(0, 1fr); }
  .matches { grid-template-columns: repeat(5, minmax(0, 1fr)); }
}
"""


# The picture

_PICTURE_WIDTH = 1200
_PICTURE_BYTES = 600_000
# Drawn at twice the size and reduced: this smooths the edges that Pillow leaves rough.
_SCALE = 2
_MARGIN, _FRAME, _PRODUCT, _ARROW = 28, 112, 118, 58
_NUM_FRAMES, _NUM_MATCHES = 4, 5
_ROW_HEIGHT = 204
_HEADER_HEIGHT = 60
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "DejaVuSans.ttf", "Arial.ttf")
_PAPER, _INK, _SOFT, _LINE = "#ffffff", "#16181d", "#5b6270", "#dfe2e8"
_RIGHT_COLOUR, _WRONG_COLOUR = "#12754a", "#b0362c"


def draw_picture(cards: Sequence[QueryCard], path: Path | str) -> None:
    """Draw queries and their first five matches as a PNG, 1,200 px wide and under 600 kB.

    Five or six cards read best. Plain Latin text is set in the font that Pillow carries, the same
    on every machine; other letters need a font of the system. Raises `ValueError` without cards.
    """
    if not cards:
        raise ValueError("no cards to draw")
    height = _HEADER_HEIGHT + _ROW_HEIGHT * len(cards)
    canvas = Image.new("RGB", (_PICTURE_WIDTH * _SCALE, height * _SCALE), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_text(draw, (_MARGIN, 22), "Query: a video's frames and title", 15, _SOFT)
    _draw_text(draw, (_products_left(), 22), "Products found, best first", 15, _SOFT)
    for row, card in enumerate(cards):
        _draw_card(canvas, draw, card, _HEADER_HEIGHT + row * _ROW_HEIGHT)
    canvas = canvas.resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    Path(path).write_bytes(_small_png(canvas))


def _products_left() -> int:
    return _PICTURE_WIDTH - _MARGIN - _NUM_MATCHES * _PRODUCT - (_NUM_MATCHES - 1) * 8


def _draw_card(canvas: Image.Image, draw: ImageDraw.ImageDraw, card: QueryCard, top: int) -> None:
    line = [value * _SCALE for value in (_MARGIN, top - 6, _PICTURE_WIDTH - _MARGIN, top - 6)]
    draw.line(line, fill=_LINE, width=_SCALE)
    picture_top = top + 14
    for place, frame in enumerate(_spread(card.frames, _NUM_FRAMES)):
        _paste(canvas, frame, (_MARGIN + place * (_FRAME + 6), picture_top), _FRAME, crop=True)
    width = _products_left() - _MARGIN - _ARROW
    title = _fit(card.title or "no title", 15, width)
    _draw_text(draw, (_MARGIN, picture_top + _FRAME + 10), title, 15, _INK if card.title else _SOFT)
    _draw_text(draw, (_MARGIN, picture_top + _FRAME + 32), _picture_verdict(card, width), 13, _SOFT)
    _draw_arrow(draw, _products_left() - _ARROW, picture_top + _FRAME // 2)
    for place, match in enumerate(card.matches[:_NUM_MATCHES]):
        left = _products_left() + place * (_PRODUCT + 8)
        _draw_match(canvas, draw, match, (left, picture_top))


def _draw_match(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, match: MatchedProduct, corner: tuple[int, int]
) -> None:
    left, top = corner
    border = 4 if match.right else 2
    colour = _RIGHT_COLOUR if match.right else _WRONG_COLOUR
    box = [side * _SCALE for side in (left, top, left + _PRODUCT, top + _PRODUCT)]
    draw.rounded_rectangle(box, radius=9 * _SCALE, fill=colour)
    size = _PRODUCT - 2 * border
    _paste(canvas, match.image, (left + border, top + border), size, crop=False)
    _draw_sign(draw, (left + _PRODUCT - 15, top + 15), match.right)
    _draw_text(draw, (left, top + _PRODUCT + 6), f"{match.score:.2f}", 12, _SOFT)
    for number, text in enumerate(_wrap(match.title or match.product_id, 12, _PRODUCT, 2)):
        _draw_text(draw, (left, top + _PRODUCT + 22 + 16 * number), text, 12, _INK)


def _draw_sign(draw: ImageDraw.ImageDraw, centre: tuple[int, int], right: bool) -> None:
    """A tick or a cross on a disc, drawn as lines: not every font has the characters."""
    x, y = (value * _SCALE for value in centre)
    unit = _SCALE
    colour = _RIGHT_COLOUR if right else _WRONG_COLOUR
    disc = (x - 11 * unit, y - 11 * unit, x + 11 * unit, y + 11 * unit)
    draw.ellipse(disc, fill=colour, outline=_PAPER, width=2 * unit)
    tick, cross = [[(-5, 0), (-1.5, 4), (5, -4)]], [[(-4, -4), (4, 4)], [(-4, 4), (4, -4)]]
    for stroke in tick if right else cross:
        points = [(x + dx * unit, y + dy * unit) for dx, dy in stroke]
        draw.line(points, fill=_PAPER, width=int(2.5 * unit), joint="curve")


def _draw_arrow(draw: ImageDraw.ImageDraw, left: int, middle: int) -> None:
    start, end, y = (left + 10) * _SCALE, (left + _ARROW - 12) * _SCALE, middle * _SCALE
    head = 7 * _SCALE
    draw.line([(start, y), (end - head, y)], fill=_SOFT, width=2 * _SCALE)
    draw.polygon([(end, y), (end - head, y - head // 2), (end - head, y + head // 2)], fill=_SOFT)


def _picture_verdict(card: QueryCard, width: int) -> str:
    if any(match.right for match in card.matches[:_NUM_MATCHES]):
        return f"{card.slice} product"
    missed = ", ".join(card.right_titles) or "a product without a title"
    return _fit(f"{card.slice} product, missed: {missed}", 13, width)


def _paste(
    canvas: Image.Image, jpeg: bytes, corner: tuple[int, int], size: int, *, crop: bool
) -> None:
    """Put an image into a square with round corners, cropped to fill it or padded with white."""
    square = (size * _SCALE, size * _SCALE)
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    if crop:
        image = ImageOps.fit(image, square, Image.Resampling.LANCZOS)
    else:
        image = ImageOps.pad(image, square, Image.Resampling.LANCZOS, color=_PAPER)
    mask = Image.new("L", square, 0)
    end = square[0] - 1
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, end, end), radius=6 * _SCALE, fill=255)
    canvas.paste(image, (corner[0] * _SCALE, corner[1] * _SCALE), mask)


def _spread(frames: Sequence[bytes], count: int) -> list[bytes]:
    """At most `count` of the frames, evenly spread over the video."""
    if len(frames) <= count:
        return list(frames)
    return [frames[int((place + 0.5) * len(frames) / count)] for place in range(count)]


def _font(size: int, text: str) -> Any:
    """Pillow's own font where it has the letters, else the first of the usual ones that is here."""
    if not text.isascii():
        for name in _WIDE_FONTS:
            try:
                return ImageFont.truetype(name, size * _SCALE)
            except OSError:
                continue
    return ImageFont.load_default(size * _SCALE)


def _draw_text(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, colour: str
) -> None:
    draw.text((corner[0] * _SCALE, corner[1] * _SCALE), text, fill=colour, font=_font(size, text))


def _fit(text: str, size: int, width: int) -> str:
    """The text, cut and ended with dots where it is wider than `width` px."""
    font = _font(size, text)
    if font.getlength(text) <= width * _SCALE:
        return text
    while text and font.getlength(text + "...") > width * _SCALE:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, size: int, width: int, num_lines: int) -> list[str]:
    """The text on at most `num_lines` lines, broken between words; the last line is cut to fit."""
    font = _font(size, text)
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < num_lines - 1:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width * _SCALE:
            line += " " + words.pop(0)
        lines.append(_fit(line, size, width))
    return [*lines, _fit(" ".join(words), size, width)] if words else lines


def _small_png(image: Image.Image) -> bytes:
    """Encode without loss if that is small enough, else in as many colours as the limit allows."""
    data = _png(image)
    for colours in (256, 192, 128, 96, 64, 32):
        if len(data) <= _PICTURE_BYTES:
            break
        plain = image.quantize(colours)
        # Dithering hides the steps between the colours, and costs bytes: try it first.
        dithered = image.quantize(palette=plain, dither=Image.Dither.FLOYDSTEINBERG)
        data = _png(_with_white(dithered, image))
        if len(data) > _PICTURE_BYTES:
            data = _png(_with_white(plain, image))
    return data


def _with_white(reduced: Image.Image, image: Image.Image) -> Image.Image:
    """Keep the paper pure white: a palette is made of averages, which give it a tint."""
    palette = reduced.getpalette() or []
    lightest = max(range(0, len(palette), 3), key=lambda start: sum(palette[start : start + 3]))
    palette[lightest : lightest + 3] = [255, 255, 255]
    white = image.convert("L").point(lambda level: 255 if level == 255 else 0)
    result = reduced.copy()
    result.putpalette(palette)
    result.paste(lightest // 3, mask=white)
    return result


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
