"""Decoding against PyAV and Pillow, and every way in which a file can be bad."""

import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from zlib import compress, crc32

import av
import fsspec
import numpy as np
import pytest
from clips import (
    MOVIE_TABLES,
    box,
    displayed,
    frame_number,
    moving_square,
    numbered,
    overwritten,
    read_clip,
    resized,
    timeless,
    write_captions,
    write_clip,
    write_sound,
)
from PIL import Image

from mmrec.data import media, sources
from mmrec.data.containers import read_header
from mmrec.data.media import (
    Clip,
    FrameConfig,
    decode_jpeg,
    encode_jpeg,
    read_image,
    read_subtitles,
    read_video,
    resize_shorter,
)
from mmrec.errors import MediaError, UserError


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean())


def read(source, num_frames: int = 8, **options) -> Clip:
    return read_video(source, FrameConfig(num_frames=num_frames, **options))


def middles(total: int, count: int) -> list[int]:
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def numbers(clip: Clip) -> list[int]:
    return [frame_number(frame) for frame in clip.frames]


# Videos: frames and times


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.mp4", "libx264", {}),
        ("groups.mp4", "libx264", {"g": "5", "bf": "2"}),
        ("clip.mkv", "libx264", {"g": "5"}),
        ("clip.webm", "libvpx-vp9", {}),
        ("old.mp4", "mpeg4", {"bf": "0"}),
    ],
)
def test_frames_and_times_are_those_of_pyav(tmp_path, name, codec, options, as_bytes):
    path = write_clip(tmp_path / name, moving_square(24), 8, codec=codec, options=options)
    all_frames, all_times = read_clip(path)
    clip = read(path.read_bytes() if as_bytes else path, 6)
    wanted = [2, 6, 10, 14, 18, 22]  # the middles of six spans of four frames
    assert clip.times == pytest.approx([all_times[i] for i in wanted], abs=1e-3)
    assert (clip.width, clip.height, clip.num_frames) == (64, 64, 24)
    assert clip.duration == pytest.approx(3, abs=2e-3)
    for frame, i in zip(clip.frames, wanted, strict=True):
        assert frame.shape == (64, 64, 3)
        assert frame.dtype == np.uint8
        assert difference(frame, all_frames[i]) < 1
        assert difference(frame, all_frames[i]) < difference(frame, all_frames[i - 1])


OPEN = {"g": "12", "x264-params": "open-gop=1:bframes=3:b-pyramid=2:scenecut=0"}
PARTS = {"movflags": "frag_keyframe+empty_moov"}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov"])
def test_pixels_that_are_not_square_become_so(tmp_path, name):
    wide = write_clip(tmp_path / name, numbered(8, height=64, width=48), aspect=Fraction(16, 9))
    whole, small = read(wide, 2), read_video(wide, FrameConfig(num_frames=2), size=32)
    assert (whole.width, whole.height) == (85, 64)
    assert [frame.shape for frame in whole.frames] == [(64, 85, 3)] * 2
    assert [frame.shape for frame in small.frames] == [(32, 42, 3)] * 2
    assert numbers(whole) == numbers(small) == [2, 6]
    if name == "clip.mp4":  # A quarter turn: what was wide is high.
        turned = displayed(wide.read_bytes(), (0, 1, -1, 0))
        assert (read(turned).width, read(turned).height) == (64, 85)
        # Nobody made such pixels.
        flat = overwritten(wide.read_bytes(), wide.read_bytes().index(b"pasp") + 4, b"\xff" * 4)
        assert (read(flat).width, read(flat).height) == (48, 64)


