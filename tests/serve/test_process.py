"""`mmrec serve` as a process: its log, its page of errors, and how it stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from conftest import run


def test_it_logs_json_drains_and_exits_with_status_0(index: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mmrec.cli",
        "serve",
        "--index",
        str(index),
        "--port",
        str(port),
    ]
    command += ["--decoders", "1", "--device", "cpu", "--drain-s", "1.5"]
    token = "a-token-of-tests-0123456789"
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stderr=file, env=os.environ | {"MMREC_TOKEN": token}) as process,
    ):
        try:
            while b"listening" not in log.read_bytes():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            url = f"http://127.0.0.1:{port}"
            headers = {"Authorization": f"Bearer {token}", "X-Request-ID": "traced-1"}
            with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
                assert http.post("/v1/match", json={"text": "a secret wish"}).status_code == 200
                process.send_signal(signal.SIGTERM)
                while (ready := http.get("/v1/readyz")).status_code == 200:
                    time.sleep(0.02)
                assert ready.status_code == 503
                assert ready.headers["connection"] == "close"
                assert ready.json()["status"] == "stopping"
                # Who has not noticed yet is still answered.
                assert http.post("/v1/match", json={"text": "x"}).status_code == 200
            assert process.wait(60) == 0
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    traced = next(line for line in requests if line["request_id"] == "traced-1")
    assert traced["route"] == "/v1/match"
    assert traced["status"] == 200
    assert traced["ms"] > 0
    assert {"ready", "listening", "stopping"} <= {line["event"] for line in lines}
    assert "secret wish" not in log.read_text()
    assert token not in log.read_text()


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "mmrec.cli", "serve", "--index", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "no such folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1
