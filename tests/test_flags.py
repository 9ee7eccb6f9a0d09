"""What a reader types wrong is answered in one line, with exit status 1."""

import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
import tyro

from mmrec.cli import app, run_program


@dataclass(frozen=True, kw_only=True)
class Part:
    kind: Literal["softmax", "sigmoid"] = "softmax"
    widths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config:
    shards: str
    """The folder, as --further-shards of another program."""
    ema: float | None = None
    loss: Part = field(default_factory=Part)


def answer(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program with the flags of `Config` says, or the command where the line starts with it."""
    monkeypatch.setattr(sys, "argv", line.split())
    command = line.startswith("mmrec")
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: app.cli(prog="mmrec") if command else tyro.cli(Config))
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "train --shards s --los.kind x",
            "--los.kind: not a known flag; close: --loss.kind, --loss.widths",
        ),
        ("train --shards s --kind=x", "--kind=x: not a known flag; close: --loss.kind"),
        ("train --shard s", "--shard: not a known flag; close: --shards"),
        ("train --shards s --price", "--price: not a known flag; --help lists all"),
        ("train --shards s more", "more: not a known argument; --help lists all"),
        ("train", "expected --shards; found none"),
        (
            "train --shards s --loss.kind softmix",
            "--loss.kind softmix: expected one of softmax, sigmoid; close: softmax",
        ),
        ("train --shards s --loss.widths x", "--loss.widths x: expected [INT [INT ...]]"),
        ("train --shards s --ema x", "--ema x: expected {None}|FLOAT"),
        ("train --shards s --ema", "--ema: expected {None}|FLOAT"),
        ("mmrec serach", "serach: not a known argument; close: search"),
        ("mmrec shards", "expected one of index; found none"),
        ("mmrec index build --factoy Flat", "--factoy: not a known flag; close: --factory"),
        ("mmrec inspect", "expected PATH; found none"),
    ],
)
def test_the_answer_is_one_line(
    line: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert answer(line, monkeypatch, capsys) == f"error: {expected}\n"


def test_help_is_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    texts = []
    for program in (lambda: tyro.cli(Config), lambda: run_program(lambda: tyro.cli(Config))):
        with pytest.raises(SystemExit) as ended:
            program()
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "--loss.kind" in texts[1]
