"""Run independent tasks on all cores of this machine, or on a Ray cluster.

A task writes its output whole under a final name, and finds at once that it is there: so a task whose
worker died may run again anywhere, and results do not depend on the engine or the number of workers.
Tasks are of a module that can be imported, not of the program that is run.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from mmrec.data.isolation import die_with, main_left_out
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


class Engine(Protocol):
    """What runs tasks."""

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        """Run tasks and yield (number of the task, its result) as they finish, in any order.

        `tasks` are asked for one at a time, so a sequence may make them as they are needed. Raises
        `UserError` when workers die again and again; what a task raises ends the run.
        """
        ...


@contextmanager
def open_engine(
    name: EngineName = "local", *, num_workers: int = 0, address: str | None = None
) -> Iterator[Engine]:
    """Give an engine whose workers stay for all the runs of the block.

    `num_workers` 0 takes one per core, or all of a cluster; one worker of this machine is this process.
    `address` is a Ray cluster's; without one Ray uses what `ray start` or RAY_ADDRESS says, or starts
    on this machine. Raises `UserError` when Ray is missing, or the cluster cannot be joined.
    """
    if name == "ray":
        yield _RayEngine(num_workers, address)
        return
    engine = _LocalEngine(num_workers or len(os.sched_getaffinity(0)))
    try:
        yield engine
    finally:
        engine.close()


class _LocalEngine:
    """Worker processes of this machine, which start when the first tasks come."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        if self._num_workers == 1 or (self._pool is None and len(tasks) == 1):
            yield from enumerate(task.run() for task in tasks)
            return
        left = set(range(len(tasks)))
        deaths = 0
        while left:
            try:
                for number, result in self._run_in_pool(tasks, sorted(left)):
                    left.remove(number)
                    deaths = 0
                    yield number, result
            except BrokenProcessPool:
                # The executor gives up all its workers when one dies; the tasks left go to new ones.
                self.close()
                deaths += 1
                if deaths == MOST_DEATHS_IN_A_ROW:
                    raise UserError(
                        f"a worker process died {deaths} times in a row, most likely for want of "
                        f"memory; fewer of them take less: --num-workers {max(1, self._num_workers // 2)}"
                    ) from None

    def close(self) -> None:
        """End the workers, each when it has finished what it is doing."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _run_in_pool(
        self, tasks: Sequence[Task[Result]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        pool = self._pool = self._pool or _new_pool(self._num_workers)
        running: dict[Future[Result], int] = {}
        try:
            for number in numbers:
                with main_left_out():
                    running[pool.submit(_run, tasks[number])] = number
                if len(running) >= self._num_workers * _TASKS_AHEAD:
                    yield from _finished(running)
            while running:
                yield from _finished(running)
        finally:
            for future in running:
                future.cancel()


def _new_pool(num_workers: int) -> ProcessPoolExecutor:
    # Not fork: the parent has threads of pyarrow by now.
    context = multiprocessing.get_context("spawn")
    # As many workers as cores stay each on its own, with its decoder: sent to and fro between cores, the
    # two threads of a decoder cost 4 to 8 per cent more cycles.
    cores = sorted(os.sched_getaffinity(0))
    own = cores if num_workers == len(cores) else []
    arguments = (os.getpid(), own, context.Value("i", 0))
    return ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=arguments)


def _finished(running: dict[Future[Result], int]) -> Iterator[tuple[int, Result]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    # Results before the one that broke the pool are kept: their work is done.
    for future in sorted(done, key=lambda f: f.exception() is not None):
        yield running.pop(future), future.result()


class _RayEngine:
    """A Ray cluster, joined for good: its workers are Ray's to keep."""

    def __init__(self, num_workers: int, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--engine ray needs Ray: pip install 'mmrec[ray]'") from None
        if not ray.is_initialized():
            _join(address)
        # A worker that dies is replaced by Ray and its task runs again.
        self._start: Callable[..., Any] = ray.remote(num_cpus=1, max_retries=MOST_DEATHS_IN_A_ROW)(
            _run
        ).remote
        self._most = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def run(self, tasks: Sequence[Task[Result]]) -> Iterator[tuple[int, Result]]:
        running: dict[Any, int] = {}
        for number, task in enumerate(tasks):
            running[self._start(task)] = number
            if len(running) >= self._most * _TASKS_AHEAD:
                yield from _finished_on_ray(running)
        while running:
            yield from _finished_on_ray(running)


def _join(address: str | None) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = f"--address {address}" if address else "its address (RAY_ADDRESS)"
        raise UserError(
            f"the Ray cluster of {named} cannot be joined ({lines[0][:200]}); `ray status` says whether "
            "one runs, and without an address Ray starts on this machine"
        ) from None


def _finished_on_ray(running: dict[Any, int]) -> Iterator[tuple[int, Any]]:
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

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


def _run(task: Task[Result]) -> Result:
    return task.run()


def _start_worker(parent: int, cores: Sequence[int], started: Any) -> None:
    with started.get_lock():
        number = started.value
        started.value += 1
    if cores:
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    # Ctrl-C reaches the whole group of processes; the parent alone says what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)
