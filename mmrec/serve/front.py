"""What every request goes through: an id, the token, headers, a line in the log, and no naked fault."""

import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrec.serve.log import log
from mmrec.serve.metrics import Metrics
from mmrec.serve.refusals import Refused, busy

Header = tuple[bytes, bytes]
# An id is a name and no secret; a random one each time costs a call of the system.
_PROCESS, _NUMBERS = uuid4().hex[:16], count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = ("/", "/openapi.json", "/v1/healthz", "/v1/readyz")
_PAGE = "/page/"
CROWDED = "crowded"
"""In a request's state where its connection is one more than there may be."""
_NEVER_TOO_MANY = ("/v1/healthz", "/v1/readyz")  # Or a busy service would be taken for a dead one.
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
# The page and all else: no other host, nothing inline, and nobody frames it.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", _POLICY),
]
_NOT_KEPT = (b"cache-control", b"no-store")
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True, eq=False)
class Direct:
    """A route that is answered without the framework: finding it and its dependencies costs half a query."""

    route: BaseRoute
    """As the framework knows it, for OpenAPI and the metrics."""
    answer: Callable[[Request], Awaitable[Response]]


class Front:
    """The ASGI application around the framework's: all requests come through here."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        token: str | None,
        direct: Mapping[tuple[str, str], Direct],
        stopping: Callable[[], bool],
    ) -> None:
        """`direct` holds routes by method and path; connections are closed once it is `stopping`."""
        self._app = app
        self._metrics = metrics
        self._token = None if token is None else token.encode()
        self._direct = direct
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id = _request_id(scope)
        sent: dict[str, int] = {}

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                message["headers"] = [
                    *message["headers"],
                    *_headers(message["headers"], request_id),
                ]
                if self._stopping() or scope["state"].get(CROWDED):
                    message["headers"].append(_CLOSE)
            await send(message)

        try:
            await self._answer(scope, receive, send_on, sent)
        finally:
            self._note(scope, sent.get("status", 0), time.perf_counter() - started)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, sent: dict[str, int]
    ) -> None:
        try:
            if scope["state"].get(CROWDED) and scope["path"] not in _NEVER_TOO_MANY:
                raise busy("too many connections are open")
            self._check_token(scope)
            direct = self._direct.get((scope["method"], scope["path"]))
            if direct is None:
                await self._app(scope, receive, send)
            else:
                scope["route"] = direct.route
                response = await direct.answer(Request(scope, receive))
                await response(scope, receive, send)
        except Refused as refused:
            await answer_refused(scope, receive, send, refused)
        except Exception as error:
            log("fault", error=error, request_id=scope["state"]["request_id"])
            if "status" in sent:
                raise
            fault = Refused(
                500, "fault", "a fault of the service; its log has it by the request's id"
            )
            await answer_refused(scope, receive, send, fault)

    def _check_token(self, scope: Scope) -> None:
        path = scope["path"]
        if self._token is None or path in _OPEN or path.startswith(_PAGE):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        # The time that a comparison takes says nothing of how much of a token was right.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise Refused(401, "unauthorised", "expected the header Authorization: Bearer TOKEN")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        kind, reason = scope["state"].get("refused", (None, None))
        self._metrics.observe_request(method, route, status, seconds)
        facts: dict[str, Any] = {
            "request_id": scope["state"]["request_id"],
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        if kind is not None:
            self._metrics.count_error(kind)
            facts["reason"] = reason
        log("request", **facts | scope["state"].get("facts", {}))


async def answer_refused(scope: Scope, receive: Receive, send: Send, refused: Refused) -> None:
    """Answer with an error, and keep its reason for the log and the metrics."""
    # What stands after a colon may be a part of the request.
    scope["state"]["refused"] = (refused.kind, refused.kind)
    body = json.dumps(refused.body(scope["state"]["request_id"])).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | refused.headers).items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def malformed_answer() -> bytes:
    """The whole answer to what is not HTTP, which no application sees."""
    request_id = _next_id()
    log("malformed", request_id=request_id)
    refused = Refused(400, "bad request", "the request is not HTTP, or its head is too long")
    body = json.dumps(refused.body(request_id)).encode()
    own = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        _CLOSE,
    ]
    lines = [b"%s: %s" % pair for pair in own + _headers(own, request_id)]
    return b"\r\n".join([b"HTTP/1.1 400 Bad Request", *lines, b"", body])


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else _next_id()


def _next_id() -> str:
    return f"{_PROCESS}-{next(_NUMBERS):x}"


def _headers(given: Sequence[Header], request_id: str) -> list[Header]:
    """What an answer has beside the headers that it is given."""
    kept = any(name == b"cache-control" for name, _ in given)
    return [(b"x-request-id", request_id.encode()), *_HEADERS, *([] if kept else [_NOT_KEPT])]
