"""The index and encoder that answer now, and the next ones, which take their place between two requests."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from mmrec.manifest import read_manifest
from mmrec.retrieval.generations import RECORD, live_generation
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.matcher import Matcher

_KEPT_PATHS = 100_000

Token = tuple[str, int, int]
"""Tells a live generation from any other that lies or lay at the same path."""


@dataclass(frozen=True, eq=False)
class Served:
    """An encoder and an index that belong together; a request keeps to one from its start to its end."""

    matcher: Matcher
    generation: str
    """The number of the index's generation, such as 000002."""
    token: Token
    published_at: float
    """When the generation was made, in seconds since 1970."""

    image_paths: dict[str, str | None] = field(default_factory=dict, repr=False)
    """Where pictures of products are, as far as somebody has asked."""

    @property
    def encoder(self) -> str:
        """The encoder's fingerprint."""
        return self.matcher.encoder.fingerprint or ""

    @property
    def index(self) -> str:
        """The fingerprint of the generation."""
        manifest = self.matcher.index.manifest
        return manifest.fingerprint if manifest else ""

    def image_path(self, product_id: str) -> str | None:
        """The path of a product's picture on this service; None where it has none."""
        if product_id not in self.image_paths:
            if len(self.image_paths) >= _KEPT_PATHS:
                self.image_paths.clear()
            found = self.matcher.has_picture(product_id)
            path = f"/v1/images/{quote(product_id, safe='')}" if found else None
            self.image_paths[product_id] = path
        return self.image_paths.get(product_id)


def read_token(folder: Path) -> Token:
    """What tells the live generation apart now. Raises `UserError` or `OSError` where there is none."""
    generation = live_generation(folder)
    status = (generation / RECORD).stat()
    return generation.name, status.st_ino, status.st_mtime_ns


def open_served(
    folder: Path, *, encoder: Path | None, device: Literal["auto", "cpu", "cuda"]
) -> Served:
    """Load what is live in an index folder. Raises `UserError`."""
    read_manifest(folder, "index")
    while True:
        token = read_token(folder)
        matcher = Matcher.load(folder, encoder=encoder, device=device)
        if read_token(folder) == token:
            return Served(matcher, token[0], token, token[2] / 1e9)


class Live:
    """Serves an index folder as it changes.

    Upserts and deletes of other processes are read on; a new generation, or a folder put in place of this
    one, is opened beside what answers, with its encoder, and takes its place in one step. What cannot be
    opened changes nothing: the old one goes on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        encoder: Path | None,
        device: Literal["auto", "cpu", "cuda"],
        log: Callable[..., Any] = lambda event, **facts: None,
    ) -> None:
        """Open the index. Raises `UserError`."""
        self._folder, self._encoder = folder, encoder
        self._device: Literal["auto", "cpu", "cuda"] = device
        self._log = log
        self.current = open_served(folder, encoder=encoder, device=device)
        self.num_swaps = self.num_failures = 0
        self.changing = threading.Lock()
        """Held while this process changes the index, and while another is put in its place."""
        self._failed: tuple[Token | None, str] | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, every_s: float) -> None:
        """Look for changes from a thread, until `close`."""
        self._thread = threading.Thread(
            target=self._watch, args=(every_s,), name="mmrec-watch", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self.current.matcher.index.close()

    def look(self) -> bool:
        """Take up what has changed since; returns whether another generation answers now.

        Never raises for what lies in the folder: that is logged and counted once, and looked at again.
        """
        token = None
        try:
            token = read_token(self._folder)
            if token != self.current.token:
                return self._swap()
            with self.changing:
                index = self.current.matcher.index
                if isinstance(index, ProductIndex) and index.refresh():
                    self.current.image_paths.clear()
            self._failed = None
        except Exception as error:
            # A folder that is being replaced is not there for a moment; a GPU may have no room for two.
            self._note_failure(token, error)
        return False

    def _swap(self) -> bool:
        started = time.perf_counter()
        opened = open_served(self._folder, encoder=self._encoder, device=self._device)
        old = self.current
        if opened.encoder == old.encoder:
            opened.matcher.encoder = old.matcher.encoder  # One copy of the weights is enough.
        with self.changing:
            self.current = opened
        self.num_swaps += 1
        self._failed = None
        self._log(
            "swapped",
            generation=opened.generation,
            index=opened.index,
            encoder=opened.encoder,
            products=len(opened.matcher.index),
            seconds=round(time.perf_counter() - started, 3),
        )
        return True

    def _note_failure(self, token: Token | None, error: Exception) -> None:
        if self._failed != (token, str(error)):
            self._failed = (token, str(error))
            self.num_failures += 1
            self._log("not swapped", error=error)

    def _watch(self, every_s: float) -> None:
        while not self._stopped.wait(every_s):
            self.look()
