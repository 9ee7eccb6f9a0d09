"""What each piece of the training buys: every arm changes one thing, under one small fixed budget.

Input: shards of the generated catalogue and of GroceryStore's videos. Output: a folder with a run for each
arm and seed, `results.json`, and `results.md`, the tables of train/README.md.

    python train/study.py --demo runs/demo/shards --videos runs/videos/shards --out runs/study

Takes about two hours on 4 cores: as many trainings at once as there are cores, each on one thread. Broken
off and started again, it goes on with the runs that are not finished, or were made with other flags or
shards; `--arms` and `--seeds` do a part.

An arm's figure is its mean over seeds on the test split, by exact search. Its difference from its base is
in MRR, which the rank of every query moves, over the same seeds and queries; the interval resamples both
(95%, percentile bootstrap). The difference on the val split stands beside it: what a recipe takes from this
study is chosen by that one, so that the test split stays one that nothing was chosen by.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from jaxtyping import Float

from mmrec.cli import run_program
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.ranges import Count, CountOrZero, check_ranges

# Shape letters: S seeds, Q queries.

ROOT = Path(__file__).resolve().parents[1]
MEASURE = "--measure"
Data = Literal["demo", "videos"]
METRICS = ("R@1", "R@5", "MRR")
SPLITS: tuple[Literal["test", "val"], ...] = ("test", "val")
VIEWS = {"content": "whole", "video": "video alone", "content_title": "title alone"}
NUM_RESAMPLES = 2000

# --- config ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is run."""

    demo: Path
    """Shards of data_prep/synthetic.py."""
    videos: Path
    """Shards of data_prep/grocery_store.py --form videos."""
    out: Path
    """The study's folder; what is finished there is not run again."""
    seeds: Count = 3
    """Runs of each arm: with the seeds 0, 1, 2."""
    arms: tuple[str, ...] = ()
    """Names of the arms to run beside the base; empty runs all."""
    jobs: CountOrZero = 0
    """Trainings at once, each on one thread; 0 takes one per core."""


# Every row brings its product, nothing is capped, corrected or mined. The demo set's base has neither of the
# two changes that its recipe took from this study. On videos the small early pictures of the recipe are left
# out, since they would make epochs unequal.
BASES: dict[Data, str] = {
    "demo": "demo --objectives.image-title 0 --augment.modality-dropout 0.25",
    "videos": "grocery-videos --epochs 20 --sampler.no-unique-products --augment.early-size None "
    "--encoder.image-size 64 --encoder.num-frames 4",
}
SHARED = "--eval-every 1000000 --checkpoint-every 1000000 --num-workers 0 --cpu-threads 1"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One change of the base."""

    name: str
    flags: str
    data: tuple[Data, ...] = ("demo", "videos")
    mined: int = 0
    """Negatives a row, mined with the base's encoder of the same seed."""


BASE = Arm(name="base", flags="")
QUESTIONS: dict[str, list[Arm]] = {
    "Who is a positive": [
        Arm(name="diagonal (CLIP)", flags="--loss.positives diagonal"),
        Arm(name="masked", flags="--loss.positives masked", data=("demo",)),
        Arm(name="sigmoid (SigLIP)", flags="--loss.kind sigmoid --encoder.start-bias -10"),
    ],
    "How batches are made": [
        Arm(
            name="a product at most twice",
            flags="--sampler.max-rows-per-product 2",
            data=("demo",),
        ),
        Arm(name="a product at most once", flags="--sampler.max-rows-per-product 1"),
        Arm(name="a product shown once", flags="--sampler.unique-products"),
        Arm(
            name="half a batch of one category",
            flags="--sampler.group-by category --sampler.group-share 0.5",
            data=("demo",),
        ),
    ],
    "Correction for popularity": [
        Arm(name="logQ 0.5", flags="--loss.logq 0.5", data=("demo",)),
        Arm(name="logQ 1", flags="--loss.logq 1"),
    ],
    "Objectives": [
        Arm(name="content-product alone", flags="--objectives.video-image 0", data=("demo",)),
        Arm(name="with title-title", flags="--objectives.title-title 1", data=("demo",)),
        Arm(name="with image-title", flags="--objectives.image-title 1", data=("demo",)),
    ],
    "Frames to a video": [Arm(name="attention pooling", flags="--encoder.pooling attention")],
    "Video and title to a content": [
        Arm(name="plain mean", flags="--encoder.fusion mean", data=("demo",)),
    ],
    "Modality dropout": [
        Arm(name="none", flags="--augment.modality-dropout 0", data=("demo",)),
        Arm(name="half", flags="--augment.modality-dropout 0.5", data=("demo",)),
    ],
    "Augmentation": [
        Arm(name="CutMix", flags="--augment.mix 0.5", data=("videos",)),
        Arm(name="averaged weights", flags="--ema 0.99", data=("videos",)),
    ],
    "Mined negatives": [
        Arm(name="one a row", flags="", data=("demo",), mined=1),
        Arm(name="four a row", flags="", data=("demo",), mined=4),
    ],
    "Together": [
        Arm(
            name="with image-title, nothing dropped",
            flags="--objectives.image-title 1 --augment.modality-dropout 0",
            data=("demo",),
        ),
    ],
}


