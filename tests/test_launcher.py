"""The end of a launcher reaches what it started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CHILD = """
import time
from mmrec.launcher import stop_with_launcher
from mmrec.training.stopping import StopSignals
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
