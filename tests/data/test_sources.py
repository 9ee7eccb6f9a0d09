"""Files of a web server: what stops for a moment is waited for, what is wrong is told as what it is."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import frame_number, numbered, write_clip
from servers import HttpServer, http_server

from mmrec.data import isolation, sources
from mmrec.data.media import FrameConfig, read_subtitles, read_video
from mmrec.data.sources import local_file, remote_exists
from mmrec.errors import MediaError

LARGE_BYTES = 12 << 20  # fsspec reads in ranges of 5 MiB


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PAUSES_S", (0.01, 0.02, 0.03))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[HttpServer]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"some bytes")
    with http_server(tmp_path / "files") as server:
        yield server


def fetched(url: str) -> bytes:
    with local_file(url) as file:
        return file if isinstance(file, bytes) else file.read_bytes()


def fault(url: str) -> MediaError:
    with pytest.raises(MediaError) as caught:
        fetched(url)
    return caught.value


@pytest.mark.parametrize("ranges", [True, False])
def test_a_large_file_of_a_server_with_and_without_ranges(web, tmp_path, ranges) -> None:
    web.ranges = ranges
    data = np.random.default_rng(0).bytes(LARGE_BYTES)
    (tmp_path / "files" / "large").write_bytes(data)
    assert fetched(f"{web.url}/large") == data
    assert web.requests == [("GET", "large")]


def test_a_large_clip_of_a_server_without_ranges(web, tmp_path) -> None:
    web.ranges = False
    clip = write_clip(tmp_path / "files" / "clip.mp4", numbered(8))
    # A box that players pass over, as long as makes a clip large.
    filler = (LARGE_BYTES).to_bytes(4, "big") + b"free" + bytes(LARGE_BYTES - 8)
    clip.write_bytes(clip.read_bytes() + filler)
    frames = read_video(f"{web.url}/clip.mp4", FrameConfig(num_frames=2)).frames
    assert [frame_number(frame) for frame in frames] == [2, 6]
    assert fetched(f"{web.url}/clip.mp4") == clip.read_bytes()


@pytest.mark.parametrize("trouble", ["busy", "cut"])
def test_a_fault_that_passes_is_waited_for(web, trouble) -> None:
    setattr(web, trouble, 3)
    assert fetched(f"{web.url}/a") == b"some bytes"
    assert len(web.requests) == 4


def test_a_slice_of_a_busy_server(web, tmp_path) -> None:
    (tmp_path / "files" / "a.tar").write_bytes(b"some bytes")
    web.busy = 2
    assert fetched(f"{web.url}/a.tar#5+5") == b"bytes"


@pytest.mark.parametrize(
    ("status", "reason", "num_requests"),
    [
        (500, "cannot fetch", 4),
        (503, "cannot fetch", 4),
        (429, "cannot fetch", 4),
        (400, "cannot fetch", 1),
        (401, "no permission to read", 1),
        (403, "no permission to read", 1),
        (404, "file not found", 1),
        (410, "file not found", 1),
    ],
)
def test_what_a_server_says_is_the_reason(web, tmp_path, status, reason, num_requests) -> None:
    (tmp_path / "files" / "a.tar").write_bytes(b"some bytes")
    for name, address in (("a", "a"), ("a.tar", "a.tar#0+4")):
        web.statuses = {name: status}
        web.requests.clear()
        error = fault(f"{web.url}/{address}")
        assert error.reason == reason
        assert len(web.requests) == num_requests
        assert reason != "cannot fetch" or f"HTTP status {status}" in error.detail


def test_a_circle_of_redirects_and_a_server_that_is_not_there(web) -> None:
    web.statuses = {"a": 302}
    assert fault(f"{web.url}/a").reason == "cannot fetch"
    assert fault("http://127.0.0.1:9/a").reason == "cannot fetch"


def test_waiting_ends_before_the_time_of_the_sample_does(web, monkeypatch) -> None:
    monkeypatch.setattr(sources, "PAUSES_S", (0.01, 30.0, 60.0))
    monkeypatch.setattr(isolation, "_deadline", time.monotonic() + 20)
    web.statuses = {"a": 500}
    started = time.monotonic()
    assert fault(f"{web.url}/a").reason == "cannot fetch"
    assert len(web.requests) == 2
    assert time.monotonic() - started < 5


def test_captions_that_a_server_may_not_tell_of(web, tmp_path) -> None:
    write_clip(tmp_path / "files" / "c.mp4", numbered(8))
    assert not remote_exists(f"{web.url}/b")
    web.busy = 1
    assert remote_exists(f"{web.url}/a")
    # Stores that do not list their folders say 403 of a file that is not there.
    web.statuses = {"c.srt": 403, "c.vtt": 403}
    assert read_subtitles(f"{web.url}/c.mp4") is None
    web.statuses = {"c.srt": 500}
    with pytest.raises(MediaError, match="cannot fetch"):
        read_subtitles(f"{web.url}/c.mp4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
def test_a_full_disk_and_a_file_too_large_are_not_tried_again(web, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MAX_FETCH_BYTES", 5)
    assert fault(f"{web.url}/a").reason == "file too large"
    monkeypatch.setattr(sources, "MAX_FETCH_BYTES", 100)
    monkeypatch.setattr(sources._Limited, "start_again", lambda copy: None)
    monkeypatch.setattr(sources, "_temporary_file", lambda: io.FileIO("/dev/full", "w"))
    assert fault(f"{web.url}/a").reason == "no room for a copy"
    assert len(web.requests) == 2
