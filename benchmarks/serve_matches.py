"""How many queries a second the service answers, against one matcher in a loop; leaks; swaps.

    python benchmarks/serve_matches.py            # about eight minutes
    python benchmarks/serve_matches.py --quick    # about a minute and a half

Encoders with random weights and indexes of random vectors are made for it: neither speed nor memory asks
what was learned. The service runs in a process of its own. 32 clients on connections that are kept ask for
ten matches each, one request at a time, of a text no other has, or of four JPEGs. The peers run in this
process, between the service's turns: `Matcher.match`, one query after another as a notebook asks, and
`Matcher.embed` and `ProductIndex.search` alone, with nothing looked up. A ratio is the median over rounds.
Idle threads of torch sleep on both sides, as `mmrec serve` has it; where they spin (OMP_WAIT_POLICY=ACTIVE
for both), a loop beside other work on the same cores comes to a stop, and a ratio says nothing of batches.
Throughput is measured with the towers of the recipe vit-b-32, and with those of the demo; leaks and swaps
with the demo's, which answer more requests in the same time. The last line is one JSON object.
"""

import asyncio
import functools
import io
import itertools
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from mmrec.serve.threads import let_idle_threads_sleep

CLIENTS, K, PICTURES = 32, 10, 4
THROUGHPUT_BAR, MEMORY_BAR = 2.0, 1.05
LARGE, SMALL = "ViT-B-32", "mmrec-tiny"
MATCH, BARE = "Matcher.match in a loop", "Matcher.embed and ProductIndex.search in a loop"
SWAPS = 4
WORDS = "red blue striped mug lamp scarf chair nova puff jazz echo plain dotted small large warm"


@dataclass(frozen=True, kw_only=True)
class ServeMatchesConfig:
    """What is measured."""

    quick: bool = False
    """Fewer products and requests."""
    towers: tuple[str, ...] = (LARGE, SMALL)
    """The encoders' architectures, of random weights."""
    device: str = "auto"
    """auto, cpu or cuda, for the service and its peers."""
    requests: int | None = None
    """Requests of the memory test; 20,000, or 2,000 with --quick."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    products: int
    rounds: int
    loop_s: float
    service_s: float
    requests: int


FULL = Sizes(products=100_000, rounds=5, loop_s=3.0, service_s=6.0, requests=20_000)
QUICK = Sizes(products=20_000, rounds=2, loop_s=1.5, service_s=3.0, requests=2_000)


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
    sizes = QUICK if config.quick else FULL
    sizes = replace(sizes, requests=config.requests or sizes.requests)
    results: list[dict[str, Any]] = []
    for towers in config.towers:
        results += throughput(towers, config.device, sizes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_index(folder / "index", folder / "encoder", SMALL, sizes.products, seed=0)
        with served(folder / "index", config.device, folder / "log") as (port, process):
            results.append(leak(port, process, sizes.requests))
            results += swaps(port, folder, sizes.products)
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {sizes.products:,} products"
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
    rng, words = random.Random(seed), WORDS.split()
    for number in itertools.count():
        yield " ".join([*rng.choices(words, k=7), str(number)])


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


def throughput(towers: str, device: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Ratios of the service's rate to those of its peers, by turns on the same index."""
    found: dict[str, list[dict[str, float]]] = {"text": [], "4-image": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_index(folder / "index", folder / "encoder", towers, sizes.products, seed=0)
        matcher = Matcher.load(folder / "index", device=device)  # pyright: ignore[reportArgumentType]
        print(f"{towers}: {batch_line(matcher)}", flush=True)
        with served(folder / "index", device, folder / "log") as (port, _):
            asyncio.run(load(port, text_requests(0), seconds=2.0))  # Everything has run once.
            for number in range(1, sizes.rounds + 1):
                for what, rounds in found.items():
                    rounds.append(one_round(matcher, port, what, sizes, number))
                    said = ", ".join(f"{name} {value:,.1f}" for name, value in rounds[-1].items())
                    print(f"{towers}, {what} queries, round {number}: {said}", flush=True)
    return [
        ratio_row(f"{towers}, {what} queries", rounds, peer)
        for what, rounds in found.items()
        for peer in (MATCH, BARE)
    ]


def batch_line(matcher: Matcher) -> str:
    """What a batch of texts takes of the encoder, beside one alone."""
    words = texts(0)

    def encode(count: int) -> float:
        seconds = []
        for _ in range(5):
            titles = list(itertools.islice(words, count))
            started = time.perf_counter()
            matcher.encode_many([()] * count, titles)
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds)) * 1000

    alone, together = encode(1), encode(CLIENTS)
    return f"the encoder takes {alone:.1f} ms for a text, {together:.1f} ms for {CLIENTS} together"


