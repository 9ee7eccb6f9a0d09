"""Lines and words on a picture: what the plots of a run and of an index share.

Places are (x, y) in pixels of the finished picture, from its upper left corner.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmrec.data.storage import write_bytes_whole

Number = int | float
Point = tuple[Number, Number]

PAPER, INK, SOFT, LINE = "#ffffff", "#16181d", "#5b6270", "#e4e7ec"
COLORS = ("#2458c5", "#c0552b", "#12754a", "#8a3fa0", "#a07d00", "#3c8ea0")
_SCALE = 2
"""Drawn at twice the size and shrunk: Pillow's own lines have steps."""


def new_picture(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white picture, and what draws on it."""
    canvas = Image.new("RGB", (width * _SCALE, height * _SCALE), PAPER)
    return canvas, ImageDraw.Draw(canvas)


def write_picture(canvas: Image.Image, path: Path) -> None:
    """Shrink a picture to its size and write it as a PNG that is whole or not there."""
    size = (canvas.width // _SCALE, canvas.height // _SCALE)
    stream = io.BytesIO()
    canvas.resize(size, Image.Resampling.LANCZOS).save(stream, "PNG")
    write_bytes_whole(path, stream.getvalue())


def draw_line(
    draw: ImageDraw.ImageDraw, points: Sequence[Point], color: str, width: int = 2
) -> None:
    """A line through points; a dot where there is one point alone."""
    scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
    if len(scaled) == 1:
        draw_dot(draw, points[0], color, 2)
    draw.line(scaled, fill=color, width=width * _SCALE, joint="curve")


def draw_dot(draw: ImageDraw.ImageDraw, place: Point, color: str, radius: Number) -> None:
    """A filled circle."""
    x, y = (coordinate * _SCALE for coordinate in place)
    radius *= _SCALE
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def draw_text(
    draw: ImageDraw.ImageDraw, place: Point, text: str, size: int, color: str, anchor: str
) -> None:
    """Words; `anchor` as Pillow names it, such as "rm" for the middle of their right edge."""
    scaled = (place[0] * _SCALE, place[1] * _SCALE)
    draw.text(scaled, text, fill=color, font=_font(size), anchor=anchor)


def text_width(text: str, size: int) -> float:
    """How many pixels wide words are."""
    return _font(size).getlength(text) / _SCALE


def round_ticks(low: Number, high: Number) -> list[float]:
    """Three to six round numbers that enclose a range."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def short_number(value: Number) -> str:
    """A number in few digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _font(size: int) -> Any:
    return ImageFont.load_default(size * _SCALE)
