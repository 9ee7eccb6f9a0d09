"""Queries to matches: many requests are encoded and searched together.

Shape letters: Q queries, T frames or pictures, S side of the encoder's input, D embedding width.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from mmrec.data.batches import collate_items
from mmrec.errors import UserError
from mmrec.model.encoder import Side
from mmrec.retrieval.matcher import Matcher
from mmrec.retrieval.queries import EncodedQuery, encode
from mmrec.serve.batching import Batcher
from mmrec.serve.config import ServeConfig
from mmrec.serve.live import Served
from mmrec.serve.metrics import Metrics
from mmrec.serve.refusals import Refused, busy, invalid

Answer = TypeVar("Answer")

_THREADS = 2
"""For what is not searched in batches, and as many again for conditions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """What the encoder's thread is asked."""

    served: Served
    pictures: UInt8[np.ndarray, "T 3 S S"] | None
    text: str | None
    side: Side
    k: int | None = None
    """Matches to search for in the same batch; None leaves the search to the caller."""


@dataclass(frozen=True, eq=False)
class Hit:
    """One match, its attributes in types that JSON has."""

    product_id: str
    score: float
    title: str | None
    attributes: dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded:
    """What the encoder's thread answers."""

    query: EncodedQuery
    """Its vector, and what the towers made of each part."""
    hits: list[Hit] | None
    """None where no search was asked for."""
    encode_s: float
    search_s: float


class Threads:
    """A few threads for what would hold up the event loop, and a limit on what waits for them."""

    def __init__(self, name: str, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"mmrec-{name}")
        self._name, self._max_waiting, self._waiting = name, max_waiting, 0

    async def __call__(self, work: Callable[..., Answer], *arguments: Any) -> Answer:
        """Call something slow in one of them. Raises `Refused` when too many wait for one."""
        if self._waiting >= self._max_waiting:
            raise busy(f"{self._waiting} requests wait for a {self._name} already")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, work, *arguments)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End them once what waits is done."""
        self._pool.shutdown()


class Matching:
    """The encoder's thread and queue, and the threads beside it."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        """Start the threads."""
        self.num_begun = self.num_without = 0
        # Requests since the start, and those of them that never came to the encoder.
        self.batcher: Batcher[Job, Encoded] = Batcher(
            answer_jobs,
            max_batch=config.max_batch,
            max_wait_s=config.max_wait_ms / 1000,
            max_queue=config.max_queue,
            max_size=config.max_batch_pictures,
            size_of=lambda job: 0 if job.pictures is None else len(job.pictures),
            on_the_way=self._num_on_the_way,
            observe=metrics.observe_batch,
        )
        self.apart = Threads("search", config.max_queue)
        """For pictures, changes, explanations, and what is like a product."""
        self.filtered = Threads("filter", config.max_queue)
        """For conditions: one may take half a minute, which nothing else is to wait for."""

    def expect(self) -> "Expected":
        """Say that a request is here which may come to the encoder: a batch waits a little for it."""
        return Expected(self)

    async def encode(self, job: Job, expected: "Expected | None" = None) -> tuple[Encoded, float]:
        """The answer to a job, and the seconds that it waited for its batch. Raises `Refused`."""
        own = expected or self.expect()
        try:
            waiting = self.batcher.submit(job)
            own.submitted = True
            return await waiting
        finally:
            own.close()

    def _num_on_the_way(self) -> int:
        return self.num_begun - self.num_without - self.batcher.num_taken

    def close(self) -> None:
        """End the threads once what waits is answered."""
        self.batcher.close()
        self.apart.close()
        self.filtered.close()

    def threads_of(self, where: str | None) -> Threads:
        """The threads that search with this condition, or with none."""
        return self.apart if where is None else self.filtered


class Expected:
    """A request that may come to the encoder."""

    def __init__(self, matching: Matching) -> None:
        self._matching = matching
        self.submitted = self._closed = False
        matching.num_begun += 1

    def close(self) -> None:
        """It has come, or will not any more."""
        if not self._closed and not self.submitted:
            self._matching.num_without += 1
        self._closed = True


def answer_jobs(jobs: Sequence[Job]) -> list[Encoded | Exception]:
    """The answer to each job of a batch; one that cannot be encoded does no harm to the others."""
    answers: dict[int, Encoded | Exception] = {}
    for group in _groups(jobs):
        own = [jobs[place] for place in group]
        try:
            found: Sequence[Encoded | Exception] = _answer_group(own)
        except Exception as error:
            found = [error] if len(own) == 1 else [_alone(job) for job in own]
        answers |= dict(zip(group, found, strict=True))
    return [answers[place] for place in range(len(jobs))]


