"""One test a rule: what a request may not do, and that it is told so with a status of the 400s."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from servers import http_server
from serving import Served, reason_of, service_on

from mmrec.errors import UserError
from mmrec.retrieval import view
from mmrec.retrieval.filters import matching_rows
from mmrec.serve import server
from mmrec.serve.config import ServeConfig, check_config, read_token
from mmrec.serve.threads import let_idle_threads_sleep

TOKEN = "a-token-of-tests-0123456789"


@pytest.fixture(scope="module")
def videos(tiny_tables: Path) -> Path:
    return tiny_tables / "media/contents"


@pytest.fixture(scope="module")
def served(index: Path, videos: Path) -> Iterator[Served]:
    """A service with small limits, a token, and one host that it may fetch from."""
    with http_server(videos) as files:
        host = files.url.removeprefix("http://")
        with service_on(
            index,
            token=TOKEN,
            max_upload_mb=0.25,
            max_images=3,
            max_megapixels=1.0,
            max_total_megapixels=1.5,
            max_frames=50,
            max_k=20,
            max_text=100,
            max_where=200,
            decode_timeout_s=5.0,
            upload_timeout_s=1.5,
            idle_timeout_s=1.0,
            allow_url_host=(host,),
        ) as served:
            served.http.headers["x-files"] = files.url
            yield served


def png(width: int, height: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def raw(served: Served, data: bytes, *, wait_s: float = 10) -> bytes:
    """What comes back on a connection of its own until the service closes it."""
    with socket.create_connection(("127.0.0.1", served.port), wait_s) as connection:
        connection.sendall(data)
        received = b""
        while block := connection.recv(65536):
            received += block
        return received


# Who may ask


def test_the_bearer_token_is_asked_for(served: Served) -> None:
    for path in ("/v1/info", "/metrics", "/v1/products/p0000", "/v1/nowhere"):
        answer = httpx.get(served.url + path)
        assert "Bearer" in reason_of(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for wrong in (
        "",
        "Bearer",
        f"Bearer {TOKEN}x",
        f"Basic {TOKEN}",
        "Bearer \u00e9".encode("latin-1"),
    ):
        headers = {"Authorization": wrong}
        assert httpx.post(f"{served.url}/v1/match", headers=headers).status_code == 401
    for path in ("/v1/healthz", "/v1/readyz", "/openapi.json"):
        assert httpx.get(served.url + path).status_code == 200


def test_a_token_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(index=tmp_path)
    assert read_token(config) is None
    monkeypatch.setenv("MMREC_TOKEN", TOKEN)
    assert read_token(config) == TOKEN
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with pytest.raises(UserError, match="both"):
        read_token(ServeConfig(index=tmp_path, token_file=tmp_path / "token"))
    monkeypatch.delenv("MMREC_TOKEN")
    assert read_token(ServeConfig(index=tmp_path, token_file=tmp_path / "token")) == TOKEN
    (tmp_path / "token").write_text("short")
    with pytest.raises(UserError, match="at least 16"):
        read_token(ServeConfig(index=tmp_path, token_file=tmp_path / "token"))


def test_writes_for_anybody_are_refused_at_the_start(tmp_path: Path) -> None:
    open_to_all = ServeConfig(index=tmp_path, writable=True, host="0.0.0.0")
    with pytest.raises(UserError, match="MMREC_TOKEN"):
        check_config(open_to_all, None)
    check_config(open_to_all, TOKEN)
    with pytest.raises(UserError, match="--max-k 0"):
        check_config(ServeConfig(index=tmp_path, max_k=0), None)
    with pytest.raises(UserError, match="expected a host"):
        check_config(ServeConfig(index=tmp_path, allow_url_host=("http://x/",)), None)


def test_write_routes_are_off(served: Served) -> None:
    put = served.http.put("/v1/products", json={"product_id": "x", "title": "y"})
    assert "--writable" in reason_of(put, 403)
    assert "--writable" in reason_of(served.http.delete("/v1/products/p0000"), 403)


def test_trailers_without_end_close_the_connection(served: Served) -> None:
    head = f"POST /v1/match HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    trailer = b"".join(b"X%d: %s\r\n" % (number, b"a" * 1_000) for number in range(1_000))
    with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
        connection.sendall(head.encode())
        # A hundred megabytes, of which sixteen kilobytes are read.
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(trailer * 100)


def test_no_other_origin_is_told_anything(served: Served) -> None:
    answer = served.http.get("/v1/info", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


# How much


def test_bytes_are_limited_with_and_without_a_length(served: Served) -> None:
    large = bytes(300_000)
    assert "0.25 MiB" in reason_of(served.upload(("images", png(8, 8) + large)), 413)
    head = b"POST /v1/match HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode()
    part = b'--b\r\nContent-Disposition: form-data; name="video"; filename="v"\r\n\r\n\0\0\0\x18ftypmp42'
    kind = b"\r\nContent-Type: multipart/form-data; boundary=b\r\nConnection: close\r\n"
    body = part + large
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert b" 413 " in raw(served, head + kind + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
    assert served.service.uploads.held_bytes == 0


def test_parts_fields_and_headers_are_limited(served: Served) -> None:
    small = png(8, 8)
    assert "at most 3" in reason_of(served.upload(*[("images", small)] * 4, text="x"), 422)
    many = [("text", (None, "x"))] * 2
    assert "twice" in reason_of(served.http.post("/v1/match", files=many), 422)
    assert "not a field" in reason_of(served.upload(text="x", path="/etc/passwd"), 422)
    assert reason_of(served.upload(where="x" * 70_000), 413)
    assert "100 characters" in reason_of(served.upload(text="x" * 101), 422)
    assert "200 characters" in reason_of(served.upload(text="x", where="1 = 1 or " * 40), 422)
    head = b'--b\r\nContent-Disposition: form-data; name="text"; x="' + b"y" * 9000
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    body = head + b'"\r\n\r\nx\r\n--b--\r\n'
    # Newer versions of the parser have a limit of their own.
    assert served.http.post("/v1/match", content=body, headers=headers).status_code in (400, 413)


def test_k_is_a_whole_number_within_its_limit(served: Served) -> None:
    for k in ("0", "21", "-1", "1.5", "ten", "", "9" * 30, "١"):
        assert "k: expected a whole number from 1 to 20" in reason_of(
            served.upload(text="x", k=k), 422
        )
    for k in (0, 21, 1.5, True, [1], "1e3"):
        assert reason_of(served.http.post("/v1/match", json={"text": "x", "k": k}), 422)


def test_pixels_and_frames_are_limited(served: Served, videos: Path, tmp_path: Path) -> None:
    assert "image too large" in reason_of(served.upload(("images", png(2100, 1000))), 422)
    assert "image too large" in reason_of(served.upload(("video", png(2100, 1000))), 422)
    large = ("images", png(1000, 900))
    assert served.upload(large).status_code == 200
    together = reason_of(served.upload(large, large), 422)
    assert together == "images[1]: more than 1.5 megapixels with those before it"
    wide = [Image.new("L", (1100, 1000), n) for n in range(2)]
    wide[0].save(tmp_path / "wide.gif", save_all=True, append_images=wide[1:], duration=20)
    large = (tmp_path / "wide.gif").read_bytes()
    assert "megapixels" in reason_of(served.upload(("video", large)), 422)
    frames = [Image.new("L", (16, 16), n) for n in range(60)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:], duration=20)
    long = (tmp_path / "long.gif").read_bytes()
    assert "more than 50 frames" in reason_of(served.upload(("video", long)), 422)


def test_a_type_is_what_the_content_says(served: Served, videos: Path) -> None:
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    for data in (
        playlist,
        b"<svg xmlns='x'/>",
        b"%PDF-1.4",
        b"\x7fELF" + bytes(99),
        b"ID3" + bytes(99),
    ):
        assert "by its content" in reason_of(served.upload(("video", data)), 415)
        assert reason_of(served.upload(("images", data)), 415)
    video = min(videos.glob("*.mp4")).read_bytes()
    assert "images[0]" in reason_of(served.upload(("images", video)), 415)
    assert "images[1]" in reason_of(
        served.upload(("images", png(8, 8)), ("images", b"\xff\xd8\xff" + bytes(50))), 422
    )


def test_a_decoder_has_a_time_and_a_memory(index: Path) -> None:
    large = png(6000, 6000)
    with service_on(index) as own:
        (decoder,) = own.service.decoders._all
        decoder._timeout_s = 0.001
        assert "timed out" in reason_of(own.upload(("images", large)), 422)
        decoder._timeout_s, decoder._memory_bytes = 60.0, 8 << 20
        assert "out of memory" in reason_of(own.upload(("images", large)), 422)
        decoder._memory_bytes = 1 << 30
        assert own.upload(("images", large)).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(served: Served) -> None:
    head = (
        f"POST /v1/match HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    )
    started = time.monotonic()
    assert b" 408 " in raw(served, head.encode())
    assert time.monotonic() - started < 8
    # Nor are heads.
    assert raw(served, b"") == b""
    assert raw(served, b"GET /v1/healthz HTTP/1.1\r\nHost") == b""


@pytest.fixture(
    params=["uvicorn.protocols.http.h11_impl H11Protocol", "mmrec.serve.upgrades PlainHttpTools"]
)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two that uvicorn may have."""
    module, name = request.param.split()
    found = pytest.importorskip(module, reason=f"{module} cannot be imported")
    monkeypatch.setattr(server, "_Protocol", getattr(found, name))


