"""Stopwatch, memory and the progress bar's fields."""

import math
import mmap
import time

import pytest
import torch

from mmrec.training.progress import Stopwatch, bar_fields, memory_gib


def test_the_stopwatch_tells_waiting_from_working() -> None:
    def slow_batches():
        for number in range(3):
            time.sleep(0.05)
            yield number

    watch = Stopwatch()
    for _ in watch.waiting(slow_batches()):
        time.sleep(0.02)
        watch.add(10)
    report = watch.report()
    assert 0.5 < report["data_wait"] < 0.95
    assert report["samples_per_s"] == pytest.approx(30 / 0.21, rel=0.3)
    assert "mfu" not in report


def test_mfu_is_the_share_of_the_peak_between_two_reports() -> None:
    watch = Stopwatch(peak_flops=1000.0)
    watch.add(1, flops=10.0)
    watch.report()
    watch.add(1, flops=20.0)
    time.sleep(0.1)
    assert watch.report()["mfu"] == pytest.approx(20 / 0.1 / 1000, rel=0.2)
    watch.add(1, flops=math.nan)
    assert "mfu" not in watch.report()


def test_memory_grows_with_what_is_held() -> None:
    before = memory_gib(torch.device("cpu"))
    # Pages of its own: what an allocator gives may have been held before.
    with mmap.mmap(-1, 2**28) as held:
        held.write(b"1" * 2**28)
        grown = memory_gib(torch.device("cpu")) - before
    assert grown >= 0.25


def test_the_bar_shows_mfu_where_there_is_one() -> None:
    row = {"loss": 1.5, "scale": 14.3, "lr": 1e-3, "samples_per_s": 99.6, "data_wait": 0.056}
    row["memory_gib"] = 1.04
    assert bar_fields(row) == {
        "loss": "1.500",
        "scale": "14.3",
        "lr": "1.0e-03",
        "samples/s": "100",
        "data wait": "6%",
        "GiB": "1.0",
    }
    assert bar_fields(row | {"mfu": 0.41})["MFU"] == "41%"
