"""A child that crashes, hangs or eats memory is one MediaError, and the next item is served."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from misbehaving import misbehave

from mmrec.data.isolation import Isolated
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