@pytest.mark.usefixtures("parser")
def test_heads_are_limited_whoever_parses_them(index: Path) -> None:
    head, more = b"GET /v1/healthz HTTP/1.1\r\nHost: x\r\n", b"X-More: %s\r\n" % (b"x" * 4000)
    with service_on(index, idle_timeout_s=1.0) as own:
        assert b"200 OK" in raw(own, head + 3 * more + b"Connection: close\r\n\r\n")
        # Two requests in one go are answered one after the other.
        both = raw(own, head + b"\r\n" + head + b"Connection: close\r\n\r\n")
        assert both.count(b"200 OK") == 2
        answer = raw(own, head + 6 * more)
        assert b"200" not in answer
        assert b"200" not in raw(own, head)
        assert own.match(text="goes on")["matches"]


@pytest.mark.usefixtures("parser")
def test_too_many_connections_and_what_is_no_http_are_told_as_all_is(index: Path) -> None:
    with service_on(index, max_connections=2) as own:
        head, _, body = raw(own, b"no HTTP\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        error = json.loads(body)["error"]
        assert error["status"] == 400
        assert f"x-request-id: {error['request_id']}".encode() in head
        assert b"x-content-type-options: nosniff" in head
        own.match(text="a connection that is kept")
        with socket.create_connection(("127.0.0.1", own.port)):
            answer = httpx.get(f"{own.url}/v1/info")
            assert "connections" in reason_of(answer, 503)
            assert answer.headers["connection"] == "close"
            assert answer.headers["retry-after"] == "1"
            for path in ("/v1/healthz", "/v1/readyz"):
                assert httpx.get(own.url + path).status_code == 200
            assert own.match(text="who was here before is answered")["matches"]


@pytest.mark.usefixtures("parser")
def test_an_offer_of_another_protocol_is_passed_over(index: Path) -> None:
    offer = b"POST /v1/match HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    offer += b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    offer += b"Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    body = b'{"text": "x"}'
    plain = b"GET /v1/healthz HTTP/1.1\r\nHost: x\r\nConnection: %s\r\n\r\n"
    with service_on(index) as own:
        assert (
            raw(own, offer + body + offer + body + plain % b"close").count(b"HTTP/1.1 200 OK") == 3
        )
        with socket.create_connection(("127.0.0.1", own.port), 10) as connection:
            for piece in (offer[:60], offer[60:], body[:5], body[5:]):
                connection.sendall(piece)
                time.sleep(0.05)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")
        assert b"200 OK" in raw(own, plain % b"Upgrade, close\r\nUpgrade: websocket")
        assert b" 400 " in raw(own, offer.replace(b"13", b"-1"))


def test_idle_threads_sleep_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "x")  # So that it is as before after the test.
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"


