"""The process of the service: its log, its signals, and how it ends."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn

from mmrec.errors import UserError
from mmrec.serve.app import Service, make_app
from mmrec.serve.config import ServeConfig, check_config, read_token
from mmrec.serve.front import CROWDED, malformed_answer
from mmrec.serve.log import log, start_logging

try:  # Parsers and loops in C; they come with the extra, and are not made for every system.
    from mmrec.serve.upgrades import PlainHttpTools as _Protocol
except ImportError:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol

_SWITCH_S = 0.0005
_MAX_HEAD_BYTES = 16 * 1024


def serve(config: ServeConfig) -> None:
    """Serve until a SIGTERM or SIGINT. Raises `UserError` for settings and folders that will not do."""
    token = read_token(config)
    check_config(config, token)
    start_logging()
    # The event loop gives up the interpreter at every read and write, and the encoder's thread would keep it
    # for 5 ms each time.
    sys.setswitchinterval(_SWITCH_S)
    service = Service(config, token=token)
    server = Server(service)
    server.run()
    if not server.started:
        raise UserError(
            f"{config.host}:{config.port} cannot be listened on; the log has the reason; give another --port"
        )


class Server(uvicorn.Server):
    """uvicorn, but that a SIGTERM lets load balancers notice before connections are refused."""

    def __init__(self, service: Service) -> None:
        """Set up for a service that is not started yet."""
        settings = service.config
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=settings.host,
                port=settings.port,
                http=_http_protocol(settings.idle_timeout_s, settings.max_connections),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(1, round(settings.idle_timeout_s)),
                timeout_graceful_shutdown=max(1, round(settings.stop_timeout_s)),
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                lifespan="on",
            )
        )
        self._service = service
        self._drain: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that it listens on, which was free where 0 was asked for."""
        return self.servers[0].sockets[0].getsockname()[1]

    async def startup(self, sockets: Any = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        if self.started:
            log("listening", host=self.config.host, port=self.port)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at a signal, and exit with status 0: uvicorn would raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        taken = []
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
                loop.add_signal_handler(number, self.stop)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Say so at /v1/readyz, take requests a little longer, then let those under way end."""
        if self._service.stopping:
            self.should_exit = True  # The second signal does not wait.
            return
        self._service.stopping = True
        log("stopping")
        self._drain = asyncio.get_running_loop().create_task(self._stop_later())

    async def _stop_later(self) -> None:
        await asyncio.sleep(self._service.config.drain_s)
        self.should_exit = True


def _http_protocol(timeout_s: float, max_connections: int) -> type[Any]:
    """HTTP/1.1 in which the head of a request must arrive within a time, too, and be of some length at most.

    uvicorn waits for ever for the first request of a connection, and for the rest of a head that comes a
    byte at a time. The parser in C takes heads of any length. Connections beyond the most that there may be
    are marked for `Front` to refuse, and what is not HTTP is answered as it answers.
    """

    class Impatient(_Protocol):  # pyright: ignore[reportGeneralTypeIssues]
        _head_timer: asyncio.TimerHandle | None = None
        _cycle_seen: Any = None
        _head_bytes = 0
        _header_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self.app_state = self.app_state | {CROWDED: True}
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            cycle = self.cycle
            if cycle is None or cycle.response_complete or not cycle.more_body:
                self._head_bytes += len(data)
            super().data_received(data)
            if self.cycle is not self._cycle_seen:
                # A head is complete; a body has a time of its own.
                self._cycle_seen, self._head_bytes = self.cycle, 0
                self._stop_timer()
            elif self._head_bytes > _MAX_HEAD_BYTES:
                self._give_up()
            elif self.cycle is None or self.cycle.response_complete:
                self._start_timer()

        def on_message_begin(self) -> None:
            self._header_bytes = 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            # Of a head that came at once, and of trailers after a body in chunks, which have no end else.
            self._header_bytes += len(name) + len(value)
            if self._header_bytes > _MAX_HEAD_BYTES:
                raise ValueError("the head is too long")
            super().on_header(name, value)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(timeout_s, self._give_up)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def send_400_response(self, msg: str) -> None:
            self.transport.write(malformed_answer())
            self.transport.close()

        def _give_up(self) -> None:
            self._head_timer = None
            if not self.transport.is_closing():
                self.transport.close()

    return Impatient


def main(config: ServeConfig) -> None:
    """`mmrec serve`."""
    try:
        serve(config)
    except SystemExit as error:  # uvicorn's way of saying that it cannot start
        if error.code:
            sys.exit(1)
