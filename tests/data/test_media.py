"""Decoding against PyAV and Pillow, and every way in which a file can be bad."""

import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from clips import moving_square, read_clip, write_clip
from PIL import Image

from mmrec.data.media import decode_jpeg, decode_video, encode_jpeg, read_image, resize_shorter
from mmrec.errors import MediaError

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean())


# Videos


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
    frames, times = decode_video(path.read_bytes() if as_bytes else path, num_frames=6)
    wanted = [2, 6, 10, 14, 18, 22]  # the middles of six spans of four frames
    assert times == pytest.approx([all_times[i] for i in wanted], abs=1e-3)
    for frame, i in zip(frames, wanted, strict=True):
        assert frame.shape == (64, 64, 3)
        assert frame.dtype == np.uint8
        assert difference(frame, all_frames[i]) < 1
        assert difference(frame, all_frames[i]) < difference(frame, all_frames[i - 1])


def test_colours_are_those_that_were_drawn(tmp_path):
    drawn = moving_square(8, color=(220, 30, 40))
    frames, _ = decode_video(write_clip(tmp_path / "red.mp4", drawn), num_frames=8)
    for frame, original in zip(frames, drawn, strict=True):
        assert difference(frame, original) < 6
        square = frame[(original == (220, 30, 40)).all(-1)].mean(0)
        assert square[0] > square[1] + 100  # red, not blue
        assert square[0] > square[2] + 100


def test_uneven_times(tmp_path):
    times_ms = [0, 40, 400, 450, 500, 1200, 1300, 1310, 2000, 2100]
    path = write_clip(tmp_path / "uneven.mp4", moving_square(10), times_ms=times_ms)
    _, times = decode_video(path, num_frames=5)
    assert times == pytest.approx([0.04, 0.45, 1.2, 1.31, 2.1], abs=2e-3)


@pytest.mark.parametrize("num_frames_in_clip", [1, 3, 5])
def test_a_short_clip_gives_all_its_frames(tmp_path, num_frames_in_clip):
    path = write_clip(tmp_path / "short.mp4", moving_square(num_frames_in_clip))
    frames, times = decode_video(path, num_frames=8)
    assert len(frames) == len(times) == num_frames_in_clip
    assert times == sorted(set(times))


def test_frames_of_any_number_are_at_the_middles(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", moving_square(11), 10)
    for num_frames in range(1, 12):
        _, times = decode_video(path, num_frames=num_frames)
        middles = [int((i + 0.5) * 11 / num_frames) for i in range(num_frames)]
        assert times == pytest.approx([i / 10 for i in middles], abs=1e-3)


def test_a_container_that_promises_more_frames_than_it_has_does_not_hang(tmp_path):
    path = write_clip(tmp_path / "whole.mp4", moving_square(60), 30, options={"g": "30"})
    nothing = bytes(
        [0, 0, 0, 5, 12, 255, 255, 255, 128]
    )  # H.264 filler: a packet without a picture
    with av.open(str(path)) as whole, av.open(str(tmp_path / "hollow.mp4"), "w") as hollow:
        stream = hollow.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(p for p in whole.demux(video=0) if p.size):
            copy = av.Packet(nothing if number >= 40 else bytes(packet))
            copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
            copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
            copy.stream = stream
            hollow.mux(copy)
    with pytest.raises(MediaError, match="cannot decode video"):
        decode_video(tmp_path / "hollow.mp4", num_frames=60)


def bad_videos(folder: Path) -> dict[str, Path | bytes]:
    good = write_clip(folder / "good.mp4", moving_square(40), options={"g": "10"}).read_bytes()
    start = good.index(b"mdat") + 4
    rng = np.random.default_rng(0)
    (folder / "empty.mp4").touch()
    picture = encode_jpeg(moving_square(1)[0], 90)
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
        "picture": picture,
    }


