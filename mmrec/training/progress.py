"""How a run goes: samples a second, the share of time spent waiting for data, memory, and MFU."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import psutil
import torch

Item = TypeVar("Item")


class Stopwatch:
    """Measures the stretch between two reports.

    `peak_flops` is what all ranks' devices can do in a second; without it there is no MFU.
    """

    def __init__(self, *, peak_flops: float | None = None) -> None:
        self._peak_flops = peak_flops
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._samples = 0
        self._flops = 0.0

    def waiting(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass batches through, counting the time that each one takes to arrive."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    def add(self, samples: int, flops: float = 0.0) -> None:
        """Count samples as done, and the floating point operations that they took."""
        self._samples += samples
        self._flops += flops

    def report(self) -> dict[str, float]:
        """Samples a second (over all ranks, if all were counted) and the data wait's share of time."""
        seconds = max(1e-9, time.perf_counter() - self._start)
        report = {"samples_per_s": self._samples / seconds, "data_wait": self._waited / seconds}
        if self._peak_flops and math.isfinite(self._flops):
            report["mfu"] = self._flops / seconds / self._peak_flops
        self._restart()
        return report


def memory_gib(device: torch.device) -> float:
    """The most that a GPU had allocated so far, or what a process on a CPU holds now, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def bar_fields(row: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar shows of a line of metrics.jsonl."""
    fields = {
        "loss": f"{row['loss']:.3f}",
        "scale": f"{row['scale']:.1f}",
        "lr": f"{row['lr']:.1e}",
        "samples/s": f"{row['samples_per_s']:.0f}",
        "data wait": f"{row['data_wait']:.0%}",
        "GiB": f"{row['memory_gib']:.1f}",
    }
    return fields | ({"MFU": f"{row['mfu']:.0%}"} if "mfu" in row else {})
