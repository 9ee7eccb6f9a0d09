"""Settings of a small training run: see `small_run`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import load_program

SMALL: dict[str, Any] = {
    "encoder": {"image_size": 32},
    "sampler": {"batch_size": 8},
    "epochs": 2,
    "num_workers": 0,
    "cpu_threads": 1,
    "log_every": 1,
}


def small_run(shards: Path, out: Path, **changes: Any) -> Any:
    """The demo's recipe in one thread: over `tiny_shards` two epochs of three steps.

    A dict changes some fields of a part: `encoder={"image_size": 48}`.
    """
    recipe = load_program("train/contrastive.py").RECIPES["demo"]
    config = replace(recipe, shards=shards, out=out)
    for settings in (SMALL, changes):
        parts = {
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in settings.items()
        }
        config = replace(config, **parts)
    return config
