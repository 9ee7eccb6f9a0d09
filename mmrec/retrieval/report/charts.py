"""Bars and recall curves of an evaluation, and differences of runs.

Bars are boxes, not SVG, so that their labels keep the page's text size on a small screen. Every bar has
its value in words beside it, every drawing a text that says what it shows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mmrec.retrieval.report.page import count_of, heading, range_text, readable, table
from mmrec.retrieval.report.tables import (
    TRAINED,
    best_baseline,
    interval_of,
    slice_groups,
    systems_of,
    value_of,
)

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 40
_TICKS = (1, 2, 5, 10, 20, 50, 100)
# Lines differ in colour and in their dashes; more than these begin anew.
NUM_STYLES = 9


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a chart."""

    label: str
    value: float
    interval: Sequence[float] | None = None
    small: str = ""
    """Further words under the label."""
    mark: float | None = None
    """Another value, shown as a tick; its words are in the chart's caption."""
    kind: str = TRAINED


def system_bars(metrics: Mapping[str, Any], metric: str) -> str:
    """Bars of the encoder and the baselines, warm above cold."""
    names = [name for name in ("warm", "cold") if name in metrics["slices"]] or ["all"]
    groups = {
        name: [
            Bar(
                label=system,
                value=means[metric],
                interval=interval_of(metrics, system, name, metric),
                kind=TRAINED if system == TRAINED else "baseline",
            )
            for system, means in systems_of(metrics, name)
        ]
        for name in names
    }
    return bar_chart(metric, groups)


def column_bars(metrics: Mapping[str, Any], metric: str = "R@1") -> str:
    """A chart for each column that was sliced by: its values, and the best baseline as a tick."""
    charts = []
    for column, names in slice_groups(metrics).items():
        bars = []
        for name in names:
            means, best = metrics["slices"][name], best_baseline(metrics, name, metric)
            bars.append(
                Bar(
                    label=value_of(name),
                    value=means[metric],
                    interval=interval_of(metrics, TRAINED, name, metric),
                    small=count_of(means["queries"]),
                    mark=best[1] if best else None,
                )
            )
        charts.append(bar_chart(f"{metric} by {column}", {"": bars}))
    return "".join(charts)


