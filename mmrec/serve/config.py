"""What a service is told, and the limits that it holds requests to."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmrec.errors import UserError
from mmrec.ranges import Count, NonNegative, Positive, check_ranges

TOKEN_VARIABLE = "MMREC_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MEGABYTE = 1 << 20
_LEAST_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `mmrec serve`. A bearer token comes from the variable MMREC_TOKEN or from a file."""

    index: Path
    """An index folder; what replaces it while the service runs is taken up, with its encoder."""
    encoder: Path | None = None
    """The encoder's folder, where the index's lineage does not lead to it."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 is every one that this machine has."""
    port: int = 8080
    """0 takes a free one, which the first line of the log names."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs and, where it takes this kind of index, the search."""
    writable: bool = False
    """Let requests add, replace and delete products."""
    token_file: Path | None = None
    """A file with the bearer token that requests must carry."""
    allow_url_host: tuple[str, ...] = ()
    """Hosts that a `video_url` may name, such as cdn.example.com or cdn.example.com:8443; none are
    fetched from otherwise."""

    max_batch: Count = 64
    """Queries that are encoded and searched together at most."""
    max_batch_pictures: Count = 128
    """Frames and pictures that are encoded together at most: what bounds the memory of a batch."""
    max_wait_ms: NonNegative = 5.0
    """How long the first query of a batch waits for others that are to be expected; never when alone."""
    max_queue: Count = 256
    """Queries that wait for the encoder at most; more are refused with status 503."""
    decoders: Count = 2
    """Processes that decode videos and pictures."""
    decode_timeout_s: Positive = 20.0
    """Seconds that the media of one request may take to decode."""
    decode_memory_mb: Count = 1024
    """Memory that they may take on top of an idle decoder's, in MiB."""

    max_upload_mb: Positive = 64.0
    """Bytes of a request's body, and of a fetched video, in MiB."""
    upload_timeout_s: Positive = 60.0
    """Seconds in which a request's body must have arrived."""
    max_images: Count = 16
    """Pictures in a request."""
    max_megapixels: Positive = 50.0
    """Width times height of a picture or of a video's frame, in millions."""
    max_total_megapixels: Positive = 200.0
    """The same of all pictures of a request together."""
    max_frames: Count = 500_000
    """Frames of a video, by its header; the encoder looks at a few of them."""
    max_k: Count = 100
    """Matches of a query."""
    max_text: Count = 2000
    """Characters of a text."""
    max_where: Count = 1000
    """Characters of a filter."""

    max_connections: Count = 512
    """Open connections; on more, all but /v1/healthz and /v1/readyz is answered with status 503."""
    idle_timeout_s: Positive = 15.0
    """Seconds in which a request's head must have arrived, and that an idle connection is kept."""
    request_timeout_s: Positive = 60.0
    """Seconds that a request may wait for its answer once its body is here."""
    watch_s: Positive = 1.0
    """Seconds between two looks at whether the index has changed."""
    drain_s: NonNegative = 1.0
    """After a SIGTERM, seconds in which requests are still taken and /v1/readyz says 503."""
    stop_timeout_s: Positive = 30.0
    """Seconds that requests under way then have to end."""

    @property
    def max_upload_bytes(self) -> int:
        """`max_upload_mb` in bytes."""
        return int(self.max_upload_mb * MEGABYTE)

    @property
    def max_pixels(self) -> int:
        """`max_megapixels` in pixels."""
        return int(self.max_megapixels * 1e6)

    @property
    def max_total_pixels(self) -> int:
        """`max_total_megapixels` in pixels."""
        return int(self.max_total_megapixels * 1e6)


def check_config(config: ServeConfig, token: str | None) -> None:
    """Raises `UserError` for settings out of range, and for products that anybody could delete."""
    check_ranges(config)
    if not 0 <= config.port <= 65535:
        raise UserError(f"--port {config.port}: expected 0 to 65535")
    if config.writable and token is None and config.host not in LOOPBACK:
        raise UserError(
            f"--writable on {config.host} lets anybody who reaches this machine change the index; set "
            f"{TOKEN_VARIABLE} or give --token-file, or listen on 127.0.0.1"
        )
    for host in config.allow_url_host:
        if not host or set(host) & set("/@?#\\ *"):
            raise UserError(
                f"--allow-url-host {host}: expected a host, such as cdn.example.com, with or without a port"
            )


def read_token(config: ServeConfig) -> str | None:
    """The bearer token, where one is set; a flag would show it to whoever lists processes.

    Raises `UserError` where both places name one, and for one that is too short to keep anybody out.
    """
    token, name = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if config.token_file is not None:
        if token is not None:
            raise UserError(f"both {TOKEN_VARIABLE} and --token-file are given; leave one out")
        try:
            token, name = config.token_file.read_text(encoding="utf-8"), str(config.token_file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {config.token_file}: cannot be read ({error})") from None
    if token is None:
        return None
    token = token.strip()
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{name}: expected at least {_LEAST_TOKEN} printable characters without spaces; "
            "`openssl rand -hex 16` makes some"
        )
    return token
