"""The house: what may import what, what is importable, and what an import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data_prep", "train", "index")
# A room may use those before it; training and retrieval stand side by side.
FLOORS = {"data": 0, "model": 1, "training": 2, "retrieval": 2, "generative": 3, "serve": 4}
SOURCES = sorted((ROOT / "mmrec").rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "mmrec").parts[0]
    for name in imports(path):
        assert name.split(".")[0] not in STAGES, f"{path} imports the stage folder {name}"
        parts = name.split(".")
        if parts[0] == "mmrec" and len(parts) > 1 and parts[1] in FLOORS and room in FLOORS:
            assert FLOORS[parts[1]] <= FLOORS[room], f"{room} imports {name}"


def test_only_mmrec_is_importable_after_an_install(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([bool(u.find_spec(n)) for n in %r])"
    done = subprocess.run(
        [sys.executable, "-c", code % (("mmrec", *STAGES),)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[True, False, False, False]"


def test_doors_are_short() -> None:
    for name in ("build_index.py", "evaluate_matching.py"):
        assert len((ROOT / "index" / name).read_text().splitlines()) <= 15


@pytest.mark.parametrize("statement", ["import mmrec", "import mmrec.cli"])
def test_imports_are_light(statement: str, tmp_path: Path) -> None:
    code = f"import sys; {statement}; print([m for m in ('torch', 'faiss', 'pyarrow') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_rank_and_world_size_are_asked_for_in_one_place() -> None:
    for path in SOURCES:
        if path.name != "distributed.py":
            text = path.read_text(encoding="utf-8")
            assert "get_rank(" not in text
            assert "get_world_size(" not in text


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmrec.cli", "inspect", "missing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "missing: no such folder" in done.stderr


def test_the_tour_names_files_that_are_there() -> None:
    tour = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The code in one tour")[1]
    )
    rows = [line.split("|")[2] for line in tour.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    for row in rows:
        folder = Path()
        for name in re.findall("`([^`]+)`", row):
            path = Path(name) if "/" in name else folder / name
            assert any(ROOT.glob(str(path))), path
            folder = path if name.endswith("/") else path.parent
