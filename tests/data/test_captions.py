"""Caption files as people write them, and as they are damaged."""

import pytest

from mmrec.data.captions import join_cues, parse_captions
from mmrec.errors import MediaError

SRT = """1
00:00:00,000 --> 00:00:02,500
<i>A red</i> <font color="#fff">dress</font>

2
00:00:02,500 --> 00:00:04,000 X1:40 X2:600
{\\an8}3 < 5 &amp; 7 > 2
for 20

"""

VTT = """WEBVTT Kind: captions

NOTE this is
not said

STYLE
::cue { color: lime }

intro
00:01.000 --> 00:02.000 align:start position:0%
<v Ann><c.yellow>Two</c> <00:00:01.500>shirts

00:00:02.000 --> 01:00:03.000
and&nbsp;a   hat
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_numbers_times_and_tags_are_taken_off(line_end, encoding):
    data = SRT.replace("\n", line_end).encode(encoding)
    assert parse_captions(data) == "A red dress\n3 < 5 & 7 > 2\nfor 20"


def test_headers_notes_styles_and_names_are_not_said():
    assert parse_captions(VTT.encode()) == "Two shirts\nand a hat"


def test_captions_without_empty_lines_between():
    lines = [
        "1",
        "00:00:01,000 --> 00:00:02,000",
        "one",
        "2",
        "00:00:02,000 --> 00:00:03,000",
        "two",
    ]
    assert parse_captions("\n".join(lines).encode()) == "one\ntwo"


def test_rolling_captions_are_said_once():
    cues = [
        ["a dress"],
        ["a dress", "<c>in</c> red"],
        ["in red", " "],
        ["in red", "and blue"],
        [],
        ["and blue"],
        ["a dress"],  # said again after something else
    ]
    assert join_cues(cues) == "a dress\nin red\nand blue\na dress"


@pytest.mark.parametrize(
    "data", [b"", b"  \n", b"WEBVTT\n\n", b"1\n00:00:00,000 --> 00:00:01,000\n<i></i>\n"]
)
def test_files_that_say_nothing(data):
    assert parse_captions(data) is None


@pytest.mark.parametrize(
    "data",
    [
        b"<html>404: not found</html>",
        b"1\n00:00:00,000 --> 00:00:01,000\ncaf\xe9\n",  # Latin-1
        b"1\n00:00:00,000 --> 00:00:01,000\nzero\0s\n",
        b"\xff\xfe\x00",  # half a character of UTF-16
        b"\x1aE\xdf\xa3 a film",
    ],
)
def test_damaged_files(data):
    with pytest.raises(MediaError) as caught:
        parse_captions(data)
    assert caught.value.reason == "damaged captions"
