"""The body of a request: fields and files, within limits on bytes, number, length and time.

Nothing of a request names a file that is opened here: what is uploaded lies in memory or in a nameless
temporary file, and the names that files are sent under are not looked at.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import Any, Literal

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from mmrec.serve.config import MEGABYTE, ServeConfig
from mmrec.serve.refusals import Refused, busy, invalid

FieldKind = Literal["text", "file", "files"]
Spool = SpooledTemporaryFile[bytes]

SNIFFED = 64
"""Bytes of a file that tell what it is."""

_MAX_FIELD_BYTES = 64 * 1024
_MAX_PART_HEADERS = 8 * 1024
_MAX_FIELDS = 32
IN_MEMORY = MEGABYTE
"""Bytes of a file that stay in memory; of a larger one all are on the disk."""
_MAX_SPOOLED = 32
"""Bodies of the largest size that may lie here at once, those of all requests taken together."""
_DRAIN_S = 3.0
_MULTIPART, _JSON = "multipart/form-data", "application/json"


@dataclass
class Body:
    """What a request brought."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Text as it was sent; of JSON whatever stood there."""
    files: dict[str, list[Spool]] = field(default_factory=dict)
    num_bytes: int = 0
    """Bytes of all of its files."""

    def close(self) -> None:
        """Let go of the files."""
        for files in self.files.values():
            for file in files:
                file.close()


class Uploads:
    """Reads the bodies of requests, and knows how much of them lies here."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self.held_bytes = 0
        """Bytes of files that requests under way have brought."""

    @asynccontextmanager
    async def received(
        self,
        request: Request,
        kinds: Mapping[str, FieldKind],
        check_head: Callable[[str, bytes, int], None],
    ) -> AsyncIterator[Body]:
        """The body of a request, for as long as the block.

        `kinds` are the fields that there may be, and `check_head` refuses a file by its field, its first
        64 bytes and its number there. Raises `Refused`.
        """
        body = Body()
        try:
            await self._receive_in_time(request, body, kinds, check_head)
            yield body
        finally:
            self.held_bytes -= body.num_bytes
            body.close()

    def hold(self, body: Body, count: int) -> None:
        """Count bytes that are about to be kept. Raises `Refused` where there is no room for them."""
        limit = self._config.max_upload_bytes
        if body.num_bytes + count > limit:
            raise _too_large(limit)
        if self.held_bytes + count > _MAX_SPOOLED * limit:
            raise busy("too many uploads are under way")
        body.num_bytes += count
        self.held_bytes += count

    async def _receive_in_time(self, request: Request, *arguments: Any) -> None:
        seconds = self._config.upload_timeout_s
        try:
            async with asyncio.timeout(seconds):
                await self._receive(request, *arguments)
        except TimeoutError:
            raise Refused(408, "timeout", f"the body did not arrive in {seconds:g} s") from None
        except ClientDisconnect:
            raise Refused(400, "bad request", "the connection was closed") from None

    async def _receive(
        self,
        request: Request,
        body: Body,
        kinds: Mapping[str, FieldKind],
        check_head: Callable[[str, bytes, int], None],
    ) -> None:
        kind, options = parse_options_header(request.headers.get("content-type"))
        stream = request.stream()
        try:
            self._check_length(request)
            if kind == _MULTIPART.encode():
                parts = _Parts(self, body, kinds, check_head, self._config.max_images)
                await _parse(stream, parts, options.get(b"boundary"))
            elif kind == _JSON.encode():
                body.fields = _checked_object(await _read(stream), kinds)
            else:
                raise Refused(415, "media type", f"expected a body of type {_MULTIPART} or {_JSON}")
        except Refused:
            # A client that is still sending would not see an answer that comes now.
            await self.drain(stream)
            raise

    def _check_length(self, request: Request) -> None:
        length = request.headers.get("content-length", "")
        limit = self._config.max_upload_bytes
        if length.isdecimal() and int(length) > limit + _MAX_FIELDS * _MAX_FIELD_BYTES:
            raise _too_large(limit)

    async def drain(self, stream: AsyncIterator[bytes]) -> None:
        """Read on for a while what nobody wants, so that the answer is seen."""
        left = self._config.max_upload_bytes
        with suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(_DRAIN_S):
                async for chunk in stream:
                    left -= len(chunk)
                    if left < 0:
                        return


def _too_large(limit: int) -> Refused:
    return Refused(413, "too large", f"the body has more than {limit / MEGABYTE:g} MiB of files")


async def _read(stream: AsyncIterator[bytes]) -> bytes:
    data = bytearray()
    async for chunk in stream:
        data += chunk
        if len(data) > _MAX_FIELD_BYTES:
            raise Refused(
                413, "too large", f"a body of JSON has at most {_MAX_FIELD_BYTES // 1024} KiB"
            )
    return bytes(data)


def _checked_object(data: bytes, kinds: Mapping[str, FieldKind]) -> dict[str, Any]:
    """The fields of a JSON object; files cannot be among them."""
    try:
        found = parse_json(data.decode())
    except (ValueError, RecursionError):
        raise Refused(400, "bad request", "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "bad request", "the body is not a JSON object")
    for name in found:
        if kinds.get(name) != "text":
            raise _unknown(name, kinds)
    return found


def parse_json(text: str) -> Any:
    """What a JSON text holds; NaN and infinities are not JSON.

    Raises `ValueError`, `RecursionError`, and `Refused` where an object has a name twice.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(422, "invalid field", f"'{printable(name)}' is given twice")
        found[name] = value
    return found


