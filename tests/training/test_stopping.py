"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading
import time

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
