"""Choose an index and its search parameters by measurement: the fastest that finds enough, within a budget.

Shape letters: Q queries, N products, K matches, D width.

Every candidate is built, its search parameters are swept by bisection until recall@k against exact search
reaches the target, and its speed is measured there, all with queries as they will come: contents, whose
vectors lie elsewhere than those of products. Half of them choose, and the other half say what was chosen:
the least effort that reaches a target by some queries may fall short of it by others. A large catalogue is
measured on a random sample; the one that is taken is built on all of it and swept again, so that its
figures are measured, too.

Recall and parameters at a recall are the same for a seed on one machine. The choice among those that reach
the target is by the clock, and may fall otherwise where the clock runs otherwise.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int64

from mmrec.errors import UserError
from mmrec.retrieval.base import Base, base_in_memory, narrowed
from mmrec.retrieval.candidates import (
    KEY_BYTES,
    Candidate,
    Growth,
    LeftOut,
    candidates_for,
    num_lists,
)
from mmrec.retrieval.embed import Embeddings, read_embeddings
from mmrec.retrieval.exact import nearest
from mmrec.retrieval.faiss_base import (
    build_base,
    is_refined,
    search_range,
    set_search,
    size_of,
)
from mmrec.retrieval.frontier import Frontier, Measured, Parameters, Setting, ranked
from mmrec.retrieval.generations import Generation
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.view import View

# Queries searched at a time, and at most in all: a standard error of recall@10 below 0.003 on half of them.
BATCH, MOST_QUERIES = 256, 2_048
# Fewer say too little to choose by; with twice as many half are kept to measure what was chosen.
LEAST_QUERIES = 100
# Standard errors to either side of a mean that hold it 95 times of 100.
_INTERVAL = 1.96
SAMPLE = 100_000
_SINGLES, _ROUNDS = 200, 3
_SHORT_S, _MOST_PASSES = 0.1, 5
# Matches fetched for each one wanted and scored again, the most first.
_K_FACTORS = (64, 32, 16, 8, 4, 2, 1)
# Two doublings that find less than this more will not reach a target.
_PLATEAU = 0.001
# A parameter is found to within a tenth: closer makes no difference to the speed.
_PRECISION = 1.1
# Scores as near as this to the k-th best count as ties: their order is that of rounding.
_TIE = 1e-6
# Fewer matches to refine are worth another sweep unless the last one was clearly slower.
_SLOWER = 0.9
# What is this much slower than another that reaches the target is not swept on.
_HOPELESS = 0.5
# A candidate whose extrapolation promises so many times the best that was built on everything is built too.
_PROMISING = 1.5

OWN = "catalogue"
"""Given in the place of queries, the catalogue's own vectors are asked with."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TuningGoal:
    """What an index is tuned for."""

    recall_target: float = 0.95
    """Share of the true k nearest products that searches must find, a mean over queries."""
    k: int = 10
    memory_budget: int | None = None
    """Bytes that the FAISS index, keys and stored vectors may take together; attributes come on top."""
    sample: int = SAMPLE
    """A larger catalogue is measured on so many of its products, drawn at random."""
    best_effort: bool = False
    """Take what finds most where nothing reaches the target."""
    seed: int = 0
    """Draws the sample and the queries."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Queries and what exact search finds for them."""

    queries: Float32[np.ndarray, "Q D"]
    vectors: Float32[np.ndarray, "N D"]
    k: int
    floors: Float32[np.ndarray, " Q"]
    """The score of each query's k-th best product."""

    def of(self, some: slice) -> "Truth":
        """The same of some of the queries."""
        return replace(self, queries=self.queries[some], floors=self.floors[some])


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What tuning arrives at."""

    index: Any
    """The FAISS index of all vectors, with its search parameters set."""
    factory: str
    parameters: Parameters
    frontier: Frontier


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is the same for all candidates."""

    goal: TuningGoal
    count: int
    """Products in all."""
    indexed_width: int
    rerank: bool
    report: Report


