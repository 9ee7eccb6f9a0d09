"""Which product does this video show: generated from its embedding beside exact search, at equal latency.

    python benchmarks/generated_match.py                    # on runs/demo, which `make demo` leaves
    python benchmarks/generated_match.py --quick            # a few epochs: that it runs, not what it reaches

No history: the test videos of the demo catalogue alone, each with its title. At the first call training
and validation contents are embedded, semantic IDs are cut (two levels of 16, contents and products in one
codebook), and a generator is trained on which content led to which product, under `--out`; later calls
find all that. Then each test content is asked for by itself, as a request is: its frames through the
encoder (they are decoded before), and the vector to FAISS (exact inner products of all products) or to
the generator at several beam widths, held to the catalogue's trie. What is printed: R@1 and R@10 of
products over the whole catalogue, with every right product of a content counted and ties against the
model; the p50 of the search and of encoder and search; and the beam width whose p50 is nearest to
FAISS's, with the encoder in both and without. Popularity proposes to every content the products that most
training contents led to. Cold products have no training content. The last line is
one JSON object. Training takes some minutes on two cores, the rest one.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import tyro

from mmrec.cli import run_program
from mmrec.data.batches import item_loader
from mmrec.errors import UserError
from mmrec.generative.evaluation import RankedProducts, list_scores
from mmrec.generative.generator import Generator
from mmrec.generative.semantic_ids import SemanticIds
from mmrec.generative.trie import Trie, build_trie
from mmrec.model.encoder import Encoder
from mmrec.retrieval.embed import Embeddings, open_split, read_embeddings
from mmrec.retrieval.metrics import bootstrap_intervals, per_query, rank_relevant_scores

ROOT = Path(__file__).resolve().parents[1]
K = 10
Search = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""From the number of a query to products, best first, and their scores."""
FAISS, POPULARITY = "FAISS exact", "popularity"


@dataclass(frozen=True, kw_only=True)
class GeneratedMatchConfig:
    """What is compared."""

    demo: Path = ROOT / "runs/demo"
    """A folder with shards, train/encoder and embeddings of the catalogue."""
    out: Path | None = None
    """Where contents' embeddings, IDs and the generator are kept; left out, `generated` under the demo."""
    epochs: int = 60
    """Of the generator, when there is none yet."""
    beams: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    threads: int = 2
    """Of torch and of FAISS."""
    rounds: int = 3
    """Turns of each query, of which the fastest counts."""
    quick: bool = False
    """Two epochs, one round and 40 queries."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What one way of searching found, and the fastest turn of each query."""

    products: np.ndarray
    """Catalogue rows (Q, K), best first; -1 where a list is shorter."""
    scores: np.ndarray
    ms: np.ndarray
    """Of each query (Q)."""


def main(config: GeneratedMatchConfig) -> None:
    """Prepare what is missing, measure, and print one JSON object on the last line."""
    torch.set_num_threads(config.threads)
    faiss.omp_set_num_threads(config.threads)
    out = config.out or config.demo / ("generated-quick" if config.quick else "generated")
    prepare(config, out)
    products = read_embeddings(config.demo / "embeddings")
    train = read_embeddings(out / "train")
    ids = SemanticIds.load(out / "ids")
    generator = Generator.load(out / "run/generator")
    rows = [ids.rows[id_] for id_ in products.ids]
    trie = build_trie(ids.codes[rows])
    rounds = 1 if config.quick else config.rounds

    vectors, relevant, encoder_ms = encode_queries(config, products, rounds)
    ways: dict[str, Search] = {
        POPULARITY: most_linked(products, train),
        FAISS: exact_search(products.vectors, vectors),
    }
    for width in config.beams:
        ways[f"beam {width}"] = beam_search(generator, trie, vectors, width)
    found = race(ways, len(vectors), rounds)
    slices = warm_and_cold(products, train, relevant)
    table = {
        name: figures(own, relevant, len(products.ids), slices, encoder_ms)
        for name, own in found.items()
    }
    report(table, slices, float(np.median(encoder_ms)), len(products.ids), config)


