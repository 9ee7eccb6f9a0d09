"""Where media come from: a path, a URL or bytes, as something local that is there and holds something.

A fault of a network that may pass is waited for, a few times and within the time that a sample has
(`isolation.time_left_s`), so that a server's bad minute does not become a file that is not there.
"""

import errno
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmrec.data.containers import BLOCK_BYTES
from mmrec.data.isolation import time_left_s
from mmrec.data.storage import (
    EXTRAS,
    Slice,
    find_slice,
    http_status,
    http_timeout,
    read_slice,
    true_fault,
)
from mmrec.errors import MediaError, UserError

Answer = TypeVar("Answer")

Source = str | Path | bytes
"""A path, a URL that fsspec opens, or the bytes of a file."""

MAX_FETCH_BYTES = 8 << 30
"""A larger file is not fetched from a URL."""

PAUSES_S = (0.5, 2.0, 6.0)
"""How long a fault that may pass is waited for before each further attempt."""

_SILENCE_S = 20.0  # how long an HTTP server may say nothing: three such attempts fit in two minutes
_NO_PERMISSION = (401, 403)
_PASSING = (408, 425, 429)  # of the statuses below 500, those that ask to come back later


@contextmanager
def local_file(source: Source) -> Iterator[Path | bytes]:
    """A source as a local file or bytes; what is fetched stays for as long as the block.

    Raises `MediaError` where it is not there, is empty, may not be read or cannot be fetched, and
    `UserError` where a URL cannot be opened for want of a package.
    """
    if isinstance(source, str) and (part := find_slice(source)) is not None:
        yield _checked(_slice_bytes(part), str(part))
    elif isinstance(source, str) and "://" in source:
        with _fetched(source) as path:
            yield _checked(path, source)
    else:
        yield _checked(source, source)


def remote_exists(url: str) -> bool:
    """Whether there is a file at a URL that may be read."""
    files, path = _filesystem(url)
    # Over HTTP fsspec would take a server's fault for a file that is not there.
    strict = {"strict": True} if _is_http(files) else {}
    try:
        return _ask(url, lambda: files.exists(path, **strict))
    except MediaError as error:
        # Stores that do not let their folders be listed say so of what is not there.
        if error.reason == "no permission to read":
            return False
        raise


@contextmanager
def copied(blocks: Iterable[bytes]) -> Iterator[Path]:
    """Blocks of bytes as a file, for as long as the block. Raises `MediaError` where the disk is full."""
    with _temporary_file() as copy:
        for block in blocks:
            _write(copy, block)
        yield Path(copy.name)


def summary(error: BaseException, *without: str) -> str:
    """The first line of an error, short and printable: decord quotes the bytes it was given.

    decord's time of day and place in its code are taken off, and the names of passing files, so that
    the same fault gives the same words.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = re.sub(r"\[\d\d:\d\d:\d\d\] |\S+\.(cc|h):\d+: ", "", lines[0])
    for name in without:
        line = line.replace(name, "")
    return "".join(c if c.isprintable() else "?" for c in line)[:200]


def _checked(source: Source, name: Source) -> Path | bytes:
    if isinstance(source, bytes):
        if not source:
            raise MediaError("empty file")
        return source
    path, name = Path(source), str(name)
    if not path.exists():
        raise MediaError("file not found", name)
    if not path.is_file():
        raise MediaError("not a file", name)
    if not os.access(path, os.R_OK):
        raise MediaError("no permission to read", name)
    if not path.stat().st_size:
        raise MediaError("empty file", name)
    return path


def _slice_bytes(part: Slice) -> bytes:
    """A member of a tar: a seek in a local file, a range request to a remote one."""
    if part.size > MAX_FETCH_BYTES:
        raise MediaError("file too large", str(part))
    return _ask(part.path, lambda: read_slice(part))


# Fetching


@contextmanager
def _fetched(url: str) -> Iterator[Path]:
    """A URL's file on disk, for as long as it is needed."""
    from fsspec.implementations.local import LocalFileSystem

    files, path = _filesystem(url)
    if isinstance(files, LocalFileSystem):
        yield Path(path)
        return
    with _temporary_file() as copy:
        _ask(url, lambda: _fetch(files, path, _Limited(copy, url)))
        yield Path(copy.name)


