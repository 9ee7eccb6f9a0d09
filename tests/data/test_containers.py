"""Headers of files that PyAV wrote, and of files that lie."""

import io
import struct

import av
import numpy as np
import pytest
from clips import (
    MOVIE_TABLES,
    box,
    displayed,
    moving_square,
    numbered,
    overwritten,
    resized,
    timeless,
    write_captions,
    write_clip,
    write_sound,
)
from PIL import Image

from mmrec.data import containers
from mmrec.data.containers import (
    Header,
    read_header,
    read_key_times,
    repaired,
    sniff,
    webp_durations,
)
from mmrec.errors import MediaError

LIVE = {"live": "1"}


def saved(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def clip(tmp_path, name: str, **options) -> bytes:
    frames = numbered(24, height=48, width=80)
    return write_clip(tmp_path / name, frames, 8, **options).read_bytes()


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "options", "num_frames"),
    [
        ("clip.mp4", "mp4", {}, 24),
        ("clip.mov", "mp4", {"codec": "mpeg4"}, 24),
        ("front.mp4", "mp4", {"container_options": {"movflags": "faststart"}}, 24),
        ("parts.mp4", "mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}, 0),
        ("clip.mkv", "matroska", {}, 180),  # three seconds at the rate that is assumed
        ("clip.webm", "matroska", {"codec": "libvpx"}, 180),
        ("clip.avi", "avi", {"codec": "mpeg4"}, 3000),  # PyAV writes a rate of 1000 a second
    ],
)
def test_what_a_header_says(tmp_path, name, kind, options, num_frames, as_bytes):
    data = clip(tmp_path, name, **options)
    header = read_header(data if as_bytes else tmp_path / name)
    assert (header.kind, header.has_video, header.has_text) == (kind, True, False)
    assert (header.width, header.height) == (80, 48)
    assert header.num_frames == pytest.approx(num_frames, rel=0.05)
    assert (header.mirrored, header.frame_s, header.edits) == (None, None, ())
    if kind == "mp4" and num_frames:
        assert header.shown_s == pytest.approx(3, abs=0.01)


def test_what_a_file_is_by_its_first_bytes():
    dot = Image.new("RGB", (2, 2))
    formats = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "AVIF")
    kinds = [sniff(saved(dot, format=name)[:64]) for name in formats]
    assert kinds == ["image", "image", "image", "image", "gif", "webp", "image"]
    for text in (b"#EXTM3U\nhttp://127.0.0.1/x.ts\n", b"ffconcat version 1.0\nfile x", b""):
        assert sniff(text) == "text"
    for sound in (b"ID3\4\0\0", b"fLaC\0\0", b"RIFF\0\0\0\0WAVEfmt "):
        assert sniff(sound) == "audio"
    assert sniff(b"FLV\1\5\0\0\0\t") == "other"


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mov", "sound.mkv", "sound.avi"])
def test_sound_alone(tmp_path, name):
    assert not read_header(write_sound(tmp_path / name)).has_video


@pytest.mark.parametrize(("name", "codec"), [("c.mp4", "mov_text"), ("c.mkv", "subrip")])
def test_streams_of_captions(tmp_path, name, codec):
    assert read_header(write_captions(tmp_path / name, codec, [b"\0\2hi"])).has_text


@pytest.mark.parametrize(
    ("matrix", "mirrored"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), None),
        ((-1, 0, 0, -1), None),
        ((-1, 0, 0, 1), 0),
        ((1, 0, 0, -1), 0),
        ((0, 1, 1, 0), 1),
        ((0, -1, -1, 0), 1),
    ],
)
def test_mirrored_pictures(tmp_path, matrix, mirrored):
    data = clip(tmp_path, "clip.mp4")
    assert read_header(displayed(data, matrix)).mirrored == mirrored


def test_claims_of_a_thousand_million_frames(tmp_path):
    many = 10**9
    mp4 = clip(tmp_path, "clip.mp4")
    times = resized(mp4, (*MOVIE_TABLES, b"stts"), struct.pack(">IIII", 0, 1, many, 1))
    sizes = resized(mp4, (*MOVIE_TABLES, b"stsz"), struct.pack(">III", 0, 1, many))
    mkv = clip(tmp_path, "clip.mkv")
    place = mkv.index(b"\x44\x89\x88") + 3
    hours = overwritten(mkv, place, struct.pack(">d", many * 1000 / 60))
    avi = clip(tmp_path, "clip.avi", codec="mpeg4")
    length = overwritten(avi, avi.index(b"strh") + 8 + 32, struct.pack("<I", many))
    for data in (times, sizes, hours, length):
        assert read_header(data).num_frames >= many
    endless = overwritten(mkv, place, struct.pack(">d", float("inf")))
    assert read_header(endless).num_frames >= many
    assert read_header(overwritten(mkv, place, struct.pack(">d", float("nan")))).num_frames == 0


