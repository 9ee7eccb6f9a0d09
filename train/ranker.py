r"""Fit the hybrid ranker on validation targets, and measure it on test targets beside what it has to beat.

Input: a folder of sessions (data_prep/amazon_reviews.py, data_prep/content_sessions.py). Output: a folder
with `ranker` (what mmrec.generative.ranker.Ranker.load reads), metrics.json, and the table that is printed.

    python train/ranker.py --sessions runs/beauty/sessions --out runs/beauty/ranker

Candidates come from transition counts, users in common, titles, and, where they are given, embeddings of
`mmrec embed` and a generator's lists. The lists of a generator are needed for both splits: it must have seen
neither target when it made them.

No leak: counts stop before the validation target. The ranker is fitted on how those counts, and the other
sources, see that target, and asked about the test target with the same counts ("hybrid"), whose history holds
the validation target. "hybrid, validation counted" counts that one too, as one would before serving; its
peer is "transition counts, validation counted". What is saved is the former.

On Beauty (22,363 users) some 5 minutes on two cores. The last line is one JSON object.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from jaxtyping import Float32

from mmrec.cli import run_program
from mmrec.errors import UserError
from mmrec.generative.baselines import popularity_scores, transition_scores
from mmrec.generative.evaluation import (
    METRIC_NAMES,
    Evaluation,
    RankedProducts,
    Scores,
    evaluate_recommendations,
    format_table,
    list_scores,
)
from mmrec.generative.lists import read_id_table, read_lists
from mmrec.generative.ranker import KIND, RankerConfig, fit_ranker
from mmrec.generative.sessions import Sessions, Split, leave_one_out, read_sessions, time_split
from mmrec.manifest import check_output, parent_of, write_whole

COUNTS, COUNTED_ANEW = "transition counts", "transition counts, validation counted"
HYBRID, HYBRID_ANEW = "hybrid", "hybrid, validation counted"
PAIRS = ((HYBRID, COUNTS), (HYBRID_ANEW, COUNTED_ANEW))


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """What to fit on, and where to write."""

    sessions: Path
    """A folder of sessions."""
    out: Path
    """The folder to write."""
    by: Literal["leave-one-out", "time"] = "leave-one-out"
    """How targets are held out."""
    embeddings: tuple[Path, ...] = ()
    """Folders of embeddings of the products; each becomes a source."""
    generated_val: Path | None = None
    """A generator's lists for the validation split: Parquet with user_id, item_ids and scores."""
    generated_test: Path | None = None
    """The same for the test split."""
    ids: Path | None = None
    """The semantic IDs that the generator uses, to say what counting IDs instead of products would add."""
    ranker: RankerConfig = field(default_factory=RankerConfig)
    overwrite: bool = False
    """Replace the ranker that is there."""


def main(config: RankerTraining) -> None:
    """Fit, evaluate, save."""
    # ------------------------------------------------------------ data
    folder = config.out / "ranker"
    check_output(folder, kind=KIND, overwrite=config.overwrite, inputs=[config.sessions])
    if (config.generated_val is None) != (config.generated_test is None):
        raise UserError("--generated-val and --generated-test go together")
    if config.ids is not None and config.generated_test is None:
        raise UserError("--ids says what a generator's figures gain; give --generated-test, too")
    sessions = read_sessions(config.sessions)
    cut = leave_one_out if config.by == "leave-one-out" else time_split
    val, test = cut(sessions, "val"), cut(sessions, "test")
    embeddings = {path.name: vectors_of(path, sessions) for path in config.embeddings}
    num_products = len(sessions.product_ids)
    val_lists = generated(config.generated_val, sessions, val)
    test_lists = generated(config.generated_test, sessions, test, config.ids)

    # ------------------------------------------------------------ fit
    start = time.perf_counter()
    ranker = fit_ranker(
        val,
        sessions.product_ids,
        sessions.titles,
        config.ranker,
        embeddings=embeddings,
        proposed={name: list_scores(lists, num_products) for name, lists in val_lists.items()},
    )
    fit_s = time.perf_counter() - start
    config.out.mkdir(parents=True, exist_ok=True)
    ranker.save(folder, parents=[parent_of(folder, config.sessions)], overwrite=config.overwrite)

    # ------------------------------------------------------------ evaluate
    proposed = {name: list_scores(lists, num_products) for name, lists in test_lists.items()}
    # What was seen is removed from lists: they must be longer than the cutoffs by a history.
    k = 20 + int(test.histories.lengths.max())
    start = time.perf_counter()
    hybrid = ranker.rank(test.histories, k=k, proposed=proposed)
    rank_s = time.perf_counter() - start
    transitions = config.ranker.transitions
    systems: dict[str, Scores] = {
        "popularity": popularity_scores(test.train, len(test.targets), num_products),
        COUNTS: transition_scores(test.train, test.histories, num_products, transitions),
        COUNTED_ANEW: transition_scores(test.before, test.histories, num_products, transitions),
        "titles alone": ranker.source_scores("title", test.histories),
        **test_lists,
        HYBRID: hybrid,
        HYBRID_ANEW: ranker.recounted(test.before).rank(test.histories, k=k, proposed=proposed),
    }
    found = evaluate_recommendations(systems, test, num_products)
    report(config, found, ranker.importance(), fit_s=fit_s, rank_s=rank_s)


