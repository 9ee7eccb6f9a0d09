"""Evaluations side by side: which differences are beyond what the choice of queries explains.

Shape letters: Q queries.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64

from mmrec.errors import UserError
from mmrec.manifest import write_whole
from mmrec.retrieval.metrics import (
    BEYOND,
    LEVEL,
    METRIC_NAMES,
    UNSURE,
    WITHIN,
    PairedDifference,
    holm,
    paired_bootstraps,
    per_query,
    recall_curve,
    summarise,
    verdict,
)
from mmrec.retrieval.query_results import read_results
from mmrec.retrieval.report.comparison_page import render_comparison
from mmrec.terminal import one_line

_SIGNS = {BEYOND: "*", UNSURE: "~", WITHIN: " "}
_MAIN_SLICES = ("all", "warm", "cold")
_NUM_DIFFERING = 10
_SHOWN_DIFFERING = 3
_MOST_TITLE = 100
# What must be equal for two evaluations to have asked the same.
_SAME = ("shards", "split", "gallery", "queries")


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """A folder that `mmrec evaluate` wrote."""

    folder: Path
    metrics: dict[str, Any]
    table: pa.Table

    @cached_property
    def ranks(self) -> list[np.ndarray]:
        """For each query the ascending ranks of its right products."""
        return [np.array(ranks, np.int64) for ranks in self.table["ranks"].to_pylist()]

    @cached_property
    def values(self) -> dict[str, Float64[np.ndarray, " Q"]]:
        """Every metric of every query."""
        return per_query(self.ranks)

    @cached_property
    def slices(self) -> dict[str, Bool[np.ndarray, " Q"]]:
        """Which queries are in each slice of this evaluation, in the order of its `metrics.json`."""
        names = self.table["slices"].to_pylist()
        return {name: np.array([name in own for own in names]) for name in self.metrics["slices"]}


def read_run(folder: Path) -> EvaluatedRun:
    """Read `metrics.json` and `queries.parquet`; raises `UserError` where one is missing or broken."""
    mend = f"`mmrec evaluate --encoder ENCODER --shards SHARDS --out {folder}` writes it"
    path = folder / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path}: no such file; {mend}") from None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}; {mend}") from None
    absent = [name for name in (*_SAME, "slices") if name not in metrics]
    if absent:
        raise UserError(f"{path}: does not say its {', '.join(absent)}; {mend} anew")
    table = read_results(folder)
    if len(table) != metrics["queries"]:
        raise UserError(
            f"{folder}: metrics.json is of {metrics['queries']:,} queries and queries.parquet of "
            f"{len(table):,}; {mend} anew"
        )
    return EvaluatedRun(folder=folder, metrics=metrics, table=table)


def compare_folders(
    folders: Sequence[Path], *, out: Path | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare evaluations with the first of them; also write the page `out`, if one is given.

    Raises `UserError` for fewer than two folders, for one that cannot be read, and for evaluations of
    other shards, of another split or another catalogue than the first's.
    """
    if len(folders) < 2:
        raise UserError(
            f"compare: expected two or more folders of `mmrec evaluate`, got {len(folders)}"
        )
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder; expected a file, such as compare.html")
    compared = compare_runs([read_run(folder) for folder in folders], seed=seed)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, render_comparison(compared))
    return compared


def compare_runs(runs: Sequence[EvaluatedRun], *, seed: int = 0) -> dict[str, Any]:
    """What `mmrec compare --json` prints: every run's means, and differences from the first run.

    "differences" has, for each other run, slice and metric, the mean difference with its 95% interval by
    the paired bootstrap, p by a sign-flip test, "p_holm" adjusted for the "comparisons" made here (those
    of all queries on their own, and those of slices), and a verdict in words. "differing" has the queries
    whose reciprocal rank changed most, up and down. Slices that not all runs have are left out.
    """
    check_comparable(runs)
    names = name_runs([run.folder for run in runs])
    first = runs[0]
    slices = {
        name: mask
        for name, mask in first.slices.items()
        if mask.any() and all(name in run.slices for run in runs)
    }
    summaries = [summarise(run.values, slices) for run in runs]
    return {
        "first": names[0],
        "runs": [
            {"name": name, "folder": str(run.folder), "encoder": run.metrics.get("encoder")}
            for name, run in zip(names, runs, strict=True)
        ],
        **{name: first.metrics[name] for name in _SAME},
        "slices": {
            slice_name: {name: own[slice_name] for name, own in zip(names, summaries, strict=True)}
            for slice_name in slices
        },
        **_differences(dict(zip(names, runs, strict=True)), slices, seed),
        "recall_curves": {
            name: recall_curve(run.ranks, min(100, first.metrics["gallery"])).round(6).tolist()
            for name, run in zip(names, runs, strict=True)
        },
        "differing": {
            name: _differing(first, run) for name, run in zip(names[1:], runs[1:], strict=True)
        },
    }


def check_comparable(runs: Sequence[EvaluatedRun]) -> None:
    """Refuse runs that did not ask the same queries of the same catalogue as the first."""
    first = runs[0]
    for run in runs[1:]:
        other = [name for name in _SAME if run.metrics[name] != first.metrics[name]]
        if not other and run.table["content_id"] != first.table["content_id"]:
            other = ["content ids"]
        if other:
            ours, theirs = (
                ", ".join(f"{name} {found.metrics.get(name, 'as they are')}" for name in other)
                for found in (run, first)
            )
            raise UserError(
                f"{run.folder}: evaluated with {ours}, and {first.folder} with {theirs}; they can be "
                "compared when both encoders are evaluated on the same shards and split"
            )


