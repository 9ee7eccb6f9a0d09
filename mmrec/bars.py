"""Progress bars: on a terminal alone, and not under --quiet."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

TICK_S = 1.0
"""How often a clock moves, and how long a step takes before it has one."""

_quiet = False


def progress_bar(
    iterable: Iterable[Any] | None = None, *, shown: bool = True, **settings: Any
) -> Any:
    """Tqdm's bar of these settings, which shows itself where `shown`, on a terminal, without --quiet."""
    from tqdm import tqdm

    return tqdm(iterable, disable=None if shown and not _quiet else True, **settings)


@contextmanager
def clock(step: str) -> Iterator[None]:
    """Show how long a step has taken that does not tell how far it is, such as one call of FAISS."""
    if not bars_are_seen():
        yield
        return
    ended = Event()
    ticking = Thread(target=_tick, args=(step, ended), daemon=True)
    ticking.start()
    try:
        yield
    finally:
        ended.set()
        ticking.join()


def _tick(step: str, ended: Event) -> None:
    if ended.wait(TICK_S):
        return
    with progress_bar(desc=step, bar_format="{desc}: {elapsed}", leave=False) as bar:
        bar.start_t -= TICK_S  # What was waited for counts.
        bar.refresh()
        while not ended.wait(TICK_S):
            bar.refresh()


def bars_are_seen() -> bool:
    """Whether somebody watches: stderr is a terminal, and --quiet was not given."""
    return sys.stderr.isatty() and not _quiet


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _quiet


@contextmanager
def quiet_if_asked() -> Iterator[None]:
    """Take --quiet from the command line, wherever it stands; no bar shows itself in this block then."""
    global _quiet
    before, given = _quiet, sys.argv
    _quiet = _quiet or "--quiet" in given
    sys.argv = [word for word in given if word != "--quiet"]
    try:
        yield
    finally:
        _quiet, sys.argv = before, given
