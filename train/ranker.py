r"""Fit the hybrid ranker on validation targets, and measure it on test targets beside what it has to beat.

Input: a folder of sessions (data_prep/amazon_reviews.py, data_prep/content_sessions.py). Output: a folder
with `ranker` (what mmrec.generative.ranker.Ranker.load reads), metrics.json, and the table that is printed.

    python train/ranker.py --sessions runs/beauty/sessions --out runs/beauty/ranker

Candidates come from transition counts, users in common, titles, and, where they are given, neighbours by
embeddings of `mmrec embed`, the neighbours of what was watched since the last purchase (`--contents`), and
the lists of a generator (`--generated`, a run of train/generator.py, which has seen neither target).

Where sessions say at which position of a list a product was taken, a query weighs 1 over the chance that its
position was looked at, so that the order of those lists is not what is learned; the chances are had from the
lists, which displays.parquet holds (mmrec/generative/displays.py).

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
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float, Float32
from scipy import sparse

from mmrec.cli import run_program
from mmrec.errors import UserError
from mmrec.generative.baselines import popularity_scores, transition_scores
from mmrec.generative.displays import position_propensities, read_displays, target_weights
from mmrec.generative.evaluation import (
    METRIC_NAMES,
    Evaluation,
    RankedProducts,
    Scores,
    evaluate_recommendations,
    format_differences,
    format_table,
)
from mmrec.generative.lists import list_shares, read_id_table, read_lists
from mmrec.generative.ranker import GENERATOR, KIND, RankerConfig, fit_ranker
from mmrec.generative.sessions import (
    HeldOut,
    Sessions,
    Split,
    SplitBy,
    check_same_sessions,
    read_sessions,
    split_sessions,
)
from mmrec.generative.watched import watched_before, watched_scores
from mmrec.manifest import (
    FILE_NAME,
    check_output,
    find_parent,
    parent_of,
    read_manifest,
    write_whole,
)

COUNTS, COUNTED_ANEW = "transition counts", "transition counts, validation counted"
WATCHED = "watched"
HYBRID, HYBRID_ANEW = "hybrid", "hybrid, validation counted"
PAIRS = ((HYBRID, COUNTS), (HYBRID_ANEW, COUNTED_ANEW))


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """What to fit on, and where to write."""

    sessions: Path
    """A folder of sessions."""
    out: Path
    """The folder to write."""
    by: SplitBy = "leave-one-out"
    """How targets are held out."""
    embeddings: tuple[Path, ...] = ()
    """Folders of embeddings of the products; each becomes a source."""
    contents: tuple[Path, ...] = ()
    """Folders of embeddings of the contents that the sessions say were watched, by the encoder of the first
    of --embeddings. What was watched since the last purchase becomes a source."""
    generated: Path | None = None
    """A run of train/generator.py: its lists/val.parquet and lists/test.parquet become a source."""
    ids: Path | None = None
    """The semantic IDs that the generator uses, to say what counting IDs instead of products would add; those
    that the run names if left out."""
    ranker: RankerConfig = field(default_factory=RankerConfig)
    overwrite: bool = False
    """Replace the ranker that is there."""


def main(config: RankerTraining) -> None:
    """Fit, evaluate, save."""
    # ------------------------------------------------------------ data
    folder = config.out / "ranker"
    check_output(folder, kind=KIND, overwrite=config.overwrite, inputs=[config.sessions])
    if config.ids is not None and config.generated is None:
        raise UserError("--ids says what a generator's figures gain; give --generated, too")
    if config.contents and not config.embeddings:
        raise UserError("--contents: give --embeddings too, the products' by the same encoder")
    names = [path.name for path in config.embeddings]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--embeddings: two folders called {twice}; sources are told by that name")
    sessions = read_sessions(config.sessions)
    if config.generated is not None:
        check_held_out(config, config.generated, sessions)
    val, test = (split_sessions(sessions, config.by, held_out) for held_out in ("val", "test"))
    embeddings = {path.name: vectors_of(path, sessions) for path in config.embeddings}
    num_products = len(sessions.product_ids)
    val_lists = generated(config, sessions, val, "val")
    test_lists = generated(config, sessions, test, "test")
    val_sources = sources(config, sessions, val, val_lists, embeddings)
    test_sources = sources(config, sessions, test, test_lists, embeddings)

    weights, propensities = position_weights(config, sessions, val)

    # ------------------------------------------------------------ fit
    start = time.perf_counter()
    ranker = fit_ranker(
        val,
        sessions.product_ids,
        sessions.titles,
        config.ranker,
        embeddings=embeddings,
        proposed=val_sources,
        weights=weights,
    )
    fit_s = time.perf_counter() - start
    config.out.mkdir(parents=True, exist_ok=True)
    inputs = [config.sessions, *config.embeddings, *config.contents, config.generated]
    parents = [parent_of(folder, one) for one in inputs if one and (one / FILE_NAME).is_file()]
    ranker.save(folder, parents=parents, overwrite=config.overwrite)

    # ------------------------------------------------------------ evaluate
    # What was seen is removed from lists: they must be longer than the cutoffs by a history.
    k = 20 + int(test.histories.lengths.max())
    start = time.perf_counter()
    hybrid = ranker.rank(test.histories, k=k, proposed=test_sources)
    rank_s = time.perf_counter() - start
    transitions = config.ranker.transitions
    systems: dict[str, Scores] = {
        "popularity": popularity_scores(test.train, len(test.targets), num_products),
        COUNTS: transition_scores(test.train, test.histories, num_products, transitions),
        COUNTED_ANEW: transition_scores(test.before, test.histories, num_products, transitions),
        "titles alone": ranker.source_scores("title", test.histories),
        **test_lists,
        **{name: test_sources[name] for name in (WATCHED,) if name in test_sources},
        HYBRID: hybrid,
        HYBRID_ANEW: ranker.recounted(test.before).rank(test.histories, k=k, proposed=test_sources),
    }
    found = evaluate_recommendations(systems, test, num_products)
    report(config, found, ranker.importance(), propensities, fit_s=fit_s, rank_s=rank_s)


def check_held_out(config: RankerTraining, run: Path, sessions: Sessions) -> None:
    """Refuse a generator of other sessions or other targets: it may have been trained on ours."""
    if not (run / GENERATOR / FILE_NAME).is_file():
        return  # Lists that another program wrote.
    made = read_manifest(run / GENERATOR, "generator")
    what, mend = (
        f"{run}: was trained on",
        "give --sessions the former, or a generator trained on these",
    )
    check_same_sessions(made, sessions, config.sessions, what=what, mend=mend)
    by = json.loads((run / "config.json").read_text(encoding="utf-8")).get("by")
    if by != config.by:
        raise UserError(
            f"{run}: its targets were held out by {by}, and these are by {config.by}; give --by {by}, or a "
            f"generator trained with --by {config.by}"
        )


def position_weights(
    config: RankerTraining, sessions: Sessions, split: Split
) -> tuple[Float[np.ndarray, " Q"] | None, list[float]]:
    """What each query counts for, and the propensities; None and none where sessions say no positions."""
    if sessions.positions is None or config.ranker.largest_weight == 1:
        return None, []
    propensities = position_propensities(read_displays(config.sessions))
    weights = target_weights(sessions, split, propensities, config.ranker.largest_weight)
    return weights, propensities.tolist()


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
    config: RankerTraining, sessions: Sessions, split: Split, held_out: HeldOut
) -> dict[str, RankedProducts]:
    """The generator's lists for a split, where there is a generator, under the name of the source."""
    if config.generated is None:
        return {}
    path = config.generated / "lists" / f"{held_out}.parquet"
    lists, dropped = read_lists(path, sessions, split)
    for reason, count in dropped.items():
        print(f"{path}: {reason}: {count:,}")
    ids = config.ids
    if ids is None and (config.generated / GENERATOR / FILE_NAME).is_file():
        ids = find_parent(config.generated / GENERATOR, "semantic_ids")
    table = read_id_table(Path(str(ids)), sessions) if ids else None
    return {GENERATOR: RankedProducts(products=lists.products, scores=lists.scores, id_table=table)}


