"""Settings of a small training run (see `small_run`), and where a run began."""

import re
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


def first_step(shown: str) -> int:
    """The step that a run began after, as its bar showed it first: more than 0 if it was resumed."""
    found = re.search(r"train: .*?\b(\d+)/\d+ \[", shown)
    assert found, shown
    return int(found[1])