@pytest.mark.parametrize("name", ["open.mp4", "open.mkv"])
@pytest.mark.parametrize("length", [4, 10, 12, 15])
def test_every_keyframe_of_short_open_groups(tmp_path, name, length):
    group = f"keyint={length}:min-keyint={length}:open-gop=1:bframes=3:scenecut=0"
    options = {"x264-params": group}
    clip = write_clip(tmp_path / name, numbered(240), 25, options=options)
    with av.open(str(clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.is_keyframe]
    assert len(packets) == 240 / length
    keys = list(range(0, 240, length))
    assert numbers(read(clip, 100, policy="keyframes")) == keys
    few = numbers(read(clip, 4, policy="keyframes"))
    assert few == [keys[(2 * i + 1) * len(keys) // 8] for i in range(4)]


# Where groups of pictures are open, where there are no times or no duration, decord alone gives frames
# of other places without a word.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("closed.mp4", {"options": {"g": "12"}}),
        ("short.mp4", {"options": {"g": "2", "bf": "1"}}),
        ("keys.mkv", {"options": {"g": "1"}}),
        ("open.mp4", {"options": OPEN}),
        ("open.mkv", {"options": OPEN}),
        ("open.mov", {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}),
        ("parts.mp4", {"options": {"g": "12"}, "container_options": PARTS}),
        ("open_parts.mp4", {"options": OPEN, "container_options": PARTS}),
        ("live.mkv", {"options": {"g": "12"}, "container_options": {"live": "1"}}),
        ("live.webm", {"codec": "libvpx", "container_options": {"live": "1"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "8"}}),
        ("plain.avi", {"codec": "mpeg4", "options": {"g": "12"}}),
        ("timeless.avi", {"codec": "libx264", "options": {"g": "12"}}),
        ("film.flv", {"codec": "flv", "options": {"g": "12"}}),
    ],
)
def test_each_frame_is_the_one_that_was_asked_for(tmp_path, name, options):
    path = write_clip(tmp_path / name, numbered(48), 25, **options)
    for num_frames in (5, 8, 48):
        clip = read(path, num_frames)
        assert numbers(clip) == middles(48, num_frames)
        expected = [i / 25 for i in middles(48, num_frames)]
        assert clip.times == pytest.approx(expected, abs=3e-3)
    assert clip.duration == pytest.approx(48 / 25, abs=5e-3)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.mov"])
def test_open_groups_are_found_in_the_index_of_the_file(tmp_path, name):
    options = {"g": "40", "bf": "2"}
    path = write_clip(tmp_path / name, numbered(160), 25, codec="mpeg4", options=options)
    reel = media._VideoReel(path, read_header(path), None)
    for i in np.random.default_rng(0).permutation(160)[:60].tolist():
        assert [(at, frame_number(frame)) for at, frame in reel.frames([i])] == [(i, i)]
    assert not reel._in_order
    with av.open(str(path)) as container:
        keys = [i for i, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    clip = read(path, 100, policy="keyframes")
    assert numbers(clip) == [round(t * 25) for t in clip.times]
    assert set(numbers(clip)) <= set(keys)
    assert len(clip.frames) >= 4


def test_colours_are_those_that_were_drawn(tmp_path):
    drawn = moving_square(8, color=(220, 30, 40))
    clip = read(write_clip(tmp_path / "red.mp4", drawn))
    for frame, original in zip(clip.frames, drawn, strict=True):
        assert difference(frame, original) < 6
        square = frame[(original == (220, 30, 40)).all(-1)].mean(0)
        assert square[0] > square[1] + 100  # red, not blue
        assert square[0] > square[2] + 100


@pytest.mark.parametrize(
    ("name", "shape", "codec", "pix_fmt", "options"),
    [
        ("ten_bits.mp4", (64, 48), "libx264", "yuv420p10le", {}),
        ("interlaced.mp4", (64, 48), "libx264", "yuv420p", {"flags": "+ildct+ilme"}),
        ("alpha.webm", (64, 48), "libvpx-vp9", "yuva420p", {}),
        ("alpha.mov", (64, 48), "prores_ks", "yuva444p10le", {}),
        ("raw.avi", (64, 48), "rawvideo", "bgr24", {}),
        ("odd.mkv", (47, 33), "ffv1", "yuv444p", {}),
        ("narrow.mkv", (40, 3), "ffv1", "yuv444p", {}),
        ("column.avi", (40, 1), "rawvideo", "bgr24", {}),
        ("small.mkv", (16, 16), "ffv1", "yuv444p", {}),
    ],
)
def test_pixel_formats_and_sizes(tmp_path, name, shape, codec, pix_fmt, options):
    drawn = numbered(8, height=shape[0], width=shape[1])
    path = write_clip(tmp_path / name, drawn, codec=codec, pix_fmt=pix_fmt, options=options)
    clip = read(path, 4)
    assert numbers(clip) == [1, 3, 5, 7]
    for frame, i in zip(clip.frames, [1, 3, 5, 7], strict=True):
        assert frame.shape == (*shape, 3)
        assert difference(frame, drawn[i]) < 8


@pytest.mark.parametrize("width", [64, 48])  # decord gives rows of 48 with their padding
@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    ],
)
def test_pictures_are_turned_and_mirrored(tmp_path, matrix, turn, width):
    square = [np.ascontiguousarray(frame[:48, :width]) for frame in moving_square(8)]
    path = write_clip(tmp_path / "clip.mp4", square)
    upright = read_clip(path)[0]
    clip = read(displayed(path.read_bytes(), matrix), 2)
    assert (clip.height, clip.width) == turn(upright[0]).shape[:2]
    for frame, i in zip(clip.frames, [2, 6], strict=True):
        np.testing.assert_array_equal(frame, turn(upright[i]))


def shown_at(times: list[float], moments: list[float]) -> list[int]:
    """Which frame is shown at each moment, each frame once: the slow way."""
    found = [max(i for i, start in enumerate(times) if start <= moment) for moment in moments]
    return sorted(set(found))


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_uneven_times(tmp_path, name):
    times_ms = [0, 40, 400, 450, 500, 1200, 1300, 1310, 2000, 2100, 2110, 2120, 5000, 5100]
    path = write_clip(tmp_path / name, numbered(14), times_ms=times_ms)
    times = [t / 1000 for t in times_ms]
    for num_frames in range(1, 14):
        clip = read(path, num_frames)
        moments = [(i + 0.5) * clip.duration / num_frames for i in range(num_frames)]
        assert numbers(clip) == shown_at(times, moments)
        assert clip.times == pytest.approx([times[i] for i in numbers(clip)], abs=2e-3)
    assert numbers(read(path, 14)) == list(range(14))
    assert 5.1 < clip.duration < 8


def test_frames_at_a_rate(tmp_path):
    even = write_clip(tmp_path / "even.mp4", numbered(40), 8)  # five seconds
    for rate, expected in [
        (1.0, [4, 12, 20, 28, 36]),
        (2.0, [2, 6, 10, 14, 18, 22, 26, 30, 34, 38]),
    ]:
        assert numbers(read(even, 10, frames_per_second=rate)) == expected
    assert numbers(read(even, 9, frames_per_second=2.0)) == middles(40, 9)  # more than there may be
    assert numbers(read(even, 5, frames_per_second=0.01)) == [20]
    assert numbers(read(even, 100, frames_per_second=50.0)) == list(range(40))
    uneven = write_clip(tmp_path / "uneven.mp4", numbered(4), times_ms=[0, 2400, 3000, 3100])
    clip = read(uneven, 8, frames_per_second=1.0)
    moments = [i + 0.5 for i in range(8) if i + 0.5 < clip.duration]
    assert numbers(clip) == shown_at([0, 2.4, 3.0, 3.1], moments)


@pytest.mark.parametrize("num_frames_in_clip", [1, 3, 5])
def test_a_short_clip_gives_all_its_frames(tmp_path, num_frames_in_clip):
    path = write_clip(tmp_path / "short.mp4", numbered(num_frames_in_clip))
    for policy in ("uniform", "scenes"):
        clip = read(path, 8, policy=policy)
        assert numbers(clip) == list(range(num_frames_in_clip))
        assert clip.times == sorted(set(clip.times))
    assert clip.duration == pytest.approx(num_frames_in_clip / 8, abs=2e-3)