def test_bad_videos_are_media_errors_and_nothing_is_printed(tmp_path, capfd):
    for name, source in bad_videos(tmp_path).items():
        with pytest.raises(MediaError) as caught:
            decode_video(source, num_frames=4)
        assert caught.value.reason in {
            "missing": {"file not found"},
            "folder": {"not a file"},
            "empty": {"empty file"},
            "no bytes": {"empty file"},
        }.get(name, {"cannot open video", "cannot decode video"}), name
        assert str(tmp_path) not in caught.value.reason
        assert caught.value.detail.isprintable()
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_stderr_works_after_decoding_in_threads(tmp_path, capfd):
    good = write_clip(tmp_path / "good.mp4", moving_square(12))
    sources: list[Path | bytes] = [good, b"noise" * 100] * 8

    def attempt(source: Path | bytes) -> int:
        try:
            return len(decode_video(source, num_frames=3)[0])
        except MediaError:
            return 0

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(attempt, sources)) == [3, 0] * 8
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_an_unreadable_file(tmp_path):
    path = write_clip(tmp_path / "locked.mp4", moving_square(2))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(MediaError, match="no permission"):
        decode_video(path, num_frames=2)


def test_a_clip_by_url(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", moving_square(8))
    frames, _ = decode_video(path.as_uri(), num_frames=2)
    expected, _ = decode_video(path, num_frames=2)
    np.testing.assert_array_equal(frames, expected)
    with pytest.raises(MediaError, match="file not found"):
        decode_video((tmp_path / "missing.mp4").as_uri(), num_frames=2)
    with pytest.raises(MediaError, match="cannot fetch"):
        decode_video("nosuchprotocol://clip.mp4", num_frames=2)


def test_media_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(MediaError("cannot open video", "clip.mp4")))
    assert (error.reason, error.detail) == ("cannot open video", "clip.mp4")


# The samples' timestamps are all zero, so a seek has nothing to go by.
@pytest.mark.skipif(not (SHARED / "panda70m_samples").is_dir(), reason="no shared videos")
def test_real_clips_without_timestamps():
    paths = sorted((SHARED / "panda70m_samples" / "videos").glob("*.mp4"))[::4]
    reasons = {}
    for number, path in enumerate(paths):
        try:
            frames, times = decode_video(path, num_frames=8)
        except MediaError as error:
            reasons[path.name] = error.reason
            continue
        assert len(frames) == 8
        assert np.all(np.diff(times) > 0)
        assert 0 <= times[0] < times[-1] < 60
        if number % 10 == 0:
            all_frames, _ = read_clip(path)
            wanted = [(2 * i + 1) * len(all_frames) // 16 for i in range(8)]
            for frame, i in zip(frames, wanted, strict=True):
                assert difference(frame, all_frames[i]) < 1
    assert set(reasons.values()) <= {"broken video timestamps"}
    assert len(reasons) <= len(paths) / 5


@pytest.mark.skipif(not (SHARED / "asl_gestures_intel").is_dir(), reason="no shared videos")
def test_real_mkv_clips():
    paths = sorted((SHARED / "asl_gestures_intel" / "videos").glob("*.mkv"))
    assert paths
    for path in paths:
        frames, times = decode_video(path, num_frames=4)
        assert [frame.shape for frame in frames] == [(480, 640, 3)] * 4
        assert np.all(np.diff(times) > 0)
    all_frames, _ = read_clip(paths[-1])
    for frame, i in zip(
        frames, [(2 * i + 1) * len(all_frames) // 8 for i in range(4)], strict=True
    ):
        assert difference(frame, all_frames[i]) < 1


# Images


def saved(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


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


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    pixels = noise(8, 16)
    data = saved(Image.fromarray(pixels), format="PNG", exif=exif)
    np.testing.assert_array_equal(read_image(data), np.rot90(pixels, -1))


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
    for reason, sources in bad.items():
        for source in sources:
            with pytest.raises(MediaError) as caught:
                read_image(source)
            assert caught.value.reason == reason
    for data in (b"", b"not a jpeg", jpeg[:100], jpeg[: len(jpeg) // 2], png):
        with pytest.raises(MediaError):
            decode_jpeg(data)
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


def test_jpegs_are_the_same_for_pillow_and_torchvision():
    pixels = resize_shorter(np.kron(noise(8, 12), np.ones((16, 16, 1), np.uint8)), 64)
    data = encode_jpeg(pixels, 95)
    assert data == encode_jpeg(pixels, 95)
    tensor = decode_jpeg(data)
    assert tuple(tensor.shape) == (3, 64, 96)
    assert difference(tensor.permute(1, 2, 0).numpy(), read_image(data)) < 2
    assert difference(read_image(data), pixels) < 8
    assert len(encode_jpeg(pixels, 50)) < len(data)
    grey = saved(Image.fromarray(pixels).convert("L"), format="JPEG")
    assert tuple(decode_jpeg(grey).shape) == (3, 64, 96)
