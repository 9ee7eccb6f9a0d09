"""Requests that offer to change the protocol, served in the one that they came in."""

import sys

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_OFFERS = (b"upgrade", b"http2-settings")


class PlainHttpTools(HttpToolsProtocol):
    """uvicorn's parser in C, which takes the body after an `Upgrade` for the other protocol and drops it.

    Java's client offers HTTP/2 so with each first request; who does not take an offer answers as if there
    were none (RFC 9110, section 7.8). So the head is read once more, without it.
    """

    _data = b""

    def data_received(self, data: bytes) -> None:
        """Read what has arrived."""
        self._data = data
        super().data_received(data)

    def _should_upgrade(self) -> bool:
        return any(name == b"upgrade" for name, _ in self.headers)

    def handle_websocket_upgrade(self) -> None:
        """Go on after such a head: uvicorn calls this where the parser has stopped behind it."""
        stopped = sys.exception()
        assert stopped is not None
        line = (
            f"{self.scope['method']} {self.url.decode('latin-1')} HTTP/{self.scope['http_version']}"
        )
        head = line.encode("latin-1") + b"\r\n"
        for name, value in self.headers:
            head += b"%s: %s\r\n" % (name, value) if name not in _OFFERS else b""
        self.parser = httptools.HttpRequestParser(self)  # The old one may have seen `close`.
        PlainHttpTools.data_received(self, head + b"\r\n" + self._data[stopped.args[0] :])
