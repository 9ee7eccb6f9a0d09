"""Jobs in batches: full, late or alone; each gets its own answer or exception."""

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from mmrec.serve.batching import Batcher
from mmrec.serve.refusals import Refused


def batcher(work: Any, **settings: Any) -> Batcher[int, int]:
    defaults = {"max_batch": 4, "max_wait_s": 0.0, "max_queue": 100, "max_size": 100}
    return Batcher(work, **defaults | settings)


def test_each_job_gets_its_own_answer_and_batches_have_a_limit() -> None:
    sizes: list[int] = []

    def work(jobs: Sequence[int]) -> list[int | Exception]:
        sizes.append(len(jobs))
        time.sleep(0.01)
        return [ValueError(str(job)) if job == 5 else job * job for job in jobs]

    async def ask() -> list[Any]:
        own = batcher(work)
        try:
            asked = [own.submit(job) for job in range(10)]
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            own.close()

    answers = asyncio.run(ask())
    assert str(answers.pop(5)) == "5"
    assert [answer for answer, _ in answers] == [n * n for n in range(10) if n != 5]
    assert sum(sizes) == 10
    assert max(sizes) == 4


def test_a_batch_holds_no_more_than_its_size() -> None:
    sizes: list[int] = []
    started = threading.Event()

    def work(jobs: Sequence[int]) -> list[int]:
        started.wait(5)
        sizes.append(sum(jobs))
        return list(jobs)

    async def ask() -> None:
        own = batcher(work, max_size=10, size_of=lambda job: job)
        asked = [own.submit(job) for job in (1, 6, 6, 3, 30)]
        started.set()
        await asyncio.gather(*asked)
        own.close()

    asyncio.run(ask())
    assert sum(sizes) == 46
    assert all(size <= 10 for size in sizes if size != 30)


def test_who_is_alone_does_not_wait_and_who_is_not_waits_for_the_other() -> None:
    batches: list[int] = []

    async def ask(on_the_way: int, max_wait_s: float) -> float:
        own = batcher(
            lambda jobs: jobs,
            max_wait_s=max_wait_s,
            on_the_way=lambda: on_the_way,
            observe=batches.append,
        )
        first = own.submit(1)
        if on_the_way > 1:
            await asyncio.sleep(0.02)
            await own.submit(2)
        _, waited_s = await first
        own.close()
        return waited_s

    assert asyncio.run(ask(1, 30.0)) < 10
    assert batches == [1]
    asyncio.run(ask(2, 30.0))
    assert batches == [1, 2]
    assert asyncio.run(ask(1, 0.0)) < 10


def test_a_full_queue_refuses() -> None:
    go_on = threading.Event()

    def work(jobs: Sequence[int]) -> list[int]:
        go_on.wait(10)
        return list(jobs)

    async def ask() -> None:
        own = batcher(work, max_batch=1, max_queue=3)
        asked = [own.submit(0)]
        while len(own):
            await asyncio.sleep(0.001)
        asked += [own.submit(job) for job in (1, 2, 3)]
        with pytest.raises(Refused) as refused:
            own.submit(4)
        assert refused.value.status == 503
        assert refused.value.headers == {"Retry-After": "1"}
        go_on.set()
        assert [answer for answer, _ in await asyncio.gather(*asked)] == [0, 1, 2, 3]
        own.close()

    asyncio.run(ask())


def test_who_gave_up_is_passed_over_and_what_waits_at_the_end_is_answered() -> None:
    seen: list[int] = []
    go_on = threading.Event()

    def work(jobs: Sequence[int]) -> list[int]:
        go_on.wait(10)
        seen.extend(jobs)
        return list(jobs)

    async def ask() -> None:
        own = batcher(work, max_batch=1)
        first = own.submit(0)
        while len(own):
            await asyncio.sleep(0.001)
        given_up, last = own.submit(1), own.submit(2)
        given_up.cancel()
        go_on.set()
        await asyncio.to_thread(own.close)
        assert [(await answer)[0] for answer in (first, last)] == [0, 2]

    asyncio.run(ask())
    assert seen == [0, 2]
