"""Search for the products that an encoder confuses with those of the training contents.

Input: an encoder and the shards it is to be trained on (further). Output: a folder with a table of
content_id, product_ids and scores, for `--negatives` of train/contrastive.py.

    python train/mine_negatives.py --encoder runs/demo/train/encoder --shards runs/demo/shards \
        --out runs/demo/negatives

Embeds the catalogue and the training contents, searches as an index would, leaves out what is a
content's own or nearly as near as its own, and prints the share of each reason. On the demo about a minute on
2 cores.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Float32

from mmrec.cli import run_program
from mmrec.data.batches import number_products
from mmrec.data.negatives import write_negatives
from mmrec.data.shards import open_sources
from mmrec.errors import UserError
from mmrec.manifest import check_output, new_folder, parent_of, read_manifest
from mmrec.model.encoder import Encoder
from mmrec.ranges import Count, CountOrZero, Range, check_ranges
from mmrec.retrieval.embed import embed_rows, pick_device
from mmrec.retrieval.faiss_base import new_base
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.mining import keep_negatives

# Shape letters: N products, Q contents, D embedding width.
_QUERIES = 1024  # contents searched at once


@dataclass(frozen=True, kw_only=True)
class MineConfig:
    """Where to search, and what counts as a hard negative."""

    encoder: Path
    """An encoder's folder, such as runs/demo/train/encoder."""
    shards: tuple[Path, ...]
    """The folders that training reads: `--shards` and all `--further-shards` of train/contrastive.py."""
    out: Path
    """The folder to write."""
    num_negatives: Count = 8
    """At most so many products are kept for a content."""
    depth: Count = 64
    """Nearest products looked at for each content."""
    margin: Annotated[float, Range(0, 1, below=True)] = 0.05
    """A product is left out when its score is above (1 - margin) times that of the best own product."""
    products: Literal["linked", "all"] = "linked"
    """linked: those that some training content links to. all: the whole catalogue; a product without a
    link is then never a positive, and only learns to be far from everything."""
    factory: str = "Flat"
    """The FAISS index that is searched; Flat is exact, HNSW32 faster over millions of products."""
    device: str = "auto"
    """auto, cpu or cuda."""
    batch_size: Count = 64
    """Items encoded at a time."""
    num_workers: CountOrZero = 2
    """Processes that read and decode; 0 does it in this one."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def main(config: MineConfig) -> Path:
    """Embed, search, keep, write; returns the folder."""
    check(config)
    # --- data and vectors ----------------------------------------------------------------------
    catalog, _ = open_sources(config.shards, "products", "catalog")
    contents, _ = open_sources(config.shards, "contents", "train")
    encoder = Encoder.load(config.encoder, device=pick_device(config.device))
    sizes = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    product_vectors = embed_rows(encoder, catalog, progress="embed catalog", **sizes)
    content_vectors = embed_rows(encoder, contents, progress="embed train", **sizes)

    # --- search --------------------------------------------------------------------------------
    rows = first_rows([ids[0] for ids in catalog.product_ids], product_vectors)
    vectors = product_vectors[list(rows.values())]
    index = ProductIndex.build(list(rows), vectors, factory=config.factory)
    place = {product_id: i for i, product_id in enumerate(rows)}
    own = [[p for p in ids if p in place] for ids in contents.product_ids]
    # A content without pictures and title has no direction, one without its own products no measure.
    lengths = np.linalg.norm(content_vectors, axis=1)
    queries = [i for i, mine in enumerate(own) if mine and lengths[i] > 0.5]
    allowed = number_products(contents.product_ids) if config.products == "linked" else None
    table, reasons = {}, {}
    for start in range(0, len(queries), _QUERIES):
        part = queries[start : start + _QUERIES]
        found = index.search(content_vectors[part], min(config.depth, len(index)))
        best = [
            float((vectors[[place[p] for p in own[i]]] @ content_vectors[i]).max()) for i in part
        ]
        kept, counted = keep_negatives(
            found.ids,
            found.scores,
            own=[own[i] for i in part],
            own_scores=best,
            allowed=allowed,
            margin=config.margin,
            most=config.num_negatives,
        )
        table |= {contents.content_ids[i]: pair for i, pair in zip(part, kept, strict=True)}
        reasons = {name: reasons.get(name, 0) + counted[name] for name in {*reasons, *counted}}

    # --- save ----------------------------------------------------------------------------------
    kept_of = reasons.pop("", 0)
    counts = {"in": len(contents), "out": len(table), "candidates": kept_of + sum(reasons.values())}
    counts |= {"kept": kept_of, "dropped": dict(sorted(reasons.items()))}
    parents = [parent_of(config.out, config.encoder, "encoder")]
    parents += [parent_of(config.out, folder, "shards") for folder in config.shards]
    with new_folder(config.out, kind="negatives", overwrite=config.overwrite) as folder:
        write_negatives(folder, table, parents=parents, config=asdict(config), counts=counts)
    report(config, counts, table)
    return config.out


def check(config: MineConfig) -> None:
    """Refuse what cannot work before any work is done."""
    check_ranges(config)
    if not config.shards:
        raise UserError("--shards: expected at least one folder")
    new_base(read_manifest(config.encoder, "encoder").details["width"], config.factory)
    for folder in config.shards:
        read_manifest(folder, "shards")
    inputs = (config.encoder, *config.shards)
    check_output(config.out, kind="negatives", overwrite=config.overwrite, inputs=inputs)


def first_rows(ids: list[str], vectors: Float32[np.ndarray, "N D"]) -> dict[str, int]:
    """The first row of each product that has a direction."""
    rows: dict[str, int] = {}
    for row in np.flatnonzero(np.linalg.norm(vectors, axis=1) > 0.5).tolist():
        rows.setdefault(ids[row], row)
    return rows


def report(
    config: MineConfig, counts: dict, table: dict[str, tuple[list[str], list[float]]]
) -> None:
    """Print what became of the candidates."""
    candidates = max(1, counts["candidates"])
    print(f"{counts['candidates']} candidates of {counts['out']} contents:")
    for reason, number in {"kept": counts["kept"], **counts["dropped"]}.items():
        print(f"  {reason:<18}{number:>10}  {number / candidates:6.1%}")
    without = sum(not ids for ids, _ in table.values()) + counts["in"] - counts["out"]
    print(f"contents without a hard negative: {without} of {counts['in']}")
    print(f"negatives: {config.out}")


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(MineConfig, prog="mine_negatives.py")))
