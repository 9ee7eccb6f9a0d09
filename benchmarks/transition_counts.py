"""What recommenders have to beat, by the contract of mmrec.generative.evaluation.

    python benchmarks/transition_counts.py --sessions runs/beauty/sessions --peer beauty    # about 20 s
    python benchmarks/transition_counts.py --sessions runs/beauty/sessions --quick    # fewer resamples

The sessions are made by data_prep/amazon_reviews.py. Popularity and windowed transition counts
(mmrec/generative/baselines.py says what they are) rank the last product of each user. The counts stop before
the validation product, which is in the history that is asked; a second row counts it too, as a model would
have it that is fitted again before it serves. The last line is one JSON object. With --peer NAME a ratio is
that of R@10 or N@10 over the figure in TIGER's paper (Rajput et al., 2023, table 1), where seen ones stay.
"""

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from mmrec.cli import run_program
from mmrec.generative.baselines import TransitionConfig, popularity_scores, transition_scores
from mmrec.generative.evaluation import Evaluation, evaluate_recommendations, format_table
from mmrec.generative.sessions import leave_one_out, read_sessions, time_split

# R@5, N@5, R@10, N@10 of the paper.
TIGER = {
    "beauty": (0.0454, 0.0321, 0.0648, 0.0384),
    "sports": (0.0264, 0.0181, 0.0400, 0.0225),
    "toys": (0.0521, 0.0371, 0.0712, 0.0432),
}
COLUMNS = ("R@5", "N@5", "R@10", "N@10")


@dataclass(frozen=True, kw_only=True)
class TransitionCountsConfig:
    """What is measured."""

    sessions: Path
    """A folder of sessions."""
    peer: Literal["beauty", "sports", "toys"] | None = None
    """Which of the paper's data sets this is, to print its row beside ours."""
    by: Literal["leave-one-out", "time"] = "leave-one-out"
    """How targets are held out."""
    transitions: TransitionConfig = field(default_factory=TransitionConfig)
    quick: bool = False
    """100 resamples for the intervals instead of 1,000."""


def main(config: TransitionCountsConfig) -> None:
    """Print the table, and one JSON object on the last line."""
    sessions = read_sessions(config.sessions)
    split = (leave_one_out if config.by == "leave-one-out" else time_split)(sessions, "test")
    num_products = len(sessions.product_ids)
    start = time.perf_counter()
    counted = transition_scores(split.train, split.histories, num_products, config.transitions)
    seconds = time.perf_counter() - start
    systems = {
        "popularity": popularity_scores(split.train, len(split.targets), num_products),
        "transition counts": counted,
        "  and validation": transition_scores(
            split.before, split.histories, num_products, config.transitions
        ),
    }
    num_resamples = 100 if config.quick else 1000
    found = evaluate_recommendations(systems, split, num_products, num_resamples=num_resamples)
    print(format_table(found))
    print(
        f"\ntransition counts: {seconds:.1f} s to count and to score {len(split.targets):,} queries"
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    results = _compared(found, config.peer) if config.peer else []
    print(json.dumps({"benchmark": "transition_counts", "machine": machine, "results": results}))


def _compared(found: Evaluation, peer: str) -> list[dict[str, Any]]:
    ours = found.systems["transition counts"]["kept"].slices["all"]
    theirs = dict(zip(COLUMNS, TIGER[peer], strict=True))
    row = "  ".join(f"{name} {theirs[name]:.4f}" for name in COLUMNS)
    print(f"TIGER, the paper's row: {row}")
    return [
        {
            "what": f"{metric}, {ours[metric]:.4f} against {theirs[metric]:.4f}",
            "peer": "TIGER, the paper's row",
            "ratio": round(ours[metric] / theirs[metric], 3),
            "bar": 1.0,
            "holds": ours[metric] >= theirs[metric],
        }
        for metric in ("R@10", "N@10")
    ]


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(TransitionCountsConfig)))