def bar_chart(caption: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Bars from 0 to a round value; groups with a name have a heading."""
    bars = [bar for group in groups.values() for bar in group]
    ends = [bar.interval[1] for bar in bars if bar.interval]
    marks = [bar.mark for bar in bars if bar.mark is not None]
    top = _round_up(max([*ends, *marks, *(bar.value for bar in bars)]))
    told = f"bars from 0 to {top:g}"
    told += "; line: 95% interval" if ends else ""
    told += "; tick: best baseline" if marks else ""
    body = "".join(
        (f"<h3>{heading(name)}</h3>" if name else "")
        + f"<ul>{''.join(_bar(bar, top) for bar in group)}</ul>"
        for name, group in groups.items()
    )
    return (
        f'<figure class="bars"><figcaption>{escape(caption)} <small>{told}</small></figcaption>'
        f"{body}</figure>"
    )


def _bar(bar: Bar, top: float) -> str:
    whisker = mark = ""
    if bar.interval:
        low, high = (100 * end / top for end in bar.interval)
        whisker = f'<i class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
    if bar.mark is not None:
        mark = f'<i class="tick" style="left:{100 * bar.mark / top:.2f}%"></i>'
    small = f"<small>{escape(bar.small)}</small>" if bar.small else ""
    spoken = f", 95% interval {range_text(bar.interval)}" if bar.interval else ""
    spoken += f", best baseline {bar.mark:.3f}" if bar.mark is not None else ""
    return (
        f'<li><span class="label">{readable(bar.label)}{small}</span>'
        f'<span class="track" aria-hidden="true">'
        f'<i class="{bar.kind}" style="width:{100 * bar.value / top:.2f}%"></i>{whisker}{mark}</span>'
        f'<span>{bar.value:.3f}<span class="spoken">{spoken}</span></span></li>'
    )


def _round_up(value: float) -> float:
    """The least tenth (below 0.1 the least hundredth) that holds the value."""
    step = 0.1 if value > 0.1 else 0.01
    return max(step, math.ceil(value / step - 1e-9) * step)


# Recall curves


def recall_chart(curves: Mapping[str, Sequence[float]]) -> str:
    """R@K over K on a logarithmic axis, one line a system, with a legend and the figures as a table."""
    curves = {name: curve for name, curve in curves.items() if len(curve)}
    if not curves:
        return ""
    longest = max(map(len, curves.values()))
    spoken = "; ".join(
        f"{name}: {curve[0]:.3f} at 1, {curve[-1]:.3f} at {len(curve)}"
        for name, curve in curves.items()
    )
    # The first is drawn last, so that it lies on top.
    numbered = list(enumerate(curves.values()))
    lines = "".join(_recall_line(curve, longest, number) for number, curve in reversed(numbered))
    legend = "".join(
        f'<li><svg viewBox="0 0 34 8" aria-hidden="true"><line class="r{number % NUM_STYLES}" '
        f'x1="1" x2="33" y1="4" y2="4"/></svg>{readable(name)}</li>'
        for number, name in enumerate(curves)
    )
    return (
        '<figure class="recall"><figcaption>Recall: queries with a right product within the first K '
        f'<small>K from 1 to {longest}</small></figcaption><div class="drawing">'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Recall curves. '
        f'{escape(spoken)}">{_recall_axes(longest)}{lines}</svg>'
        f'<ul class="legend">{legend}</ul></div>'
        f"<details><summary>Recall in figures</summary>{_recall_table(curves, longest)}</details>"
        "</figure>"
    )


def _recall_axes(longest: int) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>'
        )
    for k in (k for k in _TICKS if k <= longest):
        parts.append(
            f'<text x="{_x(k, longest):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{k}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">K</text>')
    return "".join(parts)


def _recall_line(curve: Sequence[float], longest: int, number: int) -> str:
    points = " ".join(f"{_x(k, longest):.1f},{_y(value):.1f}" for k, value in enumerate(curve, 1))
    return f'<polyline class="r{number % NUM_STYLES}" points="{points}"/>'


def _x(k: int, longest: int) -> float:
    return _LEFT + math.log(k) / math.log(max(2, longest)) * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _recall_table(curves: Mapping[str, Sequence[float]], longest: int) -> str:
    ticks = [k for k in _TICKS if k <= longest]
    rows = "".join(
        f'<tr><th scope="row">{readable(name)}</th>'
        + "".join(f"<td>{curve[k - 1]:.3f}</td>" if k <= len(curve) else "<td></td>" for k in ticks)
        + "</tr>"
        for name, curve in curves.items()
    )
    columns = ("System", *(f"R@{k}" for k in ticks))
    return table("Recall, all queries", columns, [f"<tbody>{rows}</tbody>"])


# Differences of runs


def difference_chart(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Differences as points with their intervals, to the left and right of 0.

    Of each row: "label", "difference", "low", "high", and "verdict", which stands beside it in words.
    """
    reach = max((max(abs(row["low"]), abs(row["high"])) for row in rows), default=0.0)
    reach = max(reach, 1e-6)
    items = "".join(_difference(row, reach) for row in rows)
    return (
        f'<figure class="bars differences"><figcaption>{escape(caption)} <small>from {-reach:+.3f} to '
        f"{reach:+.3f}; middle: no difference; line: 95% interval</small></figcaption>"
        f"<ul>{items}</ul></figure>"
    )


def _difference(row: Mapping[str, Any], reach: float) -> str:
    def place(value: float) -> float:
        return 50 + 50 * value / reach

    low, high, middle = place(row["low"]), place(row["high"]), place(row["difference"])
    return (
        f'<li><span class="label">{escape(row["label"])}</span><span class="track" aria-hidden="true">'
        f'<i class="zero"></i><i class="whisker" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
        f'<i class="point" style="left:{middle:.2f}%"></i></span>'
        f"<span>{row['difference']:+.3f}<small>{escape(row['verdict'])}</small>"
        f'<span class="spoken">, 95% interval {row["low"]:+.3f} to {row["high"]:+.3f}</span></span></li>'
    )
