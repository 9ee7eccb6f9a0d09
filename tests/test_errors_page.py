"""The page of errors: every message on it is one that the code gives, and some are provoked."""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

from mmrec import cli

PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
SOURCES = [path for room in ("mmrec", "data_prep", "train") for path in (ROOT / room).rglob("*.py")]


def messages() -> list[str]:
    """The first cells of the page's tables, without the marks of code around them."""
    cells = re.findall(r"^\| (`` .*? ``|`[^`]+`) \|", PAGE, re.M)
    return [cell.strip("`").strip() if cell.startswith("`` ") else cell[1:-1] for cell in cells]


def text_of(node: ast.expr) -> str:
    """A string of the source, with … where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "…"


def strings() -> Iterator[str]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                yield same(text_of(node))


def same(text: str) -> str:
    return re.sub("…+", "…", text)


def test_every_message_is_the_codes() -> None:
    known = set(strings())
    rows = len(re.findall(r"^\| [^-]", PAGE, re.M)) - PAGE.count("| error |")
    assert len(messages()) == rows > 40
    missing = [text for text in messages() if not any(same(text) in line for line in known)]
    assert missing == []


def test_flags_that_it_names_are_there() -> None:
    given = " ".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for flag in set(re.findall(r"--([a-z][a-z-]+)", PAGE)):
        name = flag.replace("-", "_")
        assert re.search(rf"\b{name}\b", given), flag


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("mmrec inspect train", "…: has no …, so it is not a folder that mmrec finished"),
        ("mmrec search --index index --text x", "…: has no …, so it is not a folder"),
        (
            "mmrec index build --embeddings x --out y --recall-target 2",
            "--recall-target …: expected more than 0",
        ),
        ("mmrec hub push --encoder nothing --repo a/b", "…: no such folder…"),
    ],
)
def test_a_message_is_one_line(
    command: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    assert re.match("error: " + pattern, printed)
