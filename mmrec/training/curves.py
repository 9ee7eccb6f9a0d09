"""A run's curves, for a person who watches it: a PNG in the run folder, and a line of text each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageDraw

from mmrec.drawing import (
    COLORS,
    INK,
    LINE,
    SOFT,
    Number,
    draw_line,
    draw_text,
    new_picture,
    round_ticks,
    short_number,
    text_width,
    write_picture,
)

Rows = Sequence[Mapping[str, Any]]

_MEASURES = ("lr", "scale", "gradient_norm", "samples_per_s", "data_wait", "memory_gib", "mfu")
_NOT_DRAWN = ("step", "epoch")
_WIDTH, _HEIGHT, _COLUMNS = 600, 250, 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 20, 40, 34
_MOST_POINTS = 400
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class _Curve:
    name: str
    steps: np.ndarray
    values: np.ndarray


def draw_curves(rows: Rows, path: Path) -> None:
    """Draw the rows of metrics.jsonl as a PNG, 1,200 px wide: a panel for every kind of number.

    A long run's points are averaged to 400 a curve. Nothing is written where no row has a number.
    """
    panels = _panels(rows)
    if not panels:
        return
    height = _HEIGHT * math.ceil(len(panels) / _COLUMNS)
    canvas, draw = new_picture(_WIDTH * _COLUMNS, height)
    last = max(float(curve.steps[-1]) for curves in panels.values() for curve in curves)
    for number, (title, curves) in enumerate(panels.items()):
        row, column = divmod(number, _COLUMNS)
        _draw_panel(draw, title, curves, (column * _WIDTH, row * _HEIGHT), last_step=last)
    write_picture(canvas, path)


def summarize_curves(rows: Rows) -> list[str]:
    """Each loss, val metric and measure as a line of text: how it went, its first and last value."""
    curves = [curve for curves in _panels(rows).values() for curve in curves]
    width = max((len(curve.name) for curve in curves), default=0)
    ends = [[short_number(curve.values[place]) for place in (0, -1)] for curve in curves]
    return [
        f"{curve.name:<{width}}  {sparkline(curve.values)}  {first} -> {last}"
        for curve, (first, last) in zip(curves, ends, strict=True)
    ]


def sparkline(values: Sequence[Number] | np.ndarray, width: int = 24) -> str:
    """Numbers as a row of `width` bars between their least and their largest; a dot where none is finite."""
    array = np.asarray(values, float)
    if not len(array):
        return ""
    parts = np.array_split(array, min(width, len(array)))
    means = np.array([_finite_mean(part) for part in parts])
    known = means[np.isfinite(means)]
    if not len(known):
        return "·" * len(means)
    low, span = known.min(), max(known.max() - known.min(), 1e-12)
    levels = [round((m - low) / span * 7) if math.isfinite(m) else None for m in means]
    return "".join("·" if level is None else _BARS[level] for level in levels)


def _finite_mean(part: np.ndarray) -> float:
    part = part[np.isfinite(part)]
    return float(part.mean()) if len(part) else math.nan


def _panels(rows: Rows) -> dict[str, list[_Curve]]:
    names = {name for row in rows for name in row}
    losses = [n for n in names if n not in (*_MEASURES, *_NOT_DRAWN) and "/" not in n]
    losses.sort(key=lambda name: (name != "loss", name))
    # An objective that is the whole loss would lie on it.
    if len(losses) == 2 and _curve(rows, losses[0]) == _curve(rows, losses[1]):
        losses = losses[1:]
    val = [n for n in ("val/R@1", "val/R@5", "val/R@10", "val/MRR", "val/nDCG@10") if n in names]
    wanted = {
        "loss": losses,
        "val": val,
        "learning rate": ["lr"],
        "scale of similarities": ["scale"],
        "gradient norm": ["gradient_norm"],
        "samples a second": ["samples_per_s"],
        "share of time waiting for data": ["data_wait"],
        "memory, GiB": ["memory_gib"],
        "model FLOPs utilization": ["mfu"],
    }
    panels = {title: [_points(rows, n) for n in names] for title, names in wanted.items()}
    panels = {title: [c for c in curves if len(c.steps)] for title, curves in panels.items()}
    return {title: curves for title, curves in panels.items() if curves}


def _curve(rows: Rows, name: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[name])) for row in rows if name in row]


def _points(rows: Rows, name: str) -> _Curve:
    points = np.array(_curve(rows, name), float).reshape(-1, 2)
    parts = np.array_split(points, min(_MOST_POINTS, max(1, len(points))))
    points = np.array([part.mean(0) for part in parts if len(part)]).reshape(-1, 2)
    return _Curve(name.removeprefix("val/"), points[:, 0], points[:, 1])


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    title: str,
    curves: Sequence[_Curve],
    corner: tuple[int, int],
    *,
    last_step: Number,
) -> None:
    left, top = corner[0] + _LEFT, corner[1] + _TOP
    right, bottom = corner[0] + _WIDTH - _RIGHT, corner[1] + _HEIGHT - _BOTTOM
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    ticks = round_ticks(float(values.min()), float(values.max())) if len(values) else [0.0, 1.0]
    for tick in ticks:
        y = bottom - (tick - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)
        draw_line(draw, [(left, y), (right, y)], LINE, 1)
        draw_text(draw, (left - 8, y), short_number(tick), 12, SOFT, "rm")
    for step in (0, last_step / 2, last_step):
        x = left + (step / max(last_step, 1)) * (right - left)
        draw_text(draw, (x, bottom + 14), f"{step:,.0f}", 12, SOFT, "mm")
    draw_text(draw, (left, top - 22), title, 15, INK, "lm")
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        keep = np.isfinite(curve.values)
        x = left + curve.steps[keep] / max(last_step, 1) * (right - left)
        y = bottom - (curve.values[keep] - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)
        draw_line(draw, list(zip(x, y, strict=True)), color, 2)
    _draw_names(draw, curves, right, top - 22)


def _draw_names(
    draw: ImageDraw.ImageDraw, curves: Sequence[_Curve], right: Number, y: Number
) -> None:
    """Names of several curves in their colors, right-aligned above the panel."""
    if len(curves) < 2:
        return
    for number in reversed(range(len(curves))):
        name = curves[number].name.replace("_", " ")
        draw_text(draw, (right, y), name, 12, COLORS[number % len(COLORS)], "rm")
        right -= text_width(name, 12) + 14
