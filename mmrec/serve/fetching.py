"""Videos from the few hosts that an operator allows."""

import asyncio
from collections.abc import Sequence
from tempfile import SpooledTemporaryFile
from urllib.parse import urlsplit

import httpx

from mmrec.serve.decoding import check_kind
from mmrec.serve.refusals import Refused, invalid
from mmrec.serve.uploads import IN_MEMORY, SNIFFED, Body, Uploads

_FIELD = "video_url"


def check_url(url: str, hosts: Sequence[str]) -> str:
    """The URL where its host is allowed, to the letter and with its port. Raises `Refused`."""
    if not hosts:
        raise Refused(
            403,
            "forbidden",
            "video_url: this service fetches from no host; its operator lists some by --allow-url-host",
            field=_FIELD,
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise invalid(_FIELD, "expected a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise invalid(_FIELD, "expected a URL that begins with https:// or http://")
    if "@" in parts.netloc or not url.isascii() or not url.isprintable() or set(url) & set(" \\"):
        raise invalid(_FIELD, "expected a URL without a user, spaces and backslashes")
    host = parts.hostname if port is None else f"{parts.hostname}:{port}"
    if host.lower() not in [allowed.lower() for allowed in hosts]:
        raise Refused(
            403,
            "forbidden",
            "video_url: its host is not one that this service fetches from",
            field=_FIELD,
        )
    return url


async def fetch(url: str, uploads: Uploads, body: Body, timeout_s: float) -> None:
    """Add the file at a checked URL to a body as its video.

    Redirects are not followed, since they lead to any host, and no proxy of the environment is asked.
    Raises `Refused`.
    """
    file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed with the body)
    body.files["video"] = [file]
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=timeout_s) as client,
            # Not packed: a small answer could grow into a large one here.
            client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                raise _unfetched(f"its host answered with status {answer.status_code}")
            async for chunk in answer.aiter_raw():
                uploads.hold(body, len(chunk))
                file.write(chunk)
    except TimeoutError:
        raise _unfetched(f"it did not arrive in {timeout_s:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL):
        raise _unfetched("its host cannot be reached") from None
    file.seek(0)
    check_kind("video", file.read(SNIFFED), 0)


def _unfetched(reason: str) -> Refused:
    return Refused(422, "unreadable media", f"video_url: {reason}", field=_FIELD)
