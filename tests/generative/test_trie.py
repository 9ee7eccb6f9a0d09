"""The trie against sets of tuples."""

import time

import numpy as np
import pytest
import torch

from mmrec.errors import UserError
from mmrec.generative.trie import build_trie


def distinct_codes(number: int, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    space = int(np.prod(sizes))
    drawn = np.arange(space) if space < 4 * number else generator.integers(space, size=2 * number)
    cells = generator.permutation(np.unique(drawn))[:number]
    return np.stack(np.unravel_index(cells, sizes), axis=1).astype(np.int32)


def test_allowed_codes_are_those_of_some_product() -> None:
    codes = distinct_codes(60, (5, 4, 6, 3))
    trie = build_trie(codes)
    whole = [tuple(row) for row in codes.tolist()]
    for depth, size in enumerate((5, 4, 6, 3)):
        prefixes = np.unique(codes[:, :depth], axis=0)
        stranger = np.full((1, depth), 2, np.int32)
        if not any(row[:depth] == tuple(stranger[0]) for row in whole):
            prefixes = np.concatenate([prefixes, stranger])
        found = trie.allowed(torch.from_numpy(prefixes), size)
        for prefix, mask in zip(prefixes.tolist(), found.tolist(), strict=True):
            follows = {row[depth] for row in whole if row[:depth] == tuple(prefix)}
            assert {code for code in range(size) if mask[code]} == follows


def test_leaves_are_the_products() -> None:
    codes = distinct_codes(50, (6, 6, 6))
    trie = build_trie(codes)
    nodes, known = trie.find(torch.from_numpy(codes))
    assert known.all()
    assert trie.products[nodes].tolist() == list(range(50))
    others = distinct_codes(200, (6, 6, 6), seed=1)
    _, known = trie.find(torch.from_numpy(others))
    assert known.tolist() == [row in codes.tolist() for row in others.tolist()]


def test_what_is_not_available_is_not_there() -> None:
    codes = distinct_codes(40, (4, 5, 6))
    in_stock = np.arange(40) % 3 > 0
    for available in (in_stock, np.flatnonzero(in_stock).tolist()):
        trie = build_trie(codes, available=available)
        assert len(trie) == in_stock.sum()
        assert sorted(trie.products.tolist()) == np.flatnonzero(in_stock).tolist()
        _, known = trie.find(torch.from_numpy(codes))
        assert known.tolist() == in_stock.tolist()


def test_many_products_take_seconds() -> None:
    codes = distinct_codes(200_000, (256, 256, 256, 8))
    started = time.process_time()
    trie = build_trie(codes)
    assert time.process_time() - started < 5
    assert len(trie) == 200_000
    some = torch.from_numpy(codes[::997])
    assert torch.equal(trie.products[trie.find(some)[0]], torch.arange(0, 200_000, 997))


def test_nothing_and_twice_the_same_are_refused() -> None:
    codes = distinct_codes(4, (3, 3))
    with pytest.raises(UserError, match="no product is available"):
        build_trie(codes, available=[])
    with pytest.raises(UserError, match="same semantic ID"):
        build_trie(np.concatenate([codes, codes[:1]]))
