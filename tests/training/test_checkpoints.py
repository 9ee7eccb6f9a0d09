"""Checkpoints appear whole or not at all, on one rank and on several."""

import json
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import SafetensorError
from safetensors.torch import save_file

from mmrec.distributed import Agreement
from mmrec.errors import UserError
from mmrec.training.checkpoints import Progress, list_checkpoints, read_progress, saving
from mmrec.training.faults import FaultWatch, stop_at_fault


def make_checkpoint(run: Path, progress: Progress) -> Path:
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))
    return folder


def test_checkpoints_are_listed_by_step_and_half_written_ones_are_not(tmp_path: Path) -> None:
    for step in (1000, 20):
        make_checkpoint(tmp_path, Progress(step=step, epoch=1, batch=2, best=0.5))
    (tmp_path / "checkpoints/.step-00002000.tmp").mkdir()
    assert [read_progress(path).step for path in list_checkpoints(tmp_path)] == [20, 1000]


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, Progress(step=3))
    (folder / "progress.json").write_text('{"step": 3, "epoch": 1, "batch": 0}')
    assert read_progress(folder).evaluated_step == -1
    (folder / "progress.json").write_text('{"stop": 3}')
    with pytest.raises(UserError, match="not a checkpoint that this version reads"):
        read_progress(folder)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_what_libraries_say_of_a_full_disk_becomes_one_line(
    error: Exception, tmp_path: Path
) -> None:
    kept = make_checkpoint(tmp_path, Progress(step=20))
    temporary = tmp_path / "checkpoints/.step-00000040.tmp"
    temporary.mkdir()
    with (
        pytest.raises(UserError, match=f"the last whole checkpoint is {kept}; make room"),
        saving(tmp_path, temporary),
    ):
        raise error
    assert not temporary.exists()


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    for error in (RuntimeError("CUDA out of memory"), ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), saving(tmp_path):
            raise error


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"a": torch.zeros(300_000)}, path),
        lambda path: torch.save(torch.zeros(300_000), path),
        lambda path: path.write_text("x" * 10**6),
    ],
    ids=["safetensors", "torch", "text"],
)
def test_a_file_that_cannot_grow_is_among_those(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"), saving(tmp_path):
            write(tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _one_rank(rank: int, run: Path) -> None:
    dist.init_process_group("gloo", f"file://{run}/store", rank=rank, world_size=2)
    said = []
    try:
        with saving(run, run / "checkpoints/.half.tmp"):
            if rank == 1:
                raise OSError(28, "No space left on device")
    except UserError as error:
        said.append(str(error))
    watch = FaultWatch(max_loss_ratio=0.0, check_norms=True)
    # Rank 1's loss is bad, and through the shared gradient so is rank 0's gradient.
    bad = float("nan")
    losses = {"loss": torch.tensor(bad if rank else 1.0), "gradient_norm": torch.tensor(bad)}
    watch.add(losses, step=5, epoch=0, batch=4, samples=torch.tensor([rank, rank + 100]))
    try:
        stop_at_fault(
            watch,
            Agreement(),
            run=run,
            content_ids=[f"c{i}" for i in range(200)],
            last_checkpoint=None,
        )
    except UserError as error:
        said.append(str(error))
    (run / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_what_one_rank_meets_stops_all(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, Progress(step=20))
    (tmp_path / "checkpoints/.half.tmp").mkdir()
    mp.spawn(_one_rank, (tmp_path,), nprocs=2)  # pyright: ignore
    disk, loss = json.loads((tmp_path / "said-0.json").read_text())
    assert [disk, loss] == json.loads((tmp_path / "said-1.json").read_text())
    assert "No space left on device" in disk
    assert "loss is nan" in loss
    assert not (tmp_path / "checkpoints/.half.tmp").exists()
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert bad["content_ids"] == ["c0", "c100", "c1", "c101"]  # Both ranks' rows.