def test_frames_of_any_number_are_at_the_middles(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(11), 10)
    for num_frames in range(1, 12):
        clip = read(path, num_frames)
        middle = [int((i + 0.5) * 11 / num_frames) for i in range(num_frames)]
        assert numbers(clip) == middle
        assert clip.times == pytest.approx([i / 10 for i in middle], abs=1e-3)


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (0, 1, 1, 0)])
def test_frames_are_brought_down_as_they_are_decoded(tmp_path, matrix):
    path = write_clip(tmp_path / "clip.mp4", moving_square(8, size=256))
    data = displayed(path.read_bytes(), matrix)
    for policy in ("uniform", "scenes"):
        whole = read(data, 2, policy=policy)
        small = read_video(data, FrameConfig(num_frames=2, policy=policy), size=36)
        assert (small.width, small.height, small.times) == (256, 256, whole.times)
        for frame, other in zip(small.frames, whole.frames, strict=True):
            assert frame.shape == (36, 36, 3)
            assert difference(frame, resize_shorter(other, 36)) < 4
    as_it_is = read_video(data, FrameConfig(num_frames=2), size=300)
    np.testing.assert_array_equal(as_it_is.frames, read(data, 2).frames)


@pytest.mark.parametrize(
    ("shape", "expected"), [((96, 160), (40, 67)), ((160, 96), (67, 40)), ((64, 300), (40, 188))]
)
def test_smaller_frames_keep_their_shape(tmp_path, shape, expected):
    drawn = numbered(8, height=shape[0], width=shape[1])
    clip = read_video(write_clip(tmp_path / "clip.mkv", drawn), FrameConfig(num_frames=4), size=40)
    assert numbers(clip) == [1, 3, 5, 7]
    assert {frame.shape for frame in clip.frames} == {(*expected, 3)}
    assert resize_shorter(drawn[0], 40).shape == (*expected, 3)


@pytest.mark.parametrize(
    "config", [{"num_frames": 0}, {"num_frames": 101}, {"frames_per_second": 0.0}]
)
def test_configs_that_ask_for_nothing(config):
    with pytest.raises(UserError, match="expected"):
        FrameConfig(**config)


def test_an_hour_is_not_decoded_from_end_to_end(tmp_path):
    frames = numbered(256, height=320, width=320)
    path = write_clip(
        tmp_path / "hour.mp4",
        [frames[i % 256] for i in range(3600)],
        1,
        codec="mpeg4",
        options={"g": "60", "bf": "0", "b": "20000"},
    )
    started = time.process_time()
    clip = read(path)
    took = time.process_time() - started
    assert numbers(clip) == [i % 256 for i in middles(3600, 8)]
    assert clip.times == pytest.approx(middles(3600, 8), abs=1e-2)
    assert clip.duration == pytest.approx(3600, abs=1)
    started = time.process_time()
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3600
    assert took < 0.75 * (time.process_time() - started)  # a quarter, on a quiet machine


# Keyframes and scenes


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.webm"])
def test_keyframes(tmp_path, name):
    codec = "libvpx" if name.endswith("webm") else "libx264"
    options = {"g": "6", "keyint_min": "6", "sc_threshold": "0"}
    path = write_clip(tmp_path / name, numbered(48), 8, codec=codec, options=options)
    clip = read(path, 100, policy="keyframes")
    assert numbers(clip) == list(range(0, 48, 6))
    assert clip.times == pytest.approx([i / 8 for i in range(0, 48, 6)], abs=2e-3)
    assert numbers(read(path, 2, policy="keyframes")) == [12, 36]
    at_rate = read(path, 100, policy="keyframes", frames_per_second=0.5)
    assert numbers(at_rate) == [0, 18, 36]  # at least two seconds apart
    assert numbers(read(path, 1, policy="keyframes", frames_per_second=0.5)) == [18]


def scenes(path: Path, lengths: list[int]) -> Path:
    """A clip of scenes of one colour each, with a square that moves through them."""
    colors = [(30, 30, 30), (200, 40, 40), (40, 40, 200), (220, 220, 220), (40, 180, 40)]
    frames = []
    for color, length in zip(colors, lengths, strict=False):
        for i in range(length):
            frame = np.full((64, 64, 3), color, np.uint8)
            frame[28:32, i % 60 : i % 60 + 4] = 128
            frames.append(frame)
    return write_clip(path, frames, 8)


def test_scenes_are_found_however_short(tmp_path):
    path = scenes(tmp_path / "scenes.mp4", [60, 3, 60, 4, 13])
    starts = np.cumsum([0, 60, 3, 60, 4]) / 8
    clip = read(path, 5, policy="scenes")
    assert list(np.searchsorted(starts, clip.times, "right")) == [1, 2, 3, 4, 5]
    assert (
        len(set(np.searchsorted(starts, read(path, 5).times, "right"))) < 5
    )  # uniform misses some
    assert read(path, 5, policy="scenes").times == clip.times
    three = read(path, 3, policy="scenes")
    assert three.times[0] == clip.times[0] < 0.5  # the first is near the start
    assert len(set(np.searchsorted(starts, three.times, "right"))) == 3
    at_rate = read(path, 5, policy="scenes", frames_per_second=0.1)  # of 17.5 seconds
    assert len(at_rate.frames) == 2


def test_a_scene_that_stays_gives_one_frame(tmp_path):
    path = write_clip(tmp_path / "still.mp4", [moving_square(1)[0]] * 40)
    clip = read(path, 8, policy="scenes")
    assert len(clip.frames) == 1
    assert clip.times[0] < 0.5


def test_scenes_of_large_frames_are_decoded_again(tmp_path, monkeypatch):
    path = scenes(tmp_path / "scenes.mp4", [20, 20, 20])
    expected = read(path, 3, policy="scenes")
    monkeypatch.setattr(media, "_KEPT_BYTES", 0)
    again = read(path, 3, policy="scenes")
    assert again.times == expected.times
    np.testing.assert_array_equal(again.frames, expected.frames)


# Still images and animations as videos


