"""Runs that end before their end: by a signal, a bad loss, or a full disk; and how they go on."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, load_program, reset_accelerate
from safetensors.torch import load_file
from small_runs import first_step, small_run

from mmrec.data.shards import open_shards
from mmrec.errors import UserError
from mmrec.training.checkpoints import list_checkpoints, read_progress
from mmrec.training.run import RunFolder, read_metrics

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

FIRST_STEPS_S = 480
"""Until a started program has made four steps; beside much other work that takes minutes."""
SAVES = {"eval_every": 3, "checkpoint_every": 2, "keep_checkpoints": 99}


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("train/contrastive.py")


@pytest.fixture
def config(tiny_shards: Path, tmp_path: Path) -> Any:
    """Six steps, evaluated after the third and the sixth."""
    return small_run(tiny_shards, tmp_path / "run", **SAVES)


@pytest.fixture(scope="module")
def short(program: ModuleType, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the first epoch alone, to be copied."""
    out = tmp_path_factory.mktemp("short") / "run"
    program.main(small_run(tiny_shards, out, **SAVES, epochs=1))
    reset_accelerate()
    return out


def steps_of(run: Path) -> list[str]:
    return [checkpoint.name for checkpoint in list_checkpoints(run)]


def learned(run: Path) -> list[dict[str, float]]:
    """What a run logged that does not depend on the clock."""
    timed = ("samples_per_s", "data_wait", "memory_gib")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def forget(checkpoint: Path, name: str) -> None:
    """Remove a file from a checkpoint as if it had never been written."""
    (checkpoint / name).unlink()
    progress = json.loads((checkpoint / "progress.json").read_text())
    del progress["sizes"][name]
    (checkpoint / "progress.json").write_text(json.dumps(progress))


def at_call(number: int, act: Callable[[], None], function: Callable) -> Callable:
    """The same function, which does something else as well as it is called for the nth time."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    return wrapped


def test_a_signal_saves_and_the_resumed_run_ends_as_an_unbroken_one(
    program: ModuleType,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = replace(config, out=config.out.with_name("whole"))
    program.main(whole)
    with monkeypatch.context() as patched:
        # In the third step: the evaluation that is due after it is left for the resumed run.
        stop = at_call(3, lambda: os.kill(os.getpid(), signal.SIGTERM), program.contrastive_loss)
        patched.setattr(program, "contrastive_loss", stop)
        with pytest.raises(SystemExit) as ended:
            program.main(config)
    assert ended.value.code == 128 + signal.SIGTERM
    assert steps_of(config.out) == ["step-00000002", "step-00000003"]
    assert read_progress(list_checkpoints(config.out)[-1]).evaluated_step == 0
    said = capsys.readouterr().err
    assert "stopped by SIGTERM" in said
    assert f"{config.out / 'config.json'} --resume" in said
    assert (config.out / "curves.png").exists()
    # The command that it names.
    program.main(program.parse([str(config.out / "config.json"), "--resume"]))
    assert first_step(capsys.readouterr().err) == 3
    assert learned(config.out) == learned(whole.out)
    ends = weights_of(config.out), weights_of(whole.out)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_nan_stops_the_run_names_its_batch_and_saves_nothing_bad(
    program: ModuleType,
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    tiny_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    healthy = program.contrastive_loss
    seen: list[list[int]] = []

    def loss(views: Any, batch: Any, *rest: Any, **named: Any) -> dict[str, torch.Tensor]:
        losses = healthy(views, batch, *rest, **named)
        seen.append(batch.samples.tolist())
        return losses | ({"loss": losses["loss"] * math.nan} if len(seen) == 4 else {})

    with monkeypatch.context() as patched:
        patched.setattr(program, "contrastive_loss", loss)
        expected = r"step 4: loss is nan; .*bad_batch\.json.*step-00000002"
        with pytest.raises(UserError, match=expected):
            program.main(config)
    assert len(seen) == 4  # It stopped with the bad step.
    bad = json.loads((config.out / "bad_batch.json").read_text())
    assert (bad["step"], bad["epoch"], bad["batch"]) == (4, 1, 0)
    assert bad["samples"] == seen[-1]
    ids = open_shards(tiny_shards, "contents", "train").content_ids
    assert bad["content_ids"] == [ids[i] for i in seen[-1]]
    assert steps_of(config.out) == ["step-00000002"]
    assert all(part.isfinite().all() for part in weights_of(config.out).values())
    # A lower rate needs a word; then it goes on from the good checkpoint.
    slower = replace(config.optimizer, learning_rate=1e-4)
    mended = replace(config, resume=True, optimizer=slower)
    with pytest.raises(UserError, match=r"another config: optimizer\.learning_rate"):
        program.main(mended)
    capsys.readouterr()
    program.main(replace(mended, accept_changes=True))
    assert first_step(capsys.readouterr().err) == 2
    assert steps_of(config.out)[-1] == "step-00000006"
    steps = [row for row in read_metrics(config.out) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 7))
    assert steps[-1]["lr"] < 1e-4


def test_a_bad_weight_is_not_saved_even_if_the_loss_was_finite(
    program: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "weights_are_finite", lambda model: False)
    with pytest.raises(UserError, match=r"step 2: a weight is NaN or infinite.*none yet"):
        program.main(config)
    assert steps_of(config.out) == []


# Too small for weights, large enough for all that is written before them.
_FEW_BYTES = 300_000


def full_disk(function: Callable, number: int) -> Callable:
    """The same function, whose nth call finds room for small files alone."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if calls == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FEW_BYTES, limits[1]))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return wrapped