def tune(
    vectors: Float32[np.ndarray, "N D"],
    queries: Float32[np.ndarray, "Q D"],
    goal: TuningGoal,
    *,
    indexed_width: int | None = None,
    rerank: bool = False,
    report: Report = lambda line: None,
) -> Tuned:
    """Measure candidates for unit-length vectors with the queries, and build the best on all of them.

    `indexed_width` and `rerank` are as in `ProductIndex.build`; recall is against exact search at full
    width in any case. `report` gets a line for each step, and the table of all. Raises `UserError` when
    nothing fits the budget, and, unless the goal says best effort, when nothing reaches the target.
    """
    check_goal(goal)
    task = _Task(
        goal=goal,
        count=len(vectors),
        indexed_width=indexed_width or vectors.shape[1],
        rerank=rerank,
        report=report,
    )
    rng = np.random.default_rng(goal.seed)
    queries, sample = _drawn(queries, MOST_QUERIES, rng), _drawn(vectors, goal.sample, rng)
    candidates, left_out = _candidates(task, vectors.shape[1])
    _check_queries(len(queries), candidates, goal)
    if len(sample) < len(vectors):
        report(
            f"candidates are measured on {len(sample):,} of {len(vectors):,} products drawn at random; "
            "queries/s are extrapolated from these, and measured again of those that promise most"
        )
    measured, index = _measure_all(task, candidates, exact_truth(sample, queries, goal.k))
    best = ranked(measured)[0]
    if len(sample) < len(vectors) and (best.reached or goal.best_effort):
        truth = exact_truth(vectors, queries, goal.k)
        best, index = _measure_finalists(task, ranked(measured), candidates, truth)
    frontier = Frontier(
        **{name: getattr(goal, name) for name in ("recall_target", "k", "memory_budget", "seed")},
        products=len(vectors),
        sample=len(sample),
        queries=len(queries),
        threads=faiss.omp_get_max_threads(),
        measured=measured,
        left_out=left_out,
        taken=best,
    )
    for line in frontier.lines():
        report(line)
    if not best.reached and not goal.best_effort:
        raise UserError(_miss(frontier))
    set_search(index, best.setting.parameters)
    return Tuned(
        index=index, factory=best.factory, parameters=best.setting.parameters, frontier=frontier
    )


def tuned_index(
    ids: Sequence[str],
    vectors: Float32[np.ndarray, "N D"],
    queries: Float32[np.ndarray, "Q D"],
    goal: TuningGoal,
    *,
    attributes: pa.Table | None = None,
    indexed_width: int | None = None,
    rerank: bool = False,
    key: str = "product_id",
    report: Report = lambda line: None,
) -> tuple[ProductIndex, Frontier]:
    """Build an index in memory as `ProductIndex.build` does, its factory and parameters chosen by `tune`."""
    frontiers: list[Frontier] = []

    def make(indexed: np.ndarray) -> tuple[Any, str, Parameters]:
        width = indexed.shape[1]
        tuned = tune(vectors, queries, goal, indexed_width=width, rerank=rerank, report=report)
        frontiers.append(tuned.frontier)
        return tuned.index, tuned.factory, tuned.parameters

    index = ProductIndex.assemble(
        ids,
        vectors,
        make,
        attributes=attributes,
        indexed_width=indexed_width,
        rerank=rerank,
        key=key,
    )
    return index, frontiers[0]


def query_vectors(
    catalogue: Embeddings, queries: Path | None, report: Report
) -> Float32[np.ndarray, "Q D"]:
    """The vectors to tune an index of embeddings with.

    `queries` is a folder of embeddings of the other side (contents, for an index of products), or
    `catalogue` for vectors of the catalogue itself. Raises `UserError` for none, and for those of another
    encoder, width or side.
    """
    family = catalogue.manifest.details["family"]
    other = "contents" if family == "products" else "products"
    if queries is None:
        raise UserError(
            f"tuning wants queries as they will come: give --queries DIR, embeddings of {other} (`mmrec "
            f"embed --split val ...`), or `--queries {OWN}` to take the catalogue's own vectors"
        )
    if str(queries) == OWN:
        report(
            f"queries are the catalogue's own vectors: recall of {other} will be lower than this"
        )
        return catalogue.vectors
    loaded = read_embeddings(queries, queries=True)
    if loaded.manifest.details["family"] not in (other, None):  # Others' folders do not say.
        raise UserError(
            f"{queries}: holds {family}, as the index does; tune with {other}, whose vectors lie "
            f"elsewhere, or say `--queries {OWN}` if you mean it"
        )
    ours, theirs = catalogue.manifest.encoder, loaded.manifest.encoder
    if ours and theirs and ours != theirs:
        raise UserError(
            f"{queries}: was made by encoder {theirs}, and {catalogue.folder} by "
            f"{ours}: their spaces differ; embed the queries again with the latter"
        )
    if loaded.vectors.shape[1] != catalogue.vectors.shape[1]:
        raise UserError(
            f"{queries}: is {loaded.vectors.shape[1]} wide, and {catalogue.folder} "
            f"{catalogue.vectors.shape[1]}; embed both with the same --width"
        )
    return loaded.vectors