def printable(name: str) -> str:
    """The beginning of a name that somebody sent, fit for a line of text."""
    return "".join(c if c.isprintable() else "?" for c in name[:40])


def _unknown(name: str, kinds: Mapping[str, FieldKind]) -> Refused:
    if name in kinds:
        return invalid(name, f"expected a file, in a body of type {_MULTIPART}")
    return Refused(
        422,
        "invalid field",
        f"'{printable(name)}' is not a field; expected some of {', '.join(kinds)}",
    )


async def _parse(stream: AsyncIterator[bytes], parts: "_Parts", boundary: bytes | None) -> None:
    if not boundary or len(boundary) > 256:
        raise Refused(400, "bad request", "the body's Content-Type names no boundary of parts")
    parser = MultipartParser(boundary, parts.callbacks())  # pyright: ignore[reportArgumentType]
    try:
        async for chunk in stream:
            parser.write(chunk)
        parser.finalize()
    except FormParserError:
        raise Refused(400, "bad request", f"the body is not {_MULTIPART}") from None
    if not parts.ended:
        raise Refused(400, "bad request", "the body ends before its last part does")


class _Parts:
    """The parts of a multipart body, as the parser comes upon them."""

    def __init__(
        self,
        uploads: Uploads,
        body: Body,
        kinds: Mapping[str, FieldKind],
        check_head: Callable[[str, bytes, int], None],
        max_files: int,
    ) -> None:
        self._uploads, self._body, self._kinds = uploads, body, kinds
        self._check_head, self._max_files = check_head, max_files
        self._num_parts = 0
        self._begin()
        self.ended = False
        """Whether the end of the body has been seen."""

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._header, self._headers = (bytearray(), bytearray()), b""
        self._num_header_bytes = 0
        self._name = ""
        self._text: bytearray | None = None
        self._file: Spool | None = None
        self._head = b""
        self._checked = False

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header[0], data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._header[1], data[start:end])

    def _grow(self, header: bytearray, more: bytes) -> None:
        self._num_header_bytes += len(more)
        if self._num_header_bytes > _MAX_PART_HEADERS:
            raise Refused(413, "too large", "the headers of a part are too long")
        header += more

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._headers = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers)
        self._num_parts += 1
        if self._num_parts > self._max_files + _MAX_FIELDS:
            raise Refused(413, "too large", "the body has too many parts")
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        kind = self._kinds.get(self._name)
        is_file = b"filename" in options
        if kind is None:
            raise _unknown(self._name, self._kinds)
        if (kind == "text") == is_file:
            found, expected = ("a file", "text") if is_file else ("text", "a file")
            raise invalid(self._name, f"expected {expected}, found {found}")
        if is_file:
            self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (closed with the body)
            held = self._body.files.setdefault(self._name, [])
            held.append(self._file)
            most = 1 if kind == "file" else self._max_files
            if len(held) > most:
                raise invalid(self._name, f"expected at most {most}")
            return
        if self._name in self._body.fields:
            raise invalid(self._name, "is given twice")
        self._text = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text += data[start:end]
            if len(self._text) > _MAX_FIELD_BYTES:
                raise Refused(
                    413,
                    "too large",
                    f"{self._name}: expected at most {_MAX_FIELD_BYTES // 1024} KiB",
                    field=self._name,
                )
            return
        assert self._file is not None
        self._uploads.hold(self._body, end - start)
        self._file.write(data[start:end])
        if not self._checked:
            self._head += data[start : min(end, start + SNIFFED)]
            if len(self._head) >= SNIFFED:
                self._check()

    def _check(self) -> None:
        self._checked = True
        number = len(self._body.files[self._name]) - 1
        self._check_head(self._name, self._head[:SNIFFED], number)

    def _end(self) -> None:
        if self._text is not None:
            try:
                self._body.fields[self._name] = self._text.decode()
            except UnicodeDecodeError:
                raise invalid(self._name, "expected UTF-8") from None
        elif self._file is not None and self._file.tell() == 0:
            # A form in a browser sends its empty file fields, too.
            self._body.files[self._name].pop().close()
        elif not self._checked:
            self._check()

    def _finish(self) -> None:
        self.ended = True


# Values of fields


def text_of(fields: Mapping[str, Any], name: str, most: int) -> str | None:
    """A text that has something in it; None where there is none."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(name, "expected text")
    if len(value) > most:
        raise invalid(name, f"expected at most {most} characters, found {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a pair, written as \ud800 in JSON
        raise invalid(name, "expected characters that UTF-8 has") from None
    return value if value.strip() else None


def whole_of(fields: Mapping[str, Any], name: str, default: int, most: int) -> int:
    """A whole number from 1."""
    value = fields.get(name, default)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise invalid(name, f"expected a whole number from 1 to {most}")
    return value


def flag_of(fields: Mapping[str, Any], name: str) -> bool:
    """True or false; false where it is not given."""
    value = fields.get(name, False)
    words = {
        "true": True,
        "1": True,
        "on": True,
        "false": False,
        "0": False,
        "off": False,
        "": False,
    }
    if isinstance(value, str):
        value = words.get(value.strip().lower())
    if not isinstance(value, bool):
        raise invalid(name, "expected true or false")
    return value
