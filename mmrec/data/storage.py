"""Where things lie: the one place that tells local paths from URLs.

A folder may be a local path or a URL of any protocol that fsspec knows (s3://, gs://, http://,
https://, memory:// ...). Either is a `Place`, joined and read like a pathlib path. What has to be a
real file is fetched once into a cache (`local_copy`), which two environment variables govern:

    MMREC_CACHE      its folder; ~/.cache/mmrec by default
    MMREC_CACHE_GB   the bytes that it may hold, in units of 10^9; 50 by default

Training wants all tars of a split in it, or at least those that a window of the sampler reads at once
(`--sampler.window-shards`): with less room the same tars are fetched over and over.

Credentials and endpoints come from where each protocol's own package looks for them (for S3
AWS_PROFILE, AWS_ENDPOINT_URL and the like), and from fsspec's configuration.
"""

import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from upath import UPath

from mmrec.errors import UserError

Answer = TypeVar("Answer")
Place = Path | UPath
"""A local path, or the remote path that a URL names."""

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
# pathlib folds the slashes of a URL: a flag that was read as a Path arrives as s3:/bucket/folder.
_FOLDED_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/(?!/)")
_LOCAL = ("file", "local")
_HTTP = ("http://", "https://")
# Extras of mmrec that bring the package of a protocol.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# What protocols call the thing that changes when a file does, the surest first.
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "Content-MD5", "generation", "version_id")
_TIME_KEYS = ("LastModified", "Last-Modified", "updated", "mtime", "created")

_DEFAULT_CACHE_GB = 50.0
_ATTEMPTS = 3
_NOT_THERE = (404, 410)
_SILENCE_S = 60.0  # how long an HTTP server may say nothing
_STALE_S = 24 * 3600  # a fetch that was killed leaves its temporary file behind
_PART = ".part-"
_LOCK = ".lock"


def place(given: str | Path | UPath) -> Place:
    """A path as a `Path`, a URL as the remote path it names.

    Raises `UserError` for a protocol that fsspec does not know, or whose package is missing.
    """
    if isinstance(given, UPath):
        return given
    text = _unfolded(given) if isinstance(given, Path) else given
    found = _URL.match(text)
    if found is None:
        return Path(given)
    if found[1].lower() in _LOCAL:
        return Path(str(LocalFileSystem._strip_protocol(text)))
    _check_protocol(text, found[1].lower())
    text = text[: found.end()] + text[found.end() :].rstrip("/")
    # Other processes write what this one reads, so what a folder held before is not remembered.
    return UPath(text, use_listings_cache=False, **_http_options(text))


def _unfolded(path: Path) -> str:
    text = str(path)
    found = _FOLDED_URL.match(text)
    if found is None or found[1] not in fsspec.available_protocols() or path.exists():
        return text
    slashes = ":///" if found[1] in _LOCAL else "://"
    return found[1] + slashes + text[found.end() :]