def test_a_full_queue_is_said(index: Path, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.service.matching.batcher, "_max_queue", 0)
    answer = served.http.post("/v1/match", json={"text": "x"})
    assert "wait for the encoder" in reason_of(answer, 503)
    assert answer.headers["retry-after"] == "1"
    monkeypatch.setattr(served.service.decoders, "_max_waiting", 0)
    assert reason_of(served.upload(("images", png(8, 8))), 503)


def test_a_heavy_condition_holds_up_conditions_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def slow(products: pa.Table, where: str) -> np.ndarray:
        over.wait(30)
        return matching_rows(products, where)

    monkeypatch.setattr(view, "matching_rows", slow)
    with ThreadPoolExecutor(4) as threads:
        heavy = [threads.submit(served.match, text="x", where="price > 0") for _ in range(4)]
        try:
            like = served.match(product_id="p0000", why="true")
            assert served.http.get(like["matches"][0]["image"]).status_code == 200
            assert not any(answer.done() for answer in heavy)
        finally:
            over.set()
    assert all(answer.result()["matches"] for answer in heavy)


# What is opened


def test_no_path_or_url_in_a_request_is_opened(served: Served, videos: Path) -> None:
    path = str(min(videos.glob("*.mp4")))
    for value in (path, f"file://{path}", "http://127.0.0.1:1/x.mp4", "tar::x"):
        assert "expected a file" in reason_of(served.upload(video=value), 422)
        assert reason_of(served.http.post("/v1/match", json={"video": value}), 422)
        assert reason_of(served.http.post("/v1/match", json={"product_id": value}), 404)
    for name in ("..%2fapp.py", "%2e%2e/app.py", "../app.py", "__init__.py", "style.css/.."):
        assert served.http.get(f"/page/{name}").status_code == 404


