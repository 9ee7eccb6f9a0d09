"""What the command line does not take, in one line instead of tyro's box."""

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, TypeVar

import tyro

from mmrec.errors import UserError

try:
    # Not public: where a version of tyro has no such thing, its box and exit status 2 are what is left.
    from tyro._errors import on_parse_error
except ImportError:
    on_parse_error = None
try:
    # Not public either: without it commands take a quarter of a second longer to begin.
    from tyro import _resolver
except ImportError:
    _resolver = None

Result = TypeVar("Result")


@contextmanager
def without_typeguard() -> Iterator[None]:
    """Spare tyro the import of typeguard, which takes more time than all else that `--help` does.

    tyro imports it to ask whether "no default" fits a command, and takes no notice of the answer.
    """
    own = getattr(_resolver, "is_instance", None)
    if _resolver is None or own is None:
        yield
        return
    absent = (tyro.MISSING, tyro.MISSING_NONPROP)
    _resolver.is_instance = lambda typ, value: (
        not any(value is one for one in absent) and own(typ, value)
    )
    try:
        yield
    finally:
        _resolver.is_instance = own


class _Refused(Exception):
    def __init__(self, event: Any) -> None:
        self.event = event


def refused_in_one_line(program: Callable[[], Result]) -> Result:
    """Run a program that reads `sys.argv` by tyro; what tyro refuses becomes a `UserError`."""
    if on_parse_error is None:
        return program()
    try:
        with on_parse_error(_stop):
            return program()
    except _Refused as refused:
        event = refused.event
    unknown = _unknown(event)
    raise UserError(_not_known(unknown, program) if unknown else _complaint(event))


def _stop(event: Any) -> None:
    if _unknown(event) or _complaint(event):
        raise _Refused(event)


def _unknown(event: Any) -> str | None:
    """The first word on the command line that is no flag, command or value; a flag before all others."""
    # A misspelt flag that is required is unknown and missing at once.
    words = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", ())
    return next((word for word in words if word.startswith("--")), next(iter(words), None))


def _not_known(word: str, program: Callable[[], object]) -> str:
    kind = "flag" if word.startswith("-") else "argument"
    close = _close(word.split("=")[0].replace("_", "-"), _names_in_help(program))
    return f"{word}: not a known {kind}{close or '; --help lists all'}"


def _complaint(event: Any) -> str | None:
    """What tyro found, and what it expected there; None where that is left to tyro."""
    kind = type(event).__name__
    if kind == "MissingArgs":
        missing = (
            part.arg.lowered.metavar if part.arg.is_positional() else part.arg.display_name()
            for part in event.missing_arguments
        )
        return f"expected {', '.join(missing)}; found none"
    if kind == "MissingSubcommand":
        return f"expected one of {', '.join(event.subcommand_spec.parser_from_name)}; found none"
    if kind == "InvalidChoice":
        choices, close = ", ".join(event.choices), _close(event.value, event.choices)
        return f"{event.argument.display_name()} {event.value}: expected one of {choices}{close}"
    if kind in ("BadValue", "InstantiationFailure") and event.argument is not None:
        name, wanted = event.argument.display_name(), event.argument.lowered.metavar
        # tyro quotes what it was given at the end of its first line.
        quoted = re.findall(r"'([^']*)'", getattr(event, "message", "").partition("\n")[0])
        return f"{name} {quoted[-1] if quoted else ''}".rstrip() + f": expected {wanted}"
    return None


def _close(word: str, names: tuple[str, ...]) -> str:
    """The names that may have been meant, for the end of a complaint."""
    # A field's name alone, without that of the part it belongs to, is what is forgotten most often.
    parts = [name for name in names if name.endswith(f".{word.lstrip('-')}")]
    close = parts or get_close_matches(word, names, n=3)
    return f"; close: {', '.join(close)}" if close else ""


def _names_in_help(program: Callable[[], object]) -> tuple[str, ...]:
    """The flags and commands that --help lists at this place of the command line."""
    given = sys.argv
    # tyro draws other boxes where text is not UTF-8.
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    commands = takewhile(lambda word: not word.startswith("-"), given[1:])
    sys.argv = [given[0], *commands, "--help"]
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            program()
    finally:
        sys.argv = given
    printed.seek(0)
    return tuple(re.findall(r"^│ (?:(?=--)| +• )([\w.-]+)", printed.read(), re.MULTILINE))