def check_goal(goal: TuningGoal) -> None:
    """Raises `UserError` for what cannot be aimed at."""
    if not 0 < goal.recall_target <= 1:
        raise UserError(f"--recall-target {goal.recall_target}: expected more than 0, at most 1")
    if goal.k < 1:
        raise UserError(f"--k {goal.k}: expected at least 1")
    if goal.sample < 1_000:
        raise UserError(f"--tuning-sample {goal.sample}: expected at least 1000")


def _check_queries(count: int, candidates: Sequence[Candidate], goal: TuningGoal) -> None:
    """Refuse to choose by a few queries, unless there is nothing to choose."""
    chooses = any(candidate.factory != "Flat" for candidate in candidates)
    if not count or (count < LEAST_QUERIES and chooses and not goal.best_effort):
        raise UserError(
            f"{count} queries are too few to tune with; give {LEAST_QUERIES} at least, better 1,000, or take "
            "what comes of them with --best-effort"
        )


def _halves(truth: Truth) -> tuple[Truth, Truth]:
    """Queries that choose a setting, and others that measure it; where they are few, all do both."""
    if len(truth.queries) < 2 * LEAST_QUERIES:
        return truth, truth
    return truth.of(slice(0, None, 2)), truth.of(slice(1, None, 2))


def recall_of(truth: Truth, rows: Int64[np.ndarray, "Q K"]) -> float:
    """The share of true matches among rows found, -1 for none; a tie with the last of them is one."""
    return float(_recalls(truth, rows).mean())


def _margin(truth: Truth, rows: Int64[np.ndarray, "Q K"]) -> float:
    """Half of the 95% interval of a mean recall."""
    return float(_INTERVAL * _recalls(truth, rows).std() / math.sqrt(len(rows)))


def exact_truth(
    vectors: Float32[np.ndarray, "N D"], queries: Float32[np.ndarray, "Q D"], k: int
) -> Truth:
    """Find the true matches of queries."""
    k = min(k, len(vectors))
    scores, _ = nearest(queries, vectors, k)
    return Truth(queries=queries, vectors=vectors, k=k, floors=scores[:, -1])


def _recalls(truth: Truth, rows: Int64[np.ndarray, "Q K"]) -> Float64[np.ndarray, " Q"]:
    """The recall of each query."""
    found = np.where(rows >= 0, rows, 0)
    scores = np.einsum("qd,qkd->qk", truth.queries, truth.vectors[found])
    hits = (scores >= truth.floors[:, None] - _TIE) & (rows >= 0)
    return hits.sum(axis=1) / truth.k