def _check_protocol(url: str, protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        known = "a local path, s3://, gs://, http:// or https://"
        raise UserError(f"{url}: unknown protocol '{protocol}'; expected {known}") from None
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        mend = f"pip install 'mmrec[{extra}]'" if extra else str(error)
        raise UserError(f"{url}: a package for {protocol}:// is missing: {mend}") from None


def _http_options(url: str) -> dict[str, Any]:
    """Without these aiohttp gives up after five minutes; a tar may take longer, but not be silent."""
    return {"client_kwargs": http_timeout(_SILENCE_S)} if url.startswith(_HTTP) else {}


def http_timeout(silence_s: float) -> dict[str, Any]:
    """Settings of an HTTP client that waits as long as bytes come, and not longer when none do."""
    try:
        from aiohttp import ClientTimeout
    except ImportError:  # fsspec says so in a moment, and what to install
        return {}
    return {"timeout": ClientTimeout(total=None, sock_connect=silence_s, sock_read=silence_s)}


def is_remote(path: Place) -> bool:
    """Whether a place is reached by a URL."""
    return not isinstance(path, Path)


def joined(base: Place, path: str) -> Place:
    """What a path or URL that was written down in the folder `base` means: relative ones start there.

    The parts `.` and `..` are worked out, since stores of objects know no such thing.
    """
    if _URL.match(path):
        return place(path)
    if os.path.isabs(path):
        return Path(path)
    if isinstance(base, Path):
        return Path(os.path.normpath(base.resolve() / path))
    protocol, rest = str(base).split("://", 1)
    host, _, folder = rest.partition("/")
    # Below a slash `..` cannot climb into the host or bucket.
    whole = os.path.normpath("/" + f"{folder}/{path}".lstrip("/"))
    return place(f"{protocol}://{host}{whole}")


def media_address(root: Place, media: str) -> str:
    """The path or URL of a media file that a table in the folder `root` names, as text."""
    if _URL.match(media) or os.path.isabs(media):
        return media
    if isinstance(root, Path):
        return os.path.join(root, media)
    if str(root).startswith(_HTTP):
        part = find_slice(media)
        # A file's name may hold what has a meaning in a URL: '#', '?', '%'.
        media = f"{quote(part.path)}{part.suffix}" if part else quote(media)
    return str(joined(root, media))


def is_file(path: Place) -> bool:
    """Whether there is a file. Raises `UserError` when the other side cannot be asked."""
    if isinstance(path, Path):
        return path.is_file()
    try:
        return _info(path)["type"] == "file"
    except FileNotFoundError:
        return False


def read_bytes(path: Place) -> bytes:
    """A file's bytes. Raises `FileNotFoundError`, and `UserError` when they cannot be had."""
    if isinstance(path, Path):
        return path.read_bytes()
    filesystem, name = _open(path)
    return _asked(path, lambda: filesystem.cat_file(name))


def list_files(folder: Place, pattern: str) -> list[Place]:
    """What in a folder has a name that matches a shell pattern, sorted; nothing without a folder.

    Over HTTP this finds what the server's own page about the folder links to, if it has one.
    """
    if isinstance(folder, Path):
        return sorted(folder.glob(pattern))
    fresh = UPath(str(folder), **folder.storage_options)  # see _open
    try:
        found = _asked(folder, lambda: list(fresh.glob(pattern)))
    except FileNotFoundError:
        return []
    return sorted(found, key=str)


def write_bytes_whole(path: Place, data: bytes | Path) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of either.

    `data` is the bytes, or a local file that holds them. A folder that is missing is made. Raises
    `UserError` where a URL cannot be written.
    """
    if isinstance(path, Path):
        _write_local(path, data)
        return
    check_writable(path)
    filesystem, name = _open(path)
    if isinstance(data, bytes):
        _asked(path, lambda: filesystem.pipe_file(name, data))
    else:
        _asked(path, lambda: filesystem.put_file(str(data), name))


def check_writable(path: UPath) -> None:
    """Raise `UserError` for a URL whose protocol takes no files."""
    if str(path).startswith(_HTTP):
        raise UserError(f"{path}: cannot be written over HTTP; give a local path, s3:// or gs://")


def replace_folder(path: UPath, folder: Path, *, last: str) -> None:
    """Put the files of a local folder in the place of all that is at `path`, the one named `last` last.

    So a remote folder that has that file is whole.
    """
    filesystem, name = _open(path)
    if _asked(path, lambda: filesystem.exists(name)):
        end = path / last
        if is_file(end):
            _asked(end, lambda: filesystem.rm_file(_open(end)[1]))
        _asked(path, lambda: filesystem.rm(name, recursive=True))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file == folder / last):
        write_bytes_whole(path / file.relative_to(folder).as_posix(), file)


def _write_local(path: Path, data: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        if isinstance(data, bytes):
            temporary.write_bytes(data)
        else:
            shutil.copyfile(data, temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{path}: the disk is full; make room, and run the same command again"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


# Slices: the place of a member inside a tar, as text that a table can hold.


@dataclass(frozen=True)
class Slice:
    """A stretch of a file's bytes, written `path.tar#offset+size`."""

    path: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """What follows the path."""
        return f"#{self.offset}+{self.size}"

    def __str__(self) -> str:
        return self.path + self.suffix


_SLICE = re.compile(r"(.+\.tar)#(\d+)\+(\d+)")


def find_slice(address: str) -> Slice | None:
    """The slice that a path or URL names, or None where it names a whole file."""
    found = _SLICE.fullmatch(address)
    return Slice(found[1], int(found[2]), int(found[3])) if found else None


def read_slice(part: Slice) -> bytes:
    """The bytes of a slice: a seek in a local file, a request of that range from a remote one.

    Raises `EOFError` where the file is shorter, `FileNotFoundError`, and whatever else the protocol does.
    """
    path = place(part.path)
    end = part.offset + part.size
    if isinstance(path, Path):
        with open(path, "rb") as file:
            file.seek(part.offset)
            data = file.read(part.size)
    else:
        filesystem, name = _open(path)
        data = filesystem.cat_file(name, start=part.offset, end=end)
        if len(data) > part.size:  # an HTTP server that knows no ranges sends the whole file
            data = data[part.offset : end]
    if len(data) < part.size:
        raise EOFError(f"{part.path}: ends before byte {end}")
    return data


# The cache.


def local_copy(path: Place) -> Path:
    """A local file with the bytes of `path`, which is itself where it is local.

    A remote file is fetched whole, once for all processes of a machine, and again when it has changed
    (its size, and its ETag or time). Those used longest ago make room when the cache is full;
    one that is open stays readable. Raises `FileNotFoundError`, and `UserError` when it cannot be had.
    """
    if isinstance(path, Path):
        return path
    info = _info(path)
    size = info.get("size")
    version = _first_of(info, _VERSION_KEYS) or _first_of(info, _TIME_KEYS)
    digest = hashlib.sha256(f"{path}\0{size}\0{version}".encode()).hexdigest()[:40]
    folder = cache_folder()
    target = folder / f"{digest}{path.suffix}"
    with _locked(folder / f"{digest}{_LOCK}"):
        # Its time of change serves as the time of last use.
        with suppress(FileNotFoundError):
            os.utime(target)
            return target
        _make_room(folder, size or 0)
        _fetch(path, size, target)
    return target


def cache_folder() -> Path:
    """The folder of fetched files, made if it is missing."""
    default = Path.home() / ".cache" / "mmrec"
    folder = Path(os.environ.get("MMREC_CACHE") or default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be the cache ({error}); set MMREC_CACHE") from None
    return folder


def _first_of(info: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((info[key] for key in keys if info.get(key)), None)


def _limit_bytes() -> float:
    text = os.environ.get("MMREC_CACHE_GB") or str(_DEFAULT_CACHE_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise UserError(f"MMREC_CACHE_GB={text}: expected a number of gigabytes above 0")
    return limit * 1e9


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of this machine, which ends with the process that holds it."""
    import fcntl  # not on Windows, where all but fetching works

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(path: UPath, size: int | None, target: Path) -> None:
    # A name of its own: should a lock file go while somebody waits for it, two may fetch at once.
    part = target.with_name(f"{target.name}{_PART}{uuid.uuid4().hex}")
    filesystem, name = _open(path)
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                filesystem.get_file(name, str(part))
                found = part.stat().st_size
                if size is not None and found != size:
                    raise EOFError(f"{found} of {size} bytes came")
                part.replace(target)
                return
            except (FileNotFoundError, PermissionError) as error:
                raise _cannot(path, error) from None
            except Exception as error:  # each protocol has its own family of exceptions
                if attempt == _ATTEMPTS:
                    raise _cannot(path, error) from None
                time.sleep(2.0 ** (attempt - 1))
    finally:
        part.unlink(missing_ok=True)


def _make_room(folder: Path, wanted: int) -> None:
    """Remove the files used longest ago until `wanted` more bytes fit, or none is left."""
    limit = _limit_bytes()
    with _locked(folder / f"all{_LOCK}"):
        files: list[tuple[float, int, Path]] = []
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # another process's temporary file may go meanwhile
                if not entry.name.endswith(_LOCK):
                    stat = entry.stat()
                    files.append((stat.st_mtime, stat.st_size, Path(entry.path)))
        over = sum(size for _, size, _ in files) + wanted - limit
        for used, size, path in sorted(files):
            if over <= 0:
                break
            if _PART in path.name and time.time() - used < _STALE_S:
                continue
            path.unlink(missing_ok=True)
            path.with_name(path.name.split(".")[0] + _LOCK).unlink(missing_ok=True)
            over -= size


# Asking the other side.


def _open(path: UPath) -> tuple[Any, str]:
    """The file system of a URL and the path in it: made anew, for those of before a fork hang."""
    return url_to_fs(str(path), **path.storage_options)


def _info(path: UPath) -> dict[str, Any]:
    filesystem, name = _open(path)
    return _asked(path, lambda: filesystem.info(name))


def _asked(path: Place, ask: Callable[[], Answer]) -> Answer:
    """The answer of a remote store; its faults, a file that is not there excepted, are `UserError`."""
    try:
        return ask()
    except Exception as error:  # each protocol has its own family of exceptions
        fault = true_fault(error)
        if isinstance(fault, FileNotFoundError):
            raise fault from None
        raise _cannot(path, fault) from None


def true_fault(error: BaseException) -> BaseException:
    """What went wrong, where fsspec says something else.

    Over HTTP it says of many a fault that the file is not there, and keeps the true one as the cause;
    and of a file that is gone for good (410) it says less than that.
    """
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp"):
        return true_fault(cause) if cause is not None else error
    if isinstance(error, FileNotFoundError) and isinstance(cause, TimeoutError | ConnectionError):
        return cause
    return FileNotFoundError(str(error)) if http_status(error) in _NOT_THERE else error


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of any protocol tells, if it does."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit() and 300 <= int(value) < 600:
            return int(value)
    return None


def _cannot(path: Place, error: BaseException) -> UserError:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return UserError(f"{path}: cannot be reached or read ({reason})")
