"""Frontier: what tuning measured of each candidate, as a table, as frontier.json and as frontier.png."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import ImageDraw

from mmrec.drawing import (
    COLORS,
    INK,
    LINE,
    SOFT,
    draw_dot,
    draw_line,
    draw_text,
    new_picture,
    round_ticks,
    short_number,
    write_picture,
)
from mmrec.manifest import write_whole
from mmrec.retrieval.candidates import LeftOut

JSON, PICTURE = "frontier.json", "frontier.png"
_WIDTH, _HEIGHT = 900, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 290, 48, 44

Parameters = dict[str, float]
"""nprobe: lists probed; efSearch: candidates of a graph; k_factor: matches refined for each one wanted."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Search parameters and what they give."""

    parameters: Parameters
    recall: float
    qps: float
    """Queries a second in batches."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A candidate that was built and searched."""

    name: str
    """Its kind: the factory string without the number of lists."""
    factory: str
    products: int
    """How many it was measured on."""
    settings: list[Setting]
    """All that were tried, in their order; speeds of one pass."""
    setting: Setting
    """The fastest that reaches the target, or the one that finds most, measured again.

    Its speed is a median of passes, its recall that of queries that had no part in the choice, where
    there are enough.
    """
    margin: float
    """Half of the 95% interval of that recall."""
    reached: bool
    """Whether it reaches the target within the budget: by the queries that chose, and, as far as
    the intervals of both tell, by the others."""
    fits: bool
    """Whether its measured size is within the budget."""
    given_up: bool
    """Whether the sweep ended early, since another that reaches the target is more than twice as fast."""
    qps_of_all: float
    """Queries a second of the whole catalogue: extrapolated where it was measured on a sample."""
    p50_ms: float
    """Of a query that comes alone."""
    p99_ms: float
    bytes_per_vector: float
    build_s: float

    def line(self, k: int) -> str:
        """What was measured, in words."""
        short = (
            "" if self.reached else (" (below the target)" if self.fits else " (over the budget)")
        )
        return (
            f"{self.factory}: recall@{k} {self.setting.recall:.4f} +- {self.margin:.4f}{short} at "
            f"{named(self.setting.parameters)}: {self.setting.qps:,.0f} queries/s, a single one "
            f"{self.p50_ms:.2f} ms, {self.bytes_per_vector:,.0f} bytes a vector, built in "
            f"{self.build_s:,.1f} s"
        )

    def _shortfall(self) -> str:
        if self.reached:
            return ""
        if not self.fits:
            return " (over the budget)"
        return " (below the target, given up as slow)" if self.given_up else " (below the target)"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What was measured, what was not, and what was taken."""

    recall_target: float
    k: int
    memory_budget: int | None
    """Bytes; None is no limit."""
    products: int
    sample: int
    """Products that candidates were measured on."""
    queries: int
    threads: int
    seed: int
    measured: list[Measured]
    left_out: list[LeftOut]
    taken: Measured
    """Measured on all products."""

    def lines(self) -> list[str]:
        """A table of the candidates, best first, and what was taken."""
        rows = [
            ("index", f"recall@{self.k}", "queries/s", "p50 ms", "bytes/vector", "build s", "at")
        ]
        rows += [_row(one, self.sample < self.products) for one in ranked(self.measured)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [_aligned(row, widths) for row in rows]
        if self.sample < self.products:
            table.append(
                f"measured on {self.sample:,} of {self.products:,}; ~ is extrapolated to all"
            )
        found = "taken" if self.taken.reached else f"nothing reaches {self.recall_target}; the best"
        table.append(f"{found}: {self.taken.line(self.k)}")
        table.append(f"{self.queries:,} queries; +- is the 95% interval of their recall")
        table.append(
            "the clock decides among those that reach the target: another run may take another"
        )
        return table

    def to_dict(self) -> dict[str, Any]:
        """For frontier.json and the manifest."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Write frontier.json and frontier.png."""
        write_whole(folder / JSON, json.dumps(self.to_dict(), indent=2) + "\n")
        draw_frontier(self, folder / PICTURE)


def remove_frontier(folder: Path) -> None:
    """Remove what an earlier tuning left: it would be taken for that of another index."""
    for name in (JSON, PICTURE):
        (folder / name).unlink(missing_ok=True)


def ranked(measured: Sequence[Measured]) -> list[Measured]:
    """Best first: what reaches the target by speed, then the rest by recall, over budget last."""
    return sorted(
        measured,
        key=lambda one: (
            (0, -one.qps_of_all) if one.reached else (1 if one.fits else 2, -one.setting.recall)
        ),
    )


