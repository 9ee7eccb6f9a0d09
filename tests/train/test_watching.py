"""What a person watches: the bar, metrics.jsonl, a tracker, the picture, and the lines at the end."""

import math
from pathlib import Path

import pytest
from conftest import load_program
from PIL import Image
from small_runs import small_run

from mmrec.training.run import read_metrics


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_shows_how_it_goes(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    program = load_program("train/contrastive.py")
    out = tmp_path / "run"
    program.main(small_run(tiny_shards, out, epochs=1, trackers=("tensorboard",)))
    steps = [row for row in read_metrics(out) if "loss" in row]
    logged = {"step", "epoch", "loss", "content_product", "video_image", "image_title"}
    logged |= {"gradient_norm", "lr", "scale", "samples_per_s", "data_wait", "memory_gib"}
    assert set(steps[0]) == logged
    for row in steps:
        assert all(math.isfinite(value) for value in row.values())
        edges = row["content_product"] + row["video_image"] + row["image_title"]
        assert row["loss"] == pytest.approx(edges, rel=1e-5)
        assert 0 <= row["data_wait"] <= 1
    with Image.open(out / "curves.png") as picture:
        assert picture.size[0] == 1200

    events = EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {name for name in scalars if name.startswith("train/")} == {
        f"train/{name}" for name in logged - {"step"}
    }
    assert "val/MRR" in scalars
    assert {name.split("/")[0] for name in scalars} == {"train", "val"}
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({row["step"]: row["loss"] for row in steps})

    said = capsys.readouterr()
    for field in ("loss=", "scale=", "lr=", "samples/s=", "data wait=", "GiB="):
        assert field in said.err
    assert any(line.startswith("loss ") and "->" in line for line in said.out.splitlines())