def _drawn(vectors: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most so many of the rows, in their order."""
    if len(vectors) <= most:
        return vectors
    return vectors[np.sort(rng.choice(len(vectors), most, replace=False))]


def _miss(frontier: Frontier) -> str:
    best = frontier.taken
    where = "" if best.products == frontier.products else f" on a sample of {best.products:,}"
    within = f" within {frontier.memory_budget:,} bytes" if frontier.memory_budget else ""
    return (
        f"no index reaches recall@{frontier.k} {frontier.recall_target}{within}; the best is "
        f"{best.factory} with {best.setting.recall:.4f}{where}; nothing was published: lower "
        "--recall-target, raise --memory-budget, or take it with --best-effort"
    )


# ------------------------------------------------------------------------------------- candidates


def _candidates(task: _Task, width: int) -> tuple[list[Candidate], list[LeftOut]]:
    beside = KEY_BYTES + (2 * width if task.rerank else 0)
    budget = task.goal.memory_budget
    kept, left_out = candidates_for(task.count, task.indexed_width, budget=budget, beside=beside)
    for candidate in left_out:
        task.report(f"{candidate.factory}: left out: {candidate.reason}")
    if not kept:
        raise UserError(
            f"no index of {task.count:,} vectors of width {task.indexed_width} fits a memory budget of "
            f"{budget:,} bytes; raise --memory-budget, or index fewer components with --width"
        )
    return kept, left_out


def _measure_all(
    task: _Task, candidates: Sequence[Candidate], truth: Truth
) -> tuple[list[Measured], Any]:
    """Measure every candidate; also gives the FAISS index of the best, the others are let go."""
    measured: list[Measured] = []
    kept = None
    for candidate in candidates:
        fastest = max((one.setting.qps for one in measured if one.reached), default=0.0)
        found, index = _measure(task, candidate, truth, fastest)
        measured.append(found)
        task.report(found.line(task.goal.k))
        if ranked(measured)[0] is found:
            kept = index
    return measured, kept


def _measure_finalists(
    task: _Task, order: Sequence[Measured], candidates: Sequence[Candidate], truth: Truth
) -> tuple[Measured, Any]:
    """Build candidates on all products, the best on the sample first, until none promises more.

    What the sample promised may be far from what all products show: recall falls as they crowd, and a graph
    can pay for it with a hundred times the candidates. What one kind breaks is taken off the promises of
    others that grow alike.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    waiting, tried = list(order), list[Measured]()
    shares: dict[Growth, float] = {}
    kept = None

    def promise(place: Measured) -> float:
        return place.qps_of_all * shares.get(by_name[place.name].growth, 1.0)

    while waiting:
        place = max((one for one in waiting if one.reached), key=promise, default=waiting[0])
        fastest = max((one.setting.qps for one in tried if one.reached), default=0.0)
        if (tried and not place.reached) or promise(place) < _PROMISING * fastest:
            break
        waiting.remove(place)
        candidate = by_name[place.name]
        task.report(f"{place.factory}: built on all {task.count:,} products")
        found, index = _measure(task, candidate, truth, fastest)
        task.report(found.line(task.goal.k))
        shares[candidate.growth] = min(1.0, found.setting.qps / place.qps_of_all)
        tried.append(found)
        if ranked(tried)[0] is found:
            kept = index
    return ranked(tried)[0], kept


def _measure(
    task: _Task, candidate: Candidate, truth: Truth, fastest: float
) -> tuple[Measured, Any]:
    """Build a candidate on the vectors of the truth, find its parameters, and measure it there.

    `fastest` is what another candidate does that reaches the target.
    """
    count = len(truth.vectors)
    factory = re.sub(r"IVF\d+", f"IVF{num_lists(count)}", candidate.factory)
    started = time.perf_counter()
    base = _built(task, factory, truth.vectors)
    build_s = time.perf_counter() - started
    view = View.of(base)
    choosing, truth = _halves(truth)
    settings = sweep(view, choosing, task.goal.recall_target, rerank=task.rerank, fastest=fastest)
    bytes_per_vector = _bytes_per_vector(task, candidate, base)
    chosen = best_setting(settings, task.goal.recall_target)
    set_search(base.index, chosen.parameters)
    passes = [_pass(view, truth, task.rerank) for _ in range(_ROUNDS)]
    rows, qps = passes[0][0], statistics.median(qps for _, qps in passes)
    recall, margin = recall_of(truth, rows), _margin(truth, rows)
    # Both halves err.
    doubt = math.sqrt(2) * margin
    reaches = chosen.recall >= task.goal.recall_target <= recall + doubt
    p50, p99 = _single_ms(view, truth, task.rerank)
    fits = not task.goal.memory_budget or bytes_per_vector * task.count <= task.goal.memory_budget
    measured = Measured(
        name=candidate.name,
        factory=factory,
        products=count,
        settings=settings,
        setting=replace(chosen, recall=recall, qps=qps),
        margin=margin,
        reached=reaches and fits,
        fits=fits,
        given_up=settings[-1].qps < _HOPELESS * fastest,
        qps_of_all=scaled_qps(qps, candidate.growth, count, task.count),
        p50_ms=p50,
        p99_ms=p99,
        bytes_per_vector=bytes_per_vector,
        build_s=build_s,
    )
    return measured, base.index


def _bytes_per_vector(task: _Task, candidate: Candidate, base: Base) -> float:
    """Measured of all products; estimated from a sample, among which codebooks are shared by too few."""
    if base.record.count < task.count:
        return candidate.bytes_per_vector
    beside = KEY_BYTES + (2 * base.record.width if task.rerank else 0)
    return size_of(base.index) / task.count + beside


def _built(task: _Task, factory: str, vectors: Float32[np.ndarray, "N D"]) -> Base:
    """A base as the finished index will have it; rows stand for ids."""
    index = build_base(narrowed(vectors, task.indexed_width), factory)
    record = Generation(
        factory=factory,
        width=vectors.shape[1],
        indexed_width=task.indexed_width,
        count=len(vectors),
        key="row",
        rerank=task.rerank,
        quantization_error=0.0,
        imbalance=1.0,
        files={},
    )
    # Searches that give rows never look at the keys.
    rows = pa.table({"row": pa.array([], pa.string())})
    store = vectors.astype(np.float16) if task.rerank else None
    return base_in_memory(record, index, rows, store)


def scaled_qps(qps: float, growth: Growth, measured: int, count: int) -> float:
    """What is to be expected of more products than were measured.

    Comparing all takes as much longer as there are more. With lists in number and length like the square
    root it takes as the root; a graph's paths grow like the logarithm.
    """
    factors = {
        "linear": measured / count,
        "root": math.sqrt(measured / count),
        "log": math.log(max(2, measured)) / math.log(max(2, count)),
    }
    return qps * factors[growth]


# ---------------------------------------------------------------------------------------- sweeping


def sweep(
    view: View, truth: Truth, target: float, *, rerank: bool = False, fastest: float = 0.0
) -> list[Setting]:
    """Search with one setting after another until the least that reaches the target is known.

    Where matches are refined, the number of them is lowered from the most as long as that makes searches
    faster; fewer want more lists or candidates. What is far slower than `fastest` is given up.
    """
    index = view.base.index
    settings: list[Setting] = []

    def measure(parameters: Parameters) -> Setting:
        set_search(index, parameters)
        rows, qps = _pass(view, truth, rerank)
        settings.append(Setting(parameters=parameters, recall=recall_of(truth, rows), qps=qps))
        return settings[-1]

    swept = search_range(index)
    if swept is None:
        measure({})
        return settings
    name, most = swept
    low = min(most, truth.k) if name == "efSearch" else 1
    best: Setting | None = None
    for k_factor in _K_FACTORS if is_refined(index) else (None,):
        fixed = {} if k_factor is None else {"k_factor": float(k_factor)}
        found = _least(
            lambda value, fixed=fixed: measure({name: float(value), **fixed}),
            low,
            most,
            target,
            _HOPELESS * fastest,
        )
        if found is None or (best is not None and found.qps < _SLOWER * best.qps):
            break
        low = int(found.parameters[name])
        # Too slow, it may be fast enough with fewer matches to refine; it is not below the target for good.
        best = found if found.recall >= target else best
    return settings


def _least(
    measure: Callable[[int], Setting], low: int, most: int, target: float, slowest: float
) -> Setting | None:
    """The setting of the least value that reaches the target, to within a tenth; None if none does.

    One that is slower than `slowest` queries a second is given back though it finds too little.
    """
    failed, value = low - 1, low
    recalls: list[float] = []
    while (found := measure(value)).recall < target:
        recalls.append(found.recall)
        if found.qps < slowest:
            return found
        if value >= most or (len(recalls) > 2 and recalls[-1] - recalls[-3] < _PLATEAU):
            return None
        failed, value = value, min(most, 2 * value)
    while value - failed > max(1, (_PRECISION - 1) * value):
        middle = (failed + value) // 2
        tried = measure(middle)
        if tried.recall >= target:
            found, value = tried, middle
        else:
            failed = middle
    return found


def best_setting(settings: Sequence[Setting], target: float) -> Setting:
    """The fastest that reaches the target, or what finds most."""
    enough = [setting for setting in settings if setting.recall >= target]
    if enough:
        return max(enough, key=lambda setting: setting.qps)
    return max(settings, key=lambda setting: (setting.recall, setting.qps))


def _pass(view: View, truth: Truth, rerank: bool) -> tuple[Int64[np.ndarray, "Q K"], float]:
    """Rows found and queries a second of all queries, in batches; a short pass is repeated for the clock."""
    seconds: list[float] = []
    found: list[np.ndarray] = []
    while not seconds or (sum(seconds) < _SHORT_S and len(seconds) < _MOST_PASSES):
        started = time.perf_counter()
        found = [
            view.search(truth.queries[start : start + BATCH], truth.k, rerank=rerank)[1]
            for start in range(0, len(truth.queries), BATCH)
        ]
        seconds.append(time.perf_counter() - started)
    return np.concatenate(found), len(truth.queries) / min(seconds)


def _single_ms(view: View, truth: Truth, rerank: bool) -> tuple[float, float]:
    """Median and 99th percentile of milliseconds of queries that come alone."""
    times = []
    for row in range(min(_SINGLES, len(truth.queries))):
        started = time.perf_counter()
        view.search(truth.queries[row : row + 1], truth.k, rerank=rerank)
        times.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.quantile(times, [0.5, 0.99]).tolist()
    return p50, p99
