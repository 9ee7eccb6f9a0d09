"""A real service on a free port of this machine, in a thread of the test's process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from mmrec.serve.app import Service
from mmrec.serve.config import ServeConfig
from mmrec.serve.server import Server


@dataclass(frozen=True)
class Served:
    """A service that runs."""

    http: httpx.Client
    service: Service
    port: int

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def match(self, **fields: Any) -> dict[str, Any]:
        """The answer to a query of text fields, which must be one of matches."""
        answer = self.http.post("/v1/match", json=fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def upload(self, *parts: tuple[str, Any], **fields: Any) -> httpx.Response:
        """The answer to a multipart query; a part is a field and the bytes of its file."""
        files: list[Any] = [(name, (None, str(value))) for name, value in fields.items()]
        files += [(name, ("../../etc/passwd", data)) for name, data in parts]
        return self.http.post("/v1/match", files=files)


@contextmanager
def service_on(index: Path, *, token: str | None = None, **settings: Any) -> Iterator[Served]:
    """Serve an index until the block ends."""
    config = ServeConfig(
        index=index, port=0, device="cpu", drain_s=0.0, **{"decoders": 1} | settings
    )
    server = Server(Service(config, token=token))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    assert server.started
    url = f"http://127.0.0.1:{server.port}"
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            yield Served(http, server._service, server.port)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def reason_of(answer: httpx.Response, status: int) -> str:
    """The reason of a refusal, which must have this status and the one shape of errors."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["status"] == status
    assert error["request_id"] == answer.headers["x-request-id"]
    return error["reason"]