# --- runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training, and what it reached."""

    data: Data
    arm: Arm
    seed: int
    shards: Path
    out: Path

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return run_folder(self.out, self.data, self.arm, self.seed)

    @property
    def measured(self) -> Path:
        """The file that is written last: every query's figures."""
        return self.folder / "queries.npz"

    @property
    def record(self) -> Path:
        """The file that says what the run was made from."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def made_from(self) -> dict[str, Any]:
        """What decides the run, but for the code."""
        shards = read_manifest(self.shards, "shards").fingerprint
        return {"flags": self._flags(), "mined": self.arm.mined, "shards": shards}

    def is_done(self) -> bool:
        """Whether it is there, from the same flags and shards."""
        return (
            self.measured.exists()
            and self.record.exists()
            and json.loads(self.record.read_text(encoding="utf-8")) == self.made_from()
        )

    def go(self) -> None:
        """Train and measure, unless that is done."""
        if self.is_done():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        negatives = self._mine() if self.arm.mined else []
        train = [*self._flags(), *negatives, "--shards", self.shards, "--out", self.folder]
        execute([ROOT / "train/contrastive.py", *train], self.folder)
        self.record.write_text(json.dumps(self.made_from()) + "\n", encoding="utf-8")
        execute([Path(__file__), MEASURE, self.folder, self.shards], self.folder)

    def _flags(self) -> list[str]:
        seeds = ["--seed", str(self.seed), "--sampler.seed", str(self.seed)]
        return [*BASES[self.data].split(), *SHARED.split(), *self.arm.flags.split(), *seeds]

    def _mine(self) -> list[str]:
        table = self.folder.with_name(f"{self.folder.name}-negatives")
        shutil.rmtree(table, ignore_errors=True)
        encoder = run_folder(self.out, self.data, BASE, self.seed) / "encoder"
        command = [ROOT / "train/mine_negatives.py", "--encoder", encoder, "--shards", self.shards]
        execute([*command, "--out", table], table)
        return ["--negatives", str(table), "--num-negatives", str(self.arm.mined)]


def run_folder(out: Path, data: Data, arm: Arm, seed: int) -> Path:
    """Where a training of the study lies."""
    kept = "".join(c if c.isalnum() else "-" for c in arm.name)
    return (
        out / data / f"{kept}-{arm.mined}" / str(seed)
        if arm.mined
        else out / data / kept / str(seed)
    )


def execute(command: Sequence[Any], folder: Path) -> None:
    """Run a program on one thread; its output goes beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command[:2]))}: failed, see {log}")


def measure(folder: Path, shards: Path) -> None:
    """Write what every query of test and val reached, with all of it and with one modality alone."""
    from mmrec.model.encoder import Encoder
    from mmrec.retrieval.embed import embed_rows, embed_views
    from mmrec.retrieval.evaluation import Gallery
    from mmrec.retrieval.metrics import per_query, rank_relevant

    encoder = Encoder.load(folder / "encoder")
    found = {}
    products = None
    for split in SPLITS:
        gallery = Gallery.open(shards, split)
        queries = embed_views(encoder, gallery.contents)
        products = embed_rows(encoder, gallery.catalog) if products is None else products
        for view in VIEWS:
            if queries[view].any():  # A view that no content has is zero.
                values = per_query(rank_relevant(queries[view], products, gallery.relevant))
                found |= {f"{split} {view} {metric}": values[metric] for metric in METRICS}
    with (folder / "queries.npz.part").open("wb") as file:
        np.savez(file, **found)
    (folder / "queries.npz.part").rename(folder / "queries.npz")


# --- results -----------------------------------------------------------------------------------


def read(runs: Sequence[Run], key: str) -> Float[np.ndarray, "S Q"]:
    """A metric of each query in each seed's run."""
    return np.stack([np.load(run.measured)[key] for run in runs])


