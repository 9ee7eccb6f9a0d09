"""Requests that nobody would write, and media that nobody could play: refused with a reason, never a 5xx.

`--requests 2000` sends more than a quick run does.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("fastapi", reason="the service is an extra: pip install 'mmrec[serve]'")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from bad_media import MemoryWatch, bombs, damaged, good_files  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Served, service_on  # noqa: E402

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
ANSWER_S = 30.0
"""No request may take longer."""
NUM_DAMAGED = 500
MEMORY_MB = 512
PICTURES = (".jpeg", ".png", ".webp")


@pytest.fixture(scope="module")
def service(index: Path) -> Iterator[Served]:
    """A service that may be written to, on an index of its own."""
    copy = index.parent / "fuzzed-index"
    shutil.copytree(index, copy)
    limits = {"decode_timeout_s": 10.0, "decode_memory_mb": MEMORY_MB, "max_megapixels": 100.0}
    with service_on(copy, writable=True, max_upload_mb=4.0, **limits) as served:
        yield served


def answers(service: Served) -> list[str]:
    """What a plain query finds, which no request of a stranger changes."""
    found = service.match(text="a mug", k=5, where="price is not null")
    return [match["product_id"] for match in found["matches"]]


def test_generated_requests_get_what_the_openapi_promises(
    service: Served, request: pytest.FixtureRequest
) -> None:
    schema = schemathesis.openapi.from_dict(service.http.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 8
    fuzzed = [own for own in operations if own.body or own.path_parameters or own.query]
    kinds = [(own, schemathesis.GenerationMode.POSITIVE) for own in fuzzed]
    # Any text may be an id, so where there is no more than that nothing is against the description.
    kinds += [(own, schemathesis.GenerationMode.NEGATIVE) for own in fuzzed if own.body]
    share = -(-request.config.getoption("--requests") // len(kinds))
    statuses: Counter[tuple[str, int]] = Counter()
    for operation, mode in kinds:
        _send(operation, mode, share, service.url, statuses)
    sent: Counter[str] = Counter()
    for (label, _), count in statuses.items():
        sent[label] += count
    print(sorted(statuses.items()))
    assert set(sent) == {operation.label for operation in fuzzed}
    matched = {status for label, status in statuses if label == "POST /v1/match"}
    assert 200 in matched  # else nothing came past the checks
    assert 422 in matched
    assert service.http.get("/v1/healthz").json() == {"status": "ok"}


def _send(
    operation: Any, mode: Any, count: int, url: str, statuses: Counter[tuple[str, int]]
) -> None:
    """`count` requests of one route, that its description allows or does not."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        answer = case.call(base_url=url, timeout=ANSWER_S)
        statuses[operation.label, answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    send()


def test_damaged_media_are_answered_with_matches_or_a_reason(
    service: Served, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rng = np.random.default_rng(1)
    files = good_files(tmp_path)
    count = min(NUM_DAMAGED, request.config.getoption("--requests") // 2)
    spoilt = [damaged(files, number, rng) for number in range(count)]
    before = answers(service)
    own = psutil.Process()
    memory = own.memory_info().rss
    watch = MemoryWatch(os.getpid())
    watch.start()
    outcomes: Counter[tuple[int, str]] = Counter()
    for name, data in [*spoilt, *bombs(files).items()]:
        status, reason = _upload(service, name, data)
        outcomes[status, reason] += 1
        assert status in (200, 413, 415, 422), (name, status, reason)
        assert (reason == "") == (status == 200)
    watch.stop()
    print(outcomes.most_common(), f"{watch.largest / 2**20:.0f} MiB at most")
    whole = [_upload(service, name, data)[0] for name, data in files.items()]
    assert whole == [200] * len(files)
    assert answers(service) == before
    assert watch.largest < (MEMORY_MB + 400) * 2**20
    assert own.memory_info().rss - memory < 300 * 2**20


def _upload(service: Served, name: str, data: bytes) -> tuple[int, str]:
    """Status and reason of a query by one file, sent as its suffix says."""
    field = "images" if name.endswith(PICTURES) and not name.startswith("b.") else "video"
    started = time.perf_counter()
    answer = service.http.post(
        "/v1/match", files=[(field, (name, data)), ("k", (None, "1")), ("frames", (None, "true"))]
    )
    assert time.perf_counter() - started < ANSWER_S, name
    if answer.status_code == 200:
        return 200, ""
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, error["reason"].removeprefix(f"{field}: ")