def saved(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def animated(file_format: str, num_frames: int = 12, **options) -> bytes:
    pictures = [Image.fromarray(frame) for frame in numbered(num_frames)]
    return saved(
        pictures[0], format=file_format, save_all=True, append_images=pictures[1:], **options
    )


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("policy", ["uniform", "keyframes", "scenes"])
def test_a_still_image_is_a_clip_of_one_frame(tmp_path, file_format, policy):
    path = tmp_path / "clip.mp4"  # What it is shows in its content.
    path.write_bytes(saved(Image.fromarray(moving_square(1)[0][:48]), format=file_format))
    clip = read_video(path, FrameConfig(policy=policy), size=32)
    assert (clip.times, clip.duration, clip.num_frames) == ([0.0], 0.0, 1)
    assert (clip.width, clip.height) == (64, 48)
    np.testing.assert_array_equal(clip.frames, [resize_shorter(read_image(path), 32)])


def test_suffixes_do_not_matter(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", numbered(8))
    path = path.rename(tmp_path / "clip.jpg")
    assert numbers(read(path)) == list(range(8))
    colon = path.rename(tmp_path / "http:clip")  # no protocol either
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        assert numbers(read(colon.name)) == list(range(8))
    finally:
        os.chdir(here)


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
@pytest.mark.parametrize("policy", ["uniform", "keyframes"])
def test_animations(tmp_path, file_format, policy, as_bytes):
    data = animated(file_format, duration=100)
    path = tmp_path / "animation"
    path.write_bytes(data)
    clip = read(data if as_bytes else path, 4, policy=policy)
    assert numbers(clip) == [1, 4, 7, 10]
    assert clip.times == pytest.approx([0.1, 0.4, 0.7, 1.0])
    assert (clip.duration, clip.num_frames) == (pytest.approx(1.2), 12)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
def test_animations_of_uneven_times(file_format):
    durations = [50, 400, 50, 50, 1000, 50, 50, 50, 300, 50, 50, 900]
    data = animated(file_format, duration=durations)
    starts = [sum(durations[:i]) / 1000 for i in range(12)]
    clip = read(data, 5)
    assert numbers(clip) == shown_at(starts, [(i + 0.5) * 3 / 5 for i in range(5)])
    scene = read(data, 12, policy="scenes")
    assert numbers(scene) == list(range(12))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
def test_animations_are_laid_over_white(file_format):
    pictures = []
    for left in (4, 24):
        picture = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
        picture.paste((255, 0, 0, 255), (left, 4, left + 16, 20))
        for corner in ((0, 0), (47, 47)):  # WebP forgets alpha where no picture of it has any
            picture.putpixel(corner, (0, 0, 0, 3 if file_format == "WEBP" else 0))
        pictures.append(picture)
    options = {"disposal": 2} if file_format == "GIF" else {"lossless": True}
    data = saved(
        pictures[0], format=file_format, save_all=True, append_images=pictures[1:], **options
    )
    for frame, left in zip(read(data, 2).frames, (4, 24), strict=True):
        expected = np.full((48, 48, 3), 255, np.uint8)
        expected[4:20, left : left + 16] = (255, 0, 0)
        assert difference(frame, expected) < 1


def long_gif(num_frames: int) -> bytes:
    """A GIF whose frames each set one pixel of 16 x 16, along the rows, to white."""
    head = b"GIF89a" + struct.pack("<HHBBB", 16, 16, 0xF0, 0, 0) + bytes(3) + b"\xff\xff\xff"
    parts = [head]
    for i in range(num_frames):
        x, y = i % 16, i // 16 % 16
        parts.append(b"!\xf9\4\4\5\0\0\0," + struct.pack("<HHHHB", x, y, 1, 1, 0))
        parts.append(b"\2\2\x4c\1\0")
    return b"".join([*parts, b";"])


def test_a_gif_of_many_frames_is_read_in_seconds():
    started = time.perf_counter()
    clip = read(long_gif(100_000), 2)
    assert time.perf_counter() - started < 30
    assert clip.times == pytest.approx([1250, 3750], abs=0.1)
    few = read(long_gif(40), 2)
    assert [int((frame[..., 0] > 128).sum()) for frame in few.frames] == [11, 31]


# Videos that are bad


def test_sound_alone_is_no_video(tmp_path):
    sources: list = [write_sound(tmp_path / name) for name in ("a.mp4", "a.mkv", "a.avi", "a.mov")]
    sources += [write_sound(tmp_path / "raw.aac"), b"ID3\3\0\0\0\0\0\0" + bytes(500)]
    for source in sources:
        with pytest.raises(MediaError) as caught:
            read(source)
        assert caught.value.reason == "no video stream"


def test_a_play_list_is_not_followed(tmp_path):
    write_clip(tmp_path / "clip.ts", numbered(16))
    for number, text in enumerate(
        ["#EXTM3U\n#EXTINF:2,\nclip.ts\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile clip.ts\n"]
    ):
        path = tmp_path / f"list{number}.mp4"
        path.write_text(text)
        with pytest.raises(MediaError, match="not a video or image"):
            read(path)


def hollow(path: Path, missing: range) -> Path:
    """The clip with packets of H.264 filler, without a picture, in place of some of its own."""
    nothing = bytes([0, 0, 0, 5, 12, 255, 255, 255, 128])
    out = path.with_name("hollow" + path.suffix)
    with av.open(str(path)) as whole, av.open(str(out), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(p for p in whole.demux(video=0) if p.size):
            copy = av.Packet(nothing if number in missing else bytes(packet))
            copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
            copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
            copy.stream = stream
            container.mux(copy)
    return out


@pytest.mark.parametrize("with_pyav", [True, False])
@pytest.mark.parametrize("size", [None, 48])
def test_a_clip_with_a_fault_gives_the_frames_around_it(tmp_path, monkeypatch, with_pyav, size):
    options = {"g": "30", "sc_threshold": "0", "bf": "0"}
    drawn = numbered(120, height=240, width=320)
    path = write_clip(tmp_path / "whole.mp4", drawn, 30, options=options)
    config = FrameConfig(num_frames=24)  # 2, 7, 12, ...
    whole = read_video(path, config, size=size)
    if not with_pyav:
        monkeypatch.setattr(media, "find_spec", lambda name: None)
    for _ in range(3):
        clip = read_video(hollow(path, range(76, 81)), config, size=size)
        assert numbers(clip) == [round(t * 30) for t in clip.times]
        assert set(numbers(clip)) >= {2, 7, 12, 92, 97, 102, 107, 112, 117}
        assert not set(numbers(clip)) & {77, 82, 87}
        if with_pyav:  # which tells to the frame where the fault is, and gives the same pixels
            assert numbers(clip) == [n for n in numbers(whole) if n < 76 or n >= 90]
            same = [
                f for f, n in zip(whole.frames, numbers(whole), strict=True) if n in numbers(clip)
            ]
            np.testing.assert_array_equal(clip.frames, same)


def bad_videos(folder: Path) -> dict[str, Path | bytes]:
    good = write_clip(folder / "good.mp4", moving_square(40), options={"g": "10"}).read_bytes()
    start = good.index(b"mdat") + 4
    rng = np.random.default_rng(0)
    (folder / "empty.mp4").touch()
    webp = animated("WEBP")
    return {
        "missing": folder / "missing.mp4",
        "folder": folder,
        "empty": folder / "empty.mp4",
        "no bytes": b"",
        "noise": rng.bytes(5_000),
        "text": b"<html>404: not found</html>" * 20,
        "cut": good[: len(good) // 2],
        "zeros": good[:start] + bytes(len(good) - start),
        "overwritten": good[:start] + rng.bytes(3_000) + good[start + 3_000 :],
        "half an animation": webp[: len(webp) // 2],
    }


def test_bad_videos_are_media_errors_and_nothing_is_printed(tmp_path, capfd):
    for name, source in bad_videos(tmp_path).items():
        for policy in ("uniform", "keyframes", "scenes"):
            with pytest.raises(MediaError) as caught:
                read(source, 4, policy=policy)
            assert caught.value.reason in {
                "missing": {"file not found"},
                "folder": {"not a file"},
                "empty": {"empty file"},
                "no bytes": {"empty file"},
                "text": {"not a video or image"},
                "half an animation": {"cannot decode image", "cannot open image"},
            }.get(name, {"cannot open video", "cannot decode video"}), name
            assert str(tmp_path) not in caught.value.reason
            assert caught.value.detail.isprintable()
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_the_same_fault_is_told_in_the_same_words(tmp_path):
    good = write_clip(tmp_path / "good.mp4", numbered(40)).read_bytes()
    start = good.index(b"mdat") + 4
    bad = [
        b"\0noise",
        good[: len(good) // 2],
        good[:start] + bytes(len(good) - start),
        b"GIF89a",
        b"BM",
    ]
    for number, data in enumerate(bad):
        told = set()
        for source in (data, data, put(f"memory://words/{number}", data)):
            with pytest.raises(MediaError) as caught:
                read(source)
            told.add(str(caught.value))
        assert len(told) == 1
        assert "mmrec-" not in told.pop()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.webm", "clip.gif"])
def test_damaged_files_give_frames_or_a_reason(tmp_path, name, capfd):
    if name.endswith("gif"):
        data = animated("GIF", duration=100)
    else:
        codec = {"clip.avi": "mpeg4", "clip.webm": "libvpx"}.get(name, "libx264")
        data = write_clip(tmp_path / name, numbered(24), codec=codec).read_bytes()
    rng = np.random.default_rng(1)
    reasons = []
    for trial in range(12):
        noisy = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), 1 + trial)
        noisy[places] ^= rng.integers(1, 256, 1 + trial).astype(np.uint8)
        cut = noisy[: rng.integers(1, len(data))] if trial % 3 == 0 else noisy
        try:
            assert 1 <= len(read(cut.tobytes(), 4).frames) <= 4
        except MediaError as error:
            reasons.append(error.reason)
    assert all(reasons)
    assert capfd.readouterr().err == ""


# Each would have decord reserve more memory than there is, which ends the process.
def test_claims_of_too_many_frames_are_refused(tmp_path):
    mp4 = write_clip(tmp_path / "clip.mp4", numbered(24)).read_bytes()
    mkv = write_clip(tmp_path / "clip.mkv", numbered(24)).read_bytes()
    avi = write_clip(tmp_path / "clip.avi", numbered(24), codec="mpeg4").read_bytes()
    table = struct.pack(">IIII", 0, 1, 10**9, 1)
    claims = [
        resized(mp4, (*MOVIE_TABLES, b"stts"), table),
        overwritten(mkv, mkv.index(b"\x44\x89\x88") + 3, struct.pack(">d", 1e18)),
        overwritten(avi, avi.index(b"strh") + 8 + 32, struct.pack("<I", 4 * 10**9)),
    ]
    for data in claims:
        with pytest.raises(MediaError, match="too many frames"):
            read(data)


def test_frames_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    mp4 = write_clip(tmp_path / "clip.mp4", numbered(4)).read_bytes()
    start, _ = box(mp4, *MOVIE_TABLES, b"stsd")
    claims = [
        overwritten(mp4, start + 40, struct.pack(">HH", 8193, 8192)),
        overwritten(long_gif(3), 6, struct.pack("<HH", 65535, 65535)),
        overwritten(
            animated("WEBP"), animated("WEBP").index(b"VP8X") + 12, b"\xff\x3f\0\xff\x3f\0"
        ),
    ]
    for data in claims:
        with pytest.raises(MediaError, match="too large"):
            read(data)
    monkeypatch.setattr(media, "MAX_VIDEO_PIXELS", 64 * 63)
    film = write_clip(tmp_path / "clip.flv", numbered(4), codec="flv")  # its header is not read
    with pytest.raises(MediaError, match="video too large: 64 x 64"):
        read(film)


def test_an_edit_list_hides_what_was_cut_off(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(48), 25, options={"g": "12"})
    data = path.read_bytes()
    start, _ = box(data, b"moov", b"trak", b"edts", b"elst")
    length, first = struct.unpack(">Ii", data[start + 8 : start + 16])
    scale = struct.unpack(
        ">I", data[(at := box(data, *MOVIE_TABLES[:3], b"mdhd")[0]) + 12 : at + 16]
    )
    for before, after in [(5, 0), (0, 20), (17, 11)]:
        edit = struct.pack(">Ii", length - 40 * (before + after), first + before * scale[0] // 25)
        shown = list(range(before, 48 - after))
        clip = read(overwritten(data, start + 8, edit), 6)
        assert numbers(clip) == [shown[i] for i in middles(len(shown), 6)]
        assert clip.num_frames == len(shown)
        assert clip.duration == pytest.approx(len(shown) / 25, abs=2e-3)


@pytest.mark.parametrize("policy", ["uniform", "keyframes", "scenes"])
def test_a_clip_without_times_is_read_in_order(tmp_path, policy):
    path = write_clip(tmp_path / "clip.mp4", numbered(48), 25, options={"g": "12", "bf": "0"})
    expected = read(path, 5, policy=policy)
    clip = read(timeless(path.read_bytes()), 5, policy=policy)
    assert numbers(clip) == numbers(expected)
    assert clip.times == pytest.approx(expected.times, abs=1e-3)
    assert clip.duration == pytest.approx(48 / 25)


def test_frames_that_are_not_kept_are_passed_over_unscaled(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", numbered(48), 25, options={"g": "12", "bf": "2"})
    data = timeless(path.read_bytes())
    stretches = []
    num_skippable = media._VideoReel._num_skippable

    def noted(reel, number):
        stretches.append(num_skippable(reel, number))
        return stretches[-1]

    monkeypatch.setattr(media._VideoReel, "_num_skippable", noted)
    skipped = read(data, 3)
    assert sum(count for count in stretches if count > 1) > 24
    monkeypatch.setattr(media._VideoReel, "_num_skippable", lambda reel, number: 1)
    for frame, other in zip(skipped.frames, read(data, 3).frames, strict=True):
        np.testing.assert_array_equal(frame, other)


def test_stderr_works_after_decoding_in_threads(tmp_path, capfd):
    good = write_clip(tmp_path / "good.mp4", moving_square(12))
    sources: list[Path | bytes] = [good, b"noise\0" * 100] * 8

    def attempt(source: Path | bytes) -> int:
        try:
            return len(read(source, 3).frames)
        except MediaError:
            return 0

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(attempt, sources)) == [3, 0] * 8
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_decord_comes_without_the_libraries_of_cuda(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", numbered(8))
    code = (
        "import sys; from mmrec.data.media import FrameConfig, read_video;"
        "read_video(sys.argv[1], FrameConfig()); print('nvidia' in sys.modules);"
        "print(sum('/nvidia/' in line for line in open('/proc/self/maps')))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list what a process has loaded")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "0"]


def test_an_unreadable_file(tmp_path):
    path = write_clip(tmp_path / "locked.mp4", moving_square(2))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(MediaError, match="no permission"):
        read(path)


def test_media_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(MediaError("cannot open video", "clip.mp4")))
    assert (error.reason, error.detail) == ("cannot open video", "clip.mp4")


# URLs


def put(url: str, data: bytes) -> str:
    with fsspec.open(url, "wb") as file:
        file.write(data)  # pyright: ignore[reportAttributeAccessIssue]
    return url


def test_files_by_url_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    path = write_clip(tmp_path / "clip.mp4", numbered(8))
    url = put("memory://media/clip.mp4", path.read_bytes())
    assert numbers(read(url, 2)) == numbers(read(path.as_uri(), 2)) == [2, 6]
    picture = put("memory://media/picture", encode_jpeg(noise(8, 8), 90))
    assert read_image(picture).shape == (8, 8, 3)
    bad = put("memory://media/bad.mp4", b"\0noise")
    with pytest.raises(MediaError, match="cannot open video"):
        read(bad)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_urls_that_cannot_be_read(tmp_path, monkeypatch):
    missing = [(tmp_path / "missing.mp4").as_uri(), "memory://media/missing.mp4"]
    for url in missing:
        with pytest.raises(MediaError, match="file not found"):
            read(url)
    with pytest.raises(MediaError, match="cannot fetch"):
        read("nosuchprotocol://clip.mp4")
    with pytest.raises(MediaError, match=r"empty file: memory://media/empty\.mp4"):
        read(put("memory://media/empty.mp4", b""))
    monkeypatch.setattr(sources, "MAX_FETCH_BYTES", 5000)
    with pytest.raises(MediaError, match="file too large"):
        read(put("memory://media/large.mp4", bytes(5001)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
def test_a_full_disk_costs_a_sample_and_says_so(monkeypatch):
    url = put("memory://media/clip.mp4", b"\0" * 100)
    monkeypatch.setattr(sources, "_temporary_file", lambda: Full("/dev/full", "w"))
    for source in (url, b"\0" * 100):
        with pytest.raises(MediaError, match=r"no room for a copy: .* set TMPDIR"):
            read(source)


class Full(io.FileIO):
    """A file on a full disk, which lets go of what was in it."""

    def truncate(self, size: int | None = None) -> int:
        """Do nothing: the device that plays the disk does not know how."""
        return 0


def test_a_missing_package_is_named(monkeypatch):
    registry = sys.modules["fsspec.registry"]
    known = {"class": "no_such_package.Files", "err": "Please install gcsfs"}
    monkeypatch.setitem(registry.known_implementations, "gs", known)
    monkeypatch.delitem(registry._registry, "gs", raising=False)
    for function in (read, read_image, read_subtitles):
        for url in ("gs://bucket/clip.mp4", "simplecache::gs://bucket/clip.mp4"):
            with pytest.raises(UserError, match=r"pip install 'mmrec\[gcs\]'"):
                function(url)


# Captions

SRT = b"1\n00:00:00,000 --> 00:00:01,000\n<i>%s</i>\n"


def test_captions_beside_a_clip(tmp_path):
    clip = write_clip(tmp_path / "a.3.mp4", moving_square(2))
    assert read_subtitles(clip) is None
    assert read_subtitles(clip.read_bytes()) is None
    names = ["a.3.fr.vtt", "a.3.en-US.vtt", "a.3.vtt", "a.3.srt"]  # the best last
    for number, name in enumerate(names):
        (tmp_path / "a.srt").write_bytes(SRT % b"another clip")
        (tmp_path / name).write_bytes(SRT % b"caption %d" % number)
        stat = tmp_path.stat()
        os.utime(tmp_path, ns=(stat.st_atime_ns, stat.st_mtime_ns + number))
        assert read_subtitles(clip) == f"caption {number}"
        assert read_subtitles(str(clip)) == f"caption {number}"
    (tmp_path / "a.3.srt").write_bytes(b"\xff\0\1")
    with pytest.raises(MediaError, match="damaged captions"):
        read_subtitles(clip)


def test_captions_beside_a_url(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", moving_square(2)).read_bytes()
    url = put("memory://captions/clip.mp4", clip)
    assert read_subtitles(url) is None
    put("memory://captions/clip.vtt", b"WEBVTT\n\n" + SRT % b"from afar")
    assert read_subtitles(url) == "from afar"


def test_captions_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MAX_CAPTION_BYTES", 40)
    clip = write_clip(tmp_path / "clip.mp4", moving_square(2))
    (tmp_path / "clip.srt").write_bytes(SRT % b"x")
    with pytest.raises(MediaError, match="captions too large"):
        read_subtitles(clip)
    long = write_captions(tmp_path / "long.mkv", "subrip", [b"word " * 20] * 2)
    with pytest.raises(MediaError, match="captions too large"):
        read_subtitles(long)


def tx3g(text: str) -> bytes:
    return struct.pack(">H", len(text.encode())) + text.encode() + b"\0\0\0\x0cstyl\0\0\0\0"


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(
    ("name", "codec", "pack"),
    [
        ("clip.mkv", "subrip", str.encode),
        ("clip.mp4", "mov_text", tx3g),
        ("web.mkv", "webvtt", str.encode),
        ("ass.mkv", "ass", lambda t: f"0,0,Default,,0,0,0,,{t}".replace("\n", r"\N").encode()),
    ],
)
def test_captions_inside_a_clip(tmp_path, name, codec, pack, as_bytes):
    words = ["<i>A dress</i>,\nred", "red", "{\\an8}é & ü"]
    path = write_captions(tmp_path / name, codec, [pack(text) for text in words])
    source = path.read_bytes() if as_bytes else path
    assert read_subtitles(source) == "A dress,\nred\né & ü"
    assert len(read(source).frames) == 8


def test_captions_inside_are_read_with_pyav(tmp_path, monkeypatch):
    path = write_captions(tmp_path / "clip.mkv", "subrip", [b"hello"])
    plain = write_clip(tmp_path / "plain.mkv", moving_square(2))
    monkeypatch.setitem(sys.modules, "av", None)
    assert read_subtitles(plain) is None
    with pytest.raises(UserError, match=r"pip install 'mmrec\[data-prep\]'"):
        read_subtitles(path)
    monkeypatch.undo()
    damaged = write_captions(tmp_path / "damaged.mkv", "subrip", [b"caf\xe9"])
    with pytest.raises(MediaError, match="damaged captions"):
        read_subtitles(damaged)
    with pytest.raises(MediaError, match="file not found"):
        read_subtitles(tmp_path / "missing.mkv")


# Real videos


# Their tables of times are empty, so a seek has nothing to go by.
def test_real_clips_without_timestamps(shared_data):
    paths = sorted((shared_data("panda70m_samples") / "videos").glob("*.mp4"))
    broken = [p for p in paths if p.name.startswith(("Vg7WOOQrErw", "HzPF47uHgqM", "0WjR6cSMi2A"))]
    for path in [*paths[::24], *broken]:
        clip = read(path)
        assert np.all(np.diff(clip.times) > 0)
        assert 0 <= clip.times[0] < clip.times[-1] < clip.duration < 60
        all_frames, _ = read_clip(path)
        for frame, i in zip(clip.frames, middles(len(all_frames), 8), strict=True):
            np.testing.assert_array_equal(frame, all_frames[i])


def test_real_mkv_clips(shared_data):
    paths = sorted((shared_data("asl_gestures_intel") / "videos").glob("*.mkv"))
    assert paths
    for path in paths:
        clip = read(path, 4)
        assert [frame.shape for frame in clip.frames] == [(480, 640, 3)] * 4
        assert np.all(np.diff(clip.times) > 0)
    all_frames, _ = read_clip(paths[-1])
    for frame, i in zip(clip.frames, middles(len(all_frames), 4), strict=True):
        assert difference(frame, all_frames[i]) < 1


@pytest.mark.parametrize("policy", ["uniform", "keyframes", "scenes"])
def test_every_policy_on_real_clips(shared_data, policy):
    clips = sorted((shared_data("panda70m_samples") / "videos").glob("*.mp4"))
    gestures = sorted((shared_data("asl_gestures_intel") / "videos").glob("*.mkv"))
    reasons: Counter[str] = Counter()
    for path in clips[::6] + gestures[::5]:
        try:
            clip = read_video(path, FrameConfig(policy=policy, num_frames=3), size=64)
        except MediaError as error:
            reasons[error.reason] += 1
            continue
        assert 1 <= len(clip.frames) == len(clip.times) <= 3
        assert clip.times == sorted(set(clip.times))
        assert min(clip.frames[0].shape[:2]) == 64
    assert not reasons


# Images


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [bytes, str, Path])
def test_a_png_comes_back_as_it_was(tmp_path, kind):
    pixels = noise(6, 9)
    data = saved(Image.fromarray(pixels), format="PNG")
    (tmp_path / "image.png").write_bytes(data)
    source = data if kind is bytes else kind(tmp_path / "image.png")
    found = read_image(source)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels)


def test_alpha_is_laid_over_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (255, 0, 0, 255)
    pixels[0, 1] = (255, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 51)
    found = read_image(saved(Image.fromarray(pixels), format="PNG"))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 1].tolist() == [255, 255, 255]
    assert found[1, 0].tolist() == [204, 204, 204]


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("L", "PNG"), ("LA", "PNG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("F", "TIFF")],
)
def test_other_modes_become_rgb(mode, file_format):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    image = Image.fromarray(grey) if mode == "F" else Image.fromarray(grey).convert("RGB")
    found = read_image(saved(image.convert(mode), format=file_format))
    assert found.shape == (8, 8, 3)
    assert difference(found, grey[..., None]) < 3


def test_sixteen_bits_and_one_bit():
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    deep = read_image(saved(Image.fromarray(grey.astype(np.uint16) * 257), format="PNG"))
    np.testing.assert_array_equal(deep, np.repeat(grey[..., None], 3, axis=-1))
    black_and_white = Image.fromarray(grey > 127)
    found = read_image(saved(black_and_white, format="PNG"))
    np.testing.assert_array_equal(found[..., 0] > 127, grey > 127)


def deep_png(samples: np.ndarray, color_type: int, transparent: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel (Pillow writes grey ones alone), from (H, W, channels)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    height, width, channels = samples.shape
    rows = samples.astype(">u2").reshape(height, width * channels)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    extra = chunk(b"tRNS", transparent) if transparent else b""
    parts = [chunk(b"IHDR", head), extra, chunk(b"IDAT", compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_sixteen_bits_of_every_kind():
    pixels = noise(5, 7).astype(np.uint16)
    grey = pixels[..., :1]
    grey3 = np.repeat(grey, 3, axis=-1)
    opaque = np.full_like(grey, 65535)
    images = [
        (deep_png(pixels * 257, 2), pixels),
        (deep_png(grey * 257, 0), grey3),
        (deep_png(np.concatenate([grey * 257, opaque], -1), 4), grey3),
        (deep_png(np.concatenate([pixels * 257, opaque], -1), 6), pixels),
        (deep_png(np.concatenate([pixels, opaque * 0], -1), 6), np.full_like(pixels, 255)),
    ]
    for data, expected in images:
        assert np.abs(read_image(data).astype(int) - expected).max() <= 1
    dark = read_image(deep_png(np.full((4, 4, 1), 200), 0))  # 200 of 65535, not of 255
    assert dark.max() <= 1
    holes = deep_png(np.array([[[257], [514]]]), 0, transparent=struct.pack(">H", 514))
    assert read_image(holes).tolist()[0][0] == [1, 1, 1]


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_of_other_modes(mode):
    pixels = resize_shorter(np.kron(noise(6, 6), np.ones((32, 32, 1), np.uint8)), 96)
    image = Image.fromarray(pixels).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert difference(read_image(saved(image, format="JPEG", quality=95)), expected) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(8, 16)
    turned = {
        1: pixels,
        2: np.fliplr(pixels),
        3: np.rot90(pixels, 2),
        4: np.flipud(pixels),
        5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).swapaxes(0, 1),
        8: np.rot90(pixels, 1),
    }[orientation]
    data = saved(Image.fromarray(pixels), format="PNG", exif=exif)
    np.testing.assert_array_equal(read_image(data), turned)
    np.testing.assert_array_equal(read(data).frames, [turned])


@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (1, 10_000), (10_000, 1)])
def test_odd_sizes(shape):
    pixels = noise(*shape)
    data = saved(Image.fromarray(pixels), format="PNG")
    np.testing.assert_array_equal(read_image(data), pixels)
    clip = read_video(data, FrameConfig(), size=256)
    np.testing.assert_array_equal(clip.frames, [pixels])
    assert read_image(encode_jpeg(pixels, 90)).shape == pixels.shape


def test_an_image_longer_than_a_jpeg_may_be():
    pixels = np.zeros((1, 70_000, 3), np.uint8)
    assert read_image(saved(Image.fromarray(pixels), format="PNG")).shape == pixels.shape
    with pytest.raises(MediaError, match="too long for a JPEG: 70000 x 1"):
        encode_jpeg(pixels, 90)


def test_formats_that_run_programs_are_not_opened():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(MediaError, match="cannot open image"):
        read_image(script)


def test_transparent_palette_and_first_picture_of_an_animation():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    animated = saved(red, format="GIF", save_all=True, append_images=[blue])
    assert read_image(animated)[0, 0].tolist() == [255, 0, 0]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 255, 0])
    transparent = saved(palette, format="PNG", transparency=0)
    assert read_image(transparent)[0, 0].tolist() == [255, 255, 255]


def test_bad_images_are_media_errors_and_nothing_is_printed(tmp_path, capfd):
    jpeg = encode_jpeg(noise(40, 40), 90)
    png = saved(Image.fromarray(noise(40, 40)), format="PNG")
    bad = {
        "file not found": [tmp_path / "missing.jpg"],
        "not a file": [tmp_path],
        "empty file": [b""],
        "cannot open image": [b"<html></html>", jpeg[:3]],
        "cannot decode image": [jpeg[: len(jpeg) // 2], png[: len(png) // 2]],
    }
    for reason, files in bad.items():
        for source in files:
            with pytest.raises(MediaError) as caught:
                read_image(source)
            assert caught.value.reason == reason
    for data in (b"", b"not a jpeg", jpeg[:100], jpeg[: len(jpeg) // 2], png[: len(png) // 2]):
        with pytest.raises(MediaError):
            decode_jpeg(data)
    # Tars that others wrote may hold PNGs.
    assert np.array_equal(decode_jpeg(png).permute(1, 2, 0), noise(40, 40))
    assert capfd.readouterr() == ("", "")


def test_a_picture_of_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 40):  # Pillow warns of the first and refuses the second
        with pytest.raises(MediaError, match="image too large"):
            read_image(saved(Image.fromarray(noise(side, side)), format="PNG"))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((100, 200), 50, (50, 100)),
        ((200, 100), 50, (100, 50)),
        ((37, 53), 16, (16, 23)),
        ((40, 60), 40, (40, 60)),
        ((40, 60), 64, (40, 60)),  # never enlarged
        ((1, 5000), 1, (1, 5000)),
    ],
)
def test_resize_shorter(shape, size, expected):
    assert resize_shorter(noise(*shape), size).shape == (*expected, 3)


def test_resizing_is_antialiased():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[::2] = 255
    assert np.abs(resize_shorter(lines, 16).astype(int) - 128).max() < 16


def test_jpegs_are_the_same_for_pillow_and_the_loader():
    pixels = resize_shorter(np.kron(noise(8, 12), np.ones((16, 16, 1), np.uint8)), 64)
    data = encode_jpeg(pixels, 95)
    assert data == encode_jpeg(pixels, 95)
    tensor = decode_jpeg(data)
    assert tuple(tensor.shape) == (3, 64, 96)
    assert difference(tensor.permute(1, 2, 0).numpy(), read_image(data)) < 2
    assert difference(read_image(data), pixels) < 8
    assert len(encode_jpeg(pixels, 50)) < len(data)
    for other in (saved(Image.fromarray(pixels), format="PNG"), animated("WEBP", lossless=True)):
        np.testing.assert_array_equal(decode_jpeg(other).permute(1, 2, 0), read_image(other))
    grey = saved(Image.fromarray(pixels).convert("L"), format="JPEG")
    assert tuple(decode_jpeg(grey).shape) == (3, 64, 96)
    cmyk = saved(Image.fromarray(pixels).convert("CMYK"), format="JPEG", quality=95)
    assert difference(decode_jpeg(cmyk).permute(1, 2, 0).numpy(), read_image(cmyk)) < 3
