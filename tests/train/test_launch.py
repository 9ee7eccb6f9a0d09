"""The launch files say what Accelerate and the shells understand."""

import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT

LAUNCH = ROOT / "train/launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert f"--config_file train/launch/{path.name}" in path.read_text()
    per_machine = {"one_gpu": 1, "one_node": 8, "fsdp2": 8, "several_nodes": 8}[path.stem]
    assert config.num_processes == per_machine * config.num_machines


def test_fsdp2_names_layers_that_open_clip_has() -> None:
    from open_clip import transformer

    config = load_config_from_file(str(LAUNCH / "fsdp2.yaml"))
    settings = config.fsdp_config
    assert settings["fsdp_version"] == 2
    assert hasattr(transformer, settings["fsdp_transformer_layer_cls_to_wrap"])


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sh"])
def test_scripts_are_whole_and_can_be_started(name: str) -> None:
    path = LAUNCH / name
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_slurm_queues_a_stopped_job_again_and_no_other(tmp_path: Path) -> None:
    """With stand-ins for SLURM's programs, on one node."""
    for name, text in {
        "srun": 'echo "srun ${@: -2}" >> "$LOG"; exit "$STATUS"',
        "scontrol": '[[ $1 == show ]] && echo node1 || echo "$1 $2" >> "$LOG"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for status, requeued in ((138, True), (143, True), (1, False), (0, False)):
        log = tmp_path / f"log-{status}"
        done = subprocess.run(
            [LAUNCH / "slurm.sh", "demo", "--epochs"],
            env={
                "PATH": f"{tmp_path}:/usr/bin:/bin",
                "SLURM_JOB_ID": "77",
                "SLURM_JOB_NODELIST": "node[1-2]",
                "STATUS": str(status),
                "LOG": str(log),
            },
            check=False,
        )
        assert done.returncode == status
        lines = log.read_text().splitlines()
        assert lines[0] == "srun demo --epochs"
        assert (lines[1:] == ["requeue 77"]) == requeued