def one_round(matcher: Matcher, port: int, what: str, sizes: Sizes, seed: int) -> dict[str, float]:
    """Queries a second of each peer and of the service, and the service's latency in milliseconds."""
    words, files = texts(seed), pictures(seed)
    if what == "text":
        calls = (
            lambda: matcher.match(text=next(words), k=K),
            lambda: search(matcher, [], next(words)),
        )
    else:
        calls = (
            lambda: matcher.match(images=next(files), k=K),
            lambda: search(matcher, next(files), None),
        )
    rates = {
        peer: rate(call, sizes.loop_s) for peer, call in zip((MATCH, BARE), calls, strict=True)
    }
    requests = (text_requests if what == "text" else picture_requests)(seed)
    found = asyncio.run(load(port, requests, seconds=sizes.service_s))
    if found.failures:
        print(f"{len(found.failures)} failed, such as {found.failures[0]}")
    p50, p99 = np.percentile(found.latencies_s, [50, 99]) * 1000
    return rates | {"service": found.rate, "p50 ms": p50, "p99 ms": p99}


def search(matcher: Matcher, images: Sequence[bytes], text: str | None) -> None:
    """The encoder and the index, and nothing around them."""
    query = matcher.embed(matcher.read(images=images), text)
    matcher.index.search(query[None], K)


def ratio_row(what: str, rounds: Sequence[dict[str, float]], peer: str) -> dict[str, Any]:
    """A result; the bar is one of texts, which batches are for."""
    ratio = float(np.median([own["service"] / own[peer] for own in rounds]))
    middle = {name: float(np.median([own[name] for own in rounds])) for name in rounds[0]}
    row = {"what": what, "peer": peer, "ratio": round(ratio, 2)}
    if "text" in what:
        row |= {"bar": THROUGHPUT_BAR, "holds": ratio >= THROUGHPUT_BAR}
    else:
        row |= {"bar": None, "holds": None}
    return row | {
        "service_per_s": round(middle["service"], 1),
        "peer_per_s": round(middle[peer], 1),
        "p99_ms": round(middle["p99 ms"], 1),
    }


def rate(work: Callable[[], Any], seconds: float) -> float:
    """Calls a second, after a few that do not count."""
    for _ in range(3):
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
    found, started = Load(), time.perf_counter()
    numbers = itertools.count()

    def go_on() -> bool:
        over = until is not None and until.is_set()
        return not over and time.perf_counter() - started < seconds and next(numbers) < most

    await asyncio.gather(*(client(port, requests, go_on, found) for _ in range(CLIENTS)))
    found.seconds = time.perf_counter() - started
    return found


async def client(
    port: int, requests: Iterator[bytes], go_on: Callable[[], bool], found: Load
) -> None:
    """Ask on one connection, and on a new one where that was cut."""
    loop = asyncio.get_running_loop()
    while True:
        over = loop.create_future()
        _, own = await loop.create_connection(
            functools.partial(Asking, requests, go_on, found, over), "127.0.0.1", port
        )
        if await over:
            return
        found.failures.append(f"a connection was closed after {own.num_answers} answers")


