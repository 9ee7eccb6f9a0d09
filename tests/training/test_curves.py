"""Curves as a picture and as lines of text."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from mmrec.training.curves import draw_curves, sparkline, summarize_curves


def make_rows(num_steps: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, num_steps + 1):
        rows.append(
            {"step": step, "epoch": step / 10, "loss": 4 / step, "content_product": 4 / step}
        )
        rows[-1] |= {"lr": 1e-3, "scale": 14.0, "data_wait": 0.1, "memory_gib": 1.0}
        if step % 10 == 0:
            rows.append({"step": step, "val/R@1": step / num_steps, "val/MRR": 0.5})
    return rows


def test_a_sparkline_rises_with_its_numbers() -> None:
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    # Means of spans: 0.5, 2.5, 4.5, 6.5 between their own least and largest.
    assert sparkline(range(8), width=4) == "▁▃▆█"
    assert sparkline([math.nan, 0.0, 1.0]) == "·▁█"
    assert sparkline([math.nan]) == "·"
    assert sparkline([]) == ""


def test_a_summary_has_a_line_for_each_curve_with_its_ends() -> None:
    lines = summarize_curves(make_rows(40))
    named = {line.split()[0]: line for line in lines}
    # With one objective the loss is that objective, and is told once.
    assert set(named) == {"content_product", "R@1", "MRR", "lr", "scale", "data_wait", "memory_gib"}
    assert named["content_product"].endswith("4 -> 0.1")
    assert named["R@1"].endswith("0.25 -> 1")
    assert summarize_curves([]) == []


def test_the_picture_has_a_panel_for_each_kind_of_number(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    draw_curves(make_rows(3000), path)
    with Image.open(path) as image:
        assert image.size == (1200, 3 * 250)  # Loss, val, lr, scale, data wait, memory.
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The loss falls: its first point is in the panel's upper half, its last at the bottom.
    blue = (pixels[:250, :600, 2] - pixels[:250, :600, 0]) > 100
    blue[:35] = False  # the names above
    rows, columns = np.nonzero(blue)
    assert rows[columns < 75].min() < 100
    assert rows[columns > 500].min() > 180
    assert not list(tmp_path.glob(".*"))


def test_nothing_to_draw_leaves_no_file(tmp_path: Path) -> None:
    draw_curves([], tmp_path / "curves.png")
    draw_curves([{"step": 1}], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_a_curve_of_one_point_or_of_no_finite_number_is_drawn(tmp_path: Path) -> None:
    draw_curves([{"step": 5, "loss": 1.0, "lr": math.nan}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
