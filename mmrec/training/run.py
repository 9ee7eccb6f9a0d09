"""The run folder: its full config, its metrics as they come, and what it was made from.

<run>/config.json      every setting; a run can be started from it
<run>/metrics.jsonl    one JSON object a line: training steps and evaluations
<run>/curves.png       the same as a picture (curves.py)
<run>/bad_batch.json   the batch at which a run failed, if it did (faults.py)
<run>/checkpoints/     where to go on from (checkpoints.py)
<run>/encoder/         the best encoder so far
<run>/manifest.json    written when the run is finished
"""

import json
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmrec.errors import UserError
from mmrec.manifest import write_whole
from mmrec.training.curves import draw_curves

Config = TypeVar("Config")


class RunFolder:
    """Appends to a run's files; only the main process holds one."""

    def __init__(self, path: Path, config: Any, *, from_step: int | None) -> None:
        """Open a run folder for writing.

        `from_step` is the step that a resumed run goes on from: lines logged past it are dropped, since
        they will be logged again. None starts afresh.
        """
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(config), indent=2, default=str)
        write_whole(path / "config.json", text + "\n")
        self.metrics_path = path / "metrics.jsonl"
        kept = [] if from_step is None else read_metrics(path)
        lines = [json.dumps(row) for row in kept if row["step"] <= (from_step or 0)]
        write_whole(self.metrics_path, "".join(line + "\n" for line in lines))
        self._warned = False

    def log(self, row: Mapping[str, float | int]) -> None:
        """Append one line to metrics.jsonl, as `append` does."""
        self.append(self.metrics_path, row)

    def append(self, path: Path, row: Mapping[str, Any]) -> None:
        """Append one line to a file, whole or not at all: a full disk is warned of, once."""
        with self._going_on(path):
            size = path.stat().st_size
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError:
                os.truncate(path, size)
                raise

    def draw(self) -> None:
        """Draw curves.png anew from metrics.jsonl; a full disk is warned of, once."""
        path = self.path / "curves.png"
        with self._going_on(path):
            draw_curves(read_metrics(self.path), path)

    @contextmanager
    def _going_on(self, path: Path) -> Iterator[None]:
        # What a person watches is not worth the run.
        try:
            yield
        except OSError as error:
            if not self._warned:
                print(f"warning: {path}: {error}; training goes on without it", file=sys.stderr)
            self._warned = True


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return read_json_lines(run / "metrics.jsonl")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; a line cut short by a crash is left out, and no file has none."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read a run's config.json back into its dataclass.

    Raises `UserError` when the file cannot be read, and for a field that the dataclass has not, or has of
    another type.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a config: {error}") from None
    return _from_dict(kind, raw, path)


def _from_dict(kind: Any, raw: Any, path: Path, prefix: str = "") -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected an object for {kind.__name__}, found {json.dumps(raw)}")
    hints = typing.get_type_hints(kind)
    unknown = set(raw) - {field.name for field in fields(kind)}
    if unknown:
        raise UserError(f"{path}: {kind.__name__} has no field '{min(unknown)}'")
    try:
        return kind(
            **{
                name: _value(hints[name], value, path, f"{prefix}{name}")
                for name, value in raw.items()
            }
        )
    except TypeError as error:
        raise UserError(f"{path}: not a whole {kind.__name__}: {error}") from None


def _value(hint: Any, value: Any, path: Path, name: str) -> Any:
    """A field's value as its type has it; raises `UserError` where JSON's is of another one."""
    if is_dataclass(hint):
        return _from_dict(hint, value, path, f"{name}.")
    for option in _options(hint):
        if typing.get_origin(option) is tuple and isinstance(value, list):
            part = typing.get_args(option)[0]
            return tuple(_value(part, found, path, name) for found in value)
        if option is Path and isinstance(value, str):
            return Path(value)
        if typing.get_origin(option) is typing.Literal and value in typing.get_args(option):
            return value
        # A whole number in JSON may be a float; true and false are none of either.
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    wanted = " or ".join(_shown(option) for option in _options(hint))
    raise UserError(f"{path}: {name}: expected {wanted}, found {json.dumps(value)}")


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _shown(hint: Any) -> str:
    """A type in words of JSON's reader."""
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(json.dumps, typing.get_args(hint)))
    parts = [part for part in typing.get_args(hint) if part is not ...]
    return f"a list of {_shown(parts[0])}" if parts else hint.__name__


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Names of the fields in which two configs of a kind differ, with both values."""
    found: list[str] = []
    for field in fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if is_dataclass(before) and type(before) is type(after):
            found += differing_fields(before, after, f"{prefix}{field.name}.")
        elif before != after:
            found.append(f"{prefix}{field.name} {before!r} -> {after!r}")
    return found
