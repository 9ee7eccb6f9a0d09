"""Curves over the steps of a training run, as SVG."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

_CHART_WIDTH, _CHART_HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 10, 40
Scale = Callable[[float], float]
"""From a value to its place in the drawing."""
# A line of more points than this is drawn as means of equal runs of points, over their range.
_MAX_POINTS = 240


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One number over the steps of a training run."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    """As many as steps; values that are not finite are left out of the line."""


def training_charts(curves: Iterable[Curve]) -> str:
    """A chart for each curve that has a finite value."""
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
