"""One JSON object a line on standard error: what happened, when, and to which request."""

import asyncio
import atexit
import json
import logging
import sys
import time
from contextlib import nullcontext
from typing import Any

_SOON_S, _MOST_LINES = 0.1, 200
_JSON = json.JSONEncoder(ensure_ascii=False, default=str)
_LOGGER = logging.getLogger("mmrec.serve")


def start_logging() -> None:
    """Send the service's and uvicorn's records to standard error as JSON lines."""
    handler = LineWriter()
    handler.setFormatter(JsonLines())
    for name in ("mmrec.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    # Its lines say less than ours: requests are logged with their ids, the start with the index.
    logging.getLogger("uvicorn.access").handlers = []
    logging.getLogger("uvicorn.access").propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def log(event: str, *, error: BaseException | None = None, **facts: Any) -> None:
    """Write a line: the event and what is known of it. Nothing of what was asked for belongs there."""
    level = logging.INFO if error is None else logging.ERROR
    if not _LOGGER.isEnabledFor(level):
        return
    if error is not None:
        facts["error"] = f"{type(error).__name__}: {error}"
    # Made here: the logger would look for the line of the caller, which costs more than all else of this.
    about = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord(_LOGGER.name, level, "", 0, event, None, about)
    record.facts = facts
    _LOGGER.handle(record)


class LineWriter(logging.Handler):
    """Writes lines to standard error, those of an event loop some at a time: each write is a system call."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        atexit.register(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line, and write it now or soon."""
        self._lines.append(self.format(record) + "\n")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None or record.levelno > logging.INFO or len(self._lines) >= _MOST_LINES:
            self.flush()
        elif len(self._lines) == 1:
            loop.call_later(_SOON_S, self.flush)

    def flush(self) -> None:
        """Write what there is."""
        with self.lock or nullcontext():
            lines, self._lines = self._lines, []
            if lines:
                sys.stderr.write("".join(lines))
                sys.stderr.flush()


class JsonLines(logging.Formatter):
    """Records as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        """The record in one line, a traceback in it."""
        seconds, fraction = divmod(record.created, 1)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(fraction * 1000):03d}Z",
            "level": record.levelname,
            "event": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return _JSON.encode(line)
