"""The report of an evaluation: one page, from `metrics.json`, curves of the training, and galleries."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmrec.retrieval.report.charts import column_bars, recall_chart, system_bars
from mmrec.retrieval.report.gallery import QueryCard, gallery
from mmrec.retrieval.report.lines import Curve, training_charts
from mmrec.retrieval.report.page import facts as fact_list
from mmrec.retrieval.report.page import note, range_text, readable, render_page
from mmrec.retrieval.report.tables import (
    best_baseline,
    index_tables,
    results_table,
    slices_table,
)


def render_report(
    *,
    title: str,
    facts: Mapping[str, str],
    metrics: Mapping[str, Any],
    curves: Sequence[Curve],
    galleries: Mapping[str, Sequence[QueryCard]],
) -> str:
    """The whole page as text, to be written as UTF-8.

    `metrics` has the shape of `metrics.json`. `facts` says how the run was made (machine, date, wall time,
    commands, fingerprints); a value may have several lines. `galleries` are cards of queries from "all
    over" the split, of the "best" and of the "worst". Parts without data are left out.
    """
    return render_page(
        title,
        _headline(metrics),
        {
            "Results": _results(metrics),
            "Slices": _slices(metrics),
            "Index": index_tables(metrics),
            "Training": training_charts(curves),
            "Matches": gallery(galleries),
            "How it was made": fact_list(facts),
        },
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    """One sentence that anybody can read, and a tile for each figure that matters."""
    first = metrics["slices"]["all"]["R@1"]
    sentence = (
        f"A right product comes first for <strong>{first:.1%}</strong> of "
        f"{metrics['queries']:,} queries, searched in all {metrics['gallery']:,} products."
    )
    best = best_baseline(metrics, "all", "R@1")
    if best:
        sentence += f" {readable(best[0]).capitalize()}, which learns nothing, gets {best[1]:.1%}."
    wanted = [("all", "R@1"), ("all", "R@10"), ("all", "MRR"), ("cold", "R@10")]
    tiles = [_tile(metrics, *tile) for tile in wanted if tile[0] in metrics["slices"]]
    return f'<p class="lead">{sentence}</p>\n<ul class="tiles">{"".join(tiles)}</ul>'


def _tile(metrics: Mapping[str, Any], slice_name: str, metric: str) -> str:
    value = metrics["slices"][slice_name][metric]
    interval = metrics["intervals"].get(slice_name, {}).get(metric)
    label = metric if slice_name == "all" else f"{metric}, {slice_name} products"
    notes = [f'95% interval <span class="range">{range_text(interval)}</span>'] if interval else []
    best = best_baseline(metrics, slice_name, metric)
    if best:
        notes.append(f"best baseline {best[1]:.3f} ({readable(best[0])})")
    lines = "".join(f"<small>{note}</small>" for note in notes)
    return f'<li><span class="label">{escape(label)}</span><b>{value:.3f}</b>{lines}</li>'


def _results(metrics: Mapping[str, Any]) -> str:
    """The main table, what its words mean, recall curves, and bars for warm and cold."""
    words = (
        "R@K: share of queries with a right product within the first K. MRR: mean of 1 / rank of "
        "the first right product. nDCG@10: the first ten, weighted by place, against the best "
        "order. A product that ties with a right one stands before it. Warm: a right product has "
        "training links; cold: none has. Small figures are 95% bootstrap intervals over queries: how sure "
        "these queries make us, not how much another training would differ."
    )
    bars = "".join(system_bars(metrics, metric) for metric in ("R@1", "R@5"))
    return (
        f"{results_table(metrics)}\n{note(words)}\n"
        f"{recall_chart(metrics.get('recall_curves', {}))}\n"
        f'<div class="charts">{bars}</div>'
    )


def _slices(metrics: Mapping[str, Any]) -> str:
    rows = slices_table(metrics)
    if not rows:
        return ""
    words = (
        "Popular and rare: above, and at or below, the median number of training links of warm queries' "
        "products. A query with several right products counts where the first of them does. Of a column's "
        "values the most frequent have a slice each, and the rest is called other. Slices overlap, and with "
        "many of them some stand out by chance: judge one by its interval."
    )
    return f'{rows}\n{note(words)}\n<div class="charts">{column_bars(metrics)}</div>'
