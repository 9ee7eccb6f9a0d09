"""Runs that are killed and resumed consume the samples, and have the losses, of a run left alone.

The default takes a few combinations; `--kills 30` takes all of them, each with more kills.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import load_program
from forked_training import Run, TrainingServer
from small_runs import first_step
from written_shards import TINY_VIT, write_shards

from mmrec.manifest import read_manifest
from mmrec.training.checkpoints import list_checkpoints, read_progress
from mmrec.training.run import read_config, read_metrics
from mmrec.training.sample_log import read_samples

STEPS = 9  # of the runs below: 24 contents, batches of 8, 3 epochs
LOGGED = ("step", "loss", "lr", "scale", "gradient_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and towers with and without draws of their own."""
    folder = tmp_path_factory.mktemp("resume")
    write_shards(folder / "shards")
    write_shards(
        folder / "further", num_contents=12, num_val=0, num_products=4, first_product=5, prefix="d"
    )
    (folder / "plain.json").write_text(json.dumps(TINY_VIT))
    drawing = deepcopy(TINY_VIT)
    # Patches left out at random: each step then depends on torch's random state.
    drawing["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "drawing.json").write_text(json.dumps(drawing))
    return folder


@dataclass(frozen=True)
class Setting:
    """How a run is made."""

    towers: str = "drawing"
    ranks: int = 1
    workers: int = 0
    options: tuple[str, ...] = ()

    def flags(self, folder: Path, out: Path) -> list[str | Path]:
        towers = self.towers if self.towers.startswith("mmrec") else folder / f"{self.towers}.json"
        fixed = "--encoder.image-size 32 --sampler.batch-size 8 --epochs 3 --eval-every 4"
        logs = "--checkpoint-every 2 --log-every 1 --log-samples --cpu-threads 1"
        return [
            *("demo", "--shards", folder / "shards", "--out", out, "--encoder.towers", towers),
            *fixed.split(),
            *logs.split(),
            *("--num-workers", str(self.workers), "--resume", *self.options),
        ]


def stream(run: Path) -> list[dict[str, Any]]:
    return read_samples(run)


def losses(run: Path) -> list[dict[str, Any]]:
    """Every step's losses and all else that is no matter of time, evaluations included."""
    rows = read_metrics(run)
    keep = [*LOGGED, "content_product", "video_image", "val/MRR"]
    return [{key: row[key] for key in keep if key in row} for row in rows]


@pytest.fixture(scope="module")
def unbroken(server: TrainingServer, folder: Path) -> Any:
    """Runs that nobody kills, one for each kind of towers and number of ranks."""
    done: dict[tuple[str, int], Path] = {}

    def run(towers: str, ranks: int) -> Path:
        if (towers, ranks) not in done:
            out = folder / f"whole-{towers}-{ranks}"
            started = server.start(
                Setting(towers, ranks).flags(folder, out), ranks=ranks, log=folder / out.name
            )
            assert started.wait() == [0] * ranks, started.text()
            done[towers, ranks] = out
        return done[towers, ranks]

    return run


def run_with_kills(
    server: TrainingServer,
    folder: Path,
    settings: Sequence[Setting],
    *,
    name: str,
    seed: int,
    fail_at: int | None = None,
) -> Path:
    """Kill every setting but the last one at a random step of what is left; resume with the next."""
    rng = np.random.default_rng(seed)
    out = folder / name

    def start(setting: Setting, fail_at: int | None = None) -> Run:
        flags = setting.flags(folder, out)
        return server.start(flags, ranks=setting.ranks, log=folder / name, fail_at=fail_at)

    out.mkdir()
    reached = 0
    for setting in settings[:-1]:
        if fail_at is None:
            begun = kill_at_random(partial(start, setting), out, reached=reached, rng=rng)
        else:
            begun = start(setting, fail_at)
            assert begun.wait() == [1] * setting.ranks, begun.text()
            assert f"batch {fail_at} fails on purpose" in begun.text()
        assert first_step(begun.text()) == reached
        reached = newest_step(out)
        assert 0 < reached < STEPS
    last = start(settings[-1])
    assert last.wait() == [0] * settings[-1].ranks, last.text()
    assert first_step(last.text()) == reached
    return out


def newest_step(run: Path) -> int:
    return read_progress(list_checkpoints(run)[-1]).step


def kill_at_random(
    start: Callable[[], Run], out: Path, *, reached: int, rng: np.random.Generator
) -> Run:
    """Start a run, and kill it after its first checkpoint and a step, with two more to go or further.

    Where it got too far before the kill, all is put back, and the next one is killed sooner.
    """
    before, seen = out.with_name(f"{out.name}-before"), len(stream(out))
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(out, before)
    target = int(rng.integers(reached + 1, STEPS - 1))
    for attempt in range(8):
        run = start()
        await_batches(run, out, seen=seen, least=max(reached + 1, target - attempt))
        # Anywhere within a step, or in the middle of writing a checkpoint.
        time.sleep(rng.uniform(0, 0.05) / (attempt + 1))
        if run.kill() and newest_step(out) <= STEPS - 3:
            return run
        shutil.rmtree(out)
        shutil.copytree(before, out)
    raise AssertionError(f"{out}: no run was killed in time")


def await_batches(run: Run, out: Path, *, seen: int, least: int) -> None:
    """Wait until a run has a checkpoint and `least` batches; it drops some of the `seen` ones first."""
    begun = False
    while run.alive():
        length = len(stream(out))
        begun = begun or length != seen
        if begun and length >= least and list_checkpoints(out):
            return
        time.sleep(0.001)


def combinations(number: int) -> Sequence[tuple[str, int, int]]:
    """(towers, ranks, workers): all with batch normalisation or draws if many kills are asked for."""
    every = list(product(("drawing", "mmrec-tiny"), (1, 2), (0, 2, 4)))
    sampled = [("drawing", 1, 2), ("mmrec-tiny", 2, 0)]
    return every if number > 4 else sampled


def test_killed_runs_are_those_that_were_not_killed(
    server: TrainingServer, folder: Path, unbroken: Any, request: pytest.FixtureRequest
) -> None:
    kills = int(request.config.getoption("--kills") or 0)
    for number, (towers, ranks, workers) in enumerate(combinations(kills)):
        whole = unbroken(towers, ranks)
        assert len(stream(whole)) == STEPS
        setting = Setting(towers, ranks, workers)
        settings = [setting] * (max(1, kills // 10) + 1)
        broken = run_with_kills(
            server, folder, settings, name=f"killed-{towers}-{ranks}-{workers}", seed=number
        )
        assert stream(broken) == stream(whole)
        assert losses(broken) == losses(whole)
        weights = [list_checkpoints(run)[-1] / "model.safetensors" for run in (broken, whole)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_an_exception_is_no_worse_than_a_kill(
    server: TrainingServer, folder: Path, unbroken: Any
) -> None:
    settings = [Setting(workers=2), Setting(workers=4)]
    broken = run_with_kills(server, folder, settings, name="failed", seed=0, fail_at=6)
    assert stream(broken) == stream(unbroken("drawing", 1))
    assert losses(broken) == losses(unbroken("drawing", 1))


def test_other_ranks_and_workers_go_on_with_the_same_batches(
    server: TrainingServer, folder: Path, unbroken: Any, request: pytest.FixtureRequest
) -> None:
    settings = [Setting("plain", 1, 2), Setting("plain", 2, 0)]
    if int(request.config.getoption("--kills") or 0) > 4:
        settings = [Setting("plain", r, w) for r, w in ((2, 2), (1, 4), (4, 0), (2, 4), (1, 0))]
    broken = run_with_kills(server, folder, settings, name="changed", seed=4)
    whole = unbroken("plain", 1)
    assert stream(broken) == stream(whole)
    for ours, theirs in zip(losses(broken), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


def test_mixed_sources_and_groups_survive_a_kill(server: TrainingServer, folder: Path) -> None:
    options = ("--further-shards", str(folder / "further"), "--sampler.source-weights", "1", "3")
    groups = ("--sampler.group-by", "category", "--sampler.group-size", "2")
    limits = ("--sampler.max-rows-per-product", "3", "--epochs", "2")
    setting = Setting("plain", 1, 0, (*options, *groups, *limits))
    whole = run_with_kills(server, folder, [setting], name="mixed", seed=0)
    broken = run_with_kills(server, folder, [setting, setting], name="mixed-killed", seed=1)
    assert stream(broken) == stream(whole)
    assert losses(broken) == losses(whole)
    # One pass over the 36 contents of both is 4 batches of 8; 6 rows of each come from the second.
    assert len(stream(whole)) == 8
    names = [name for row in stream(whole) for name in row["contents"]]
    assert sum(name.startswith("d") for name in names) == pytest.approx(48, abs=3)
    parents = [parent.fingerprint for parent in read_manifest(whole / "encoder").parents]
    assert parents == [read_manifest(folder / f).fingerprint for f in ("shards", "further")]
    config = read_config(whole / "config.json", load_program("train/contrastive.py").TrainConfig)
    assert config.further_shards == (folder / "further",)
