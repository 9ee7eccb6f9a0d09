"""What a script or a shell asks of the command: quick help, completion, --quiet, --json."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from vectors import unit_vectors

from mmrec import bars, cli
from mmrec.retrieval import faiss_base
from mmrec.retrieval.index import ProductIndex

HELP_S = 0.5
"""Processor time in user mode that `mmrec --help` may take; with numpy or pyarrow it takes more."""


def user_seconds(*arguments: str) -> float:
    """Processor time of a command in user mode: the wall's depends on what else runs."""
    code = "import resource, sys; from mmrec import cli\n"
    code += f"sys.argv = ['mmrec', *{list(arguments)}]\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"COVERAGE_PROCESS_START": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "embed" in done.stdout
    return float(done.stderr.splitlines()[-1])


def test_help_answers_at_once() -> None:
    # The least of a few: another process on the core makes caches cold and the clock coarse.
    assert min(user_seconds("--help") for _ in range(4)) < HELP_S


def test_the_version_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmrec", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"mmrec {version('mmrec')}\n"


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete "), ("zsh", "#compdef mmrec"), ("fish", "complete ")]
)
def test_completion_is_printed(
    shell: str, sign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmrec", "completion", shell])
    cli.main()
    script = capsys.readouterr().out
    assert sign in script
    assert "recall-target" in script
    assert "completion" in script


@pytest.mark.parametrize(("shell", "end"), [("zsh", "\nPYTHON_EOF"), ("fish", '"\n')])
def test_a_completion_is_one_line_with_its_help(
    shell: str, end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mmrec", "completion", shell])
    cli.main()
    code = capsys.readouterr().out.partition("# Hardcoded completion spec.")[2]
    code = code.partition("main()" + end)[0] + "main()"
    if shell == "fish":  # It stands within double quotes there.
        code = code.replace('\\"', '"').replace("\\\\", "\\")
    words = ["mmrec", "serve", "--allow-url", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    flag, _, text = done.stdout.rstrip("\n").partition("\t")
    assert flag == "--allow-url-host"
    assert "Hosts that" in text
    assert "fetched from otherwise" in text
    assert len(done.stdout.splitlines()) == 1


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = (
        "from mmrec import cli; import sys; sys.argv = ['mmrec', 'completion', 'bash']; cli.main()"
    )
    script = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    path = tmp_path_factory.mktemp("completion") / "script"
    path.write_text(script)
    return path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mmrec index bu", "build"),
        ("mmrec index build --re", "--rerank --recall-target"),
        ("mmrec search --backend ", "faiss milvus"),
        # Nothing: readline goes on with files.
        ("mmrec inspect run", ""),
        ("mmrec compare runs/a runs/b", ""),
        ("mmrec search --index run", ""),
        ("mmrec serve --allow", "--allow-url-host"),
    ],
)
def test_bash_takes_the_completion(line: str, found: str, bash_script: Path) -> None:
    *words, last = line.split(" ")
    asked = f"""source {bash_script}; COMP_WORDS=({" ".join(words)} "{last}"); COMP_CWORD={len(words)}
        _tyro_mmrec; printf '%s' "${{COMPREPLY[*]}} of ${{#COMPREPLY[@]}}"; complete -p mmrec >&2"""
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == f"{found} of {len(found.split())}"
    assert done.stderr.startswith("complete -o default -F _tyro_mmrec mmrec")


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "line", "shown"),
    [
        (True, "mmrec embed", True),
        (False, "mmrec embed", False),
        (True, "mmrec --quiet embed", False),
        (True, "mmrec embed --quiet", False),
    ],
)
def test_bars_are_for_people(
    terminal: bool, line: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", line.split())

    def program() -> list[str]:
        list(bars.progress_bar(range(3), desc="rows"))
        return sys.argv

    assert cli.run_program(program) == ["mmrec", "embed"]
    assert ("rows: 100%" in stream.getvalue()) == shown
    assert sys.argv == line.split()
    assert not bars.is_quiet()


@pytest.mark.parametrize(("line", "shown"), [("mmrec embed", True), ("mmrec embed --quiet", False)])
def test_a_step_that_does_not_tell_how_far_it_is_has_a_clock(
    line: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", line.split())
    monkeypatch.setattr(bars, "TICK_S", 0.02)

    def program() -> None:
        with bars.clock("short"):
            pass
        with bars.clock("long"):
            limit = time.monotonic() + 10
            while shown and "long: 00:0" not in stream.getvalue() and time.monotonic() < limit:
                time.sleep(0.01)

    cli.run_program(program)
    assert ("long: 00:0" in stream.getvalue()) == shown
    assert "short" not in stream.getvalue()


@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_building_and_compacting_have_clocks(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    @contextmanager
    def noted(step: str) -> Iterator[None]:
        steps.append(step)
        yield

    monkeypatch.setattr(bars, "clock", noted)
    monkeypatch.setattr(faiss_base, "clock", noted)
    ids = [f"p{number}" for number in range(300)]
    vectors = unit_vectors(300, width=16)
    with ProductIndex.build(ids, vectors, factory=factory) as index:
        index.save(tmp_path / "index")
        index.delete(ids[:10])
    cli.index_compact(index=tmp_path / "index")
    built = [f"train {factory}", f"index 300 rows as {factory}"]
    assert steps == [*built, "compact 290 rows"]


def printed(capsys: pytest.CaptureFixture[str], command: Callable[[], None]) -> dict:
    capsys.readouterr()
    command()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_json_is_one_object_on_stdout(
    trained: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings, index = tmp_path / "embeddings", tmp_path / "index"
    encoder = trained / "encoder"
    (tmp_path / "gone.txt").write_text("p0000\nnobody\n")

    def ask(command: Callable[..., None], **flags: object) -> dict:
        return printed(capsys, lambda: command(**flags, json=True))

    found = ask(cli.embed, encoder=encoder, shards=tiny_shards, out=embeddings)
    assert (found["rows"], found["new_rows"], found["width"]) == (12, 12, 128)
    found = ask(cli.index_build, embeddings=embeddings, out=index)
    assert found == {"out": str(index), "products": 12, "width": 128, "factory": "Flat"}
    found = ask(cli.index_delete, index=index, ids=tmp_path / "gone.txt")
    assert found == {"deleted": 1, "missing": 1, "holds": 11}
    found = ask(cli.index_upsert, index=index, embeddings=embeddings)
    assert (found["upserted"], found["holds"]) == (12, 12)
    found = ask(cli.index_compact, index=index)
    assert found == {"compacted": True, "generation": "000002", "rows": 12}
    assert ask(cli.index_verify, index=index)["whole"] is True
    assert ask(cli.index_status, index=index)["generation"] == "000002"
    out = tmp_path / "matches.parquet"
    found = ask(cli.search, index=index, queries=embeddings, out=out, k=2, side="product")
    assert found == {"out": str(out), "queries": 12, "matches": 24, "dropped": {}}


def test_what_is_measured_goes_to_stderr_beside_json(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings = index.parent / "embeddings"
    found = printed(
        capsys,
        lambda: cli.index_build(
            embeddings=embeddings,
            out=tmp_path / "index",
            recall_target=0.5,
            queries="catalogue",
            best_effort=True,
            json=True,
        ),
    )
    assert found["products"] == 12


def test_every_command_that_changes_something_has_json() -> None:
    """Those that are left out print something whole already, or nothing."""
    source = (ROOT / "mmrec/cli.py").read_text(encoding="utf-8")
    for part in source.split("_app.command(")[1:]:
        assert "json: bool = False" in part.split('"""')[0], part[:60]
