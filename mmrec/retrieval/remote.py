"""RemoteMatcher: a matcher whose encoder and index are behind `mmrec serve`.

from mmrec import Matcher
matcher = Matcher.connect("http://127.0.0.1:8080")
matcher.match(video="clip.mp4", title="love this NOVA find", k=5)
"""

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import urlsplit

from mmrec.data.sources import Source, local_file
from mmrec.errors import MediaError, UserError
from mmrec.model.encoder import Side
from mmrec.retrieval.matches import Match, Matches, Why
from mmrec.retrieval.queries import (
    Ids,
    PictureLists,
    Query,
    Videos,
    Words,
    is_given,
    queries_of,
)

if TYPE_CHECKING:
    import httpx

_TRIES = 4
_AT_ONCE = 8
"""Queries of a list that are under way together."""
_LONGEST_PAUSE_S = 10.0


class RemoteMatcher:
    """Asks a service for matches; `match` takes and gives what `Matcher.match` does.

    Files are read here and uploaded; the service never opens a path of this machine.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float = 120.0, pictures: bool = True
    ) -> None:
        """Set up for a service at `url`; nothing is sent yet.

        `token` is the bearer token that the service may want, `timeout_s` the most that one answer may
        take. Without `pictures` the matches come without the products' images, which are a request each.
        Raises `UserError` for a URL that is none, and where the package httpx is missing.
        """
        try:
            import httpx
        except ImportError:
            raise UserError("a connection needs httpx: pip install 'mmrec[serve]'") from None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url}: expected the URL of a service, such as http://127.0.0.1:8080")
        self.url = url.rstrip("/")
        self._pictures = pictures
        self._http: httpx.Client = httpx.Client(
            base_url=self.url,
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    @overload
    def match(  # pyright: ignore[reportOverlappingOverload]
        self,
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
        text: str | None = None,
        product_id: str | None = None,
        content_id: str | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> Matches: ...

    @overload
    def match(
        self,
        *,
        video: Videos | None = None,
        images: PictureLists | tuple[()] = (),
        title: Words | None = None,
        text: Words | None = None,
        product_id: Ids | None = None,
        content_id: Ids | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> list[Matches]: ...

    def match(
        self,
        *,
        video: Source | Videos | None = None,
        images: Source | Sequence[Source] | PictureLists = (),
        title: str | Words | None = None,
        text: str | Words | None = None,
        product_id: str | Ids | None = None,
        content_id: str | Ids | None = None,
        k: int = 10,
        where: str | None = None,
        side: Side | None = None,
        rerank: bool | None = None,
    ) -> Matches | list[Matches]:
        """The k nearest to a video, or pictures, with or without words, or words alone, or to a product.

        Arguments, lists of them too, and what comes back are those of `Matcher.match`; queries of a list
        are sent some at a time, and the service encodes them together. Raises `UserError` with the
        service's reason where it refuses, and when it cannot be reached.
        """
        asked = {"k": k, "where": where, "rerank": rerank}
        named = {"product_id": product_id, "content_id": content_id}
        given = [(name, ids) for name, ids in named.items() if ids is not None]
        if given:
            name, ids = given[0]
            if len(given) > 1 or any(map(is_given, (video, images, title, text))):
                raise UserError(f"give {name}, or a video, images or text, not both")
            ask = partial(self._match_like, name, asked)
            return ask(ids) if isinstance(ids, str) else self._each(ask, list(ids))
        queries, many = queries_of(video, images, title, text)
        ask = partial(self._match_query, asked | {"side": side})
        return self._each(ask, queries) if many else ask(queries[0])

    def info(self) -> dict[str, Any]:
        """What the service holds and takes: its encoder, index, columns and limits."""
        return self._send("GET", "/v1/info").json()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "RemoteMatcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _each(self, ask: Callable[[Any], Matches], queries: Sequence[Any]) -> list[Matches]:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return list(threads.map(ask, queries))

    def _match_query(self, asked: Mapping[str, Any], query: Query) -> Matches:
        files = [("video", _read(query.video))] if query.video is not None else []
        files += [("images", _read(image)) for image in query.images]
        return self._ask({"text": query.title, **asked}, files)

    def _match_like(self, name: str, asked: Mapping[str, Any], id_: str) -> Matches:
        return self._ask({name: id_, **asked}, [])

    def _ask(self, fields: Mapping[str, Any], files: Sequence[tuple[str, bytes]]) -> Matches:
        # Parts, also where there is no file: httpx sends data alone as a form of another type.
        parts: list[tuple[str, Any]] = [
            (name, (None, str(value))) for name, value in fields.items() if value is not None
        ]
        parts += [(name, (name, data)) for name, data in files]
        shown = [*parts, ("frames", (None, "true"))]
        answer = self._send("POST", "/v1/match", files=shown).json()
        return Matches(
            matches=[self._match(found) for found in answer["matches"]],
            title=answer["query"]["text"],
            frames=[base64.b64decode(uri.partition(",")[2]) for uri in answer["query"]["frames"]],
            key=answer["key"],
            explainer=partial(self._explain, parts),
        )

    def _explain(self, parts: Sequence[tuple[str, Any]], product_id: str) -> Why:
        """Ask once more, with the reasons: most matches are never asked why."""
        answer = self._send("POST", "/v1/match", files=[*parts, ("why", (None, "true"))]).json()
        found = {match["product_id"]: match["why"] for match in answer["matches"]}.get(product_id)
        if not found:
            raise UserError(
                f"{product_id}: the service does not say why; its index or shards keep too little, or have "
                "changed"
            )
        return Why(
            product_id=product_id,
            score=found["score"],
            frame_losses=tuple(found["frame_losses"]),
            video_alone=found["video_alone"],
            title_alone=found["title_alone"],
        )

    def _match(self, found: Mapping[str, Any]) -> Match:
        image = None
        if self._pictures and found["image"]:
            image = self._send("GET", found["image"]).content
        return Match(
            product_id=found["product_id"],
            score=found["score"],
            title=found["title"],
            attributes=found["attributes"],
            image=image,
        )

    def _send(self, method: str, path: str, **content: Any) -> "httpx.Response":
        """An answer of the service; where it is busy it is asked again, when it says to."""
        import httpx

        for attempt in range(1, _TRIES + 1):
            try:
                answer = self._answer(method, path, **content)
            except httpx.HTTPError as error:
                raise UserError(
                    f"{self.url}: cannot be reached ({error or type(error).__name__})"
                ) from None
            if answer.status_code < 400:
                return answer
            pause = answer.headers.get("retry-after", "")
            if answer.status_code != 503 or attempt == _TRIES or not pause.isdecimal():
                raise UserError(f"{self.url}: {_reason(answer)}")
            time.sleep(min(float(pause), _LONGEST_PAUSE_S))
        raise AssertionError

    def _answer(self, method: str, path: str, **content: Any) -> "httpx.Response":
        """An answer; a request whose connection is lost is sent once more, since all here only read."""
        import httpx

        with suppress(httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            return self._http.request(method, path, **content)
        return self._http.request(method, path, **content)


def _read(source: Source) -> bytes:
    try:
        with local_file(source) as file:
            return file if isinstance(file, bytes) else file.read_bytes()
    except MediaError as error:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else f"{source}"
        raise UserError(f"{name}: {error.reason}") from None


def _reason(answer: Any) -> str:
    try:
        error = answer.json()["error"]
        return f"{error['reason']} (status {answer.status_code}, request {error['request_id']})"
    except (ValueError, KeyError, TypeError):
        return f"answered with status {answer.status_code}"
