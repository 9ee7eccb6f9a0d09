"""A function in a child process that may crash, hang or eat memory without harm to this one.

Decoders are large C libraries fed with files from anywhere. What one bad file does to its child is an
`MediaError` here: the child is replaced and the next item goes on. What the child leaves in its temporary
folder goes with it.
"""

import ctypes
import fcntl
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from mmrec.errors import MediaError

Item = TypeVar("Item")
Result = TypeVar("Result")

GIGABYTE = 1 << 30
_START_TIMEOUT_S = 120.0  # a child imports numpy and the decoders, on a disk that may be busy
_POLL_S = 0.02  # how often memory is looked at: a decoder fills a gigabyte in about 0.3 s
_SLACK_BYTES = (
    GIGABYTE  # address space that is reserved and never touched: stacks, arenas, libraries
)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_FOLDER_PREFIX = "mmrec-decoder-"
_YOUNG_S = 60.0  # a folder as young may be about to be locked by whoever made it

_deadline = math.inf  # of the item that this child works on, by the monotonic clock


def time_left_s() -> float:
    """Seconds until this process is ended for taking too long; infinite where nobody watches."""
    return _deadline - time.monotonic()


class Isolated(Generic[Item, Result]):
    """Calls a function on one item at a time in a child process with limits.

    `function` is found by its module and name, and the module must not be the program that is run; items
    and results are pickled. The child starts at the first call, and again after each item that it did
    not survive.
    """

    def __init__(
        self, function: Callable[[Item], Result], *, timeout_s: float, memory_bytes: int
    ) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        # Not fork: the parent has threads, whose locks a fork would copy in any state.
        self._context = multiprocessing.get_context("spawn")
        self._child: Any = None
        self._ended_at_exit: Any = None
        self._pipe: Connection | None = None
        self._watched: psutil.Process | None = None
        self._base_bytes = 0
        self._folder: Path | None = None

    def __call__(self, item: Item) -> Result:
        """The function's result for one item.

        Raises `MediaError` with the reason "decoding timed out", "decoder ran out of memory" or
        "decoder crashed", and whatever the function itself raised.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send(item)
            state, result = self._answer(pipe, self._timeout_s)
        except (EOFError, ConnectionError):
            raise self._death() from None
        except BaseException:
            # Timed out, over its memory, or interrupted: in each case its answer would come too late.
            self.close()
            raise
        if state == "ok":
            # A leak of many small files must not be held against the next one.
            if self._used_bytes() > self._memory_bytes / 2:
                self.close()
            return result
        self.close()
        if isinstance(result, MemoryError):
            raise MediaError("decoder ran out of memory", self._memory_limit())
        raise result

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None:
            self._ended_at_exit.cancel()
            self._child.kill()
            self._child.join()
            self._child.close()
        self._child = self._pipe = self._watched = None
        if self._folder is not None:
            _empty(self._folder)

    def __enter__(self) -> "Isolated[Item, Result]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> Connection:
        here, there = self._context.Pipe()
        self._folder = self._folder or self._make_folder()
        limits = (self._timeout_s, self._memory_bytes)
        child = self._context.Process(
            target=_serve,
            args=(there, self._function, *limits, str(self._folder), os.getpid()),
            daemon=True,
        )
        with main_left_out():
            child.start()
        # At its exit this process sends daemons a SIGTERM, which the child ignores, and waits for them: this
        # comes before.
        self._ended_at_exit = Finalize(None, child.kill, exitpriority=10)
        there.close()
        self._child, self._pipe = child, here
        self._watched = psutil.Process(child.pid)
        try:
            self._base_bytes = 0
            state, result = self._answer(here, _START_TIMEOUT_S, limited=False)
        except (EOFError, ConnectionError, MediaError) as error:
            self.close()
            raise RuntimeError(f"a decoding process does not start: {error!r}") from None
        if state != "ok":
            self.close()
            raise result
        self._base_bytes = self._resident()
        return here

    def _make_folder(self) -> Path:
        """A temporary folder for the children, which goes when this object or its process does."""
        _remove_abandoned()
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        weakref.finalize(self, _remove, folder, lock)
        return folder

    def _answer(
        self, pipe: Connection, timeout_s: float, *, limited: bool = True
    ) -> tuple[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not pipe.poll(_POLL_S):
            if time.monotonic() > deadline:
                raise MediaError("decoding timed out", f"more than {timeout_s:g} s")
            if limited and self._used_bytes() > self._memory_bytes:
                raise MediaError("decoder ran out of memory", self._memory_limit())
        return pipe.recv()

    def _used_bytes(self) -> int:
        return self._resident() - self._base_bytes

    def _resident(self) -> int:
        try:
            return self._watched.memory_info().rss if self._watched else 0
        except psutil.Error:  # It has just died, which the pipe will tell.
            return 0

    def _memory_limit(self) -> str:
        return f"more than {self._memory_bytes / GIGABYTE:g} GiB"

    def _death(self) -> MediaError:
        self._child.join(5)
        code = self._child.exitcode
        self.close()
        if code is None or code >= 0:
            return MediaError("decoder crashed", f"exit status {code}")
        # The kernel's out-of-memory killer sends the same signal as anybody else's kill -9.
        name = signal.Signals(-code).name
        return MediaError("decoder crashed", f"signal {-code} ({name})")


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_abandoned() -> None:
    """Remove the folders of processes that were killed: nobody holds their locks any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        with suppress(OSError):  # another's, or just removed by another
            if time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _serve(
    pipe: Connection,
    function: Callable[[Any], Any],
    timeout_s: float,
    memory_bytes: int,
    folder: str,
    parent: int,
) -> None:
    """The child: answers items until the pipe closes."""
    global _deadline
    die_with(parent)
    tempfile.tempdir = folder
    # Ctrl-C, or a SIGTERM to all of a group, is for the parent: it may finish its work before it ends this.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(memory_bytes)
    pipe.send(("ok", None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        _deadline = time.monotonic() + timeout_s
        try:
            answer = ("ok", function(item))
        except Exception as error:
            # A traceback does not pickle, and without it nobody finds the line.
            error.add_note(traceback.format_exc())
            answer = ("error", error)
        pipe.send(answer)


@contextmanager
def main_left_out() -> Iterator[None]:
    """Processes that are spawned meanwhile do not run the main program's file once more.

    multiprocessing has each import it for what it may be asked for; here that is half of the time that
    a child takes to start.
    """
    names = vars(sys.modules["__main__"])
    found = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    names.update(dict.fromkeys(found))
    try:
        yield
    finally:
        names.update(found)


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, even by kill -9 (Linux; elsewhere not)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # It died before the line above.
        os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Make allocations fail at a limit. The parent watches as well, for what is not allocated so."""
    if sys.platform != "linux":
        return  # macOS takes the limit and does not keep to it.
    used = psutil.Process().memory_info().vms
    resource.setrlimit(
        resource.RLIMIT_AS, (used + memory_bytes + _SLACK_BYTES, resource.RLIM_INFINITY)
    )