def _fetch(files: Any, path: str, copy: "_Limited") -> None:
    copy.start_again()
    if _is_http(files):
        # One request. Opened as a file it would be read in ranges, which many servers do not know.
        files.get_file(path, copy)
    else:
        with files.open(path, "rb") as remote:
            while block := remote.read(BLOCK_BYTES):
                copy.write(block)


class _Limited(io.RawIOBase):
    """A file to write to that takes so many bytes and no more."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def writable(self) -> bool:
        return True

    def start_again(self) -> None:
        """Forget what a fetch that broke off has written."""
        self._file.seek(0)
        self._file.truncate()

    def write(self, block: Any) -> int:
        if self._file.tell() + len(block) > MAX_FETCH_BYTES:
            raise MediaError("file too large", self._url)
        _write(self._file, block)
        return len(block)


def _temporary_file() -> Any:
    # Without a buffer: one that a full disk has kept from being written would fail again at the close.
    return tempfile.NamedTemporaryFile(prefix="mmrec-", buffering=0)


def _write(file: Any, block: Any) -> None:
    left = memoryview(block)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MediaError(
            "no room for a copy",
            f"{tempfile.gettempdir()} is full; set TMPDIR to a folder on another disk",
        ) from None


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    schemes = set(re.findall(r"\b(https?)://", url))
    options = {name: {"client_kwargs": http_timeout(_SILENCE_S)} for name in schemes}
    return _ask(url, lambda: url_to_fs(url, **options))


def _is_http(files: Any) -> bool:
    protocol = files.protocol
    return "http" in ((protocol,) if isinstance(protocol, str) else protocol)


# Faults


def _ask(url: str, ask: Callable[[], Answer]) -> Answer:
    """What `ask` gives; it is asked again after faults that may pass."""
    for pause_s in (*PAUSES_S, None):
        try:
            return ask()
        except (MediaError, UserError, MemoryError):
            raise
        except Exception as error:  # each protocol has its own family of exceptions
            fault = true_fault(error)
            # Whoever has no time left for another attempt says why, before the sample's time is up.
            if pause_s is None or not _may_pass(fault) or time_left_s() < 2 * pause_s:
                raise _told(url, fault) from None
        time.sleep(pause_s)
    raise AssertionError


def _may_pass(fault: BaseException) -> bool:
    status = http_status(fault)
    if status is not None:
        return status >= 500 or status in _PASSING
    if isinstance(fault, FileNotFoundError | PermissionError | ImportError | ValueError):
        return False
    # aiohttp's own families begin with these names; its package may not be installed.
    families = {kind.__name__ for kind in type(fault).__mro__}
    return isinstance(fault, OSError | EOFError) or "ClientError" in families


def _told(url: str, fault: BaseException) -> MediaError | UserError:
    """A fault as what it means: a file that cannot be fetched, or a machine that cannot fetch."""
    status = http_status(fault)
    if isinstance(fault, FileNotFoundError):
        return MediaError("file not found", url)
    if isinstance(fault, PermissionError) or status in _NO_PERMISSION:
        return MediaError("no permission to read", url)
    if isinstance(fault, ImportError):
        extras = [EXTRAS[name] for name in re.findall(r"(\w+)://", url) if name in EXTRAS]
        mend = f"`pip install 'mmrec[{extras[-1]}]'`" if extras else summary(fault)
        return UserError(f"{url}: a package for this protocol is missing: {mend}")
    said = summary(fault) if status is None else f"HTTP status {status}"
    return MediaError("cannot fetch", f"{url}: {said}")