def prepare(config: GeneratedMatchConfig, out: Path) -> None:
    """Embed contents, cut IDs and train the generator, where that is not done yet."""
    for needed in ("shards", "train/encoder", "embeddings"):
        if not (config.demo / needed / "manifest.json").is_file():
            raise UserError(f"{config.demo / needed}: not there; run `make demo`, or give --demo")
    encoder, shards = config.demo / "train/encoder", config.demo / "shards"
    for split in ("train", "val"):
        folder = out / split
        if not folder.is_dir():
            _mmrec(
                "embed", "--encoder", encoder, "--shards", shards, "--split", split, "--out", folder
            )
    if not (out / "ids").is_dir():
        flags = ["--embeddings", config.demo / "embeddings", "--contents", out / "train"]
        flags += ["--codebook-size", "16", "--levels", "2", "--out", out / "ids"]
        _run("train/semantic_ids.py", *flags)
    if not (out / "run/manifest.json").is_file():
        flags = ["--ids", out / "ids", "--contents", out / "train", "--val-contents", out / "val"]
        flags += [
            "--epochs",
            2 if config.quick else config.epochs,
            "--out",
            out / "run",
            "--resume",
        ]
        flags += ["--cpu-threads", config.threads]
        _run("train/generator.py", *flags)


def encode_queries(
    config: GeneratedMatchConfig, products: Embeddings, rounds: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Each test content's vector, the rows of its products, and the milliseconds that encoding it took."""
    encoder = Encoder.load(config.demo / "train/encoder")
    reader = open_split(config.demo / "shards", "test")
    number = min(len(reader), 40) if config.quick else len(reader)
    place = {product: row for row, product in enumerate(products.ids)}
    loader = item_loader(
        reader,
        range(number),
        preprocess=encoder.preprocess,
        tokenizer=encoder.tokenizer,
        num_frames=encoder.config.num_frames,
        batch_size=1,
        num_workers=0,
    )
    vectors, ms = [], []
    for batch in loader:
        best = float("inf")
        for _ in range(rounds + 1):  # The first one warms up.
            started = time.perf_counter()
            with torch.inference_mode():
                vector = encoder.embed(batch, "content").float().numpy()
            best = min(best, time.perf_counter() - started)
        vectors.append(vector[0])
        ms.append(1000 * best)
    wanted = [np.array([place[id_] for id_ in own]) for own in reader.product_ids[:number]]
    return np.stack(vectors), wanted, np.array(ms)


def exact_search(products: np.ndarray, queries: np.ndarray) -> Search:
    """FAISS's flat index, asked for one query; enough places for exact ties to show."""
    index = faiss.IndexFlatIP(products.shape[1])
    index.add(np.ascontiguousarray(products, np.float32))

    def search(query: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = index.search(queries[query : query + 1], min(2 * K, len(products)))
        return rows[0], scores[0]

    return search


def most_linked(products: Embeddings, train: Embeddings) -> Search:
    """The same products for every query: those that most training contents led to."""
    led = Counter(product for own in train.metadata["product_ids"].to_pylist() for product in own)
    counts = np.array([led[product] for product in products.ids], np.float64)
    rows = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return lambda _: (rows, counts[rows])


def beam_search(generator: Generator, trie: Trie, queries: np.ndarray, width: int) -> Search:
    """The generator, asked for one content without a history."""
    contents = torch.from_numpy(queries)
    nothing = torch.zeros(0, generator.levels, dtype=torch.int64)

    def search(query: int) -> tuple[np.ndarray, np.ndarray]:
        beams = generator.generate(
            [nothing], trie=trie, num_beams=width, contents=contents[query : query + 1]
        )
        assert beams.products is not None
        return beams.products[0].numpy(), beams.scores[0].numpy()

    return search


def race(ways: dict[str, Search], number: int, rounds: int) -> dict[str, Timed]:
    """Every query asked in every way, turn by turn, so that what else the machine does falls on all alike."""
    ms = {name: np.full(number, np.inf) for name in ways}
    lists: dict[str, list[Any]] = {name: [None] * number for name in ways}
    for turn in range(rounds + 1):  # The first one warms up.
        for query in range(number):
            for name, search in ways.items():
                started = time.perf_counter()
                lists[name][query] = search(query)
                if turn:
                    taken = 1000 * (time.perf_counter() - started)
                    ms[name][query] = min(ms[name][query], taken)
    return {name: as_table(lists[name], ms[name]) for name in ways}


def as_table(lists: list[tuple[np.ndarray, np.ndarray]], ms: np.ndarray) -> Timed:
    """Lists of some lengths as one array each."""
    longest = max(len(products) for products, _ in lists)
    products = np.full((len(lists), longest), -1)
    scores = np.zeros((len(lists), longest))
    for query, (rows, own) in enumerate(lists):
        products[query, : len(rows)] = rows
        scores[query, : len(rows)] = np.where(rows >= 0, own, 0.0)
    return Timed(products=products, scores=scores, ms=ms)


def warm_and_cold(
    products: Embeddings, train: Embeddings, relevant: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """Which queries have a product that some training content led to."""
    led = {product for own in train.metadata["product_ids"].to_pylist() for product in own}
    warm = np.array([any(products.ids[row] in led for row in own) for own in relevant])
    return {"all": np.ones(len(warm), bool), "warm": warm, "cold": ~warm}


def figures(
    found: Timed,
    relevant: list[np.ndarray],
    num_products: int,
    slices: dict[str, np.ndarray],
    encoder_ms: np.ndarray,
) -> dict[str, Any]:
    """R@1 and R@10 of each slice, their intervals, and the p50 of search, and of encoder and search."""
    lists = RankedProducts(products=found.products, scores=found.scores)
    ranks = rank_relevant_scores(list_scores(lists, num_products).toarray(), relevant)
    values = {name: column for name, column in per_query(ranks).items() if name in ("R@1", "R@10")}
    return {
        "slices": {
            name: {metric: float(column[mask].mean()) for metric, column in values.items()}
            for name, mask in slices.items()
            if mask.any()
        },
        "intervals": bootstrap_intervals(values, slices),
        "p50_ms": float(np.median(found.ms)),
        "p50_ms_with_encoder": float(np.median(found.ms + encoder_ms)),
    }


def report(
    table: dict[str, dict[str, Any]],
    slices: dict[str, np.ndarray],
    encoder_ms: float,
    num_products: int,
    config: GeneratedMatchConfig,
) -> None:
    """Print the table, what stands at equal latency, and the JSON object."""
    print(
        f"{len(slices['all'])} test contents ({slices['cold'].sum()} of cold products), {num_products} "
        f"products, {config.threads} threads; the encoder takes {encoder_ms:.2f} ms a content (p50)"
    )
    print(f"{'':<12} {'R@1':>6} {'R@10':>6} {'95%':>13}  cold R@10  search ms  with encoder ms")
    for name, own in table.items():
        low, high = own["intervals"]["all"]["R@10"]
        cold = own["slices"].get("cold", {}).get("R@10", float("nan"))
        means = own["slices"]["all"]
        print(
            f"{name:<12} {means['R@1']:6.3f} {means['R@10']:6.3f}   {low:.3f}-{high:.3f} {cold:10.3f} "
            f"{own['p50_ms']:10.3f} {own['p50_ms_with_encoder']:16.3f}"
        )
    results = []
    for kind, text in (("p50_ms_with_encoder", "encoder and search"), ("p50_ms", "search alone")):
        results += at_equal_latency(table, kind, text)
    machine = f"{platform.machine()}, {config.threads} of {os.cpu_count()} cores"
    print(
        json.dumps(
            {
                "benchmark": "generated_match",
                "machine": f"{machine}, Python {platform.python_version()}",
                "encoder_p50_ms": encoder_ms,
                "table": table,
                "results": results,
            }
        )
    )


def at_equal_latency(
    table: dict[str, dict[str, Any]], kind: str, text: str
) -> list[dict[str, Any]]:
    """R@1 and R@10 of the beam width whose latency is nearest to FAISS's, beside FAISS's."""
    exact = table[FAISS]
    widths = [name for name in table if name not in (FAISS, POPULARITY)]
    nearest = min(widths, key=lambda name: abs(table[name][kind] - exact[kind]))
    own = table[nearest]
    latencies = f"{own[kind]:.3f} and {exact[kind]:.3f} ms"
    print(f"at the nearest latency, {text}: {nearest}, {latencies}")
    return [
        {
            "what": f"{metric}, {nearest}, {text}, {latencies}",
            "value": round(own["slices"]["all"][metric], 4),
            "peer": f"{FAISS}, {exact['slices']['all'][metric]:.4f}",
            "ratio": round(
                own["slices"]["all"][metric] / max(exact["slices"]["all"][metric], 1e-9), 3
            ),
        }
        for metric in ("R@1", "R@10")
    ]


def _mmrec(*arguments: object) -> None:
    _run("-c", "from mmrec.cli import main; main()", *arguments)


def _run(*arguments: object) -> None:
    command = [str(part) for part in (sys.executable, *arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:4])}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(GeneratedMatchConfig)))