def sources(
    config: RankerTraining,
    sessions: Sessions,
    split: Split,
    lists: dict[str, RankedProducts],
    embeddings: dict[str, Float32[np.ndarray, "N D"]],
) -> dict[str, sparse.csr_array]:
    """What is proposed to each query of a split beside the links between products."""
    found = {name: list_shares(own, len(sessions.product_ids)) for name, own in lists.items()}
    if not config.contents:
        return found
    from mmrec.retrieval.embed import read_embeddings

    products = read_embeddings(config.embeddings[0])
    contents = [read_embeddings(path) for path in config.contents]
    for one in contents:
        if one.manifest.encoder != products.manifest.encoder:
            raise UserError(
                f"{one.folder}: was embedded by {one.manifest.encoder}, and {config.embeddings[0]} by "
                f"{products.manifest.encoder}; embed contents and products with one encoder"
            )
    watched = watched_before(sessions, split, [id_ for one in contents for id_ in one.ids])
    if watched.without_embedding:
        print(f"contents watched that have no embedding: {watched.without_embedding:,}")
    if not len(watched.queries):
        raise UserError(
            "--contents: none of them was watched before a query; are they of these sessions?"
        )
    vectors = np.concatenate([one.vectors for one in contents])
    by_products = embeddings[config.embeddings[0].name]
    return found | {
        WATCHED: watched_scores(watched, vectors, by_products, config.ranker.candidates)
    }


def report(
    config: RankerTraining,
    found: Evaluation,
    importance: dict[str, float],
    propensities: list[float],
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
            for stratum, figures in format_differences(means, intervals).items():
                lines.append(f"  {ours} - {theirs}, seen {seen}, {stratum}: {figures}")
    top = ", ".join(f"{name} {share:.0%}" for name, share in list(importance.items())[:8])
    lines += ["", f"transition counts are features of {HYBRID} and of {HYBRID_ANEW}"]
    lines.append(f"what the trees go by, in share of gain: {top}")
    if propensities:
        shown = " ".join(f"{chance:.2f}" for chance in propensities)
        lines.append(f"how likely positions of a list are to be looked at, as weighed for: {shown}")
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
        "propensities": propensities,
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
