"""The study's bookkeeping, with trainings replaced by files: what is run again, left out and compared."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mmrec.errors import UserError
from mmrec.manifest import Manifest, write_manifest

PROGRAM = Path(__file__).resolve().parents[2] / "train" / "study.py"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", PROGRAM)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return module


def write_shards(folder: Path, fingerprint: str) -> Path:
    folder.mkdir(exist_ok=True)
    write_manifest(
        folder, Manifest(kind="shards", config={}, counts={"out": 1}, fingerprint=fingerprint)
    )
    return folder


@pytest.fixture
def ran(study, tmp_path, monkeypatch) -> list[list[str]]:
    """The commands that the study gave; a run of seed s finds s hundredths more, and CutMix 0.1 more."""
    commands: list[list[str]] = []

    def execute(command: Sequence[Any], folder: Path) -> None:
        given = [str(part) for part in command]
        commands.append(given)
        if "sigmoid" in given:
            raise UserError("contrastive.py: failed")
        folder.mkdir(parents=True, exist_ok=True)
        if given[1] != study.MEASURE:
            manifest = Manifest(kind="run", config={}, counts={}, fingerprint="0" * 16)
            write_manifest(folder, Manifest(**vars(manifest) | {"details": {"minutes": 1.0}}))
            return
        hits = 0.2 + 0.01 * int(folder.name) + 0.1 * ("CutMix" in folder.parent.name)
        values = np.full(50, hits)
        np.savez(
            folder / "queries.npz",
            **{f"{s} content {m}": values for s in study.SPLITS for m in study.METRICS},
        )

    monkeypatch.setattr(study, "execute", execute)
    write_shards(tmp_path / "demo", "a" * 16)
    write_shards(tmp_path / "videos", "b" * 16)
    return commands


def go(study: ModuleType, folder: Path, *arms: str) -> None:
    study.main(
        study.StudyConfig(
            demo=folder / "demo", videos=folder / "videos", out=folder / "out", jobs=1, arms=arms
        )
    )


def trainings(commands: list[list[str]]) -> list[list[str]]:
    return [command for command in commands if command[0].endswith("contrastive.py")]


def test_finished_runs_are_not_run_again_unless_shards_differ(study, ran, tmp_path):
    go(study, tmp_path, "CutMix")
    assert len(trainings(ran)) == 3 * (2 + 1)
    ran.clear()
    go(study, tmp_path, "CutMix")
    assert ran == []
    write_shards(tmp_path / "videos", "c" * 16)
    go(study, tmp_path, "CutMix")
    assert len(trainings(ran)) == 6
    assert all("grocery-videos" in command for command in trainings(ran))


def test_arms_share_seeds_and_differ_in_their_flags_alone(study, ran, tmp_path):
    go(study, tmp_path, "CutMix")
    base, mixed = (
        next(c for c in trainings(ran) if f"/videos/{name}/1" in c[-1])
        for name in ("base", "CutMix")
    )
    assert [flag for flag in mixed if flag not in base][:1] == ["--augment.mix"]
    assert base[base.index("--seed") + 1] == mixed[mixed.index("--seed") + 1] == "1"


def test_differences_are_over_the_same_seeds(study, ran, tmp_path):
    go(study, tmp_path, "CutMix")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = [row for row in rows if row["arm"] == "CutMix"]
    figure = row["test content R@1"]
    assert figure["mean"] == pytest.approx(0.31)
    assert figure["difference"] == pytest.approx(0.1)
    # Seeds are a hundredth apart, and that is in both: the interval of the difference has no width.
    assert figure["difference_interval"] == pytest.approx([0.1, 0.1])
    assert figure["interval"][0] < 0.305 < 0.315 < figure["interval"][1]
    assert "**+0.100 (+0.100 to +0.100)**" in (tmp_path / "out" / "results.md").read_text()


def test_a_failed_arm_is_left_out_and_the_others_are_written(study, ran, tmp_path):
    with pytest.raises(UserError, match=r"6 runs failed.*sigmoid"):
        go(study, tmp_path, "sigmoid (SigLIP)", "CutMix")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["data"], row["arm"]) for row in rows] == [
        ("demo", "base"),
        ("videos", "base"),
        ("videos", "CutMix"),
    ]


def test_an_unknown_arm_is_refused(study, tmp_path):
    with pytest.raises(UserError, match="--arms 'dialgonal': expected some of diagonal"):
        go(study, tmp_path, "dialgonal")
