"""Real runs of two processes on a CPU: DDP and FSDP2 beside one process over the same global batches."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import load_program, reset_accelerate, run
from forked_training import TrainingServer
from small_runs import small_run

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.training.checkpoints import list_checkpoints, read_progress
from mmrec.training.run import read_metrics

# Without batch normalization, which sees the rows of one rank alone.
TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def config(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six steps of eight rows, a checkpoint after each third, one process."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "towers.json").write_text(json.dumps(TOWERS))
    return small_run(
        tiny_shards,
        folder / "whole",
        encoder={"towers": str(folder / "towers.json")},
        optimizer={"learning_rate": 1e-3},
        eval_every=6,
        checkpoint_every=3,
    )


def train_here(config: Any) -> None:
    load_program("train/contrastive.py").main(config)
    reset_accelerate()


@pytest.fixture(scope="module")
def whole(config: Any) -> Path:
    """The run that one process makes."""
    train_here(config)
    return config.out


def config_of(out: Path, config: Any) -> Path:
    """A file that a run into another folder is started from."""
    raw = json.loads((config.out / "config.json").read_text())
    file = out.with_suffix(".json")
    file.write_text(json.dumps(raw | {"out": str(out)}))
    return file


def losses_of(run: Path) -> list[tuple[float, float, float]]:
    rows = [row for row in read_metrics(run) if "loss" in row]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


def assert_same_training(run: Path, whole: Path) -> None:
    """Losses, gradient norms and the exported weights agree to what another order of sums makes."""
    for ours, theirs in zip(losses_of(run), losses_of(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    ends = [Encoder.load(folder / "encoder").state_dict() for folder in (run, whole)]
    for name, expected in ends[1].items():
        difference = (ends[0][name] - expected).abs()
        if name.endswith("in_proj_bias"):
            # A key's bias adds the same to all scores of a query: its gradient is nothing but
            # rounding, of which Adam makes steps as large as any.
            difference = difference.view(3, -1)[[0, 2]]
        assert difference.mean() < 2e-5, name


def test_two_ranks_agree_to_stop_and_one_goes_on_where_they_were(
    config: Any, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = config.out.with_name("stopped")
    done = run(
        Path(sys.executable).parent / "torchrun",
        *("--standalone", "--nproc-per-node", "2"),
        *(Path(__file__).with_name("contrastive_on_ranks.py"), config_of(out, config)),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
        STOP_RANK="1",
    )
    assert "stopped by SIGTERM" in done.stderr, done.stderr
    assert "exitcode  : 143" in done.stderr
    assert [path.name for path in list_checkpoints(out)] == ["step-00000003"]
    assert read_progress(list_checkpoints(out)[-1]).world_size == 2
    train_here(replace(config, out=out, resume=True))
    assert "going on with 1 ranks after 2" in capsys.readouterr().err
    assert_same_training(out, whole)


def test_fsdp2_trains_exports_and_resumes_on_another_number_of_ranks(
    server: TrainingServer, config: Any, whole: Path
) -> None:
    out = config.out.with_name("sharded")
    file, log = config_of(out, config), config.out.with_name("sharded-log")
    ranks = server.start([file], log=log, ranks=2, sharded=True)
    assert ranks.wait() == [0, 0], ranks.text()
    assert_same_training(out, whole)
    sizes = [path.stat().st_size for path in list_checkpoints(out)[-1].rglob("*.distcp")]
    assert len(sizes) == 4  # Weights and optimizer, a part for each rank,
    assert max(sizes[:2]) < 0.6 * sum(sizes[:2])  # of about half.
    shutil.rmtree(list_checkpoints(out)[-1])
    shutil.rmtree(out / "encoder")
    rank = server.start([file, "--resume"], log=log, sharded=True)
    assert rank.wait() == [0], rank.text()
    assert_same_training(out, whole)


def test_a_batch_that_ranks_cannot_share_is_refused_before_any_work(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program("train/contrastive.py")
    monkeypatch.setattr(program.Accelerator, "num_processes", 3)
    out = config.out.with_name("refused")
    with pytest.raises(UserError, match="batch-size 8 cannot be cut into 3 equal parts"):
        program.main(replace(config, out=out))
    assert not out.exists()
