"""Numbers out of range are refused by name before a program does anything."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from conftest import load_program

from mmrec.errors import UserError
from mmrec.ranges import Count, Positive, Range, Share, check_ranges


@dataclass(frozen=True, kw_only=True)
class Inner:
    some_share: Share = 0.5
    weights: tuple[Positive, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    size: Count | None = None
    free: float = -3.0
    beta: Annotated[float, Range(0, 1, below=True)] = 0.0
    ema: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Outer(inner=Inner(some_share=1.5)), r"--inner\.some-share 1\.5: expected 0 to 1$"),
        (Outer(inner=Inner(weights=(1.0, 0.0))), r"--inner\.weights 0\.0: expected more than 0$"),
        (Outer(size=0), "--size 0: expected at least 1$"),
        (Outer(free=float("nan")), "--free nan: expected a finite number"),
        (Outer(free=float("inf")), "--free inf: expected a finite number"),
        (Outer(beta=1.0), "--beta 1.0: expected 0 to below 1$"),
        (Outer(ema=0.0), "--ema 0.0: expected more than 0, below 1$"),
    ],
)
def test_the_flag_the_number_and_the_range_are_named(config: Outer, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_ranges(config)


def test_the_ends_of_a_range_are_in_it() -> None:
    check_ranges(Outer(inner=Inner(some_share=0, weights=(0.1,)), size=1))
    check_ranges(Outer(inner=Inner(some_share=1.0)))


@pytest.mark.parametrize(
    "flags",
    [
        *("--encoder.start-scale 0", "--encoder.start-bias nan", "--encoder.image-size 0"),
        *("--optimizer.learning-rate -1", "--optimizer.learning-rate nan"),
        *("--optimizer.beta2 1.5", "--optimizer.clip-norm 0", "--optimizer.warmup 5"),
        *("--optimizer.weight-decay -3", "--optimizer.layer-decay 0", "--ema 1"),
        *("--sampler.source-weights nan 1", "--sampler.group-share 2"),
        *("--augment.min-scale 2", "--augment.max-aspect 0", "--augment.color 3"),
        *("--augment.flip 7", "--augment.mix 5", "--augment.modality-dropout 2"),
        *("--augment.early-size 8", "--augment.early-share -1", "--augment.rotate 400"),
        *("--max-loss-ratio nan", "--objectives.content-product -1", "--epochs 0"),
        *("--objectives.content-product nan", "--cache.images -1", "--loss.logq 1.5"),
        *("--loss.chunk-rows 0", "--tuning.lora-rank -2", "--num-workers -1"),
    ],
)
def test_training_refuses_it(flags: str, tmp_path: Path) -> None:
    program = load_program("train/contrastive.py")
    paths = ["--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "run")]
    config = program.parse(["demo", *paths, *flags.split()])
    with pytest.raises(UserError, match=f"{flags.split()[0]} .*: expected "):
        program.check(config)


def test_recipes_are_in_range() -> None:
    for recipe in load_program("train/contrastive.py").RECIPES.values():
        check_ranges(recipe)
