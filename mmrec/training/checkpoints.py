"""Checkpoints: all that a run needs to go on as if it had never stopped.

Accelerate writes model, optimizer, scaler and random states; the place in the data is two integers.
A checkpoint is written under a temporary name and renamed when whole, and only then are older ones
removed.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator

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
    seconds: float = 0.0
    """Time spent so far, over all resumes."""
    shards: str = ""
    """Fingerprint of the shards that the run reads."""


def save_checkpoint(accelerator: Accelerator, run: Path, progress: Progress, *, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`; every rank calls this."""
    folder = run / "checkpoints"
    name = f"step-{progress.step:08d}"
    temporary, final = folder / f".{name}.tmp", folder / name
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


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
