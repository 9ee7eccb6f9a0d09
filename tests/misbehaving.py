"""What decoders do on bad days, for the tests of isolation and engines: child processes import this."""

import ctypes
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmrec.data.isolation import time_left_s
from mmrec.errors import MediaError


def misbehave(what: str) -> str:
    """Do what is asked, in the process that calls this."""
    if what == "crash":
        ctypes.string_at(0)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "leave a file":
        with open(tempfile.mkstemp(prefix="mmrec-")[1], "wb") as file:
            file.write(bytes(1 << 20))
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "time left":
        return f"{time_left_s():.3f} in {tempfile.gettempdir()}"
    if what == "hang":
        time.sleep(60)
    if what == "eat at once":
        np.ones(4 << 30, dtype=np.uint8)
    if what == "eat slowly":
        held = []
        while True:
            held.append(np.ones(8 << 20, dtype=np.uint8))
            time.sleep(0.01)
    if what == "bad file":
        raise MediaError("cannot open video", "it is a text")
    if what == "bug":
        raise KeyError("no such column")
    return f"{what} in {os.getpid()}"


@dataclass(frozen=True)
class Fragile:
    """A task that dies the first time and does its work the second."""

    out: Path
    deaths: int = 1

    def run(self) -> int:
        """Die while there are fewer than `deaths` notes of it."""
        notes = list(self.out.parent.glob(f"{self.out.name}.death-*"))
        if len(notes) < self.deaths:
            self.out.with_name(f"{self.out.name}.death-{len(notes)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.out.write_text("done")
        return len(notes)


@dataclass(frozen=True)
class Slow:
    """A task that says who ran it."""

    out: Path
    seconds: float = 0.0

    def run(self) -> str:
        """Add a line to a file."""
        time.sleep(self.seconds)
        with open(self.out, "a") as file:
            file.write(f"{os.getpid()}\n")
        return self.out.name


@dataclass(frozen=True)
class Faulty:
    """A task with a bug in it."""

    def run(self) -> None:
        """Raise."""
        raise ZeroDivisionError("a bug")
