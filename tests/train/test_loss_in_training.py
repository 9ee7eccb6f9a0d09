"""The loss's options in a run of two ranks: what is learned, logged and saved."""

import math
from pathlib import Path

import pytest
from conftest import load_program
from forked_training import TrainingServer

from mmrec.model.encoder import Encoder
from mmrec.training.run import read_metrics

LOSS = (
    "--loss.kind sigmoid --loss.positives masked --loss.logq 0.5 --loss.chunk-rows 3 "
    "--encoder.start-bias -10 --encoder.start-scale 10 --sampler.unique-products "
    "--objectives.image-title 0.5 --objectives.video-title 0.5"
)


def test_two_ranks_learn_with_a_sigmoid(
    server: TrainingServer, tiny_shards: Path, tmp_path: Path
) -> None:
    flags = (
        "--encoder.image-size 32 --sampler.batch-size 8 --epochs 2 --num-workers 0 --log-every 1"
    )
    arguments = ["demo", "--shards", tiny_shards, "--out", tmp_path / "run"]
    run = server.start([*arguments, *flags.split(), *LOSS.split()], log=tmp_path / "log", ranks=2)
    assert run.wait() == [0, 0], run.text()
    steps = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(steps) == 6
    assert all(math.isfinite(row["loss"]) for row in steps)
    # At a bias of -10 a negative costs almost nothing, and a positive about 10 less its similarity.
    assert 2 < steps[0]["content_product"] < 14
    assert steps[-1]["content_product"] < steps[0]["content_product"]
    encoder = Encoder.load(tmp_path / "run/encoder")
    assert encoder.logit_bias is not None
    assert -10 < encoder.logit_bias.item() < -9.9  # Raised: most of the loss is positives'.


def test_a_sigmoid_without_a_bias_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    from mmrec.errors import UserError

    program = load_program("train/contrastive.py")
    flags = f"demo --shards {tiny_shards} --out {tmp_path / 'run'} --loss.kind sigmoid"
    with pytest.raises(UserError, match="start-bias"):
        program.main(program.parse(flags.split()))
    assert not (tmp_path / "run").exists()