def undominated(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that no other beats in both recall and speed, in the order of recall."""
    found: list[Setting] = []
    for setting in sorted(settings, key=lambda setting: (-setting.recall, -setting.qps)):
        if not found or setting.qps > found[-1].qps:
            found.append(setting)
    return found[::-1]


def named(parameters: Parameters) -> str:
    """Search parameters in words."""
    return ", ".join(f"{name} {value:g}" for name, value in parameters.items()) or "nothing to set"


def _row(one: Measured, extrapolated: bool) -> tuple[str, ...]:
    return (
        one.factory,
        f"{one.setting.recall:.4f} +-{one.margin:.4f}" + ("" if one.reached else " *"),
        f"{'~' if extrapolated else ''}{one.qps_of_all:,.0f}",
        f"{one.p50_ms:.2f}",
        f"{one.bytes_per_vector:,.0f}",
        f"{one.build_s:,.1f}",
        named(one.setting.parameters),
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *numbers, last = row
    cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join([f"{first:<{widths[0]}}", *cells, last]).rstrip()


def draw_frontier(frontier: Frontier, path: Path) -> None:
    """Draw recall against queries a second, a curve for each candidate, a dot at the one taken."""
    canvas, draw = new_picture(_WIDTH, _HEIGHT)
    axes = _axes(frontier)
    _draw_axes(draw, axes, frontier)
    for number, one in enumerate(frontier.measured):
        color = COLORS[number % len(COLORS)]
        draw_line(draw, [axes.place(setting) for setting in undominated(one.settings)], color)
        for setting in one.settings:
            draw_dot(draw, axes.place(setting), color, 2)
        draw_text(draw, _legend(number), one.factory, 12, color, "lm")
    draw_dot(draw, axes.place(frontier.taken.setting), INK, 5)
    last = len(frontier.measured)
    draw_text(draw, _legend(last), "large dot: what was taken, of all", 12, INK, "lm")
    draw_text(draw, _legend(last + 1), "upright line: the target", 12, SOFT, "lm")
    write_picture(canvas, path)


@dataclass(frozen=True)
class _Axes:
    """Where recall and speed lie on the picture."""

    recalls: list[float]
    """Ticks of the lower axis."""
    powers: range
    """Powers of ten on the left one."""

    def place(self, setting: Setting) -> tuple[float, float]:
        across = (setting.recall - self.recalls[0]) / (self.recalls[-1] - self.recalls[0])
        up = (_power(setting) - self.powers[0]) / (self.powers[-1] - self.powers[0])
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + across * width, _HEIGHT - _BOTTOM - up * height


def _axes(frontier: Frontier) -> _Axes:
    settings = [setting for one in frontier.measured for setting in one.settings]
    settings.append(frontier.taken.setting)
    lowest = min(setting.recall for setting in settings)
    recalls = round_ticks(min(lowest, frontier.recall_target), 1.0)
    powers = [_power(setting) for setting in settings]
    low = math.floor(min(powers))
    return _Axes(recalls, range(low, max(math.ceil(max(powers)), low + 1) + 1))


def _power(setting: Setting) -> float:
    return math.log10(max(setting.qps, 1e-3))


def _legend(number: int) -> tuple[int, int]:
    return _WIDTH - _RIGHT + 18, _TOP + 18 * number


def _draw_axes(draw: ImageDraw.ImageDraw, axes: _Axes, frontier: Frontier) -> None:
    bottom = _HEIGHT - _BOTTOM
    for power in axes.powers:
        _, y = axes.place(Setting(parameters={}, recall=1.0, qps=10.0**power))
        draw_line(draw, [(_LEFT, y), (_WIDTH - _RIGHT, y)], LINE, 1)
        draw_text(draw, (_LEFT - 8, y), short_number(10.0**power), 12, SOFT, "rm")
    for recall in axes.recalls:
        x, _ = axes.place(Setting(parameters={}, recall=recall, qps=1.0))
        draw_text(draw, (x, bottom + 14), short_number(recall), 12, SOFT, "mm")
    x, _ = axes.place(Setting(parameters={}, recall=frontier.recall_target, qps=1.0))
    draw_line(draw, [(x, _TOP), (x, bottom)], SOFT, 1)
    title = f"queries a second over recall@{frontier.k}, {frontier.sample:,} products"
    draw_text(draw, (_LEFT, _TOP - 24), title, 15, INK, "lm")
