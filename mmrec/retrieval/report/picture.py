"""Queries and their matches as one picture, for a README."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mmrec.retrieval.report.gallery import MatchedProduct, QueryCard, spread_frames

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
    for place, (_, frame) in enumerate(spread_frames(card.frames, _NUM_FRAMES)):
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
