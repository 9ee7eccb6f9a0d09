"""How many queries a second the service answers, against calling encoder and index in a loop; leaks; swaps.

    python benchmarks/serve_matches.py            # about eight minutes
    python benchmarks/serve_matches.py --quick    # about a minute

An encoder with random weights and an index of random vectors are made for it: neither speed nor memory asks
what was learned. The service runs in a process of its own. 32 clients on connections that are kept ask for
ten matches each, one request at a time, of a text no other has, or of four JPEGs. The peer is this process:
the same queries one after another through `Matcher.embed` and `ProductIndex.search`, with nothing sent,
parsed or looked up. The last line is one JSON object.
"""

import asyncio
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
import tyro
from PIL import Image

from mmrec.manifest import Parent, relative_path
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.matcher import Matcher

CLIENTS, K, PICTURES = 32, 10, 4
THROUGHPUT_BAR, MEMORY_BAR = 2.0, 1.05
WORDS = [
    "red",
    "blue",
    "striped",
    "mug",
    "lamp",
    "scarf",
    "chair",
    "nova",
    "puff",
    "jazz",
    "echo",
    "plain",
    "dotted",
    "small",
    "large",
    "warm",
]


@dataclass(frozen=True, kw_only=True)
class ServeMatchesConfig:
    """What is measured."""

    quick: bool = False
    """Fewer products and requests."""
    towers: str = "mmrec-tiny"
    """The encoder's architecture, of random weights."""
    device: str = "auto"
    """auto, cpu or cuda, for the service and its peer."""


@dataclass
class Load:
    """What clients saw."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies_s) / self.seconds

    def line(self) -> str:
        """Rate and latency in words."""
        p50, p99 = np.percentile(self.latencies_s, [50, 99]) * 1000
        return f"{self.rate:,.1f} a second, p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def main(config: ServeMatchesConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    count, seconds, requests = (5_000, 5.0, 2_000) if config.quick else (100_000, 20.0, 20_000)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_index(folder / "index", folder / "encoder", config.towers, count, seed=0)
        peers = in_a_loop(folder / "index", config.device, seconds / 2)
        with served(folder / "index", config.device, folder / "log") as (port, process):
            asyncio.run(load(port, text_requests(0), seconds=2.0))  # Everything has run once.
            for what, make in (("text", text_requests), ("4-image", picture_requests)):
                found = asyncio.run(load(port, make(1), seconds=seconds))
                print(f"{what} queries, service: {found.line()}")
                print(f"{what} queries, loop: {peers[what]:,.1f} a second")
                if found.failures:
                    print(f"{len(found.failures)} failed, such as {found.failures[0]}")
                results.append(above(f"{what} queries", found.rate / peers[what]))
            results.append(leak(port, process, requests))
            results += swaps(port, folder, config.towers, count)
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {config.towers}, "
        f"{count:,} products"
    )
    print(json.dumps({"benchmark": "serve_matches", "machine": machine, "results": results}))


# ------------------------------------------------------------------------------------- what is asked


def make_index(out: Path, encoder_folder: Path, towers: str, count: int, *, seed: int) -> None:
    """An encoder with random weights, and an index of random vectors that says it is that encoder's."""
    torch.manual_seed(seed)
    encoder = Encoder(EncoderConfig(towers=towers, num_frames=PICTURES))
    fingerprint = encoder.save(encoder_folder, overwrite=True)
    publish(out, encoder_folder, fingerprint, encoder.width, count, seed)


