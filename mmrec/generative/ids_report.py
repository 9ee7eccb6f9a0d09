"""How well semantic IDs tell a catalogue: what report.json holds, and its picture.

Shape letters: N products, D embedding width, L levels, K codes a level, C contents.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from mmrec.drawing import (
    COLORS,
    INK,
    LINE,
    SOFT,
    Number,
    draw_dot,
    draw_line,
    draw_text,
    new_picture,
    round_ticks,
    short_number,
    text_width,
    write_picture,
)
from mmrec.generative.quantize import Codebook
from mmrec.generative.semantic_ids import SemanticIds, cell_numbers

_WIDTH, _HEIGHT = 560, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 24, 46, 44


def describe_ids(ids: SemanticIds, vectors: Float32[np.ndarray, "N D"]) -> dict[str, Any]:
    """Figures of the IDs; `vectors` are the products' embeddings, in the rows' order.

    For each level: `used`, the share of its codes that some product has; `entropy_bits` of its codes and the
    same as a share of the most there can be; `fan_out`, how many codes follow a prefix on average and
    at most; `error`, the squared error of the embeddings told by the codes so far, as a share of their
    variance; `same_category`, how likely another product with the same codes so far is of the same category.
    """
    prefixes, size = ids.codes[:, :-1], ids.codebook.size
    cells, members = np.unique(cell_numbers(prefixes, size), return_counts=True)
    levels = [
        {
            "level": level + 1,
            **_usage(prefixes[:, level], size),
            **_fan_out(prefixes, level, size),
            "error": relative_error(ids.codebook, vectors, prefixes, level + 1),
            "same_category": _same_category(
                cell_numbers(prefixes[:, : level + 1], size), ids.categories
            ),
        }
        for level in range(ids.codebook.levels)
    ]
    report: dict[str, Any] = {
        "products": len(ids),
        "levels": levels,
        "cells": len(cells),
        "collisions": {
            "products": int(members[members > 1].sum()),
            "share": float(members[members > 1].sum() / len(ids)),
            "cells": int((members > 1).sum()),
            "largest_cell": int(members.max()),
        },
        "appended": ids.appended,
        "same_category_by_chance": _same_category(np.zeros(len(ids), np.int64), ids.categories),
    }
    if ids.content_codes is not None:
        report["contents"] = len(ids.content_ids)
        report["content_products_of_codes"] = [
            _shared_codes(prefixes[:, level], ids.content_codes[:, level])
            for level in range(ids.codebook.levels)
        ]
    return report


def _usage(codes: Int32[np.ndarray, " N"], size: int) -> dict[str, float]:
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * np.log2(shares)).sum())
    return {
        "used": float((counts > 0).mean()),
        "entropy_bits": entropy,
        "entropy_share": entropy / math.log2(size),
    }


def _fan_out(prefixes: Int32[np.ndarray, "N L"], level: int, size: int) -> dict[str, float]:
    """How many codes of a level follow the codes before it."""
    cells = np.unique(cell_numbers(prefixes[:, : level + 1], size))
    _, children = np.unique(cells // size, return_counts=True)
    return {"fan_out": float(children.mean()), "largest_fan_out": int(children.max())}


def relative_error(
    codebook: Codebook,
    vectors: Float32[np.ndarray, "N D"],
    codes: Int32[np.ndarray, "N L"],
    levels: int,
) -> float:
    """The squared error of embeddings told by their first codes, over their squared distance to the mean."""
    error = np.square(vectors - codebook.reconstruct(codes, levels)).sum(dtype=np.float64)
    spread = np.square(vectors - vectors.mean(0)).sum(dtype=np.float64)
    return float(error / max(spread, 1e-12))


def _same_category(cells: np.ndarray, categories: Sequence[str | None] | None) -> float | None:
    """The chance that another product drawn from a product's own cell has its category.

    Products without a category, and those alone in their cell, are left out: a cell of one is pure and tells
    nothing.
    """
    rows = [row for row, category in enumerate(categories or []) if category is not None]
    if not rows or categories is None:
        return None
    _, own = np.unique(np.array([categories[row] for row in rows]), return_inverse=True)
    _, cell = np.unique(cells[rows], return_inverse=True)
    _, group, alike = np.unique(
        cell.astype(np.int64) * (own.max() + 1) + own, return_inverse=True, return_counts=True
    )
    others = np.bincount(cell)[cell] - 1
    shared = others > 0
    return float(((alike[group] - 1)[shared] / others[shared]).mean()) if shared.any() else None


def _shared_codes(products: Int32[np.ndarray, " N"], contents: Int32[np.ndarray, " C"]) -> float:
    """The share of contents whose code some product has as well."""
    return float(np.isin(contents, products).mean())


def format_report(report: dict[str, Any]) -> str:
    """The report as a table of text."""
    head = f"{'level':<7}{'used':>8}{'entropy':>10}{'fan-out':>10}{'largest':>9}{'error':>8}"
    has_categories = report["same_category_by_chance"] is not None
    lines = [head + (f"{'same category':>15}" if has_categories else "")]
    for row in report["levels"]:
        line = (
            f"{row['level']:<7}{row['used']:>8.1%}{row['entropy_bits']:>6.2f} b "
            f"{row['fan_out']:>9.1f}{row['largest_fan_out']:>9,}{row['error']:>8.3f}"
        )
        same = row["same_category"]
        lines.append(
            line + (f"{'-' if same is None else f'{same:.3f}':>15}" if has_categories else "")
        )
    if has_categories:
        lines.append(f"same category by chance: {report['same_category_by_chance']:.3f}")
    found = report["collisions"]
    lines.append(
        f"{report['products']:,} products in {report['cells']:,} cells; {found['products']:,} "
        f"({found['share']:.1%}) share one, at most {found['largest_cell']:,}, and "
        f"{report['appended']:,} can"
    )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- picture


def draw_report(ids: SemanticIds, report: dict[str, Any], path: Path) -> None:
    """Four panels: how often each code is used, entropy, error and fan-out, and category by prefix."""
    canvas, draw = new_picture(2 * _WIDTH, 2 * _HEIGHT)
    size, levels = ids.codebook.size, report["levels"]
    numbers = [row["level"] for row in levels]
    usage = {
        f"level {level + 1}": (
            list(range(1, size + 1)),
            np.sort(np.bincount(ids.codes[:, level], minlength=size))[::-1].tolist(),
        )
        for level in range(ids.codebook.levels)
    }
    _panel(draw, (0, 0), "products a code, most used first", usage, "code", dots=False)
    entropy = {
        "entropy, of the most": (numbers, [row["entropy_share"] for row in levels]),
        "codes used": (numbers, [row["used"] for row in levels]),
    }
    _panel(draw, (_WIDTH, 0), "use of a level, shares", entropy, "level")
    error = {"error": (numbers, [row["error"] for row in levels])}
    _panel(draw, (0, _HEIGHT), "squared error, share of the variance", error, "codes told")
    fan_out = {"fan-out": (numbers, [row["fan_out"] for row in levels])}
    title = "codes that follow a prefix, mean"
    if report["same_category_by_chance"] is not None:
        known = [row for row in levels if row["same_category"] is not None]
        fan_out = {
            "same codes so far": ([r["level"] for r in known], [r["same_category"] for r in known]),
            "by chance": (numbers, [report["same_category_by_chance"]] * len(numbers)),
        }
        title = "another one is of the same category"
    _panel(draw, (_WIDTH, _HEIGHT), title, fan_out, "level")
    write_picture(canvas, path)


def _panel(
    draw: Any,
    corner: tuple[int, int],
    title: str,
    curves: Mapping[str, tuple[Sequence[int], Sequence[Number]]],
    x_name: str,
    *,
    dots: bool = True,
) -> None:
    left, top = corner[0] + _LEFT, corner[1] + _TOP
    right, bottom = corner[0] + _WIDTH - _RIGHT, corner[1] + _HEIGHT - _BOTTOM
    ticks = round_ticks(0, max([max(y) for _, y in curves.values() if len(y)], default=1) or 1)
    low, high = (
        min(min(x) for x, _ in curves.values() if len(x)),
        max(max(x) for x, _ in curves.values() if len(x)),
    )
    draw_text(draw, (left, corner[1] + 16), title, 15, INK, "lm")
    for tick in ticks:
        y = bottom - tick / ticks[-1] * (bottom - top)
        draw_line(draw, [(left, y), (right, y)], LINE, 1)
        draw_text(draw, (left - 8, y), short_number(tick), 12, SOFT, "rm")
    marks = range(low, high + 1) if dots else (low, (low + high) // 2, high)
    for mark in marks:
        x = left + (mark - low) / max(high - low, 1) * (right - left)
        draw_text(draw, (x, bottom + 14), f"{mark:,}", 12, SOFT, "mm")
    draw_text(draw, ((left + right) / 2, bottom + 32), x_name, 12, SOFT, "mm")
    for number, (x, y) in enumerate(curves.values()):
        color = COLORS[number % len(COLORS)]
        points = [
            (
                left + (a - low) / max(high - low, 1) * (right - left),
                bottom - b / ticks[-1] * (bottom - top),
            )
            for a, b in zip(x, y, strict=True)
        ]
        draw_line(draw, points, color, 2)
        for point in points if dots else ():
            draw_dot(draw, point, color, 4)
    _draw_names(draw, list(curves), right, corner[1] + 16)


def _draw_names(draw: Any, names: Sequence[str], right: Number, y: Number) -> None:
    """Names of several curves in their colors, right-aligned in the line of the title."""
    if len(names) < 2:
        return
    for number in reversed(range(len(names))):
        draw_text(draw, (right, y), names[number], 12, COLORS[number % len(COLORS)], "rm")
        right -= text_width(names[number], 12) + 14
