"""Tables of an evaluation: its systems, its slices, and exact search against an index."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmrec.retrieval.metrics import MAIN_METRICS, METRIC_NAMES, systems
from mmrec.retrieval.report.page import count_of, heading, note, range_text, readable, table

MAIN_SLICES = ("all", "warm", "cold")
"""The slices of the main table; all others go to the table of slices."""
TRAINED = "trained"


def systems_of(metrics: Mapping[str, Any], slice_name: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The encoder, the encoder with half of each query, then each baseline, on one slice."""
    return [
        (name, summary[slice_name])
        for name, summary in systems(metrics).items()
        if slice_name in summary
    ]


def interval_of(
    metrics: Mapping[str, Any], system: str, slice_name: str, metric: str
) -> Sequence[float] | None:
    """A system's 95% interval, where it was drawn."""
    intervals = metrics["intervals"]
    if system != TRAINED:
        intervals = metrics.get("system_intervals", {}).get(system, {})
    return intervals.get(slice_name, {}).get(metric)


def best_baseline(
    metrics: Mapping[str, Any], slice_name: str, metric: str
) -> tuple[str, float] | None:
    """The baseline of the highest value, if there are any."""
    scores = [
        (summary[slice_name][metric], name)
        for name, summary in metrics["baselines"].items()
        if slice_name in summary
    ]
    value, name = max(scores, default=(0.0, ""))
    return (name, value) if name else None


def results_table(metrics: Mapping[str, Any]) -> str:
    """The main table: all systems on the main slices."""
    names = [name for name in MAIN_SLICES if name in metrics["slices"]]
    caption = (
        f"{metrics['queries']:,} queries against the whole catalogue of {metrics['gallery']:,} "
        "products, by exact search"
    )
    bodies = [_result_rows(metrics, name) for name in names]
    return table(caption, ("System", *METRIC_NAMES), bodies, kind="results")


def _result_rows(metrics: Mapping[str, Any], slice_name: str) -> str:
    found = systems_of(metrics, slice_name)
    best = {metric: max(means[metric] for _, means in found) for metric in METRIC_NAMES}
    rows = []
    for system, means in found:
        cells = "".join(
            _figure_cell(
                means[metric],
                means[metric] == best[metric],
                interval_of(metrics, system, slice_name, metric),
            )
            for metric in METRIC_NAMES
        )
        kind = ' class="trained"' if system == TRAINED else ""
        rows.append(f'<tr{kind}><th scope="row">{readable(system)}</th>{cells}</tr>')
    count = metrics["slices"][slice_name]["queries"]
    group = group_row(slice_name, count_of(count), len(METRIC_NAMES) + 1)
    return f"<tbody>{group}{''.join(rows)}</tbody>"


def group_row(name: str, small: str, num_columns: int) -> str:
    """The first row of a tbody, which names it."""
    return (
        f'<tr class="group"><th scope="rowgroup" colspan="{num_columns}">'
        f"{heading(name)} <small>{escape(small)}</small></th></tr>"
    )


def _figure_cell(value: float, best: bool, interval: Sequence[float] | None) -> str:
    figure = f"<b>{value:.3f}</b>" if best else f"{value:.3f}"
    small = f"<small>{range_text(interval)}</small>" if interval else ""
    return f"<td>{figure}{small}</td>"


def slices_table(metrics: Mapping[str, Any]) -> str:
    """Every other slice of the evaluation: popularity, missing modality, and columns such as category."""
    groups = slice_groups(metrics)
    if not groups:
        return ""
    columns = ("Slice", "Queries", *MAIN_METRICS, "Best baseline R@1")
    bodies = []
    for group, names in groups.items():
        rows = "".join(_slice_row(metrics, name) for name in names)
        bodies.append(f"<tbody>{group_row(group, '', len(columns))}{rows}</tbody>")
    return table("The trained encoder on parts of the queries", columns, bodies, kind="results")


def slice_groups(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Slices that the main table leaves out, by the column that they come from."""
    groups: dict[str, list[str]] = {}
    for name in metrics["slices"]:
        if name not in MAIN_SLICES:
            column = name.split(": ")[0] if ": " in name else "popularity and missing parts"
            groups.setdefault(column, []).append(name)
    return groups


def value_of(slice_name: str) -> str:
    """The value of a column that a slice is: "bags" of "category: bags"."""
    return slice_name.partition(": ")[2] or slice_name


def _slice_row(metrics: Mapping[str, Any], name: str) -> str:
    means = metrics["slices"][name]
    best = best_baseline(metrics, name, "R@1")
    figures = "".join(
        _figure_cell(means[metric], False, interval_of(metrics, TRAINED, name, metric))
        for metric in MAIN_METRICS
    )
    beside = f"{best[1]:.3f}<small>{readable(best[0])}</small>" if best else "none"
    return (
        f'<tr><th scope="row">{readable(value_of(name))}</th><td>{means["queries"]:,}</td>'
        f"{figures}<td>{beside}</td></tr>"
    )


def index_tables(metrics: Mapping[str, Any]) -> str:
    """Exact search against the index's own answers."""
    index = metrics.get("index")
    if index is None:
        return ""
    missing = index["missing"]
    held = "all products of these shards" if not missing else f"not {missing:,} of these products"
    intro = (
        f"The index <strong>{escape(index['factory'])}</strong> of {index['products']:,} products, which "
        f"holds {held}, was asked the same {metrics['queries']:,} queries. Recall here is the share of what "
        f"an exact search finds first; a right product that is not among its first {index['depth']} stands "
        "last. Latency is of one query at a time, rate of all queries at once, both on this machine "
        "beside a flat index in the same process; the encoder's work is not in it."
    )
    return note(intro) + _recall_table(index) + _end_table(metrics, index) + _speed_table(index)


def _recall_table(index: Mapping[str, Any]) -> str:
    cells = "".join(f"<td>{share:.4f}</td>" for share in index["recall"].values())
    columns = ("First K of an exact search", *(f"K = {k}" for k in index["recall"]))
    row = f'<tbody><tr><th scope="row">found by the index</th>{cells}</tr></tbody>'
    return table("How much of an exact search the index finds", columns, [row])


def _end_table(metrics: Mapping[str, Any], index: Mapping[str, Any]) -> str:
    rows = []
    for name, summary in (("exact search", metrics["slices"]), ("index", index["slices"])):
        cells = "".join(f"<td>{summary['all'][metric]:.4f}</td>" for metric in METRIC_NAMES)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    cells = "".join(
        f"<td>{own['difference']:+.4f}<small>{own['low']:+.4f} to {own['high']:+.4f}</small></td>"
        for own in (index["differences"][metric] for metric in METRIC_NAMES)
    )
    rows.append(f'<tr><th scope="row">difference</th>{cells}</tr>')
    caption = "Right products found, all queries; small: 95% intervals, paired bootstrap"
    body = f"<tbody>{''.join(rows)}</tbody>"
    return table(caption, ("Search", *METRIC_NAMES), [body], kind="results")


def _speed_table(index: Mapping[str, Any]) -> str:
    rows = []
    for name, label in (("exact", "exact search (Flat)"), ("index", "index")):
        times = index["latency_ms"][name]
        cells = "".join(f"<td>{times[part]:.3f}</td>" for part in ("median", "p95", "p99"))
        rate = index["queries_per_s"][name]
        rows.append(f'<tr><th scope="row">{label}</th>{cells}<td>{rate:,.0f}</td></tr>')
    columns = ("Search", "Median, ms", "95%, ms", "99%, ms", "Queries a second, at once")
    return table("Speed of a search", columns, [f"<tbody>{''.join(rows)}</tbody>"])
