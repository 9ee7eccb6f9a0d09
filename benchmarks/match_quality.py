"""What matching by product id buys over the diagonal of a batch, at equal compute.

    python benchmarks/match_quality.py --shards runs/photos/shards     # about 15 minutes on 4 cores
    python benchmarks/match_quality.py --shards runs/photos/shards --quick    # about a minute

Two trainings of the recipe `grocery-videos` on GroceryStore photos (README.md says how the shards are
made): same towers, first weights, steps, batches of the same size, augmentation and learning rates. The
peer is open_clip's loss, where a row's own column is its only positive and every other column a negative,
with every row bringing its product; ours knows products by id and shows each once a batch. Both are
evaluated on the test split by exact search. The last line is one JSON object; the ratio is ours over the
peer's R@1, and the bar holds when the 95% intervals (bootstrap over queries) do not meet.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
DIAGONAL = "--loss.positives diagonal --sampler.no-unique-products"


@dataclass(frozen=True, kw_only=True)
class MatchQualityConfig:
    """What is trained."""

    shards: Path
    """Shards of GroceryStore photos."""
    epochs: int = 40
    """Times that each photo is shown, at 64 pixels."""
    ours: str = "--loss.positives shared --sampler.unique-products"
    """Flags of our side, as train/contrastive.py takes them."""
    quick: bool = False
    """Two epochs: that it runs, not what it reaches."""


def main(config: MatchQualityConfig) -> None:
    """Train both, and print one JSON object on the last line."""
    epochs = 2 if config.quick else config.epochs
    sides = {"open_clip's diagonal": DIAGONAL, "ours": config.ours}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (side, flags) in enumerate(sides.items()):
            found[side] = _train(config.shards.resolve(), Path(folder) / str(number), epochs, flags)
            value, (low, high) = found[side]
            print(f"{side:<22} R@1 {value:.3f} ({low:.3f}-{high:.3f})", flush=True)
    (theirs, (_, their_high)), (ours, (our_low, _)) = found.values()
    result = {
        "what": f"test R@1 after {epochs} epochs at 64 pixels, {ours:.3f} against {theirs:.3f}",
        "peer": "open_clip's diagonal loss",
        "ratio": round(ours / theirs, 3),
        "bar": "intervals apart",
        "holds": our_low > their_high,
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(json.dumps({"benchmark": "match_quality", "machine": machine, "results": [result]}))


def _train(shards: Path, out: Path, epochs: int, flags: str) -> tuple[float, list[float]]:
    """Test R@1 of a training and its interval."""
    size = "--encoder.image-size 64 --augment.early-size None --augment.mix 0"
    steps = f"--epochs {epochs} --eval-every 1000000 --shards {shards} --out {out}"
    _run("train/contrastive.py", "grocery-videos", *size.split(), *steps.split(), *flags.split())
    command = f"evaluate --encoder {out}/encoder --shards {shards} --out {out}/test"
    program = "from mmrec.cli import main; main()"
    _run("-c", program, *command.split(), "--no-baselines", "--no-untrained")
    metrics: dict[str, Any] = json.loads((out / "test/metrics.json").read_text())
    return metrics["slices"]["all"]["R@1"], metrics["intervals"]["all"]["R@1"]


def _run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main(tyro.cli(MatchQualityConfig))
