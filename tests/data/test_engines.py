"""Tasks on worker processes of this machine and on Ray, some of which die."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from misbehaving import Faulty, Fragile, Slow

from mmrec.data.engines import MOST_DEATHS_IN_A_ROW, EngineName, open_engine
from mmrec.errors import UserError


def run_tasks(
    tasks: Sequence[Any], engine: EngineName = "local", num_workers: int = 0
) -> list[tuple[int, Any]]:
    """What one run of an engine yields."""
    with open_engine(engine, num_workers=num_workers) as opened:
        return list(opened.run(tasks))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_task_runs_once(tmp_path: Path, num_workers: int) -> None:
    tasks = [Slow(tmp_path / f"{i}") for i in range(9)]
    results = dict(run_tasks(tasks, num_workers=num_workers))
    assert results == {i: f"{i}" for i in range(9)}
    workers = [int((tmp_path / f"{i}").read_text()) for i in range(9)]  # one line each
    assert (set(workers) == {os.getpid()}) == (num_workers == 1)


def test_workers_stay_for_the_next_run(tmp_path: Path) -> None:
    with open_engine(num_workers=2) as engine:
        for name in ("first", "second"):
            tasks = [Slow(tmp_path / f"{name}-{i}", 0.1) for i in range(6)]
            assert len(dict(engine.run(tasks))) == 6
    by_run = [
        {int(path.read_text()) for path in tmp_path.glob(f"{name}-*")}
        for name in ("first", "second")
    ]
    assert by_run[1] <= by_run[0]
    assert os.getpid() not in by_run[0]
    assert not any(psutil.pid_exists(pid) for pid in by_run[0])


def test_a_run_that_is_broken_off_leaves_the_engine_usable(tmp_path: Path) -> None:
    with open_engine(num_workers=2) as engine:
        next(engine.run([Slow(tmp_path / f"{i}", 0.05) for i in range(50)]))
        results = dict(engine.run([Slow(tmp_path / f"again-{i}") for i in range(3)]))
    assert results == {i: f"again-{i}" for i in range(3)}
    assert len(list(tmp_path.glob("[0-9]*"))) < 20


def test_a_worker_that_dies_is_replaced_and_its_task_runs_again(tmp_path: Path) -> None:
    tasks = [*(Slow(tmp_path / f"slow-{i}", 0.05) for i in range(4)), Fragile(tmp_path / "fragile")]
    results = dict(run_tasks(tasks, num_workers=2))
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert (tmp_path / "fragile").read_text() == "done"


def test_a_task_that_always_kills_its_worker_ends_the_run(tmp_path: Path) -> None:
    tasks = [Fragile(tmp_path / "one", 99), Fragile(tmp_path / "two", 99)]
    with pytest.raises(UserError, match=r"died 3 times in a row.*--num-workers 1"):
        run_tasks(tasks, num_workers=2)
    assert len(list(tmp_path.glob("*.death-*"))) <= 2 * MOST_DEATHS_IN_A_ROW


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_bug_in_a_task_ends_the_run(tmp_path: Path, num_workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_tasks([Slow(tmp_path / "a"), Faulty()], num_workers=num_workers)


def test_ray_runs_tasks_again_whose_worker_died(tmp_path: Path, local_ray: None) -> None:
    tasks = [*(Slow(tmp_path / f"{i}") for i in range(5)), Fragile(tmp_path / "fragile")]
    results = dict(run_tasks(tasks, engine="ray", num_workers=2))
    assert sorted(results) == list(range(6))
    assert results[5] == 1  # one death before
    workers = {(tmp_path / f"{i}").read_text() for i in range(5)}
    assert str(os.getpid()) not in workers


def test_a_bug_in_a_task_on_ray_is_raised_as_it_is(tmp_path: Path, local_ray: None) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_tasks([Faulty()], engine="ray")


@pytest.mark.parametrize(
    ("raised", "address"),
    [(ConnectionError("Could not find any running Ray instance."), "auto"), (ValueError(), None)],
)
def test_a_cluster_that_cannot_be_joined_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, address: str | None
) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    reason = str(raised) or "ValueError"
    named = f"--address {address}" if address else "its address (RAY_ADDRESS)"
    with pytest.raises(UserError) as caught, open_engine("ray", address=address):
        pass
    assert f"the Ray cluster of {named} cannot be joined ({reason})" in str(caught.value)
