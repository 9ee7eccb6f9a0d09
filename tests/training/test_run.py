"""Schedules and run folders: the small pieces that the training loops share."""

import json
import math
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from mmrec.errors import UserError
from mmrec.training.run import RunFolder, differing_fields, read_config, read_metrics
from mmrec.training.sample_log import SampleLog, read_samples
from mmrec.training.schedules import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    # Written so, a type that may be None comes back as typing's kind of union.
    limit: Annotated[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    folder: Path
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"


def test_warmup_rises_in_a_line_and_the_cosine_ends_at_its_floor() -> None:
    factors = [warmup_cosine(step, total=100, warmup=10, final=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 90))
    assert factors[55] == pytest.approx(expected)
    assert factors[99] == pytest.approx(0.1, abs=1e-3)


def test_a_config_comes_back_as_it_was_written(tmp_path: Path) -> None:
    config = Outer(folder=Path("a/b"), inner=Inner(limit=3), names=("x", "y"))
    RunFolder(tmp_path / "run", config, from_step=None)
    assert read_config(tmp_path / "run/config.json", Outer) == config


def test_a_config_with_a_field_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"folder": "a", "inner": {"rat": 1}}))
    with pytest.raises(UserError, match="Inner has no field 'rat'"):
        read_config(path, Outer)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a config"):
        read_config(path, Outer)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"inner": {"limit": "ten"}}, r'inner\.limit: expected int or null, found "ten"'),
        ({"inner": {"limit": True}}, r"inner\.limit: expected int or null, found true"),
        ({"inner": {"rate": None}}, r"inner\.rate: expected float, found null"),
        ({"inner": 3}, "expected an object for Inner, found 3"),
        ({"names": "x"}, 'names: expected a list of str, found "x"'),
        ({"names": [1]}, "names: expected str, found 1"),
        ({"kind": "c"}, 'kind: expected "a" or "b", found "c"'),
        ({"folder": 3}, "folder: expected Path, found 3"),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(
    raw: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"folder": "a"} | raw))
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read_config(path, Outer)


def test_a_whole_number_may_stand_for_a_float(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"folder": "a", "inner": {"rate": 2}}')
    assert read_config(tmp_path / "config.json", Outer).inner.rate == 2.0


def test_differing_fields_are_named_with_both_values() -> None:
    one, two = Outer(folder=Path("a")), Outer(folder=Path("a"), inner=Inner(rate=0.7))
    assert differing_fields(one, two) == ["inner.rate 0.5 -> 0.7"]
    assert differing_fields(one, one) == []


def test_resuming_drops_what_was_logged_past_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, Outer(folder=Path("a")), from_step=None)
    for step in (10, 20, 30):
        run.log({"step": step, "loss": 1.0})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 40, "lo')  # The line that a kill cut short.
    RunFolder(tmp_path, Outer(folder=Path("a")), from_step=20)
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20]


def test_a_full_disk_leaves_whole_lines_and_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path, Outer(folder=Path("a")), from_step=None)
    run.log({"step": 1, "loss": 1.0})
    samples = SampleLog(run, epoch=0, batch=0)
    samples.log(epoch=0, batch=0, contents=["c1"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for a few bytes more: the next line breaks off in its middle.
    size = run.metrics_path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        run.log({"step": 2, "loss": 1.0})
        run.log({"step": 3, "loss": 1.0})
        samples.log(epoch=0, batch=1, contents=["c" * size])
        run.draw()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.log({"step": 4, "loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
    assert [row["batch"] for row in read_samples(tmp_path)] == [0]
    assert capsys.readouterr().err.count("training goes on without it") == 1
    names = {"config.json", "metrics.jsonl", "samples.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names
    run.draw()
    assert (tmp_path / "curves.png").exists()