def test_urls_are_fetched_from_listed_hosts_alone(served: Served, videos: Path) -> None:
    files = served.http.headers["x-files"]
    name = min(videos.glob("*.mp4")).name
    assert served.match(video_url=f"{files}/{name}", k=2)["query"]["num_frames"] > 0
    for url in (
        "http://127.0.0.1:1/x.mp4",
        files.replace("127.0.0.1", "localhost") + "/x",
        "http://127.0.0.1/x",
    ):
        answer = served.http.post("/v1/match", json={"video_url": url})
        assert "not one that" in reason_of(answer, 403)
    for url in ("file:///etc/passwd", files.replace("//", "//u@"), f"{files}\\@x", "http://[", "x"):
        assert reason_of(served.http.post("/v1/match", json={"video_url": url}), 422)
    answer = served.http.post("/v1/match", json={"video_url": f"{files}/none.mp4"})
    assert "status 404" in reason_of(answer, 422)


def test_no_host_is_fetched_from_unless_listed(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = served.service.config
    monkeypatch.setattr(served.service, "config", ServeConfig(index=config.index))
    answer = served.http.post("/v1/match", json={"video_url": "http://x/y"})
    assert "--allow-url-host" in reason_of(answer, 403)


@pytest.mark.parametrize(
    "where",
    [
        "(select count(*) from read_csv('/etc/passwd')) > 0",
        "title in (select content from read_text('/etc/passwd'))",
        "read_blob('/etc/passwd') is not null",
        "getenv('MMREC_TOKEN') <> ''",
        "1 = 1); copy products to '/tmp/x' --",
        "sleep(5) is null",
        "current_setting('home_directory') = ''",
        "lpad(title, 2000000000, 'x') = ''",
        "replace(replace(title, 'a', 'aaaaaaaaaaaaaaaa'), 'a', 'aaaaaaaaaaaaaaaa') = ''",
        "price <",
        "nothing = 1",
        "\x00",
    ],
)
def test_filters_read_no_files_and_run_nothing(served: Served, where: str) -> None:
    answer = served.http.post("/v1/match", json={"text": "x", "where": where})
    assert reason_of(answer, 422).startswith("where")
    assert answer.json()["error"]["field"] == "where"


# What is malformed


def test_bodies_that_are_not_what_they_say(served: Served) -> None:
    def post(content: bytes, kind: str) -> httpx.Response:
        return served.http.post("/v1/match", content=content, headers={"Content-Type": kind})

    parts = "multipart/form-data"
    part = b'--b\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
    many: list[tuple[bytes, str, int]] = [
        (b"{", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b'{"k": NaN}', "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"text": "\\ud800"}', "application/json", 422),
        (b'{"text": 3}', "application/json", 422),
        (b'{"text": "x", "why": "perhaps"}', "application/json", 422),
        (b"{}", "application/json", 422),
        (b"text=x", "application/x-www-form-urlencoded", 415),
        (b"", "", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", f"{parts}; boundary=b", 400),
        (part + b"\xff\r\n--b--\r\n", f"{parts}; boundary=b", 422),
        (part + b"x", f"{parts}; boundary=b", 400),
    ]
    for content, kind, status in many:
        assert reason_of(post(content, kind), status)
    both = {"text": "x", "product_id": "p0000"}
    assert "not both" in reason_of(served.http.post("/v1/match", json=both), 422)
    assert reason_of(served.http.get("/v1/match"), 405)
    assert reason_of(served.http.get("/nowhere"), 404)


def test_request_ids_are_taken_when_they_are_sane(served: Served) -> None:
    for given, taken in (("abc-1.2_Z", True), ("a b", False), ("x" * 65, False), ('"\\', False)):
        answer = served.http.get("/v1/healthz", headers={"X-Request-ID": given})
        assert (answer.headers["x-request-id"] == given) is taken
    body: Any = served.http.post("/v1/match", json={"text": "x"}, headers={"X-Request-ID": "mine"})
    assert body.json()["request_id"] == "mine"


def test_a_fault_is_told_without_its_words(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(served.service.matching, "encode", broken)
    answer = served.http.post("/v1/match", json={"text": "x"})
    assert "secret" not in json.dumps(answer.json())
    assert reason_of(answer, 500)
