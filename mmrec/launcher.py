"""What a process knows of the launcher that started it: accelerate's or torchrun."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch"}
_LAUNCHERS |= {"torchrun", "torch.distributed.run", "torch.distributed.launch"}
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def stop_with_launcher() -> None:
    """From now on, SIGTERM comes when the launcher that started this process is gone; Linux alone has this.

    A process with any other parent is left alone: a shell may end before what it started with nohup. So is
    one whose launcher is gone already, within the seconds in which Python reads torch.
    """
    parent = os.getppid()
    if sys.platform != "linux" or not _is_launcher(parent):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # It was gone before the kernel was told.
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # An interpreter with an option or two comes first; what is launched comes later.
    return any(Path(word).name in _LAUNCHERS for word in command[:4])