def test_a_full_disk_costs_the_new_checkpoint_alone(
    program: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, keep_checkpoints=1)
    with monkeypatch.context() as patched:
        patched.setattr(program, "save_checkpoint", full_disk(program.save_checkpoint, 2))
        with pytest.raises(UserError, match=r"cannot be written .*step-00000002; make room"):
            program.main(config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000002"]
    before = weights_of(config.out)
    assert len(before) > 10
    program.main(replace(config, resume=True))
    assert steps_of(config.out) == ["step-00000006"]
    assert not torch.equal(before["log_scale"], weights_of(config.out)["log_scale"])


def test_a_full_disk_keeps_the_encoder_that_was_there(
    program: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(program.Encoder, "save", full_disk(program.Encoder.save, 2))
        # Equal is better, so that each evaluation exports.
        patched.setattr(program, "measure", lambda *_, **__: {"MRR": 0.5})
        with pytest.raises(UserError, match=r"cannot be written .*step-00000002"):
            program.main(config)
    assert program.Encoder.load(config.out / "encoder").width == 128
    assert {path.name for path in config.out.iterdir()} == {
        *("config.json", "metrics.jsonl", "curves.png", "checkpoints", "encoder")
    }
    program.main(replace(config, resume=True))
    assert (config.out / "manifest.json").exists()


def test_what_a_kill_left_half_written_is_swept_away(program: ModuleType, config: Any) -> None:
    half = config.out / "checkpoints" / ".step-00000009.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    program.main(replace(config, epochs=1))
    assert [p.name for p in sorted((config.out / "checkpoints").iterdir())] == [
        "step-00000002",
        "step-00000003",
    ]


def test_a_checkpoint_from_fewer_ranks_has_no_random_states_for_the_others(
    program: ModuleType, config: Any, short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = config.out.with_name("broken")
    shutil.copytree(short, broken)
    for checkpoint in list_checkpoints(broken):
        if checkpoint.name != "step-00000002":
            shutil.rmtree(checkpoint)
        else:
            forget(checkpoint, "random_states_0.pkl")
    program.main(replace(config, epochs=1, out=broken, resume=True))
    assert first_step(capsys.readouterr().err) == 2
    assert steps_of(broken)[-1] == "step-00000003"
    assert learned(broken)[-2:] == learned(short)[-2:]


def test_a_checkpoint_of_fsdp_is_not_read_without_it(
    program: ModuleType, config: Any, short: Path
) -> None:
    shutil.copytree(short, config.out)
    last = list_checkpoints(config.out)[-1]
    forget(last, "model.safetensors")
    (last / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(UserError, match="was written with FSDP, and this run was launched without"):
        program.main(replace(config, epochs=1, resume=True))


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("encoder", {"pooling": "attention"}, r"encoder\.pooling 'mean' -> 'attention'"),
        ("optimizer", {"weight_decay": 0.3}, r"optimizer\.weight_decay [\d.]+ -> 0\.3"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(
    program: ModuleType, config: Any, short: Path, part: str, changes: dict[str, Any], named: str
) -> None:
    shutil.copytree(short / "checkpoints", config.out / "checkpoints")
    other = replace(config, epochs=1, resume=True)
    other = replace(other, **{part: replace(getattr(other, part), **changes)})
    # The folder's own run is the other one.
    RunFolder(config.out, other, from_step=None)
    with pytest.raises(UserError, match=rf"step-00000003: .* another config: {named}$"):
        program.main(other)


def test_a_checkpoint_of_another_precision_is_refused(
    program: ModuleType, config: Any, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's launcher chose it, so that the config says nothing of it."""
    shutil.copytree(short, config.out)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"step-00000003: .* mixed_precision 'no' -> 'bf16'"):
        program.main(replace(config, epochs=1, resume=True))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"]
)
def test_half_a_file_is_found_and_the_whole_checkpoint_named(
    program: ModuleType, config: Any, short: Path, name: str
) -> None:
    shutil.copytree(short, config.out)
    resumed = replace(config, epochs=1, resume=True)
    older, newest = list_checkpoints(config.out)
    os.truncate(newest / name, (newest / name).stat().st_size // 2)
    with pytest.raises(UserError, match=f"step-00000003.*the last whole checkpoint is {older}: "):
        program.main(resumed)
    shutil.rmtree(newest)
    assert program.check(resumed) == older


def test_old_checkpoints_alone_are_a_run_too(program: ModuleType, config: Any, short: Path) -> None:
    """Pruned by their steps they would outlive those of the run that begins."""
    shutil.copytree(short / "checkpoints", config.out / "checkpoints")
    with pytest.raises(UserError, match="holds a run already; --resume goes on with it"):
        program.main(config)


def start_long_run(config: Any, *command: str | Path, workers: int) -> subprocess.Popen[str]:
    """Start a run in a group of processes of its own, and wait for its first steps."""
    flags = "--encoder.image-size 32 --sampler.batch-size 8 --epochs 5000 --log-every 1"
    process = subprocess.Popen(
        [
            *(*command, "train/contrastive.py", "demo", *flags.split()),
            *("--num-workers", str(workers), "--shards", config.shards, "--out", config.out),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + FIRST_STEPS_S
    while len(read_metrics(config.out)) < 4:
        if process.poll() is not None or time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"no four steps within {FIRST_STEPS_S} s:\n{process.communicate()[1]}")
        time.sleep(0.05)
    return process


@pytest.mark.timeout(600)
def test_ctrl_c_reaches_trainer_and_loaders_and_all_end_well(config: Any) -> None:
    """A terminal sends it to the whole group: to the trainer and to its loaders' processes."""
    process = start_long_run(config, sys.executable, workers=2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    step = read_progress(list_checkpoints(config.out)[-1]).step
    assert step == read_metrics(config.out)[-1]["step"] >= 3
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
def test_a_sigterm_to_the_launcher_alone_saves_and_ends_the_run(config: Any) -> None:
    launch = (Path(sys.executable).parent / "accelerate", "launch", "--quiet")
    launch += ("--config_file", "accelerate_config.yaml")
    process = start_long_run(config, *launch, workers=0)
    process.terminate()
    try:
        # Until nobody holds the other end: the trainer is no child of this process.
        _, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == -signal.SIGTERM
    assert "stopped by SIGTERM" in errors
    step = read_progress(list_checkpoints(config.out)[-1]).step
    assert step == read_metrics(config.out)[-1]["step"] >= 3
