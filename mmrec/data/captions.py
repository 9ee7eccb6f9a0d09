"""Caption files to plain text: SubRip (.srt), WebVTT (.vtt), and the lines of subtitle streams."""

import html
import re
from collections.abc import Iterable, Iterator

from mmrec.errors import MediaError

_TIMING = re.compile(r"\s*(?:\d+:)?\d+:\d+[.,]\d+\s*-->\s*(?:\d+:)?\d+:\d+[.,]\d+")
# <i>, </font>, <c.yellow>, <v Ann>, <00:00:01.500>, and the {\an8} of SubStation Alpha.
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|</?[\d:.]+>|\{\\[^{}]*\}")


def parse_captions(data: bytes) -> str | None:
    """The words of an .srt or .vtt file, a line of a caption a line; None where it says nothing.

    Raises `MediaError` where it is neither UTF-8 nor UTF-16, or holds no captions.
    """
    text = _decode(data)
    cues = list(_cues(text.splitlines()))
    if not cues and text.strip() and not text.startswith("WEBVTT"):
        raise MediaError(
            "damaged captions", "there is no line of the form 00:00:01,000 --> 00:00:02,000"
        )
    return join_cues(cues)


def join_cues(cues: Iterable[list[str]]) -> str | None:
    """Captions, each a list of lines, as one text without tags; None where there are no words.

    A line that the caption before it showed too is said once: rolling captions show each line two or
    three times on its way up.
    """
    said: list[str] = []
    before: list[str] = []
    for cue in cues:
        lines = [line for line in map(_clean, cue) if line]
        for line in lines:
            if line not in before:
                said.append(line)
        before = lines or before  # Between two captions MP4 has an empty one.
    return "\n".join(said) or None


def _decode(data: bytes) -> str:
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MediaError("damaged captions", f"not in UTF-8: {error.reason}") from None
    if "\0" in text:
        raise MediaError("damaged captions", "there are zero bytes in the text")
    return text


def _cues(lines: Iterable[str]) -> Iterator[list[str]]:
    """The lines of text under each line of times, up to the next empty line.

    What stands elsewhere is no text: headers, numbers of captions, notes and styles.
    """
    cue: list[str] | None = None
    for line in lines:
        if _TIMING.match(line):
            if cue is not None:  # There was no empty line: the last one is this caption's number.
                yield cue[:-1] if cue and cue[-1].strip().isdigit() else cue
            cue = []
        elif cue is not None and line.strip():
            cue.append(line)
        elif cue is not None:
            yield cue
            cue = None
    if cue is not None:
        yield cue


def _clean(line: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", line)).split())