def test_a_table_without_times_is_repaired(tmp_path):
    whole = clip(tmp_path, "clip.mp4", options={"bf": "0"})
    broken = timeless(whole)
    header = read_header(broken)
    assert header.frame_s == pytest.approx(1 / 8)
    assert header.shown_s is None  # the edit list ended with the table
    mended = b"".join(repaired(broken, header.edits))
    start, end = box(mended, *MOVIE_TABLES, b"stts")
    rows = np.frombuffer(mended[start + 8 : end], ">u4").reshape(-1, 2)
    assert rows[:, 0].sum() == 24
    assert len(set(rows[:, 1])) == 1
    assert read_header(mended).edits == ()
    assert read_header(mended).shown_s == pytest.approx(3, abs=0.01)
    assert len(mended) == len(broken)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "front.mp4", "parts.mp4", "clip.avi"])
@pytest.mark.parametrize("bf", ["0", "2"])
def test_when_keyframes_are_shown(tmp_path, name, bf):
    movflags = {"front.mp4": "faststart", "parts.mp4": "frag_keyframe+empty_moov"}.get(name, "")
    path = write_clip(
        tmp_path / name,
        numbered(60),
        25,
        codec="mpeg4",
        options={"g": "20", "bf": bf},
        container_options={"movflags": movflags} if movflags else {},
    )
    times = read_key_times(path)
    if name in ("parts.mp4", "clip.avi"):
        assert times is None
        return
    assert times is not None
    with av.open(str(path)) as container:
        expected = [frame.time for frame in container.decode(video=0) if frame.key_frame]
    np.testing.assert_allclose(times, np.array(expected) - expected[0], atol=2e-3)
    assert np.array_equal(times, read_key_times(path.read_bytes()))


@pytest.mark.parametrize(("name", "codec"), [("live.mkv", "libx264"), ("live.webm", "libvpx")])
def test_a_recording_without_a_duration_is_given_one(tmp_path, name, codec):
    data = clip(tmp_path, name, codec=codec, container_options=LIVE)
    header = read_header(data)
    assert header.num_frames == 0
    mended = b"".join(repaired(tmp_path / name, header.edits))
    assert read_header(mended) == Header(kind="matroska", width=80, height=48, num_frames=60)
    assert mended.endswith(data[-500:])


def test_headers_that_make_no_sense_are_no_errors(tmp_path):
    rng = np.random.default_rng(0)
    clips = [
        clip(tmp_path, "clip.mp4"),
        clip(tmp_path, "clip.mkv"),
        clip(tmp_path, "clip.avi", codec="mpeg4"),
        saved(Image.new("RGB", (4, 4)), format="GIF"),
    ]
    for data in clips:
        kind = read_header(data).kind
        for size in (12, 40, 100, len(data) // 2, len(data) - 50):
            assert read_header(data[:size]).kind == kind
        for _ in range(50):
            noisy = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(16, len(data), 200)
            noisy[places] = rng.integers(0, 256, 200)
            read_key_times(noisy.tobytes())
            assert read_header(noisy.tobytes()).kind == kind


def test_headers_that_are_made_to_be_slow(monkeypatch):
    monkeypatch.setattr(containers, "MAX_HEADER_ITEMS", 1000)
    empty = struct.pack(">I4s", 8, b"free")
    boxes = struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + empty * 2000
    nested = struct.pack(">I4s", 8 + len(boxes), b"moov") + boxes
    elements = bytes.fromhex("1a45dfa380") + bytes.fromhex("ec80") * 2000
    for data in (boxes, nested, elements, b"RIFF\0\0\0\0AVI " + b"JUNK\0\0\0\0" * 2000):
        with pytest.raises(MediaError, match="damaged header"):
            read_header(data)
    deep = b""
    for _ in range(2000):
        deep = struct.pack(">I4s", 8 + len(deep), b"mdia") + deep
    trak = struct.pack(">I4s", 8 + len(deep), b"trak") + deep
    moov = struct.pack(">I4s", 8 + len(trak), b"moov") + trak
    assert read_header(struct.pack(">I4s", 8, b"free") + moov).kind == "mp4"


def test_how_long_the_pictures_of_a_webp_are_shown():
    pictures = [Image.fromarray(frame) for frame in moving_square(4)]
    still = saved(pictures[0], format="WEBP")
    moving = saved(
        pictures[0],
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=[100, 0, 250, 1000],
    )
    assert webp_durations(still) == []
    assert webp_durations(moving) == [0.1, 0.1, 0.25, 1.0]


def element(name: str, *inside: bytes) -> bytes:
    data = b"".join(inside)
    return bytes.fromhex(name) + (len(data) | 1 << 56).to_bytes(8, "big") + data


@pytest.mark.parametrize(
    ("shown", "aspect"),
    [((1024, 576), 64 / 45), ((16, 9), 64 / 45), ((0, 0), 1.0), ((1, 576), 1.0)],
)
def test_the_shape_of_the_pixels_of_a_matroska_file(shown, aspect):
    sizes = zip(("b0", "ba", "54b0", "54ba"), (720, 576, *shown), strict=True)
    video = element("e0", *(element(name, size.to_bytes(2, "big")) for name, size in sizes))
    track = element("ae", element("d7", b"\1"), element("83", b"\1"), video)
    file = element("1a45dfa3") + element("18538067", element("1654ae6b", track))
    header = read_header(file)
    assert (header.kind, header.width, header.height) == ("matroska", 720, 576)
    assert header.pixel_aspect == pytest.approx(aspect)
