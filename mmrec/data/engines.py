"""Run independent tasks on all cores of this machine, or on a Ray cluster.

A task writes its output whole under a final name, and finds at once that it is there: so a task whose
worker died may run again anywhere, and results do not depend on the engine or the number of workers.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from mmrec.data.isolation import die_with
from mmrec.errors import UserError

EngineName = Literal["local", "ray"]
Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")

MOST_DEATHS_IN_A_ROW = 3  # of a worker without a task finished in between
_TASKS_AHEAD = 2  # per worker: enough to keep it busy; tasks name their inputs and are not small


@runtime_checkable
class Task(Protocol[Result_co]):
    """Something to do that says what came of it; it pickles."""

    def run(self) -> Result_co:
        """Do it, or find it done."""
        ...


def run_tasks(
    tasks: Sequence[Task[Result]],
    *,
    engine: EngineName = "local",
    num_workers: int = 0,
    address: str | None = None,
) -> Iterator[tuple[int, Result]]:
    """Run tasks and yield (number of the task, its result) as they finish, in any order.

    `tasks` are asked for one at a time, so a sequence may make them as they are needed. `num_workers`
    0 takes one per core, or all of a cluster. `address` is a Ray cluster's; without one Ray uses what
    `ray start` or RAY_ADDRESS says, or starts on this machine.

    Raises `UserError` when workers die again and again, or Ray is missing; what a task raises ends
    the run.
    """
    if engine == "ray":
        return _run_on_ray(tasks, num_workers, address)
    workers = min(num_workers or len(os.sched_getaffinity(0)), len(tasks))
    return _run_locally(tasks, workers) if workers > 1 else enumerate(t.run() for t in tasks)


def _run_locally(tasks: Sequence[Task[Result]], workers: int) -> Iterator[tuple[int, Result]]:
    left = set(range(len(tasks)))
    deaths = 0
    while left:
        try:
            for number, result in _run_in_pool(tasks, sorted(left), workers):
                left.remove(number)
                deaths = 0
                yield number, result
        except BrokenProcessPool:
            # The executor gives up all its workers when one dies; the tasks left go to new ones.
            deaths += 1
            if deaths == MOST_DEATHS_IN_A_ROW:
                raise UserError(
                    f"a worker process died {deaths} times in a row, most likely for want of memory; "
                    f"fewer of them take less: --num-workers {max(1, workers // 2)}"
                ) from None


def _run_in_pool(
    tasks: Sequence[Task[Result]], numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, Result]]:
    # Not fork: the parent has threads of pyarrow by now.
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Result], int] = {}
    with ProcessPoolExecutor(
        min(workers, len(numbers)), context, initializer=_start_worker, initargs=(os.getpid(),)
    ) as pool:
        try:
            for number in numbers:
                running[pool.submit(_run, tasks[number])] = number
                if len(running) >= workers * _TASKS_AHEAD:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(running: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    # Results before the one that broke the pool are kept: their work is done.
    for future in sorted(done, key=lambda f: f.exception() is not None):
        yield running.pop(future), future.result()


def _run_on_ray(
    tasks: Sequence[Task[Result]], num_workers: int, address: str | None
) -> Iterator[tuple[int, Result]]:
    try:
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'mmrec[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    # A worker that dies is replaced by Ray and its task runs again.
    remote: Callable[..., Any] = ray.remote(num_cpus=1, max_retries=MOST_DEATHS_IN_A_ROW)(
        _run
    ).remote
    most = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, int] = {}

    def finished() -> Iterator[tuple[int, Result]]:
        done, _ = ray.wait(list(running), num_returns=1)
        for reference in done:
            try:
                yield running.pop(reference), ray.get(reference)
            except WorkerCrashedError:
                raise UserError(
                    f"a Ray worker died {MOST_DEATHS_IN_A_ROW + 1} times on one task, most likely for "
                    "want of memory; give its node more, or --num-workers fewer of them"
                ) from None
            except RayTaskError as error:
                # What the task raised, as it would have been raised here.
                raise error.cause from None

    for number, task in enumerate(tasks):
        running[remote(task)] = number
        if len(running) >= most * _TASKS_AHEAD:
            yield from finished()
    while running:
        yield from finished()


def _run(task: Task[Result]) -> Result:
    return task.run()


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches the whole group of processes; the parent alone says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
