"""Requests that arrive one by one, worked on together in one thread."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mmrec.serve.refusals import busy

Job = TypeVar("Job")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Waiting(Generic[Job, Answer]):
    job: Job
    answer: "asyncio.Future[tuple[Answer, float]]"
    size: int
    since: float = field(default_factory=time.perf_counter)


class Batcher(Generic[Job, Answer]):
    """Hands jobs to `work` in batches, from one thread; `work` answers a job or gives its exception.

    A batch starts when it is full, when nobody else is to be expected, or when its first job has waited
    `max_wait_s`. To be expected are those on the way, and as many as there were around the batch before:
    who has an answer often asks again. So who is alone never waits, and under load batches are large.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Job]], Sequence[Answer | Exception]],
        *,
        max_batch: int,
        max_wait_s: float,
        max_queue: int,
        max_size: int,
        size_of: Callable[[Job], int] = lambda job: 0,
        on_the_way: Callable[[], int] = lambda: 0,
        observe: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Start the thread.

        `size_of` says how large a job is and `max_size` what the jobs of a batch come to at most, where
        there are several. `on_the_way` says how many requests may still bring a job here, those that wait
        already among them. `observe` is told the number of jobs of each batch.
        """
        self._work = work
        self._max_batch, self._max_wait_s, self._max_queue = max_batch, max_wait_s, max_queue
        self._max_size, self._size_of = max_size, size_of
        self._on_the_way, self._observe = on_the_way, observe
        self._queue: deque[_Waiting[Job, Answer]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._company = 0
        self._wanted = 1
        """Jobs in the queue that the thread is woken for: being woken for each costs more than its work."""
        self.num_taken = 0
        """Jobs that have left the queue since the start."""
        self._thread = threading.Thread(target=self._run, name="mmrec-encoder", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many jobs wait."""
        return len(self._queue)

    def submit(self, job: Job) -> "asyncio.Future[tuple[Answer, float]]":
        """The answer to a job, and the seconds that it waited for its batch to start.

        Raises `Refused` when too many wait already; the future raises what `work` gave for the job.
        """
        if self._closed or len(self._queue) >= self._max_queue:
            raise busy(f"{len(self._queue)} queries wait for the encoder already")
        answer = asyncio.get_running_loop().create_future()
        with self._changed:
            self._queue.append(_Waiting(job, answer, self._size_of(job)))
            if len(self._queue) >= self._wanted:
                self._changed.notify()
        return answer

    def close(self) -> None:
        """End the thread once what waits is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._observe(len(batch))
            started = time.perf_counter()
            try:
                answers = self._work([waiting.job for waiting in batch])
            except Exception as error:
                answers = [error] * len(batch)
            self._company = len(batch) + len(self._queue)
            _deliver(batch, answers, started)

    def _next_batch(self) -> list[_Waiting[Job, Answer]]:
        """The jobs to work on next; none once this is closed and all are answered."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._queue:
                self._wait_for_more(self._queue[0].since + self._max_wait_s)
            return self._taken()

    def _wait_for_more(self, until: float) -> None:
        while not self._closed:
            expected = max(self._on_the_way(), self._company)
            left = until - time.perf_counter()
            self._wanted = min(self._max_batch, expected)
            if left <= 0 or len(self._queue) >= self._wanted:
                break
            self._changed.wait(left)
        self._wanted = 1

    def _taken(self) -> list[_Waiting[Job, Answer]]:
        batch, size = [], 0
        while self._queue and len(batch) < self._max_batch:
            size += self._queue[0].size
            if batch and size > self._max_size:
                break
            waiting = self._queue.popleft()
            self.num_taken += 1
            if not waiting.answer.cancelled():
                batch.append(waiting)
        # All had given up: look again, since an empty batch is the end.
        return batch or (self._next_batch() if not self._closed else [])


def _deliver(
    batch: Sequence[_Waiting[Job, Answer]], answers: Sequence[Answer | Exception], started: float
) -> None:
    """Hand answers to the event loop, all of them in one call."""
    if len(answers) != len(batch):
        raise RuntimeError(f"{len(batch)} jobs were given {len(answers)} answers")

    def settle() -> None:
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(answer, Exception):
                waiting.answer.set_exception(answer)
            else:
                waiting.answer.set_result((answer, started - waiting.since))

    loop = batch[0].answer.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
