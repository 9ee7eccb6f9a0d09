"""A child that crashes, hangs or eats memory is one MediaError, and the next item is served."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from misbehaving import misbehave

from mmrec.data.isolation import Isolated, time_left_s
from mmrec.errors import MediaError


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated[str, str]]:
    with Isolated(misbehave, timeout_s=2.0, memory_bytes=300 << 20) as function:
        yield function


@pytest.mark.parametrize(
    ("what", "reason", "detail"),
    [
        ("crash", "decoder crashed", "signal 11 (SIGSEGV)"),
        ("die", "decoder crashed", "signal 9 (SIGKILL)"),
        ("exit", "decoder crashed", "exit status 3"),
        ("hang", "decoding timed out", "more than 2 s"),
        ("eat at once", "decoder ran out of memory", "more than 0.29"),
        ("eat slowly", "decoder ran out of memory", "more than 0.29"),
        ("bad file", "cannot open video", "it is a text"),
    ],
)
def test_a_bad_item_is_a_reason_and_the_next_one_is_served(isolated, what, reason, detail) -> None:
    with pytest.raises(MediaError) as caught:
        isolated(what)
    assert caught.value.reason == reason
    assert caught.value.detail.startswith(detail)
    assert isolated("good").startswith("good in")


def test_a_bug_is_not_taken_for_a_bad_file(isolated) -> None:
    with pytest.raises(KeyError) as caught:
        isolated("bug")
    assert 'raise KeyError("no such column")' in caught.value.__notes__[0]


def test_one_child_serves_all_items_and_ends_with_its_parent(isolated) -> None:
    children = {isolated("good").split()[-1] for _ in range(20)}
    assert len(children) == 1
    assert int(children.pop()) != os.getpid()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_a_group_of_processes_is_left_to_the_parent(isolated, number) -> None:
    child = int(isolated("good").split()[-1])
    os.kill(child, number)
    time.sleep(0.05)
    assert isolated("good") == f"good in {child}"


def test_a_process_that_ends_does_not_wait_for_its_child() -> None:
    code = (
        "from misbehaving import misbehave\n"
        "from mmrec.data.isolation import Isolated\n"
        "if __name__ == '__main__':\n"
        "    function = Isolated(misbehave, timeout_s=5.0, memory_bytes=300 << 20)\n"
        "    print(function('good').split()[-1])"
    )
    python = [sys.executable, "-c", code]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        python, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert not psutil.pid_exists(int(done.stdout))


def test_an_item_costs_little(isolated) -> None:
    isolated("good")
    started = time.perf_counter()
    for _ in range(200):
        isolated("good")
    assert (time.perf_counter() - started) / 200 < 0.01  # a clip takes some 50 ms


def test_a_child_dies_with_its_parent() -> None:
    code = (
        "import sys, os; sys.path.insert(0, 'tests')\n"
        "from misbehaving import misbehave\n"
        "from mmrec.data.isolation import Isolated\n"
        "if __name__ == '__main__':\n"
        "    f = Isolated(misbehave, timeout_s=60, memory_bytes=1 << 30)\n"
        "    print(f('good').split()[-1], flush=True)\n"
        "    f('hang')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)


def test_what_a_killed_child_leaves_goes_with_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, young = tmp_path / "mmrec-decoder-old", tmp_path / "mmrec-decoder-new"
    abandoned.mkdir()
    (abandoned / "mmrec-download").write_bytes(b"left by a process that was killed")
    os.utime(abandoned, (0, 0))
    young.mkdir()
    with Isolated(misbehave, timeout_s=5.0, memory_bytes=300 << 20) as function:
        with pytest.raises(MediaError, match="SIGKILL"):
            function("leave a file")
        assert {*tmp_path.rglob("mmrec-*")} == {*function_folders(tmp_path), young}
        assert abandoned not in function_folders(tmp_path)
        seconds, _, folder = function("time left").split()
        assert 4 < float(seconds) <= 5
        assert Path(folder) in function_folders(tmp_path)
        # Another run on this machine leaves what is in use alone.
        os.utime(folder, (0, 0))
        with Isolated(misbehave, timeout_s=5.0, memory_bytes=300 << 20) as other:
            other("good")
            assert Path(folder).is_dir()
    del function, other
    gc.collect()
    assert list(tmp_path.iterdir()) == [young]


def function_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != "mmrec-decoder-new"]


def test_nobody_watches_the_time_of_this_process() -> None:
    assert time_left_s() == float("inf")
