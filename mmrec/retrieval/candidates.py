"""Candidates: the FAISS indexes worth trying for a catalogue, and the bytes that each would take.

The kinds follow FAISS's guidelines (Douze et al. 2024, "The Faiss library"): all vectors, inverted lists
over vectors or codes of them, graphs. Codes that lose much are refined: the first matches are scored again
by a better copy of their vectors. Of the copies the best that fits the budget is taken.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from mmrec.errors import UserError

# Below this many products comparing all of them is fast, and there is nothing to choose.
SMALL_CATALOGUE = 10_000
# K-means wants so many vectors for a list; FAISS warns below.
_VECTORS_PER_LIST = 39
_LISTS_PER_ROOT = 4
_LINKS = 32
# An id of an inverted list, and what keys.npy holds of a product: a hash and a row.
_ID_BYTES, KEY_BYTES = 8, 16
# A fast scan reads codes in blocks of so many; the last of a list is half empty on the average.
_SCAN_BLOCK = 32
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Growth = Literal["linear", "root", "log"]
"""How the time of a search grows with the number of products."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An index that could be built."""

    factory: str
    """Its FAISS factory string."""
    bytes_per_vector: float
    """Estimated, with what the index keeps beside FAISS's file for each product; without attributes."""
    growth: Growth

    @property
    def name(self) -> str:
        """Its kind: the factory string without the number of lists, which depends on the catalogue."""
        return re.sub(r"IVF\d+", "IVF", self.factory)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A candidate that is not tried."""

    factory: str
    reason: str


def parse_bytes(text: str) -> int:
    """A number of bytes: 4GB is 4 * 10^9, 4GiB is 4 * 2^30, a bare number is itself.

    Raises `UserError` for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip(), re.IGNORECASE)
    if not found or (found[3] and not found[2]) or not float(found[1]):
        raise UserError(
            f"'{text}' is not a number of bytes; expected one such as 500MB, 4GB or 4GiB"
        )
    unit = found[2].upper()
    return round(float(found[1]) * (_BINARY_UNITS if found[3] else _UNITS)[unit])


def candidates_for(
    count: int, width: int, *, budget: int | None = None, beside: int = KEY_BYTES
) -> tuple[list[Candidate], list[LeftOut]]:
    """What to try for `count` vectors of a width, and what not to, with the reason.

    `budget` is in bytes for the whole index, `beside` what is kept for a product beside FAISS's file.
    A small catalogue stays flat where that fits.
    """
    flat = Candidate(factory="Flat", bytes_per_vector=float(4 * width + beside), growth="linear")
    if count < SMALL_CATALOGUE and (budget is None or flat.bytes_per_vector * count <= budget):
        reason = f"{count:,} products are few: comparing all of them is exact and fast"
        return [flat], [LeftOut(factory="all others", reason=reason)]
    kept: list[Candidate] = []
    left: list[LeftOut] = []
    for choices in [[flat], *_listed(count, width, beside), *_graphs(width, beside)]:
        fitting = [c for c in choices if budget is None or c.bytes_per_vector * count <= budget]
        kept += fitting[:1]
        left += [_over_budget(c, count, budget) for c in choices if c not in fitting and budget]
    return kept, left


def num_lists(count: int) -> int:
    """Inverted lists for so many vectors: four times the square root, of enough vectors to train them."""
    return max(1, min(round(_LISTS_PER_ROOT * math.sqrt(count)), count // _VECTORS_PER_LIST))


def _over_budget(candidate: Candidate, count: int, budget: int | None) -> LeftOut:
    needed = candidate.bytes_per_vector * count
    reason = (
        f"{candidate.bytes_per_vector:,.0f} bytes a vector are {needed / 1e6:,.1f} MB, and the budget is "
        f"{(budget or 0) / 1e6:,.1f} MB"
    )
    return LeftOut(factory=candidate.factory, reason=reason)


def _listed(count: int, width: int, beside: int) -> list[list[Candidate]]:
    """Inverted lists over vectors, bytes, product quantizers and RaBitQ; the last two refined."""
    lists = num_lists(count)
    # The lists' centres, shared out among the vectors.
    own = beside + _ID_BYTES + 4 * width * lists / count
    padding = _SCAN_BLOCK / 2 * lists / count

    def choice(factory: str, code: float, refined: bool) -> list[Candidate]:
        stages = _refinements(width) if refined else [("", 0.0)]
        return [
            Candidate(factory=factory + stage, bytes_per_vector=own + code + extra, growth="root")
            for stage, extra in stages
        ]

    found = [
        choice(f"IVF{lists},Flat", 4.0 * width, False),
        choice(f"IVF{lists},SQ8", 1.0 * width, False),
    ]
    rotation = 4 * width * width / count
    if width % 2 == 0:
        parts, code = width // 2, width / 4
        factory = f"OPQ{parts}_{width},IVF{lists},PQ{parts}x4fs"
        # 16 centres for each part, two components wide.
        tables = 4 * 16 * width / count
        found.append(choice(factory, code * (1 + padding) + rotation + tables, True))
    code = math.ceil(width / 8) + 8
    found.append(choice(f"RR{width},IVF{lists},RaBitQ", code + rotation, True))
    return found


def _refinements(width: int) -> list[tuple[str, float]]:
    """Second stages, the best first, with their bytes a vector. Without one too little is found."""
    return [
        (",Refine(SQfp16)", 2.0 * width),
        (",Refine(SQ8)", 1.0 * width),
        (",Refine(SQ4)", 0.5 * width),
    ]


def _graphs(width: int, beside: int) -> list[list[Candidate]]:
    """HNSW over vectors and over scalar codes of them."""
    # Two times the links in the lowest layer, one in those above; where a row's links begin, and its layer.
    links = 4 * (2 * _LINKS + _LINKS / (_LINKS - 1)) + 12
    kinds = {
        f"HNSW{_LINKS}": 4 * width,
        f"HNSW{_LINKS}_SQfp16": 2 * width,
        f"HNSW{_LINKS}_SQ8": width,
    }
    return [
        [Candidate(factory=factory, bytes_per_vector=beside + links + code, growth="log")]
        for factory, code in kinds.items()
    ]