def publish(out: Path, encoder: Path, fingerprint: str, width: int, count: int, seed: int) -> None:
    """The next generation of an index, or the first."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"p{number:07d}" for number in range(count)]
    attributes = pa.table(
        {
            "product_id": ids,
            "title": [f"product {number}" for number in range(count)],
            "price": np.arange(count) % 90 + 0.5,
            "available": np.arange(count) % 3 > 0,
        }
    )
    parent = Parent(kind="encoder", fingerprint=fingerprint, path=relative_path(out, encoder))
    index = ProductIndex.build(ids, vectors, attributes=attributes)
    index.save(out, parents=[parent], overwrite=True)


def texts(seed: int) -> Iterator[str]:
    """Titles of eight words, no two alike."""
    rng = np.random.default_rng(seed)
    number = 0
    while True:
        number += 1
        yield " ".join([*rng.choice(WORDS, 7), str(number)])


def pictures(seed: int) -> Iterator[list[bytes]]:
    """Four JPEGs of 256 pixels, of a few that are made once."""
    rng = np.random.default_rng(seed)
    kept = []
    for _ in range(64):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        kept.append(stream.getvalue())
    while True:
        yield [kept[place] for place in rng.integers(0, len(kept), PICTURES)]


def text_requests(seed: int) -> Iterator[bytes]:
    """HTTP requests of texts."""
    for text in texts(seed):
        yield http("application/json", json.dumps({"text": text, "k": K}).encode())


def picture_requests(seed: int) -> Iterator[bytes]:
    """HTTP requests of pictures."""
    end = b"--parts--\r\n"
    for files in pictures(seed):
        body = part("k", str(K).encode())
        body += b"".join(part("images", data, file=True) for data in files)
        yield http("multipart/form-data; boundary=parts", body + end)


def part(name: str, data: bytes, *, file: bool = False) -> bytes:
    """A part of a multipart body."""
    named = f'form-data; name="{name}"' + ('; filename="f"' if file else "")
    return f"--parts\r\nContent-Disposition: {named}\r\n\r\n".encode() + data + b"\r\n"


def http(kind: str, body: bytes) -> bytes:
    """A request for matches."""
    head = f"POST /v1/match HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# ------------------------------------------------------------------------------------- the two sides


def in_a_loop(index: Path, device: str, seconds: float) -> dict[str, float]:
    """Queries a second of encoder and index, called one after another in this process."""
    matcher = Matcher.load(index, device=device)  # pyright: ignore[reportArgumentType]

    def search(own: Sequence[bytes], text: str | None) -> None:
        query = matcher.embed(matcher.read(images=own), text)
        matcher.index.search(query[None], K)

    words, files = texts(2), pictures(2)
    return {
        "text": rate(lambda: search([], next(words)), seconds),
        "4-image": rate(lambda: search(next(files), None), seconds),
    }


def rate(work: Callable[[], None], seconds: float) -> float:
    """Calls a second, after a few that do not count."""
    for _ in range(5):
        work()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        calls += 1
    return calls / (time.perf_counter() - started)


@contextmanager
def served(index: Path, device: str, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    """The service on a free port, in a process of its own that must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mmrec.cli", "serve", "--index", str(index)]
    command += ["--port", str(port), "--device", device, "--watch-s", "0.2", "--drain-s", "0"]
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            wait_for(port, process, log)
            yield port, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                print(f"the service ended with status {process.returncode}")


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the port answers."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(log.read_text())


async def load(
    port: int,
    requests: Iterator[bytes],
    *,
    seconds: float = float("inf"),
    most: float = float("inf"),
    until: asyncio.Event | None = None,
) -> Load:
    """Ask from all clients at once, until the time, the number or the event."""
    found, started, sent = Load(), time.perf_counter(), 0

    async def client() -> None:
        nonlocal sent
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while sent < most and time.perf_counter() - started < seconds:
            if until is not None and until.is_set():
                break
            sent += 1
            asked = time.perf_counter()
            try:
                writer.write(next(requests))
                status, body = await answer_from(reader)
            except (OSError, asyncio.IncompleteReadError) as error:
                found.failures.append(repr(error))
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                continue
            found.latencies_s.append(time.perf_counter() - asked)
            if status != 200:
                found.failures.append(body.decode()[:300])
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    found.seconds = time.perf_counter() - started
    return found


