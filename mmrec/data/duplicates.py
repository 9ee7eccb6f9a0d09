"""Contents that show the same pictures: perceptual hashes of frames, and groups of near duplicates.

A frame's hash is the signs of the lowest 256 frequencies of its cosine transform against their median
(Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", with more bits), and
its mean colour, because the same design in red and in blue is not the same product. It is taken of the
JPEG that a shard holds, so that anybody with the shard can take it again.

Found of copies of 44 clips of Panda-70M and 7 of sign language, 8 frames each, shorter side 256 pixels:

    half size, x264 crf 32         51 of 51    quarter size, crf 38           51 of 51
    every second frame             51 of 51    quarter size, crf 40           51 of 51
    15 per cent brighter           51 of 51    half a second cut off          48 of 51
    3 per cent cropped, each side  51 of 51      of 16 frames each            50 of 51

Of all 8,646 pairs of different clips of Panda-70M none was found; of 771,903 pairs of photos of
groceries 2. Not found are clips that were mirrored, turned, cropped by much or cut to a small part. One
speaker before one wall looks the same whatever is said: of 20 such clips 19 were near duplicates.

Shape letters: F frames of all contents, C contents, P pairs, R frequencies.
"""

import io
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float64, Int, UInt8, UInt16
from PIL import Image

_BITS = 256
_COLOR_AT = _BITS // 8
HASH_BYTES = _COLOR_AT + 3
"""256 bits, the lowest frequencies first, and three bytes of mean colour."""
MOST_BITS = 72
"""Two hashes at most this many bits apart are one picture. Copies are 0 to 70 apart; of 8,646 pairs of
different clips of Panda-70M none has half of its frames within 105, and their median is 118."""
MOST_COLOR = 24
"""And so far apart at most in the mean of red less green and of blue less green, of 255. A picture that was
made brighter keeps these, where red, green and blue alone would change by more."""
_LEAST_CONTRAST = 4.0  # standard deviation of grey, of 255; the hash of a flat picture is its noise
_SIDE = 32  # pixels of the picture that is transformed
_ROWS = 23  # of frequencies, among which the lowest 256 are
# Candidates are pairs that agree in two of eight chunks of 12 bits, taken from the lowest 96 frequencies.
# Low frequencies change least: this finds all 354 pairs of copies that comparing all frames with all would.
_CHUNKS = 8
_CHUNK_BITS = 12
_LONG_RUN = 64  # frames that agree in two chunks; of more than these not all are compared
_NEIGHBOURS = 4  # but each with the first, and with so many that have the nearest hashes
_BLOCK = 1 << 20  # pairs of frames that are compared at a time: 100 MB


def _cosines() -> Float64[np.ndarray, "R 32"]:
    """The first rows of the cosine transform, in whole numbers, so that sums of them are exact anywhere."""
    frequency, at = np.arange(_ROWS)[:, None], np.arange(_SIDE)
    return np.rint(256 * np.cos(np.pi * frequency * (2 * at + 1) / (2 * _SIDE)))


def _lowest() -> tuple[Int[np.ndarray, " 256"], Int[np.ndarray, " 256"]]:
    """Where the lowest frequencies but the mean are, from low to high."""
    places = [(a, b) for a in range(_ROWS) for b in range(_ROWS) if a + b]
    places = sorted(places, key=lambda place: (sum(place), max(place), place))[:_BITS]
    rows, columns = zip(*places, strict=True)
    return np.array(rows), np.array(columns)


_COSINES, _LOWEST = _cosines(), _lowest()


def hash_jpeg(jpeg: bytes) -> bytes | None:
    """The hash of a picture; None where it is too flat to be told from another flat one."""
    with Image.open(io.BytesIO(jpeg)) as image:
        image.draft("RGB", (_SIDE, _SIDE))  # libjpeg decodes at a fraction of the size, and faster
        how = Image.Resampling.BOX if min(image.size) >= _SIDE else Image.Resampling.BILINEAR
        small = image.convert("RGB").resize((_SIDE, _SIDE), how)
    grey = np.asarray(small.convert("L")).astype(np.float64)
    if grey.std() < _LEAST_CONTRAST:
        return None
    waves = (_COSINES @ grey @ _COSINES.T)[_LOWEST]
    color = np.asarray(small).reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.packbits(waves > np.median(waves)).tobytes() + color.tobytes()


def group_duplicates(hashes: Sequence[Sequence[bytes]]) -> Int[np.ndarray, " C"]:
    """The group of each content, by the hashes of its frames; the group is its first content's number.

    Two contents are near duplicates when at least half of the frames of the one with fewer are found
    in the other, and groups are what is connected by that. Time and memory grow as the number of
    frames: 8,000,000 frames of 1,000,000 contents take a minute and a half on one core, and 2.5 GB.
    """
    counts = np.array([len(frames) for frames in hashes], dtype=np.int64)
    groups = np.arange(len(counts))
    if not counts.sum():
        return groups
    flat = np.frombuffer(b"".join(h for frames in hashes for h in frames), np.uint8)
    flat = flat.reshape(-1, HASH_BYTES)  # (F, 35)
    pairs = _candidates(flat, np.repeat(np.arange(len(counts)), counts), len(counts))
    for first, second in pairs[:, _alike(pairs, flat, counts)].T:
        _join(groups, int(first), int(second))
    return np.array([_root(groups, content) for content in range(len(groups))])