def name_runs(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell all folders apart; raises `UserError` for one given twice."""
    paths = [folder.resolve().parts for folder in folders]
    twice = [folder for folder, number in Counter(paths).items() if number > 1]
    if twice:
        raise UserError(f"{Path(*twice[0])}: given twice; expected runs that differ")
    names = ["/".join(parts[-1:]) for parts in paths]
    for length in range(2, max(map(len, paths)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(parts[-length:]) for parts in paths]
    return names


def _differences(
    runs: Mapping[str, EvaluatedRun], slices: Mapping[str, Bool[np.ndarray, " Q"]], seed: int
) -> dict[str, Any]:
    first, *others = runs.values()
    found: dict[tuple[str, str, str], PairedDifference] = {}
    for name, run in zip(list(runs)[1:], others, strict=True):
        for slice_name, mask in slices.items():
            ours, theirs = (
                {metric: column[mask] for metric, column in own.values.items()}
                for own in (run, first)
            )
            for metric, difference in paired_bootstraps(ours, theirs, seed=seed).items():
                found[name, slice_name, metric] = difference
    # What was asked first, all queries, is not to pay for how many slices are looked at besides.
    families = {
        family: [key for key in found if (key[1] == "all") == (family == "all")]
        for family in ("all", "slices")
    }
    adjusted = {
        key: p
        for keys in families.values()
        for key, p in zip(keys, holm([found[key].p for key in keys]), strict=True)
    }
    told: dict[str, Any] = {}
    for key, difference in found.items():
        name, slice_name, metric = key
        told.setdefault(name, {}).setdefault(slice_name, {})[metric] = {
            **asdict(difference),
            "p_holm": adjusted[key],
            "verdict": verdict(difference, adjusted[key]),
        }
    counts = {family: len(keys) for family, keys in families.items()}
    return {"comparisons": counts, "differences": told}


def _differing(first: EvaluatedRun, run: EvaluatedRun) -> dict[str, list[dict[str, Any]]]:
    """The queries that gained and lost most, by 1 / rank of the best right product."""
    change = run.values["MRR"] - first.values["MRR"]
    order = np.argsort(-change, kind="stable")
    chosen = {
        "gained": [int(row) for row in order[:_NUM_DIFFERING] if change[row] > 0],
        "lost": [int(row) for row in order[::-1][:_NUM_DIFFERING] if change[row] < 0],
    }
    return {side: [_query(first, run, row) for row in rows] for side, rows in chosen.items()}


def _query(first: EvaluatedRun, run: EvaluatedRun, row: int) -> dict[str, Any]:
    ours, theirs = (found.table.slice(row, 1).to_pylist()[0] for found in (run, first))
    return {
        "content_id": ours["content_id"],
        "title": ours["title"],
        "product_ids": ours["product_ids"],
        "rank_first": theirs["rank"],
        "rank": ours["rank"],
        "found_first": theirs["top_ids"][0],
        "found": ours["top_ids"][0],
    }


# Text


def comparison_text(compared: Mapping[str, Any]) -> str:
    """What `mmrec compare` prints: means and differences on the main slices, what stands out elsewhere."""
    lines = [
        f"{compared['queries']:,} queries of split {compared['split']}, gallery of "
        f"{compared['gallery']:,} products, shards {compared['shards']}; differences from "
        f"{compared['first']}",
        "",
        *_table_lines(compared),
        "",
        *_legend(compared),
        *_elsewhere(compared),
        *_differing_lines(compared),
    ]
    return "\n".join(lines)


def _legend(compared: Mapping[str, Any]) -> list[str]:
    counts = compared["comparisons"]
    return [
        "* beyond chance: the 95% interval (paired bootstrap over queries) leaves out 0, and p stays below "
        f"{LEVEL} with Holm's",
        f"correction for {counts['all']:,} comparisons of all queries, or {counts['slices']:,} of slices; "
        "~ unsure: the interval leaves out 0, p does not",
    ]


def _table_lines(compared: Mapping[str, Any]) -> list[str]:
    rows = [["slice", "queries", "run", *METRIC_NAMES]]
    for slice_name in (name for name in _MAIN_SLICES if name in compared["slices"]):
        for place, (run, means) in enumerate(compared["slices"][slice_name].items()):
            own = compared["differences"].get(run, {}).get(slice_name)
            figures = [_figure(means[metric], own and own[metric]) for metric in METRIC_NAMES]
            head = ["", ""] if place else [slice_name, f"{means['queries']:,}"]
            rows.append([*head, run, *figures])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [padded[0], "  ".join("-" * width for width in widths), *padded[1:]]


def _figure(value: float, difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return f"{value:.3f}"
    return f"{value:.3f} {difference['difference']:+.3f}{_SIGNS[difference['verdict']]}"


def _elsewhere(compared: Mapping[str, Any]) -> list[str]:
    """Differences beyond chance on other slices than the main ones."""
    lines = []
    for run, slices in compared["differences"].items():
        for slice_name, metrics in slices.items():
            found = [
                f"{metric} {own['difference']:+.3f} ({own['low']:+.3f} to {own['high']:+.3f})"
                for metric, own in metrics.items()
                if own["verdict"] == BEYOND and slice_name not in _MAIN_SLICES
            ]
            if found:
                lines.append(f"{run}, {one_line(slice_name)}: {', '.join(found)}")
    return ["", "beyond chance on other slices:", *lines] if lines else []


def _differing_lines(compared: Mapping[str, Any]) -> list[str]:
    lines = []
    for run, sides in compared["differing"].items():
        for side, queries in sides.items():
            for query in queries[:_SHOWN_DIFFERING]:
                lines.append(
                    f"{run} {side}: {one_line(query['content_id'])}, place {query['rank_first']:,} -> "
                    f"{query['rank']:,}: {one_line(query['title'] or 'no title', most=_MOST_TITLE)}"
                )
    return ["", "queries that differ most:", *lines] if lines else []
