"""Hashes of pictures that were changed a little, and groups against a brute-force search."""

import io
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from clips import write_clip
from PIL import Image, ImageEnhance

from mmrec.data.duplicates import HASH_BYTES, MOST_BITS, group_duplicates, hash_jpeg
from mmrec.data.media import FrameConfig, encode_jpeg, read_video


def picture(seed: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def hashed(image: Image.Image, quality: int = 90) -> bytes:
    found = hash_jpeg(jpeg(image, quality))
    assert found is not None
    assert len(found) == HASH_BYTES
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_stays_itself_when_it_is_encoded_resized_or_lit_anew(seed: int) -> None:
    original = picture(seed)
    for copy in (
        hashed(original, 40),
        hashed(original.resize((120, 90))),
        hashed(original.resize((400, 300))),
        hashed(ImageEnhance.Brightness(original).enhance(1.05)),
        hashed(ImageEnhance.Brightness(original).enhance(0.7)),
    ):
        assert len(set(group_duplicates([[hashed(original)], [copy]]))) == 1


def test_other_pictures_and_other_colours_of_one_are_not_the_same() -> None:
    others = [[hashed(picture(seed))] for seed in range(300)]
    assert group_duplicates(others).tolist() == list(range(300))
    shirt = picture(0)
    pixels = np.asarray(shirt)
    red, blue = (
        Image.fromarray(np.clip(pixels * weights, 0, 255).astype(np.uint8))
        for weights in ([1.0, 0.4, 0.4], [0.4, 0.4, 1.0])
    )
    assert group_duplicates([[hashed(red)], [hashed(blue)]]).tolist() == [0, 1]


def test_flat_pictures_have_no_hash() -> None:
    rng = np.random.default_rng(0)
    for level in (0, 128, 255):
        noise = rng.normal(level, 2, (90, 120, 3)).clip(0, 255).astype(np.uint8)
        assert hash_jpeg(jpeg(Image.fromarray(noise))) is None
    assert group_duplicates([[], [], []]).tolist() == [0, 1, 2]


def test_half_of_the_shorter_ones_frames_make_a_near_duplicate() -> None:
    frames = [hashed(picture(seed)) for seed in range(40)]
    contents = [
        frames[:8],
        frames[4:8],  # a cut of the first: all of its four frames
        [frames[0], *frames[10:13]],  # one of four
        [*frames[0:2], *frames[20:22]],  # two of four
        frames[30:34],
    ]
    assert group_duplicates(contents).tolist() == [0, 0, 2, 0, 4]
    # A frame that is shown often is one match, not many.
    assert group_duplicates([[frames[0]] * 8, frames[:8]]).tolist() == [0, 1]
    assert group_duplicates([frames[:8], [frames[0]] * 3 + frames[20:25]]).tolist() == [0, 1]


def brute_force(hashes: list[list[bytes]]) -> list[int]:
    groups = list(range(len(hashes)))
    for a in range(len(hashes)):
        for b in range(a):
            match = [[distance(f, g) <= MOST_BITS for g in hashes[b]] for f in hashes[a]]
            found = min(sum(map(any, match)), sum(map(any, zip(*match, strict=True))))
            if 2 * found >= min(len(hashes[a]), len(hashes[b])):
                low, high = sorted((groups[a], groups[b]))
                groups = [low if g == high else g for g in groups]
    return groups


def distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one[:32]) ^ int.from_bytes(other[:32])).bit_count()


def flipped(frame: bytes, bits: int, rng: np.random.Generator) -> bytes:
    number = int.from_bytes(frame[:32])
    for bit in rng.choice(256, bits, replace=False):
        number ^= 1 << int(bit)
    return number.to_bytes(32) + frame[32:]


@pytest.mark.parametrize("bits", [0, 3, 6])
def test_groups_are_those_of_comparing_all_with_all(bits: int) -> None:
    rng = np.random.default_rng(bits)
    pool = [rng.bytes(HASH_BYTES) for _ in range(60)]
    contents = []
    for _ in range(120):
        chosen = rng.choice(60, rng.integers(1, 5), replace=False)
        contents.append([flipped(pool[i], bits if rng.random() < 0.5 else 0, rng) for i in chosen])
    contents += [[flipped(rng.bytes(HASH_BYTES), 0, rng)] for _ in range(60)]
    assert group_duplicates(contents).tolist() == brute_force(contents)


def test_a_picture_that_everybody_shows_takes_no_longer() -> None:
    rng = np.random.default_rng(0)
    card = rng.bytes(HASH_BYTES)
    contents = [[card, *(rng.bytes(HASH_BYTES) for _ in range(3))] for _ in range(3_000)]
    started = time.perf_counter()
    assert len(set(group_duplicates(contents).tolist())) == 3_000  # one frame of four is not half
    assert time.perf_counter() - started < 10
    uploads = [[card] for _ in range(3_000)]
    assert set(group_duplicates(uploads).tolist()) == {0}


def test_a_long_run_of_frames_that_begin_alike_is_still_searched() -> None:
    rng = np.random.default_rng(0)
    # Two of the eight chunks, the lowest bits of the first 12 bytes, are the same in all of them.
    low = rng.integers(0, 256, (500, 12), dtype=np.uint8) & 0xFC
    pool = [row.tobytes() + rng.bytes(HASH_BYTES - 12) for row in low]
    twins = [flipped(pool[i], 0, rng) for i in (7, 250, 499)]
    groups = group_duplicates([[frame] for frame in (*pool, *twins)]).tolist()
    assert groups == [*range(500), 7, 250, 499]


def changed(
    clip: Path, out: Path, *, scale: float, crf: int, step: int = 1, light: int = 0, crop: int = 0
) -> Path:
    """A copy of the first seconds of a clip: smaller, worse, of fewer frames, lit otherwise or cropped."""
    with av.open(str(clip)) as source:
        frames = []
        for frame in islice(source.decode(video=0), 0, 120, step):
            width, height = (int(side * scale) // 2 * 2 for side in (frame.width, frame.height))
            pixels = frame.reformat(width, height, "rgb24").to_ndarray()
            pixels = pixels[crop : height - crop, crop : width - crop]
            frames.append((pixels.astype(np.int16) + light).clip(0, 255).astype(np.uint8))
    return write_clip(out, frames, 30, options={"crf": str(crf), "preset": "ultrafast"})


def hashes_of(clip: Path) -> list[bytes]:
    frames = read_video(clip, FrameConfig(), size=256).frames
    found = [hash_jpeg(encode_jpeg(frame, 90)) for frame in frames]
    return [frame for frame in found if frame is not None]


def test_copies_of_real_clips_are_found_and_other_clips_are_not(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    clips = sorted(shared_data("panda70m_samples").rglob("*.mp4"))[3:130:25]
    contents = []
    for number, clip in enumerate(clips):
        out = tmp_path / f"{number}.mp4"
        contents.append(hashes_of(changed(clip, out, scale=0.5, crf=23)))
        contents.append(hashes_of(changed(clip, out, scale=0.25, crf=40)))
        contents.append(hashes_of(changed(clip, out, scale=0.5, crf=32, step=2, light=15)))
        contents.append(hashes_of(changed(clip, out, scale=0.5, crf=28, crop=6)))
    expected = [number // 4 * 4 for number in range(len(contents))]
    assert len(clips) == 6
    assert group_duplicates(contents).tolist() == expected