def _candidates(
    hashes: UInt8[np.ndarray, "F 35"], owner: Int[np.ndarray, " F"], num_contents: int
) -> Int[np.ndarray, "2 _P"]:
    """Pairs of contents, the earlier one first, of which a pair of frames was found to be one picture."""
    # In the order of their hashes, the nearest are beside each other in every run.
    order = np.lexsort(hashes[:, _COLOR_AT - 1 :: -1].T)
    hashes, owner = hashes[order], owner[order]
    chunks = _split(hashes)
    found = [np.empty(0, np.int64)]
    for i, j in combinations(range(_CHUNKS), 2):
        for first, second in _pairs_in_runs(chunks[i], chunks[j]):
            apart = owner[first] != owner[second]
            first, second = first[apart], second[apart]
            same = _one_picture(hashes, first, second)
            a, b = owner[first[same]], owner[second[same]]
            found.append(np.unique(np.minimum(a, b) * num_contents + np.maximum(a, b)))
    return np.stack(np.divmod(np.unique(np.concatenate(found)), num_contents))


def _split(hashes: UInt8[np.ndarray, "F 35"]) -> UInt16[np.ndarray, "8 F"]:
    """The chunks of each hash. One is the same bit of 12 bytes, so that it has high and low frequencies."""
    chunks = np.zeros((_CHUNKS, len(hashes)), np.uint16)
    for i in range(_CHUNKS):
        for byte in range(_CHUNK_BITS):
            chunks[i] |= (hashes[:, byte] >> i & 1).astype(np.uint16) << byte
    return chunks


def _pairs_in_runs(
    one: UInt16[np.ndarray, " F"], other: UInt16[np.ndarray, " F"]
) -> Iterator[Int[np.ndarray, "2 _P"]]:
    """Pairs of rows that agree in both chunks, a block at a time."""
    key = one.astype(np.uint32) << np.uint32(_CHUNK_BITS) | other
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(key[order]) != 0])
    lengths = np.diff(np.r_[starts, len(order)])
    firsts, sizes = np.repeat(starts, lengths), np.repeat(lengths, lengths)
    rest = firsts + sizes - np.arange(len(order)) - 1  # how many come after it in its run
    # In a long run (a channel's opening card) not each is compared with each.
    long = sizes > _LONG_RUN
    here = np.flatnonzero(long & (firsts < np.arange(len(order))))
    yield from _in_blocks(order, firsts[here], here)
    for step in range(1, _LONG_RUN):
        here = np.flatnonzero((rest >= step) & (~long | (step <= _NEIGHBOURS)))
        if not len(here):
            break
        yield from _in_blocks(order, here, here + step)


def _in_blocks(
    order: Int[np.ndarray, " F"], first: Int[np.ndarray, " P"], second: Int[np.ndarray, " P"]
) -> Iterator[Int[np.ndarray, "2 _B"]]:
    for at in range(0, len(first), _BLOCK):
        yield order[np.stack([first[at : at + _BLOCK], second[at : at + _BLOCK]])]


def _one_picture(
    hashes: UInt8[np.ndarray, "F 35"], first: Int[np.ndarray, " P"], second: Int[np.ndarray, " P"]
) -> Bool[np.ndarray, " P"]:
    one, other = hashes[first], hashes[second]
    differing = np.bitwise_count(one[:, :_COLOR_AT] ^ other[:, :_COLOR_AT]).sum(-1)
    color = np.abs(_hue(one) - _hue(other)).max(-1, initial=0)
    return (differing <= MOST_BITS) & (color <= MOST_COLOR)


def _hue(hashes: UInt8[np.ndarray, "P 35"]) -> Int[np.ndarray, "P 2"]:
    red, green, blue = hashes[:, _COLOR_AT:].T.astype(np.int16)
    return np.stack([red - green, blue - green], -1)


def _alike(
    pairs: Int[np.ndarray, "2 P"],
    hashes: UInt8[np.ndarray, "F 35"],
    counts: Int[np.ndarray, " C"],
) -> Bool[np.ndarray, " P"]:
    """Which pairs of contents have enough frames in common, all frames compared with all."""
    starts = np.cumsum(counts) - counts
    work = np.cumsum(counts[pairs].prod(0))
    enough = np.zeros(pairs.shape[1], bool)
    at = 0
    while at < len(work):
        before = work[at - 1] if at else 0
        end = max(at + 1, int(np.searchsorted(work, before + _BLOCK, side="right")))
        enough[at:end] = _share_half(pairs[:, at:end], hashes, starts, counts)
        at = end
    return enough


def _share_half(
    pairs: Int[np.ndarray, "2 P"],
    hashes: UInt8[np.ndarray, "F 35"],
    starts: Int[np.ndarray, " C"],
    counts: Int[np.ndarray, " C"],
) -> Bool[np.ndarray, " P"]:
    num = counts[pairs]  # (2, P)
    total = num.prod(0)
    which = np.repeat(np.arange(pairs.shape[1]), total)
    place = np.arange(len(which)) - np.repeat(np.cumsum(total) - total, total)
    frames = np.stack(np.divmod(place, num[1][which])) + starts[pairs][:, which]
    same = _one_picture(hashes, *frames)
    shared = []
    for side in frames[:, same]:
        # A frame counts once, however many frames of the other content it resembles.
        found = np.unique(which[same] * len(hashes) + side) // len(hashes)
        shared.append(np.bincount(found, minlength=pairs.shape[1]))
    return 2 * np.minimum(*shared) >= num.min(0)


def _root(groups: Int[np.ndarray, " C"], content: int) -> int:
    while groups[content] != content:
        groups[content] = groups[groups[content]]
        content = int(groups[content])
    return content


def _join(groups: Int[np.ndarray, " C"], a: int, b: int) -> None:
    a, b = _root(groups, a), _root(groups, b)
    groups[max(a, b)] = min(a, b)