def _alone(job: Job) -> Encoded | Exception:
    try:
        return _answer_group([job])[0]
    except Exception as error:
        return error


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """Places of jobs that go through one encoder on one side."""
    groups: dict[tuple[int, Side], list[int]] = {}
    for place, job in enumerate(jobs):
        groups.setdefault((id(job.served), job.side), []).append(place)
    return list(groups.values())


def _answer_group(jobs: Sequence[Job]) -> list[Encoded]:
    started = time.perf_counter()
    matcher = jobs[0].served.matcher
    queries = _encode(matcher, jobs)
    vectors = np.stack([query.vector for query in queries])
    encoded = time.perf_counter()
    searched = [place for place, job in enumerate(jobs) if job.k is not None]
    hits: dict[int, list[Hit]] = {}
    if searched:
        k = max(jobs[place].k or 0 for place in searched)
        result = matcher.index.search(vectors[searched], k)
        rows = [
            (ids[: jobs[place].k], scores)
            for place, ids, scores in zip(searched, result.ids, result.scores, strict=True)
        ]
        hits = dict(zip(searched, look_up(matcher, rows), strict=True))
    done = time.perf_counter()
    return [
        Encoded(
            query=query,
            hits=hits.get(place),
            encode_s=encoded - started,
            search_s=done - encoded,
        )
        for place, query in enumerate(queries)
    ]


def _encode(matcher: Matcher, jobs: Sequence[Job]) -> list[EncodedQuery]:
    encoder = matcher.encoder
    items = collate_items(
        [() if job.pictures is None else torch.from_numpy(job.pictures).unbind() for job in jobs],
        [job.text for job in jobs],
        tokenizer=encoder.tokenizer,
        size=encoder.preprocess.size,
    )
    return encode(encoder, items, jobs[0].side, width=matcher.index.width)


def look_up(matcher: Matcher, rows: Sequence[tuple[Sequence[str], np.ndarray]]) -> list[list[Hit]]:
    """Titles and attributes of the ids of several searches, each asked for once.

    A product that has been deleted since it was found is left out.
    """
    ids = list(dict.fromkeys(id_ for found, _ in rows for id_ in found))
    known: dict[str, dict[str, Any]] = {}
    while ids:
        try:
            known = dict(zip(ids, matcher.index.attributes_of(ids), strict=True))
            break
        except UserError:
            ids = [id_ for id_ in ids if id_ in matcher.index]
    plain = {id_: plain_attributes(own) for id_, own in known.items()}
    return [
        [
            Hit(id_, float(score), *plain[id_])
            for id_, score in zip(found, scores.tolist(), strict=False)
            if id_ in plain
        ]
        for found, scores in rows
    ]


def plain_attributes(attributes: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The title, and the other attributes in types that JSON has."""
    plain = {name: _plain(value) for name, value in attributes.items()}
    title = plain.pop("title", None)
    return title if title is None else str(title), plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def search_apart(
    matcher: Matcher,
    vector: Float32[np.ndarray, " D"],
    k: int,
    where: str | None,
    rerank: bool | None,
) -> list[Hit]:
    """The k best that meet a condition, scored again or not.

    Raises `Refused` where the condition cannot be understood, or the index keeps nothing to score by.
    """
    try:
        result = matcher.index.search(vector[None], k, where=where, rerank=rerank)
    except UserError as error:
        if str(error).startswith("where"):
            raise Refused(422, "invalid field", str(error), field="where") from None
        raise invalid("rerank", str(error)) from None
    return look_up(matcher, [(result.ids[0], result.scores[0])])[0]


def search_like(
    matcher: Matcher, id_: str, k: int, where: str | None, rerank: bool | None
) -> list[Hit]:
    """The k nearest to something that the index holds, without itself. Raises `Refused`."""
    key = matcher.index.key
    if id_ not in matcher.index:
        raise Refused(404, "not found", f"{key}: is not in this index", field=key)
    try:
        vectors = matcher.index.vectors([id_])
    except UserError as error:
        raise invalid(key, str(error)) from None
    vector = vectors[0] / np.linalg.norm(vectors[0])
    found = search_apart(matcher, vector, k + 1, where, rerank)
    return [hit for hit in found if hit.product_id != id_][:k]


def explain(matcher: Matcher, query: EncodedQuery, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Which frames, and how much the text, carried each match; none where an index gives no vectors back."""
    if not ids:
        return {}
    try:
        return {why.product_id: why.to_dict() for why in matcher.why(query, ids)}
    except UserError:
        return {}


def explain_like(matcher: Matcher, id_: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same of what is like something that the index holds; none where its shards are not there."""
    try:
        return explain(matcher, matcher.encode_held([id_])[0], ids)
    except UserError:
        return {}