def interval(values: Float[np.ndarray, "S Q"]) -> tuple[float, float]:
    """The 95% percentile interval of the mean, resampling seeds and queries."""
    rng = np.random.default_rng(0)
    seeds, queries = values.shape
    means = [
        values[rng.integers(seeds, size=seeds)][:, rng.integers(queries, size=queries)].mean()
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarise(
    data: Data, question: str, arm: Arm, runs: Sequence[Run], base: Sequence[Run]
) -> dict:
    """An arm's figures and how far they are from the base's."""
    row: dict[str, Any] = {"data": data, "question": question, "arm": arm.name, "flags": arm.flags}
    if arm.mined:
        row["flags"] = f"--negatives TABLE --num-negatives {arm.mined}"
    row["minutes"] = float(np.mean([read_manifest(run.folder).details["minutes"] for run in runs]))
    for key in np.load(runs[0].measured).files:
        values, reference = read(runs, key), read(base, key)
        row[key] = {
            "mean": float(values.mean()),
            "seeds": [round(float(part), 4) for part in values.mean(1)],
            "interval": interval(values),
            "difference": float((values - reference).mean()),
            "difference_interval": interval(values - reference),
        }
    return row


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Two tables, one a data set; a difference whose interval leaves out zero is bold."""
    lines = []
    for data in BASES:
        mine = [row for row in rows if row["data"] == data]
        if not mine:
            continue
        views = [view for view in VIEWS if f"test {view} R@1" in mine[0]]
        if "content_title" not in views:  # Without titles the video is the whole content.
            views = views[:1]
        head = ["arm", "R@1", "R@5", "MRR", "MRR against base", "the same on val"]
        head += [f"R@1, {VIEWS[view]}" for view in views[1:]]
        lines += [f"**{data}**", "", _line(head), _line(["---"] * len(head))]
        question = ""
        for row in mine:
            if row["question"] != question:
                question = row["question"]
                lines.append(_line([f"*{question}*", *[""] * (len(head) - 1)]))
            lines.append(_line(_cells(row, views)))
        lines.append("")
    return "\n".join(lines)


def _cells(row: dict[str, Any], views: Sequence[str]) -> list[str]:
    is_base = row["arm"] == BASE.name
    cells = [row["arm"], *(f"{row[f'test content {metric}']['mean']:.3f}" for metric in METRICS)]
    cells += ["" if is_base else _change(row[f"{split} content MRR"]) for split in SPLITS]
    return cells + [f"{row[f'test {view} R@1']['mean']:.3f}" for view in views[1:]]


def _change(figure: dict[str, Any]) -> str:
    low, high = figure["difference_interval"]
    change = f"{figure['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
    return f"**{change}**" if low > 0 or high < 0 else change


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- the study ---------------------------------------------------------------------------------


def main(config: StudyConfig) -> None:
    """Run what is not finished, and write the results of what is."""
    check_ranges(config)
    arms = [(question, arm) for question, group in QUESTIONS.items() for arm in group]
    unknown = set(config.arms) - {arm.name for _, arm in arms}
    if unknown:
        names = ", ".join(arm.name for _, arm in arms)
        raise UserError(f"--arms '{min(unknown)}': expected some of {names}")
    chosen = [
        ("", BASE),
        *(pair for pair in arms if not config.arms or pair[1].name in config.arms),
    ]
    shards: dict[Data, Path] = {"demo": config.demo, "videos": config.videos}
    for folder in shards.values():
        read_manifest(folder, "shards")

    def runs_of(data: Data, arm: Arm) -> list[Run]:
        return [Run(data, arm, seed, shards[data], config.out) for seed in range(config.seeds)]

    pairs: list[tuple[Data, str, Arm]] = [
        (data, question, arm)
        for data in shards
        for question, arm in chosen
        if arm is BASE or data in arm.data
    ]
    everything = [run for data, _, arm in pairs for run in runs_of(data, arm)]
    started = time.perf_counter()
    # Mining needs the base's encoders, so those come first.
    failed: list[Run] = []
    for stage in (
        [run for run in everything if run.arm is BASE],
        [run for run in everything if run.arm is not BASE],
    ):
        failed += run_all(stage, config.jobs or len(os.sched_getaffinity(0)))
    rows = [
        summarise(d, q, arm, runs_of(d, arm), runs_of(d, BASE))
        for d, q, arm in pairs
        if all(run.is_done() for each in (arm, BASE) for run in runs_of(d, each))
    ]
    (config.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (config.out / "results.md").write_text(to_markdown(rows), encoding="utf-8")
    print(to_markdown(rows))
    print(f"{len(everything)} runs; this call took {(time.perf_counter() - started) / 60:.0f} min")
    if failed:
        names = ", ".join(f"{run.data} {run.arm.name} {run.seed}" for run in failed)
        raise UserError(f"{len(failed)} runs failed, and their arms are left out: {names}")


def run_all(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Run trainings side by side, say which are done, and return those that failed."""
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [(run, pool.submit(run.go)) for run in runs]
        for number, (run, future) in enumerate(futures, 1):
            name = f"{number}/{len(runs)} {run.data}, {run.arm.name}, seed {run.seed}"
            try:
                future.result()
            except UserError as error:
                failed.append(run)
                name += f": {error}"
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            print(name, file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        run_program(lambda: measure(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        run_program(lambda: main(tyro.cli(StudyConfig, description=__doc__)))
