"""What Prometheus is told of the service."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The service's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "mmrec_request_seconds",
            "From a request's head to the end of its answer.",
            ["method", "route", "status"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "mmrec_stage_seconds",
            "Parts of a query: receive, decode, queue, encode, search.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "mmrec_batch_size", "Queries encoded together.", buckets=_SIZES, registry=self._registry
        )
        self._errors = Counter(
            "mmrec_errors",
            "Requests that were answered with an error.",
            ["reason"],
            registry=self._registry,
        )
        self._children: dict[Any, Any] = {}

    def gauge(self, name: str, words: str, read: Callable[[], float]) -> None:
        """A figure that is read when it is asked for."""
        Gauge(name, words, registry=self._registry).set_function(read)

    def counter(self, name: str, words: str, read: Callable[[], float]) -> None:
        """A figure that only grows, counted elsewhere."""
        self._registry.register(_ReadCounter(name, words, read))

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._child(self._requests, method, route, str(status)).observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Count the time that a part of a query took."""
        self._child(self._stages, stage).observe(seconds)

    def observe_batch(self, count: int) -> None:
        """Count a batch."""
        self._batches.observe(count)

    def count_error(self, reason: str) -> None:
        """Count a refusal."""
        self._child(self._errors, reason).inc()

    def text(self) -> bytes:
        """All of them, in the text format that Prometheus reads."""
        return generate_latest(self._registry)

    def _child(self, parent: Any, *labels: str) -> Any:
        # `labels` of the library costs as much as the observation itself.
        key = (parent, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = parent.labels(*labels)
        return child


class _ReadCounter:
    def __init__(self, name: str, words: str, read: Callable[[], float]) -> None:
        self._name, self._words, self._read = name, words, read

    def collect(self) -> Any:
        from prometheus_client.core import CounterMetricFamily

        yield CounterMetricFamily(self._name, self._words, value=self._read())