def vectors_of(path: Path, sessions: Sessions) -> Float32[np.ndarray, "N D"]:
    """Embeddings in catalogue order; a product without one has no neighbours by them."""
    # Brings torch and the towers, which nothing else here needs.
    from mmrec.retrieval.embed import read_embeddings

    read = read_embeddings(path)
    rows = {product: row for row, product in enumerate(read.ids)}
    order = np.array([rows.get(product, -1) for product in sessions.product_ids])
    if not (order >= 0).any():
        raise UserError(
            f"{path}: holds none of the products of {sessions.product_ids[0]} and others"
        )
    vectors = read.vectors[order].astype(np.float32)
    vectors[order < 0] = 0
    return vectors


def generated(
    path: Path | None, sessions: Sessions, split: Split, ids: Path | None = None
) -> dict[str, RankedProducts]:
    """A generator's lists for a split, where there are any, under the name of the source."""
    if path is None:
        return {}
    lists, dropped = read_lists(path, sessions, split)
    for reason, count in dropped.items():
        print(f"{path}: {reason}: {count:,}")
    table = read_id_table(ids, sessions) if ids else None
    return {
        "generator": RankedProducts(products=lists.products, scores=lists.scores, id_table=table)
    }


def report(
    config: RankerTraining,
    found: Evaluation,
    importance: dict[str, float],
    *,
    fit_s: float,
    rank_s: float,
) -> None:
    """Print the table and paired differences, and write them as metrics.json and table.txt."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [format_table(found), "", "paired differences in R@10 and N@10, with 95% intervals:"]
    differences: dict[str, Any] = {}
    for ours, theirs in PAIRS:
        for seen in ("kept", "removed"):
            means, intervals = found.difference(ours, theirs, seen=seen)
            differences[f"{ours} - {theirs}, seen {seen}"] = {
                "means": means,
                "intervals": intervals,
            }
            for stratum in means:
                figures = ", ".join(
                    f"{metric} {means[stratum][metric]:+.4f} ({low:+.4f} to {high:+.4f})"
                    for metric in ("R@10", "N@10")
                    for low, high in [intervals[stratum][metric]]
                )
                lines.append(f"  {ours} - {theirs}, seen {seen}, {stratum}: {figures}")
    top = ", ".join(f"{name} {share:.0%}" for name, share in list(importance.items())[:8])
    lines += ["", f"what the trees go by, in share of gain: {top}"]
    queries = found.num_queries
    lines += [
        f"fitted in {fit_s:.0f} s; ranked {queries:,} queries in {rank_s:.0f} s; {machine}",
    ]
    text = "\n".join(lines)
    print(text)
    write_whole(config.out / "table.txt", text + "\n")
    metrics = found.to_dict() | {
        "differences": differences,
        "importance": importance,
        "config": asdict(config),
        "fit_s": fit_s,
        "rank_s": rank_s,
        "machine": machine,
    }
    write_whole(config.out / "metrics.json", json.dumps(metrics, indent=2, default=str) + "\n")
    last = {
        name: {metric: by_seen["kept"].slices["all"][metric] for metric in METRIC_NAMES}
        for name, by_seen in found.systems.items()
    }
    print(json.dumps({"program": "ranker", "machine": machine, "seen kept": last}))


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(RankerTraining)))
