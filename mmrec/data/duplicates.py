"""Contents that show the same pictures: perceptual hashes of frames, and groups of near duplicates.

A frame's hash is a difference hash (Krawetz 2013, "Kind of Like That") in both directions, 128 bits,
and its mean colour, because the same design in red and in blue is not the same product. It is taken of
the JPEG that a shard holds, so that anybody with the shard can take it again.

Shape letters: F frames of all contents, W words of a hash.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8, UInt16
from PIL import Image

HASH_BYTES = 19
"""128 bits of differences and three bytes of mean colour."""
MOST_BITS = 10
"""Two hashes at most this many bits apart are one picture: re-encoding and resizing change 0 to 8."""
MOST_COLOR = 24
"""And so far apart at most in each channel's mean, of 255."""
_LEAST_CONTRAST = 4.0  # standard deviation of grey, of 255; the hash of a flat picture is its noise
_CHUNKS = 8  # of 16 bits; hashes 6 bits apart or less agree in two of them at least
_LONG_RUN = (
    64  # hashes that agree in two chunks; of more than these, each is compared with the first
)


def hash_jpeg(jpeg: bytes) -> bytes | None:
    """The hash of a picture; None where it is too flat to be told from another flat one."""
    with Image.open(io.BytesIO(jpeg)) as image:
        image.draft("RGB", (64, 64))  # libjpeg decodes at an eighth of the size, many times faster
        small = image.convert("RGB").resize((9, 9), Image.Resampling.BOX)
    pixels = np.asarray(small)
    grey = np.asarray(small.convert("L")).astype(np.int16)
    if grey.std() < _LEAST_CONTRAST:
        return None
    bits = [grey[:8, 1:] > grey[:8, :-1], grey[1:, :8] > grey[:-1, :8]]
    color = pixels.reshape(-1, 3).mean(0).round().astype(np.uint8)
    return np.packbits(np.concatenate([part.ravel() for part in bits])).tobytes() + color.tobytes()


def group_duplicates(hashes: Sequence[Sequence[bytes]]) -> Int[np.ndarray, " C"]:
    """The group of each content, by the hashes of its frames; the group is its first content's number.

    Two contents are near duplicates when at least half of the frames of the one with fewer are found
    in the other, and groups are what is connected by that. Time and memory grow as the number of
    frames: about 10 s and 1 GB for a million.
    """
    counts = np.array([len(frames) for frames in hashes], dtype=np.int64)
    groups = np.arange(len(counts))
    if not counts.sum():
        return groups
    flat = np.frombuffer(b"".join(h for frames in hashes for h in frames), np.uint8)
    flat = flat.reshape(-1, HASH_BYTES)  # (F, 19)
    owner = np.repeat(np.arange(len(counts)), counts)  # (F,)
    first, second = _similar_frames(flat, owner)
    for a, b in _alike(first, second, owner, counts):
        _join(groups, a, b)
    return np.array([_root(groups, content) for content in range(len(groups))])


def _similar_frames(
    hashes: UInt8[np.ndarray, "F W"], owner: Int[np.ndarray, " F"]
) -> tuple[Int[np.ndarray, " _P"], Int[np.ndarray, " _P"]]:
    """Pairs of frames of different contents that are one picture.

    Of all pairs, those that agree in two of the eight chunks are looked at: none that differs in up
    to six bits is missed, and of those that differ in ten most are found.
    """
    chunks = np.ascontiguousarray(hashes[:, :16]).view(np.uint16)  # (F, 8)
    found = []
    for i in range(_CHUNKS):
        for j in range(i + 1, _CHUNKS):
            pairs = _pairs_in_runs(chunks, i, j)
            pairs = pairs[:, owner[pairs[0]] != owner[pairs[1]]]
            pairs = pairs[:, _one_picture(hashes, *pairs)]
            found.append(np.sort(pairs, axis=0))
    first, second = np.unique(np.concatenate(found, axis=1), axis=1)
    return first, second


def _pairs_in_runs(chunks: UInt16[np.ndarray, "F 8"], i: int, j: int) -> Int[np.ndarray, "2 _P"]:
    """Pairs of rows that agree in chunks i and j."""
    key = chunks[:, i].astype(np.uint32) << np.uint32(16) | chunks[:, j]
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(key[order]) != 0])
    lengths = np.diff(np.r_[starts, len(order)])
    place = np.arange(len(order)) - np.repeat(starts, lengths)  # within its run
    rest = np.repeat(lengths, lengths) - place - 1  # how many come after it in its run
    firsts = np.repeat(starts, lengths)
    # In a long run (a channel's opening card) each is compared with the first alone.
    short = np.repeat(lengths, lengths) <= _LONG_RUN
    pairs = [np.stack([firsts, np.arange(len(order))])[:, ~short & (place > 0)]]
    for step in range(1, _LONG_RUN):
        here = np.flatnonzero(short & (rest >= step))
        if not len(here):
            break
        pairs.append(np.stack([here, here + step]))
    return order[np.concatenate(pairs, axis=1)]


def _one_picture(
    hashes: UInt8[np.ndarray, "F W"], first: Int[np.ndarray, " P"], second: Int[np.ndarray, " P"]
) -> np.ndarray:
    differing = np.bitwise_count(hashes[first, :16] ^ hashes[second, :16]).sum(-1)
    color = np.abs(hashes[first, 16:].astype(np.int16) - hashes[second, 16:]).max(-1, initial=0)
    return (differing <= MOST_BITS) & (color <= MOST_COLOR)


def _alike(
    first: Int[np.ndarray, " P"],
    second: Int[np.ndarray, " P"],
    owner: Int[np.ndarray, " F"],
    counts: Int[np.ndarray, " C"],
) -> list[tuple[int, int]]:
    """Pairs of contents of which enough frames are the same pictures."""
    pairs = np.stack([owner[first], owner[second]])
    swapped = pairs[0] > pairs[1]
    pairs[:, swapped] = pairs[::-1, swapped]
    frames = np.where(swapped, np.stack([second, first]), np.stack([first, second]))
    contents, number = np.unique(pairs, axis=1, return_inverse=True)
    matched = []
    for side in frames:
        # A frame counts once, however many frames of the other content it resembles.
        which, _ = np.unique(np.stack([number.ravel(), side]), axis=1)
        matched.append(np.bincount(which, minlength=contents.shape[1]))
    enough = 2 * np.minimum(*matched) >= counts[contents].min(0)
    return [(int(a), int(b)) for a, b in contents[:, enough].T]


def _root(groups: Int[np.ndarray, " C"], content: int) -> int:
    while groups[content] != content:
        groups[content] = groups[groups[content]]
        content = int(groups[content])
    return content


def _join(groups: Int[np.ndarray, " C"], a: int, b: int) -> None:
    a, b = _root(groups, a), _root(groups, b)
    groups[max(a, b)] = min(a, b)
