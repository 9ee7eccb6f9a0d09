"""Evaluations side by side: one page, from what `compare_runs` found."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmrec.retrieval.metrics import BEYOND, MAIN_METRICS, METRIC_NAMES, WITHIN
from mmrec.retrieval.report.charts import difference_chart, recall_chart
from mmrec.retrieval.report.page import count_of, facts, note, render_page, table
from mmrec.retrieval.report.tables import group_row


def render_comparison(compared: Mapping[str, Any]) -> str:
    """The whole page as text, to be written as UTF-8."""
    names = [run["name"] for run in compared["runs"]]
    runs = {run["name"]: f"encoder {run['encoder']}\n{run['folder']}" for run in compared["runs"]}
    made = {
        "shards": str(compared["shards"]),
        "split": str(compared["split"]),
        "comparisons": "{all:,} of all queries, {slices:,} of slices".format(
            **compared["comparisons"]
        ),
    }
    return render_page(
        f"{names[0]} against {', '.join(names[1:])}",
        _headline(compared),
        {
            "Results": _results(compared) + recall_chart(compared["recall_curves"]),
            "Differences": _differences(compared),
            "Queries that differ": _differing(compared),
            "Runs": facts(runs | made),
        },
    )


def _headline(compared: Mapping[str, Any]) -> str:
    """A sentence a run: how its first place compares."""
    sentences = []
    for run, slices in compared["differences"].items():
        own, value = slices["all"]["R@1"], compared["slices"]["all"][run]["R@1"]
        sentences.append(
            f"<strong>{escape(run)}</strong> puts a right product first for {value:.1%} of "
            f"{compared['queries']:,} queries, {100 * own['difference']:+.1f} points from "
            f"{escape(compared['first'])} (95% interval {100 * own['low']:+.1f} to "
            f"{100 * own['high']:+.1f}): {own['verdict']}."
        )
    return "".join(f'<p class="lead">{sentence}</p>' for sentence in sentences)


def _results(compared: Mapping[str, Any]) -> str:
    bodies = []
    for slice_name, runs in compared["slices"].items():
        count = next(iter(runs.values()))["queries"]
        rows = "".join(_row(compared, slice_name, run, means) for run, means in runs.items())
        group = group_row(slice_name, count_of(count), len(METRIC_NAMES) + 1)
        bodies.append(f"<tbody>{group}{rows}</tbody>")
    caption = (
        f"{compared['queries']:,} queries against the whole catalogue of {compared['gallery']:,} "
        f"products; small: difference from {compared['first']}"
    )
    words = (
        "Beyond chance: the 95% interval of the difference, by the paired bootstrap over queries, leaves out "
        "0, and p of a sign-flip test stays below 0.05 with Holm's correction for "
        f"{compared['comparisons']['all']:,} comparisons of all queries, or "
        f"{compared['comparisons']['slices']:,} of slices. Unsure: the interval leaves out 0, which of many "
        "some do by chance. What chance means here is the choice of queries; another training with another "
        "seed differs besides."
    )
    return table(caption, ("Run", *METRIC_NAMES), bodies, kind="results") + note(words)


def _row(compared: Mapping[str, Any], slice_name: str, run: str, means: Mapping[str, Any]) -> str:
    own = compared["differences"].get(run, {}).get(slice_name)
    kind = "" if own else ' class="trained"'
    cells = "".join(_cell(means[metric], own and own[metric]) for metric in METRIC_NAMES)
    return f'<tr{kind}><th scope="row">{escape(run)}</th>{cells}</tr>'


def _cell(value: float, own: Mapping[str, Any] | None) -> str:
    if own is None:
        return f"<td>{value:.3f}</td>"
    figure = f"<b>{value:.3f}</b>" if own["verdict"] == BEYOND else f"{value:.3f}"
    words = "" if own["verdict"] == WITHIN else f"<small>{own['verdict']}</small>"
    return f"<td>{figure}<small>{own['difference']:+.3f}</small>{words}</td>"


def _differences(compared: Mapping[str, Any]) -> str:
    charts = [
        difference_chart(
            f"{run}: {metric} less that of {compared['first']}",
            [{"label": slice_name, **own[metric]} for slice_name, own in slices.items()],
        )
        for run, slices in compared["differences"].items()
        for metric in MAIN_METRICS
    ]
    return f'<div class="charts wide">{"".join(charts)}</div>'


def _differing(compared: Mapping[str, Any]) -> str:
    tables = [
        _query_table(f"{run}: what {side} most", compared["first"], run, queries)
        for run, sides in compared["differing"].items()
        for side, queries in sides.items()
        if queries
    ]
    words = "By the change of 1 / place of the best right product."
    return note(words) + "".join(tables) if tables else ""


def _query_table(caption: str, first: str, run: str, queries: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(query["title"] or "no title")}'
        f"<small>{escape(query['content_id'])}</small></th>"
        f"<td>{query['rank_first']:,}<small>{escape(query['found_first'])}</small></td>"
        f"<td>{query['rank']:,}<small>{escape(query['found'])}</small></td>"
        f"<td>{escape(', '.join(query['product_ids']))}</td></tr>"
        for query in queries
    )
    columns = (
        "Query",
        f"Place by {first}, and its first",
        f"Place by {run}, and its first",
        "Right",
    )
    return table(caption, columns, [f"<tbody>{rows}</tbody>"], kind="results queries")
