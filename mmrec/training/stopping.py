"""Stops that are asked for from outside: SIGTERM, Ctrl-C, and SIGUSR1, SLURM's warning of a preemption."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from mmrec.training.checkpoints import list_checkpoints

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
# A terminal sends Ctrl-C to every process, and torchrun then sends it to its ranks once more: only a
# second one that comes later is a person's.
_ECHO_S = 1.0


class StopSignals:
    """Notes that the run shall stop, so that the loop can end between two steps.

    A context: inside it the signals no longer end the process. A second Ctrl-C does, at once and
    without a checkpoint. Outside of the main thread, where Python takes no signals, it notes nothing.
    """

    received: int = 0
    """The number of the first signal that came; 0 before."""

    def __init__(self, *, announce: bool = True) -> None:
        self._announce = announce
        self._received_at = 0.0
        self._owner = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # A loader's process, forked with this handler: the trainer decides for it.
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            self._say(
                f"\n{signal.Signals(number).name}: stopping after this step; Ctrl-C ends at once\n"
            )
        elif number == signal.SIGINT and now - self._received_at > _ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._owner, number)

    def _say(self, text: str) -> None:
        if self._announce:
            os.write(2, text.encode())  # A print could meet another one half done.


def stop_message(number: int, run: Path, *, program: str = "train/contrastive.py") -> str:
    """What a stopped run says: why it ended, where it is, and how it goes on."""
    return (
        f"stopped by {signal.Signals(number).name}; checkpoint: {list_checkpoints(run)[-1]}\n"
        f"go on with: accelerate launch {program} {run / 'config.json'} --resume"
    )


def exit_status(number: int) -> int:
    """The exit status of a program that a signal ended, as shells count it."""
    return 128 + number