async def answer_from(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


# ------------------------------------------------------------------------------------- what is measured


def leak(port: int, process: psutil.Process, requests: int) -> dict[str, Any]:
    """Memory of the service and its decoders after many requests, over that after a quarter of them."""

    def mixed() -> Iterator[bytes]:
        words, files = text_requests(3), picture_requests(3)
        bad = http("application/json", b'{"text": "x", "where": "no such column = 1"}')
        upload = http("multipart/form-data; boundary=parts", part("video", b"x" * 99, file=True))
        while True:
            yield from (next(words) for _ in range(7))
            yield next(files)
            yield bad
            yield upload

    first = asyncio.run(load(port, mixed(), most=requests // 4))
    before = resident(process)
    rest = asyncio.run(load(port, mixed(), most=requests - requests // 4))
    after = resident(process)
    unexpected = [f for f in first.failures + rest.failures if '"status": 4' not in f]
    print(
        f"memory: {before / 2**20:,.0f} MiB after {requests // 4:,} requests, "
        f"{after / 2**20:,.0f} MiB after {requests:,}; {len(unexpected)} unexpected answers"
    )
    what = f"memory after {requests:,} requests"
    return below(what, f"after {requests // 4:,}", after / before, MEMORY_BAR)


def resident(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    return sum(own.memory_info().rss for own in (process, *process.children(recursive=True)))


def swaps(port: int, folder: Path, towers: str, count: int) -> list[dict[str, Any]]:
    """Requests that fail while the index is published anew, and replaced with its encoder, under load."""
    found, num_swaps = asyncio.run(load_while_swapped(port, folder, towers, count))
    print(f"{num_swaps} swaps under load: {found.line()}, {len(found.failures)} failed")
    for failure in found.failures[:3]:
        print(f"  {failure}")
    return [
        below(
            f"failed of {len(found.latencies_s):,} in {num_swaps} swaps",
            "bar",
            len(found.failures),
            0,
        ),
        above("swaps taken up", num_swaps / 4, bar=1.0),
    ]


async def load_while_swapped(port: int, folder: Path, towers: str, count: int) -> tuple[Load, int]:
    """Two generations, then two indexes of other encoders in the place of this one."""
    over = asyncio.Event()
    loading = asyncio.create_task(load(port, text_requests(4), until=over))
    taken = 0
    for number in range(1, 5):
        before = await facts_of(port)
        # In a process of its own: what builds an index is not to slow the clients.
        await in_a_process(folder, towers, count, number)
        if number > 2:
            (folder / "index").rename(folder / f"old-{number}")
            (folder / f"new-{number}").rename(folder / "index")
        for _ in range(300):
            await asyncio.sleep(0.1)
            if await facts_of(port) != before:
                taken += 1
                break
    over.set()
    return await loading, taken


async def in_a_process(folder: Path, towers: str, count: int, number: int) -> None:
    """Publish a generation in place, or make an index beside with another encoder."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import serve_matches as own;"
        "folder, number, count = Path(sys.argv[2]), int(sys.argv[4]), int(sys.argv[5]);"
        "own.change(folder, sys.argv[3], count, number)"
    )
    here = str(Path(__file__).resolve().parent)
    arguments = [here, str(folder), towers, str(number), str(count)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *arguments)
    if await process.wait():
        raise SystemExit("the index could not be published")


def change(folder: Path, towers: str, count: int, number: int) -> None:
    """What `in_a_process` runs."""
    if number > 2:
        make_index(
            folder / f"new-{number}", folder / f"encoder-{number}", towers, count, seed=number
        )
        return
    encoder = Encoder.load(folder / "encoder")
    assert encoder.fingerprint
    publish(folder / "index", folder / "encoder", encoder.fingerprint, encoder.width, count, number)


async def facts_of(port: int) -> tuple[str, str]:
    """What answers: generation and index."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    _, body = await answer_from(reader)
    writer.close()
    found = json.loads(body)
    return found["generation"], found["index"]


def above(what: str, ratio: float, *, bar: float = THROUGHPUT_BAR) -> dict[str, Any]:
    peer = "encoder and index in a loop" if bar == THROUGHPUT_BAR else "bar"
    return {"what": what, "peer": peer, "ratio": round(ratio, 2), "bar": bar, "holds": ratio >= bar}


def below(what: str, peer: str, ratio: float, bar: float) -> dict[str, Any]:
    return {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "holds": ratio <= bar}


if __name__ == "__main__":
    main(tyro.cli(ServeMatchesConfig))
