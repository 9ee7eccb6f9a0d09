"""Whole trainings with averaged weights, nested widths and tuned towers: what they log, save and refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_program
from safetensors.torch import load_file
from small_runs import first_step, small_run
from small_towers import small_encoder
from written_shards import TINY_VIT

from mmrec import Matcher, cli
from mmrec.errors import UserError
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.model.tuning import TuningConfig
from mmrec.retrieval.embed import read_embeddings
from mmrec.retrieval.evaluation_config import EvaluationConfig
from mmrec.training.checkpoints import list_checkpoints
from mmrec.training.run import read_metrics

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_an_averaged_run_resumes_bit_for_bit(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load_program("train/contrastive.py")
    config = small_run(
        tiny_shards,
        tmp_path / "whole",
        ema=0.9,
        encoder={"pooling": "attention", "widths": (32, 64)},
        optimizer={"layer_decay": 0.7},
        tuning={"frozen_image_layers": 1, "checkpoint_towers": True},
        checkpoint_every=2,
        eval_every=2,
        keep_checkpoints=99,
    )
    program.main(config)
    broken = tmp_path / "broken"
    shutil.copytree(config.out, broken)
    for checkpoint in list_checkpoints(broken)[1:]:
        shutil.rmtree(checkpoint)
    capsys.readouterr()
    program.main(replace(config, out=broken, resume=True))
    assert first_step(capsys.readouterr().err) == 2
    whole, resumed = (
        [{k: v for k, v in row.items() if k.startswith(("step", "loss", "val"))} for row in rows]
        for rows in (read_metrics(config.out), read_metrics(broken))
    )
    assert whole == resumed
    assert {"loss/32", "loss/64", "loss/128"} <= set(whole[1])
    assert {"val/R@1", "val/32/R@1", "val/64/MRR"} <= set(whole[0])
    ends = [list_checkpoints(run)[-1] for run in (config.out, broken)]
    weights, average = [], []
    for end in ends:
        weights.append(load_file(end / "model.safetensors"))
        average.append(torch.load(end / "custom_checkpoint_0.pkl", weights_only=True))
    for states in (weights, average):
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(part, states[1][name]) for name, part in states[0].items())
    name = "text_tower.token_embedding.weight"
    assert not torch.equal(weights[0][name], average[0][f"module.{name}"])
    # What is exported is the average at the step that scored best.
    exported = load_file(config.out / "encoder/model.safetensors")
    best = json.loads((ends[0] / "progress.json").read_text())["best_step"]
    assert best in (2, 4, 6)
    checkpoint = config.out / f"checkpoints/step-{best:08d}/custom_checkpoint_0.pkl"
    assert torch.equal(exported[name], torch.load(checkpoint)[f"module.{name}"])
    with pytest.raises(UserError, match=r"ema 0\.9 -> None"):
        program.main(replace(config, out=broken, resume=True, ema=None))
    with pytest.raises(
        UserError, match=r"encoder\.widths \(32, 64\) -> \(\).*tuning\.frozen_image"
    ):
        program.main(
            replace(
                config,
                out=broken,
                resume=True,
                encoder=replace(config.encoder, widths=()),
                tuning=TuningConfig(),
            )
        )


def test_each_width_is_evaluated_embedded_and_searched(tiny_shards: Path, tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32, widths=(16, 64)))
    encoder.save(tmp_path / "encoder")
    config = EvaluationConfig(
        encoder=tmp_path / "encoder",
        shards=tiny_shards,
        out=tmp_path / "report",
        num_cards=1,
        untrained=False,
        baselines=False,
    )
    cli.evaluate(config=config)
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert set(metrics["widths"]) == {"16", "64", "128"}
    assert metrics["widths"]["128"] == metrics["slices"]
    for summary in metrics["widths"].values():
        assert summary.keys() == metrics["slices"].keys()
    for width in (None, 16):
        cli.embed(
            encoder=tmp_path / "encoder",
            shards=tiny_shards,
            out=tmp_path / f"embeddings-{width}",
            width=width,
            dtype="float32",
        )
    full, narrow = (read_embeddings(tmp_path / f"embeddings-{width}") for width in (None, 16))
    prefix = full.vectors[:, :16]
    expected = prefix / np.linalg.norm(prefix, axis=1, keepdims=True)
    np.testing.assert_allclose(narrow.vectors, expected, atol=1e-6)
    assert narrow.manifest.details["width"] == 16
    cli.index_build(embeddings=tmp_path / "embeddings-16", out=tmp_path / "index")
    matcher = Matcher.load(tmp_path / "index")
    assert matcher.embed([], "a red mug").shape == (16,)
    assert len(matcher.match(text="a red mug", k=3)) == 3
    with pytest.raises(UserError, match=r"--width 48: .* was trained at 16, 64, 128"):
        cli.embed(encoder=tmp_path / "encoder", shards=tiny_shards, out=tmp_path / "no", width=48)
    assert not (tmp_path / "no").exists()


def test_adapters_train_and_leave_a_plain_encoder(tiny_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is an extra: pip install 'mmrec[lora]'")
    start = small_encoder(tmp_path)
    config = small_run(
        tiny_shards,
        tmp_path / "run",
        ema=0.5,
        encoder=start.config,
        tuning={"lora_rank": 4, "frozen_text_layers": "all"},
        optimizer={"learning_rate": 0.02},
    )
    load_program("train/contrastive.py").main(config)
    steps = [row for row in read_metrics(config.out) if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"]
    encoder = Encoder.load(config.out / "encoder")
    assert list(encoder.state_dict()) == list(start.state_dict())
    assert torch.equal(encoder.image_tower.proj, start.image_tower.proj)  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, "--ema 1.0: expected more than 0, below 1"),
        ({"encoder": {"widths": (64, 32)}}, r"encoder\.widths 64 32: expected ascending"),
        ({"encoder": {"widths": (256,)}}, r"encoder\.widths 256: .* from 1 to 128"),
        ({"encoder": {"towers": "mmrec-smal"}}, r"not known.*close: .*mmrec-small"),
        ({"optimizer": {"layer_decay": 0.0}}, r"optimizer\.layer-decay 0\.0"),
        ({"tuning": {"lora_rank": 4}}, r"tuning\.lora-rank 4: expected a tower with linear"),
        ({"tuning": {"frozen_image_layers": 7}}, r"frozen-image-layers 7: expected 0 to 6"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    changes: dict[str, Any], message: str, tiny_shards: Path, tmp_path: Path
) -> None:
    config = small_run(tiny_shards, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message):
        load_program("train/contrastive.py").main(config)
    assert not (tmp_path / "run").exists()


def test_a_size_that_the_tower_cannot_take_is_refused_before_any_work(
    tiny_shards: Path, tmp_path: Path
) -> None:
    towers = tmp_path / "vit.json"
    towers.write_text(json.dumps(TINY_VIT))
    config = small_run(
        tiny_shards, tmp_path / "run", encoder={"towers": str(towers), "image_size": 4}
    )
    with pytest.raises(UserError, match=r"--encoder\.image-size 4: .*vit\.json cannot take"):
        load_program("train/contrastive.py").main(config)
    assert not (tmp_path / "run").exists()


def test_a_config_file_with_an_unknown_objective_is_refused(
    tiny_shards: Path, tmp_path: Path
) -> None:
    program = load_program("train/contrastive.py")
    (tmp_path / "config.json").write_text(
        json.dumps({"shards": str(tiny_shards), "out": "x", "objectives": {"sound_image": 1.0}})
    )
    with pytest.raises(UserError, match="Objectives has no field 'sound_image'"):
        program.parse([str(tmp_path / "config.json")])
