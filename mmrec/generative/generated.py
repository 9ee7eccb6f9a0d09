"""What a generator recommends to many queries at once, in the rows of a catalogue.

A catalogue and a table of IDs hold the same products in orders of their own, and either may lack some: a
product without an ID is never generated, and a generated product that is not of the catalogue is left out.
Shape letters: Q queries, W beams, N catalogue size, M rows of the table of IDs, E codes of an ID, L = E - 1,
V width of a content's embedding.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from mmrec.generative.evaluation import RankedProducts, list_scores, rank_targets
from mmrec.generative.generator import Generator
from mmrec.generative.semantic_ids import SemanticIds
from mmrec.generative.sessions import Sequences
from mmrec.generative.trie import Trie

_Found = TypeVar("_Found")


def id_rows(ids: SemanticIds, product_ids: Sequence[str]) -> Int64[np.ndarray, " N"]:
    """The row of each product of a catalogue in the table of IDs, -1 for one without an ID."""
    return np.array([ids.rows.get(product, -1) for product in product_ids], np.int64)


def histories_as_codes(
    histories: Sequences, ids: SemanticIds, rows: Int64[np.ndarray, " N"]
) -> list[Int64[Tensor, "_ E"]]:
    """The IDs of each history, without products that have none; `rows` are those of `id_rows`."""
    codes = torch.from_numpy(ids.codes).long()
    found = [rows[own] for own in histories]
    return [codes[torch.from_numpy(own[own >= 0])] for own in found]


def search_in_threads(
    search: Callable[[int], _Found], starts: Sequence[int], device: torch.device
) -> list[_Found]:
    """What a search gives for each of several parts; on a CPU as many at once as torch has threads.

    A small decoder's steps are too short to be shared out: two threads with a part each did 1.3 (10 beams) to
    1.5 times (100) as much as two that shared every step of one part.
    """
    if device.type != "cpu":
        return [search(start) for start in starts]
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(search, starts))
    torch.set_num_threads(threads)  # Threads that begin later have what was set last, by any.
    return found


def generate_lists(
    generator: Generator,
    histories: Sequence[Int64[Tensor, "_ E"]],
    *,
    trie: Trie,
    num_beams: int,
    contents: Float[Tensor, "Q V"] | None = None,
    at_once: int = 128,
) -> RankedProducts:
    """The beams of each query, best first, as rows of the table of IDs."""
    # Equal lengths lie together, so that hardly any padding is computed.
    order = np.argsort([len(history) for history in histories], kind="stable")

    def search(start: int) -> tuple[np.ndarray, np.ndarray]:
        part = order[start : start + at_once].tolist()
        beams = generator.generate(
            [histories[query] for query in part],
            trie=trie,
            num_beams=num_beams,
            contents=None if contents is None else contents[part].to(generator.device),
        )
        assert beams.products is not None
        return beams.products.cpu().numpy(), beams.scores.double().cpu().numpy()

    found = search_in_threads(search, range(0, len(order), at_once), generator.device)
    products, scores = (np.concatenate(parts) for parts in zip(*found, strict=True))
    back = np.argsort(order, kind="stable")
    return RankedProducts(products=products[back], scores=scores[back])


def in_catalogue(
    lists: RankedProducts, ids: SemanticIds, rows: Int64[np.ndarray, " N"]
) -> RankedProducts:
    """Lists of rows of the table of IDs as lists of a catalogue's, with its IDs beside them."""
    of_row = np.full(len(ids) + 1, -1)  # The last is for -1.
    of_row[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    products = of_row[lists.products]
    return RankedProducts(
        products=products,
        scores=np.where(products >= 0, lists.scores, 0.0),
        id_table=id_table(ids, rows),
    )


def id_table(ids: SemanticIds, rows: Int64[np.ndarray, " N"]) -> Int[np.ndarray, "N L"]:
    """The ID of each product of a catalogue, without the code that tells equal IDs apart.

    A product without an ID has one that no other has, of codes that none can be.
    """
    table = np.where((rows >= 0)[:, None], ids.codes[rows, :-1].astype(np.int64), -1)
    without = np.flatnonzero(rows < 0)
    table[without, 0] = -1 - without
    return table


def rank_answers(
    lists: RankedProducts, answers: Sequence[Sequence[int]], num_products: int
) -> list[Int[np.ndarray, " _R"]]:
    """The ascending ranks of each query's right products, as `mmrec.retrieval.metrics.per_query` takes them.

    A right product that is not listed, or is -1 since it has no ID, stands last.
    """
    owners = np.repeat(np.arange(len(answers)), [len(own) for own in answers])
    targets = np.array([row for own in answers for row in own], np.int64)
    scores = list_scores(lists, num_products)
    ranks = np.full(len(targets), num_products)
    known = targets >= 0
    ranks[known] = rank_targets(scores[owners[known]], targets[known])
    return [np.sort(ranks[owners == query]) for query in range(len(answers))]
