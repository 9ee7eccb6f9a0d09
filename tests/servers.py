"""Servers that tests read from and write to: a local HTTP server, moto's S3 server, and one for gs://."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

import pytest

BUCKET = "mmrec-test"


@dataclass
class HttpServer:
    """A folder served over HTTP."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request so far."""
    cut: int = 0
    """How many of the next GETs lose their connection half-way."""
    busy: int = 0
    """How many of the next requests are answered with status 503."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Paths that are answered with a status and nothing else; 302 leads to the same path again."""
    ranges: bool = True
    """Whether byte ranges are honoured, or passed over as `python -m http.server` does."""

    def count(self, method: str, suffix: str) -> int:
        """How many requests of a method asked for paths with that ending."""
        return sum(m == method and path.endswith(suffix) for m, path in self.requests)


@contextmanager
def http_server(folder: Path) -> Iterator[HttpServer]:
    """Serve the files of a folder; folders are not listed."""
    served = HttpServer("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, folder, served))
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Files(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, served: HttpServer, *arguments: object) -> None:
        self._folder = folder
        self._served = served
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        self._served.requests.append((self.command, name))
        path = self._folder / name
        status = self._fault(name, path)
        if status:
            self.send_response(status)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        stretch = self._range(len(data))
        self.send_response(HTTPStatus.PARTIAL_CONTENT if stretch else HTTPStatus.OK)
        if stretch:
            self.send_header(
                "Content-Range", f"bytes {stretch.start}-{stretch.stop - 1}/{len(data)}"
            )
            data = data[stretch.start : stretch.stop]
        if self._served.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        self.end_headers()
        if with_body and self._served.cut:
            self._served.cut -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif with_body:
            self.wfile.write(data)

    def _fault(self, name: str, path: Path) -> int:
        if self._served.busy:
            self._served.busy -= 1
            return HTTPStatus.SERVICE_UNAVAILABLE
        return self._served.statuses.get(name, 0 if path.is_file() else HTTPStatus.NOT_FOUND)

    def _range(self, size: int) -> range | None:
        unit, _, stretch = self.headers.get("Range", "").partition("=")
        if unit != "bytes" or not self._served.ranges:
            return None
        first, _, last = stretch.partition("-")
        if not first:
            return range(max(0, size - int(last)), size)
        return range(int(first), min(int(last) + 1, size) if last else size)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Run moto's S3 server in a process of its own, with one bucket; yields the bucket's URL.

    Skips the test where moto or s3fs is missing. The environment names the server and made-up
    credentials meanwhile, for this process and those that it starts.
    """
    _skip_without("moto", "flask", "s3fs")
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    command = ["moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, ready=f"{endpoint}/moto-api/", settings=settings, log=log):
        _make_bucket()
        yield f"s3://{BUCKET}"


@contextmanager
def gcs_server(log: Path) -> Iterator[str]:
    """Run gcp-storage-emulator in a process of its own, with one bucket; yields the bucket's URL.

    Skips the test where it or gcsfs is missing. The environment names the server meanwhile, for this
    process and those that it starts.
    """
    _skip_without("gcp_storage_emulator", "gcsfs")
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "STORAGE_EMULATOR_HOST": endpoint,
        # Or gcsfs asks for the kind of the bucket by gRPC, which the emulator does not speak.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    command = ["gcp_storage_emulator", "start", "-H", "127.0.0.1", "--port", str(port)]
    command += ["--in-memory", "--default-bucket", BUCKET]
    ready = f"{endpoint}/storage/v1/b/{BUCKET}"
    with _serving(command, ready=ready, settings=settings, log=log):
        _forget_gcs()
        try:
            yield f"gs://{BUCKET}"
        finally:
            _forget_gcs()


@contextmanager
def _serving(
    command: list[str], *, ready: str, settings: dict[str, str], log: Path
) -> Iterator[None]:
    """Run a module in a process of its own; from when `ready` answers, the environment has the settings."""
    with (
        open(log, "wb") as output,
        subprocess.Popen([sys.executable, "-m", *command], stdout=output, stderr=output) as process,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            _wait_for(ready, process, log)
            for name, value in settings.items():
                patch.setenv(name, value)
            yield
        finally:
            process.terminate()


def _forget_gcs() -> None:
    import gcsfs

    # An instance of an earlier server must not be taken for this one.
    gcsfs.GCSFileSystem.clear_instance_cache()


def _skip_without(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"the server needs {package}: pip install 'mmrec[dev]'")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


def _make_bucket() -> None:
    import s3fs

    # An instance of an earlier server must not be taken for this one.
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(BUCKET)
