"""How fast a run goes: samples a second, and the share of time spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Measures the stretch between two reports."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._samples = 0

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

    def add(self, samples: int) -> None:
        """Count samples as done."""
        self._samples += samples

    def report(self) -> dict[str, float]:
        """Samples a second (over all ranks, if all were counted) and the data wait's share of time."""
        seconds = max(1e-9, time.perf_counter() - self._start)
        report = {"samples_per_s": self._samples / seconds, "data_wait": self._waited / seconds}
        self._start, self._waited, self._samples = time.perf_counter(), 0.0, 0
        return report
