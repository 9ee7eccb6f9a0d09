"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from mmrec.training.stopping import SIGNALS, StopSignals, exit_status


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_once_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignals(announce=False) as stop:
        assert stop.received == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == number
    assert signal.getsignal(number) is before
    assert exit_status(number) == 128 + number


def test_an_echo_of_ctrl_c_ends_nothing() -> None:
    """A terminal's and torchrun's Ctrl-C arrive one after the other."""
    with StopSignals(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_a_thread_can_train_without_signals() -> None:
    seen = []

    def work() -> None:
        with StopSignals() as stop:
            seen.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0]


PROGRAM = """
import time
from mmrec.training.stopping import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_a_second_ctrl_c_ends_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert "SIGINT: stopping after this step" in errors


CHILD = """
import time
from mmrec.training.stopping import StopSignals, stop_with_launcher
stop_with_launcher()
with StopSignals(announce=False) as stop:
    print("ready", flush=True)
    until = time.monotonic() + 2
    while time.monotonic() < until and not stop.received:
        time.sleep(0.01)
    print("received", stop.received)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
@pytest.mark.parametrize(("name", "received"), [("torchrun", signal.SIGTERM), ("start.py", 0)])
def test_the_end_of_a_launcher_is_a_sigterm_and_of_another_parent_nothing(
    tmp_path: Path, name: str, received: int
) -> None:
    (tmp_path / name).write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {CHILD!r}])"
    )
    parent = subprocess.Popen(
        [sys.executable, tmp_path / name],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    said, _ = parent.communicate(timeout=10)  # Until the child has ended as well.
    assert said == f"received {int(received)}\n"
