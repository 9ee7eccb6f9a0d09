"""RemoteMatcher: a matcher whose encoder and index are behind `mmrec serve`.

from mmrec import Matcher
matcher = Matcher.connect("http://127.0.0.1:8080")
matcher.match(video="clip.mp4", title="love this NOVA find", k=5)
"""

import base64
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mmrec.data.sources import Source, local_file
from mmrec.errors import MediaError, UserError
from mmrec.retrieval.matcher import Match, Matches

if TYPE_CHECKING:
    import httpx

_TRIES = 4
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

    def match(
        self,
        *,
        video: Source | None = None,
        images: Sequence[Source] | Source = (),
        title: str | None = None,
        text: str | None = None,
        product_id: str | None = None,
        k: int = 10,
        where: str | None = None,
    ) -> Matches:
        """The k nearest to a video, or pictures, with or without words, or words alone, or to a product.

        Arguments are those of `Matcher.match`. Raises `UserError` with the service's reason where it
        refuses, and when it cannot be reached.
        """
        if title and text:
            raise UserError("give title or text, not both: they are the same thing")
        fields = {"text": title or text, "where": where, "product_id": product_id, "k": k}
        if isinstance(images, str | Path | bytes):
            images = [images]
        if video is not None and images:
            raise UserError("give a video or images, not both")
        files = [("video", _read(video))] if video is not None else []
        files += [("images", _read(image)) for image in images]
        answer = self._ask(fields, files)
        return Matches(
            matches=[self._match(found) for found in answer["matches"]],
            title=title or text,
            frames=[base64.b64decode(uri.partition(",")[2]) for uri in answer["query"]["frames"]],
        )

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

    def _ask(self, fields: Mapping[str, Any], files: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
        # Parts, also where there is no file: httpx sends data alone as a form of another type.
        parts: list[tuple[str, Any]] = [
            (name, (None, str(value))) for name, value in fields.items() if value is not None
        ]
        parts.append(("frames", (None, "true")))
        parts += [(name, (name, data)) for name, data in files]
        return self._send("POST", "/v1/match", files=parts).json()

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
                answer = self._http.request(method, path, **content)
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