class Asking(asyncio.Protocol):
    """Asks again as soon as it is answered; with more Python than this it would be what is measured."""

    transport: asyncio.Transport

    def __init__(
        self,
        requests: Iterator[bytes],
        go_on: Callable[[], bool],
        found: Load,
        over: "asyncio.Future[bool]",
    ) -> None:
        self._requests, self._go_on, self._found, self._over = requests, go_on, found, over
        self._received = b""
        self._asked_at = 0.0
        self.num_answers = 0

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self.transport = transport
        self._ask()

    def _ask(self) -> None:
        if not self._go_on():
            self._over.set_result(True)
            self.transport.close()
            return
        self._asked_at = time.perf_counter()
        self.transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        """Take what has come of an answer."""
        self._received = received = self._received + data
        end = received.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        at = received[:end].lower().find(b"content-length:") + 15
        if len(received) < end + int(received[at : received.find(b"\r", at)]):
            return
        self._found.latencies_s.append(time.perf_counter() - self._asked_at)
        if received[9:12] != b"200":
            self._found.failures.append(received[end:].decode()[:300])
        self._received = b""
        self.num_answers += 1
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """Where that was not the end, somebody else goes on."""
        if not self._over.done():
            self._over.set_result(False)


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

    asked = mixed()
    memory, failures = [], []
    for quarter in range(1, 5):
        found = asyncio.run(load(port, asked, most=requests // 4))
        failures += found.failures
        memory.append(resident(process))
        print(
            f"memory after {quarter * requests // 4:,} requests: {memory[-1] / 2**20:,.1f} MiB "
            f"({found.line()})",
            flush=True,
        )
    unexpected = [failure for failure in failures if '"status": 4' not in failure]
    print(f"{len(unexpected)} unexpected answers")
    what = f"memory after {requests:,} requests"
    return below(what, f"after {requests // 4:,}", memory[-1] / memory[0], MEMORY_BAR)


def resident(process: psutil.Process) -> int:
    """Bytes of a process and its children."""
    return sum(own.memory_info().rss for own in (process, *process.children(recursive=True)))


def swaps(port: int, folder: Path, count: int) -> list[dict[str, Any]]:
    """Requests that fail while the index is published anew, and replaced with its encoder, under load."""
    found, taken = asyncio.run(load_while_swapped(port, folder, count))
    print(f"{taken} swaps under load: {found.line()}, {len(found.failures)} failed")
    for failure in found.failures[:3]:
        print(f"  {failure}")
    what = f"failed of {len(found.latencies_s):,} in {taken} swaps"
    return [
        below(what, "bar", len(found.failures), 0),
        {"what": "swaps taken up", "peer": "bar", "ratio": taken / SWAPS, "bar": 1.0}
        | {"holds": taken == SWAPS},
    ]


async def load_while_swapped(port: int, folder: Path, count: int) -> tuple[Load, int]:
    """Two generations, then two indexes of other encoders in the place of this one."""
    over = asyncio.Event()
    loading = asyncio.create_task(load(port, text_requests(4), until=over))
    taken = 0
    for number in range(1, SWAPS + 1):
        before = await facts_of(port)
        # In a process of its own: what builds an index is not to slow the clients.
        await in_a_process(folder, count, number)
        if number > 2:
            (folder / "index").rename(folder / f"old-{number}")
            (folder / f"new-{number}").rename(folder / "index")
        for _ in range(300):
            await asyncio.sleep(0.1)
            if await facts_of(port) != before:
                taken += 1
                break
        print(f"swap {number}: {taken} taken up", flush=True)
    await asyncio.sleep(1.0)
    over.set()
    return await loading, taken


async def in_a_process(folder: Path, count: int, number: int) -> None:
    """Publish a generation in place, or make an index beside with another encoder."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import serve_matches as own;"
        "own.change(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
    )
    here = str(Path(__file__).resolve().parent)
    arguments = [here, str(folder), str(count), str(number)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *arguments)
    if await process.wait():
        raise SystemExit("the index could not be published")


def change(folder: Path, count: int, number: int) -> None:
    """What `in_a_process` runs."""
    if number > 2:
        make_index(
            folder / f"new-{number}", folder / f"encoder-{number}", SMALL, count, seed=number
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


def below(what: str, peer: str, ratio: float, bar: float) -> dict[str, Any]:
    return {"what": what, "peer": peer, "ratio": round(ratio, 3), "bar": bar, "holds": ratio <= bar}


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        # As the service has it, and read when torch is loaded, which has happened.
        let_idle_threads_sleep()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main(tyro.cli(ServeMatchesConfig))
