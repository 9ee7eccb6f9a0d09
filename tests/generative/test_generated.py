"""A generator's lists in the rows of a catalogue."""

from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest

pytest.importorskip("transformers", reason="pip install 'mmrec[generative]'")

import torch
from small_sessions import write_small

from mmrec.generative.evaluation import RankedProducts
from mmrec.generative.generated import (
    generate_lists,
    histories_as_codes,
    id_rows,
    id_table,
    in_catalogue,
    rank_answers,
    search_in_threads,
)
from mmrec.generative.generator import Generator, GeneratorConfig
from mmrec.generative.lists import read_lists, write_lists
from mmrec.generative.semantic_ids import SemanticIdConfig, SemanticIds, build_ids
from mmrec.generative.sessions import leave_one_out, sequences_of
from mmrec.generative.trie import build_trie

NAMES = list("hgfedcz")  # a and b have no ID; z is not of the catalogue.


@pytest.fixture(scope="module")
def ids() -> SemanticIds:
    vectors = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    return build_ids(NAMES, vectors, SemanticIdConfig(levels=2, codebook_size=3))


def test_rows_of_ids_become_rows_of_the_catalogue(ids: SemanticIds) -> None:
    rows = id_rows(ids, list("abcdefgh"))
    assert rows.tolist() == [-1, -1, 5, 4, 3, 2, 1, 0]
    histories = histories_as_codes(sequences_of([[0, 3, 2], [1], [7]]), ids, rows)
    assert [len(own) for own in histories] == [2, 0, 1]
    assert histories[0].tolist() == ids.codes[[4, 5]].tolist()
    # h, the foreign z, nothing.
    found = RankedProducts(
        products=np.array([[0, 6, -1]]), scores=np.array([[-1.0, -2.0, -np.inf]])
    )
    lists = in_catalogue(found, ids, rows)
    assert lists.products.tolist() == [[7, -1, -1]]
    assert lists.scores.tolist() == [[-1.0, 0.0, 0.0]]
    table = id_table(ids, rows)
    assert table[2:].tolist() == ids.codes[5::-1, :2].tolist()
    assert len(np.unique(table[:2], axis=0)) == 2
    assert (table[:2] < 0).all()


def test_lists_are_those_of_each_history_alone(ids: SemanticIds, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = GeneratorConfig(width=16, layers=1, heads=2, inner=16, dropout=0.0, max_items=4)
    generator = Generator(shape, ids.sizes).eval()
    trie = build_trie(ids.codes)
    sessions = write_small(tmp_path, ["cdefgh", "abc", "hhc", "acegdf"])
    rows = id_rows(ids, sessions.product_ids)
    split = leave_one_out(sessions, "test")
    histories = histories_as_codes(split.histories, ids, rows)
    lists = generate_lists(generator, histories, trie=trie, num_beams=5, at_once=3)
    for query, history in enumerate(histories):
        alone = generator.generate([history], trie=trie, num_beams=5)
        assert alone.products is not None
        assert lists.products[query].tolist() == alone.products[0].tolist()
        np.testing.assert_allclose(lists.scores[query], alone.scores[0].numpy(), rtol=1e-4)

    # Written and read, they are as they were, but for what the catalogue lacks.
    mine = in_catalogue(lists, ids, rows)
    write_lists(tmp_path / "lists/test.parquet", mine, sessions, split)
    read, dropped = read_lists(tmp_path / "lists/test.parquet", sessions, split)
    assert not dropped
    for query in range(len(histories)):
        there = mine.products[query] >= 0
        again = read.products[query] >= 0
        assert read.products[query][again].tolist() == mine.products[query][there].tolist()
        assert read.scores[query][again].tolist() == mine.scores[query][there].tolist()


def test_parts_are_searched_by_threads_of_one_core_each(torch_threads: int) -> None:
    both = Barrier(torch_threads)

    def search(start: int) -> tuple[int, int]:
        both.wait(30)  # Nobody is done before all have begun.
        return start, torch.get_num_threads()

    found = search_in_threads(search, range(0, 8, 2), torch.device("cpu"))
    assert found == [(start, 1) for start in range(0, 8, 2)]
    own = []
    later = Thread(target=lambda: own.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *own] == [torch_threads] * 2


@pytest.fixture
def torch_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def test_several_right_products_have_a_rank_each() -> None:
    lists = RankedProducts(
        products=np.array([[4, 2, 0, 1], [1, 3, 0, 2]]),
        scores=np.array([[-1.0, -2, -3, -4], [-1, -1, -2, -3]]),
    )
    ranks = rank_answers(lists, [[0, 4, 5], [3, -1]], 6)
    # A tie counts against the model, and what is not listed stands last.
    assert [own.tolist() for own in ranks] == [[1, 3, 6], [2, 6]]
