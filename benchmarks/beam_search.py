"""Beam search held to a catalogue's products, beside the same search without that limit, and users a second.

    python benchmarks/beam_search.py            # 12,000 and 1,000,000 products
    python benchmarks/beam_search.py --quick    # 12,000 products, fewer users

A decoder of 0.9 million random weights (four layers of width 128) writes IDs of three codes of 256 and an
appended one, after histories of five products, the median of Amazon Beauty's test. The IDs are random, and
about a quarter of the products share a cell with another, as on Beauty; training makes no decoder faster.
Without a trie every level is asked of every beam; with one the appended code only where a cell holds
several products. Users are searched for 64 at a time, in as many threads as torch is given, as lists are
generated. Time is the best of several rounds over the same users; the two searches take turns. The
reference is what a decoder of 0.9M weights reached elsewhere on two threads: 775, 446, 248 and 95 users a
second at 10, 20, 50 and 100 beams. The last line is one JSON object.
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import tyro

from mmrec.generative.generated import search_in_threads
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.trie import Trie, build_trie

SIZES = (256, 256, 256, 16)
RATIO_BAR, BUILD_BAR_S = 0.8, 10.0
REFERENCE = {10: 775, 20: 446, 50: 248, 100: 95}
AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class BeamSearchConfig:
    """What is measured."""

    quick: bool = False
    """12,000 products alone, and fewer users and rounds."""
    threads: int = 2
    """Of torch."""
    history: int = 5
    """Products of each user's history."""
    users: int = 256
    rounds: int = 5
    """Turns of each search, of which the fastest counts."""


def main(config: BeamSearchConfig) -> None:
    """Measure, and print one JSON object on the last line."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    users, rounds = (128, 3) if config.quick else (config.users, config.rounds)
    shape = GeneratorConfig(width=128, layers=4, heads=4, inner=304, max_items=config.history)
    generator = Generator(shape, SIZES).eval()
    weights = sum(part.numel() for part in generator.parameters())
    print(f"{weights:,} weights, {config.threads} threads, histories of {config.history} products")
    results: list[dict[str, Any]] = []
    for count in (12_000,) if config.quick else (12_000, 1_000_000):
        codes = random_codes(count)
        started = time.perf_counter()
        trie = build_trie(codes)
        seconds = time.perf_counter() - started
        print(f"{count:,} products: trie built in {seconds:.2f} s, most children {trie.fan_out}")
        results.append(
            {
                "what": f"seconds to build a trie of {count:,} products",
                "value": round(seconds, 3),
                "bar": BUILD_BAR_S,
                "holds": seconds <= BUILD_BAR_S,
            }
        )
        generated = torch.from_numpy(codes).long()
        drawn = np.random.default_rng(1).integers(count, size=(users, config.history))
        histories = [generated[rows] for rows in torch.from_numpy(drawn)]
        for beams, reference in REFERENCE.items():
            held, free = race(generator, histories, trie, beams, rounds)
            results += judged(count, beams, users / held, users / free, reference)
    print(
        json.dumps(
            {
                "benchmark": "beam_search",
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                "threads": config.threads,
                "weights": weights,
                "history": config.history,
                "results": results,
            }
        )
    )


def random_codes(count: int) -> np.ndarray:
    """Distinct IDs: random codes, an eighth of them taken from another product, and an appended one."""
    generator = np.random.default_rng(0)
    cells = generator.integers(256**3, size=count)
    doubled = count // 8
    cells[:doubled] = cells[generator.integers(doubled, count, size=doubled)]
    cells = np.sort(cells)
    fresh = np.r_[True, cells[1:] != cells[:-1]]
    first = np.flatnonzero(fresh)
    appended = np.arange(count) - np.repeat(first, np.diff(np.r_[first, count]))
    return np.stack([cells >> 16, cells >> 8 & 255, cells & 255, appended], axis=1).astype(np.int32)


def race(
    generator: Generator, histories: list[torch.Tensor], trie: Trie, beams: int, rounds: int
) -> tuple[float, float]:
    """Seconds for all users with the trie and without it, the least of several turns each."""

    def search(start: int, held: bool) -> None:
        own = histories[start : start + AT_ONCE]
        generator.generate(own, trie=trie if held else None, num_beams=beams)

    best = {True: float("inf"), False: float("inf")}
    starts = range(0, len(histories), AT_ONCE)
    for turn in range(rounds + 1):
        for held in best:
            started = time.perf_counter()
            search_in_threads(partial(search, held=held), starts, generator.device)
            if turn:  # The first one warms up.
                best[held] = min(best[held], time.perf_counter() - started)
    return best[True], best[False]


def judged(
    count: int, beams: int, held: float, free: float, reference: int
) -> list[dict[str, Any]]:
    """Two results: the search beside the one without a trie, and users a second beside the reference."""
    print(
        f"  beam {beams:>3}: {held:6.0f} users/s, {held / free:.2f} of {free:.0f} without a trie; "
        f"reference {reference}"
    )
    return [
        {
            "what": f"users a second, {count:,} products, beam {beams}",
            "peer": "the same search without a trie",
            "ratio": round(held / free, 3),
            "bar": RATIO_BAR,
            "holds": held / free >= RATIO_BAR,
        },
        {
            "what": f"users a second, {count:,} products, beam {beams}",
            "value": round(held, 1),
            "peer": f"reference, {reference}",
            "ratio": round(held / reference, 3),
            "bar": 1.0,
            "holds": held >= reference,
        },
    ]


if __name__ == "__main__":
    main(tyro.cli(BeamSearchConfig))
