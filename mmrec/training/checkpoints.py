"""Checkpoints: all that a run needs to go on as if it had never stopped.

Accelerate writes model, optimizer, scaler and random states; the place in the data is two integers. The
run's config.json and the sizes of all files are kept as well, to be compared before a run goes on.
A checkpoint is written under a temporary name, flushed to the disk and renamed when whole, and only
then are older ones removed: a full disk or a kill costs the new one alone.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from safetensors import SafetensorError

from mmrec import distributed
from mmrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    batch: int = 0
    """The next global batch of that epoch."""
    best: float | None = None
    """The best value of the metric that picks the exported encoder."""
    best_step: int = 0
    """The step of that encoder."""
    evaluated_step: int = -1
    """The step of the last evaluation: a run that stops before one makes up for it when it goes on."""
    seconds: float = 0.0
    """Time spent so far, over all resumes."""
    shards: str = ""
    """Fingerprint of the shards that the run reads."""
    world_size: int = 1
    """Ranks of the run when this was written."""
    mixed_precision: str = ""
    """The precision in effect, which Accelerate's own config may have chosen; empty if not recorded."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each other file of the checkpoint."""


def save_checkpoint(accelerator: Accelerator, run: Path, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`; every rank calls this.

    Raises `UserError` on every rank when the disk is full; what was there before stays.
    """
    folder = run / "checkpoints"
    name = f"step-{progress.step:08d}"
    temporary, final = folder / f".{name}.tmp", folder / name
    with saving(run, temporary):
        if accelerator.is_main_process:
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
    with saving(run, temporary):
        accelerator.save_state(str(temporary))
    with saving(run, temporary):
        if accelerator.is_main_process:
            shutil.copy(run / "config.json", temporary)
            text = json.dumps(asdict(replace(progress, sizes=_sizes(temporary))))
            (temporary / "progress.json").write_text(text, encoding="utf-8")
            _flush(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _flush(folder, inside=False)
            for old in list_checkpoints(run)[:-keep]:
                shutil.rmtree(old)
    return final


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def newest_checkpoint(run: Path) -> Path | None:
    """A run's newest checkpoint, or None.

    Raises `UserError` where it is damaged, and names the newest one that is whole.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return None
    problem = _damage(checkpoints[-1])
    if problem is None:
        return checkpoints[-1]
    good = next((c for c in reversed(checkpoints[:-1]) if _damage(c) is None), "none")
    raise UserError(
        f"{problem}; the last whole checkpoint is {good}: remove those after it, then go on with --resume"
    )


def _damage(checkpoint: Path) -> str | None:
    """What a checkpoint lacks of what was written, if anything."""
    try:
        sizes = read_progress(checkpoint).sizes
    except UserError as error:
        return str(error)
    found = _sizes(checkpoint)
    for name, size in sizes.items():
        if found.get(name) != size:
            return f"{checkpoint / name}: expected {size} bytes, found {found.get(name, 'no file')}"
    return None


def check_launch(accelerator: Accelerator, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint whose run was launched in a way that changes what is learned.

    Raises `UserError` where one of the two is FSDP's and the other is not, or their precisions differ.
    """
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded != (accelerator.distributed_type == DistributedType.FSDP):
        kinds = ("with FSDP", "without FSDP")
        written, launched = kinds if sharded else reversed(kinds)
        raise UserError(
            f"{checkpoint}: was written {written}, and this run was launched {launched}; launch it as "
            "before (train/launch/ has config files for both)"
        )
    before = read_progress(checkpoint).mixed_precision
    if before not in ("", accelerator.mixed_precision):
        raise UserError(
            f"{checkpoint}: cannot resume with another precision: mixed_precision {before!r} -> "
            f"{accelerator.mixed_precision!r}; launch it as before (--mixed_precision of accelerate "
            "launch, or ACCELERATE_MIXED_PRECISION)"
        )


def restore_checkpoint(accelerator: Accelerator, checkpoint: Path, *, seed: int) -> None:
    """Load a checkpoint; every rank calls this.

    The weights, the optimizer and the batches to come do not depend on the number of ranks. Draws
    inside the model (dropout) do: a rank that the checkpoint knows nothing of starts a stream of its own.
    """
    accelerator.load_state(str(checkpoint))
    before, rank = read_progress(checkpoint).world_size, distributed.rank()
    if rank == 0 and before != distributed.world_size():
        print(
            f"going on with {distributed.world_size()} ranks after {before}: the batches are the same, "
            "random numbers inside the model are not",
            file=sys.stderr,
        )
    if not (checkpoint / f"random_states_{rank}.pkl").exists():
        set_seed(seed + rank)


@contextmanager
def saving(run: Path, temporary: Path | None = None) -> Iterator[None]:
    """What is done inside may meet a full disk on any rank; then all of them stop, and `temporary` goes.

    Raises `UserError` that names the last whole checkpoint, on every rank.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = _disk_problem(error)
        if problem is None:
            raise
    except BaseException as error:  # torch.distributed.checkpoint's exception is no Exception
        failures = getattr(error, "failures", None)
        if failures is None:
            raise
        problem = next(filter(None, (_disk_problem(f[0]) for f in failures.values())), None)
        if problem is None:
            raise
    problems = [found for found in distributed.gather_objects(problem) if found]
    if not problems:
        return
    if temporary is not None and distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    last = (list_checkpoints(run) or ["none yet"])[-1]
    raise UserError(
        f"{run}: cannot be written ({problems[0]}); the last whole checkpoint is {last}; make room, "
        "then go on with --resume"
    )


def _disk_problem(error: BaseException) -> str | None:
    """In a few words what a writer met, if it was the disk: each library has an exception of its own."""
    text = " ".join(str(error).split())
    wrapped = isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in text or "unexpected pos" in text or "No space left" in text
    )
    if isinstance(error, (OSError, SafetensorError)) or wrapped:
        return text[:120]
    return None


def _flush(folder: Path, *, inside: bool = True) -> None:
    """Have the disk hold a folder's names, and what lies inside it."""
    for path in [*(folder.rglob("*") if inside else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def list_checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def read_progress(checkpoint: Path) -> Progress:
    """Where the run was when a checkpoint was written."""
    try:
        return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{checkpoint}: not a checkpoint that this version reads ({error})"
        ) from None
