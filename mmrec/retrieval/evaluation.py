"""How well an encoder matches contents to products, beside things that learn nothing.

Shape letters: Q queries, N catalogue size, D embedding width.
"""

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32
from tqdm import tqdm

import mmrec
from mmrec.data.media import decode_jpeg, encode_jpeg
from mmrec.data.shards import ShardReader, image_name, open_shards
from mmrec.errors import UserError
from mmrec.manifest import FILE_NAME, check_no_file, read_manifest, write_whole
from mmrec.model.encoder import Encoder
from mmrec.retrieval.base import narrowed
from mmrec.retrieval.baselines import (
    color_histogram,
    histogram_intersection,
    popularity_scores,
    title_overlap_scores,
)
from mmrec.retrieval.embed import Split, embed_rows, embed_views, open_split, pick_device
from mmrec.retrieval.metrics import (
    Summary,
    bootstrap_intervals,
    evaluation,
    format_table,
    per_query,
    rank_relevant,
    rank_relevant_scores,
    summarise,
)
from mmrec.retrieval.report import Curve, MatchedProduct, QueryCard, draw_picture, render_report
from mmrec.training.run import read_metrics

Slices = dict[str, Bool[np.ndarray, " Q"]]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Queries of one split, the whole catalogue, and which products are right for which query."""

    contents: ShardReader
    catalog: ShardReader
    relevant: list[np.ndarray]
    """For each content, the catalogue rows of its linked products."""

    @classmethod
    def open(cls, shards: Path, split: Split) -> "Gallery":
        """Open a split's contents and the catalogue of a folder of shards."""
        contents = open_split(shards, split)
        catalog = open_split(shards, "catalog")
        rows = {ids[0]: row for row, ids in enumerate(catalog.product_ids)}
        return cls(
            contents=contents,
            catalog=catalog,
            relevant=[np.array([rows[p] for p in ids]) for ids in contents.product_ids],
        )


def measure(
    encoder: Encoder, gallery: Gallery, *, batch_size: int = 64, num_workers: int = 0
) -> dict[str, float]:
    """Every metric over all queries, by exact search: what training prints while it runs.

    Those of a narrower nested width are under its number: "64/R@1".
    """
    queries = embed_rows(encoder, gallery.contents, batch_size=batch_size, num_workers=num_workers)
    products = embed_rows(encoder, gallery.catalog, batch_size=batch_size, num_workers=num_workers)
    metrics = {}
    for width in reversed(encoder.widths):
        prefix = "" if width == encoder.width else f"{width}/"
        narrow = narrowed(queries, width), narrowed(products, width)
        values = per_query(rank_relevant(*narrow, gallery.relevant))
        metrics |= {f"{prefix}{name}": float(column.mean()) for name, column in values.items()}
    return metrics


def evaluate(
    encoder: Encoder,
    shards: Path,
    *,
    split: Split = "test",
    untrained: bool = True,
    baselines: bool = True,
    num_cards: int = 12,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[dict[str, Any], list[QueryCard]]:
    """Measure an encoder on a split: the contents of `metrics.json`, and cards for a gallery.

    `untrained` adds a baseline: the same encoder with the weights that a training with `seed` starts
    from. Beside the usual keys, "widths" holds the same slices at each nested width, "modalities" those
    with only the pictures or only the title of each content, and "timing" the seconds taken.
    """
    started = time.perf_counter()
    gallery = Gallery.open(shards, split)
    train_links = count_train_links(shards, gallery.catalog)
    slices = query_slices(gallery, train_links)
    systems = {"trained": encoder}
    if untrained:
        systems["untrained"] = _untrained(encoder, seed)
    queries, products = {}, {}
    for name, system in systems.items():
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        queries[name] = embed_views(system, gallery.contents, progress=f"{name}: contents", **sizes)
        products[name] = embed_rows(system, gallery.catalog, progress=f"{name}: products", **sizes)
    embedded = time.perf_counter()

    def ranked(
        system: str, view: str = "content", width: int = encoder.width
    ) -> dict[str, np.ndarray]:
        rows, columns = narrowed(queries[system][view], width), narrowed(products[system], width)
        return per_query(rank_relevant(rows, columns, gallery.relevant))

    values = ranked("trained")
    summaries: dict[str, Summary] = {}
    if untrained:
        summaries["untrained"] = summarise(ranked("untrained"), slices)
    if baselines:
        summaries |= _baselines(gallery, train_links, slices)
    metrics = evaluation(
        gallery=len(gallery.catalog),
        queries=len(gallery.contents),
        slices=summarise(values, slices),
        intervals=bootstrap_intervals(values, slices),
        baselines=summaries,
    )
    if len(encoder.widths) > 1:
        metrics["widths"] = {
            str(width): summarise(ranked("trained", width=width), slices)
            for width in encoder.widths
        }
    if queries["trained"]["content_title"].any():  # Rows without a title are zero.
        metrics["modalities"] = {
            "video alone": summarise(ranked("trained", "video"), slices),
            "title alone": summarise(ranked("trained", "content_title"), slices),
        }
    metrics["timing"] = {
        "embed_s": round(embedded - started, 2),
        "total_s": round(time.perf_counter() - started, 2),
    }
    cards = make_cards(
        gallery, queries["trained"]["content"], products["trained"], slices, num_cards
    )
    return metrics, cards


def evaluate_to_folder(
    encoder_folder: Path,
    shards: Path,
    out: Path,
    *,
    split: Split = "test",
    untrained: bool = True,
    baselines: bool = True,
    num_cards: int = 12,
    picture: Path | None = None,
    other_shards: bool = False,
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
) -> str:
    """Evaluate a saved encoder, write `metrics.json` and `report.html`, and return the result table.

    The report shows the curves of the run that the encoder lies in. Raises `UserError` when the encoder
    was trained on other shards, unless `other_shards` allows it.
    """
    if num_cards < 1 or batch_size < 1 or num_workers < 0:
        raise UserError(
            "expected --num-cards and --batch-size of at least 1, --num-workers of 0 or more"
        )
    check_no_file(out)
    if not other_shards:
        check_same_shards(encoder_folder, shards)
    run = encoder_folder.parent
    encoder = Encoder.load(encoder_folder, device=pick_device(device))
    metrics, cards = evaluate(
        encoder,
        shards,
        split=split,
        untrained=untrained,
        baselines=baselines,
        num_cards=num_cards,
        seed=_seed_of(run),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    metrics["encoder"] = encoder.fingerprint
    metrics["shards"] = read_manifest(shards, "shards").fingerprint
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    table = format_table(metrics)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, encoder on {encoder.device}",
        "encoder": f"{encoder.config.towers}, {encoder.width} wide, {encoder.fingerprint}",
        "shards": str(metrics["shards"]),
        "split": split,
        "evaluation": f"{metrics['timing']['total_s']} s",
        "mmrec": mmrec.__version__,
    }
    if (run / FILE_NAME).is_file():
        facts["training"] = f"{read_manifest(run).details.get('minutes')} minutes"
    page = render_report(
        title=f"{out.name}: matching content to products",
        facts=facts,
        metrics=metrics,
        curves=read_curves(run),
        cards=cards,
    )
    write_whole(out / "report.html", page)
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(cards[:: max(1, len(cards) // 6)][:6], picture)
    return table + "\n\n" + f"report: {out / 'report.html'}"


def read_curves(run: Path) -> list[Curve]:
    """A run's curves worth looking at: the loss, val metrics, learning rate and scale."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in read_metrics(run):
        for name in ("loss", "val/R@1", "val/R@5", "val/MRR", "lr", "scale"):
            if name in row:
                steps, values = points.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(row[name])
    return [Curve(name=name, steps=s, values=v) for name, (s, v) in points.items()]


def count_train_links(shards: Path, catalog: ShardReader) -> np.ndarray:
    """How many training contents each catalogue product is linked from, (N,)."""
    counts = Counter(p for ids in open_shards(shards, "contents", "train").product_ids for p in ids)
    return np.array([counts[ids[0]] for ids in catalog.product_ids], np.float64)


def query_slices(gallery: Gallery, train_links: np.ndarray) -> Slices:
    """Masks over the queries by what is known of their products and what is missing from themselves.

    warm: at least one right product has training links; cold: none has. popular and rare: above and at
    or below the median link count of the warm queries. category: where products carry that attribute.
    """
    links = np.array([train_links[rows].max() for rows in gallery.relevant])
    warm = links > 0
    middle = np.median(links[warm]) if warm.any() else 0.0
    metas = [gallery.contents.meta(row) for row in range(len(gallery.contents))]
    titled = np.array([bool(meta["title"]) for meta in metas])
    slices: Slices = {"all": np.ones(len(links), bool), "warm": warm, "cold": ~warm}
    if warm.any() and (warm & (links > middle)).any():
        slices |= {"popular": warm & (links > middle), "rare": warm & (links <= middle)}
    if titled.any() and not titled.all():
        slices |= {"with title": titled, "no title": ~titled}
    first = np.array([rows[0] for rows in gallery.relevant])
    category = [
        gallery.catalog.meta(row)["attributes"].get("category")
        for row in range(len(gallery.catalog))
    ]
    for name in sorted({str(c) for c in category if c is not None}):
        slices[f"category: {name}"] = np.array([str(category[row]) == name for row in first])
    return {name: mask for name, mask in slices.items() if mask.any()}


def make_cards(
    gallery: Gallery,
    queries: Float32[np.ndarray, "Q D"],
    products: Float32[np.ndarray, "N D"],
    slices: Slices,
    count: int,
    *,
    num_matches: int = 5,
) -> list[QueryCard]:
    """A gallery of `count` queries spread over the split, not chosen by how well they went."""
    chosen = np.unique(
        np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(int)
    ).tolist()
    cards = []
    for query in chosen:
        scores = products @ queries[query]
        best = np.argsort(-scores, kind="stable")[:num_matches]
        right = set(gallery.relevant[query].tolist())
        names = gallery.contents.names(query)
        frames = gallery.contents.read(query, [n for n in names if n.startswith("f")])
        meta = gallery.contents.meta(query)
        cards.append(
            QueryCard(
                content_id=meta["content_id"],
                title=meta["title"],
                frames=list(frames.values()),
                slice="cold" if "cold" in slices and slices["cold"][query] else "warm",
                right_titles=[
                    product["title"] or product["product_id"] for product in meta["products"]
                ],
                matches=[
                    _matched(gallery.catalog, int(row), float(scores[row]), int(row) in right)
                    for row in best
                ],
            )
        )
    return cards


def check_same_shards(encoder: Path, shards: Path) -> None:
    """Refuse shards that the encoder was not trained on: their test split may hold what it has seen."""
    parent = read_manifest(encoder, "encoder").parent("shards")
    found = read_manifest(shards, "shards").fingerprint
    if parent is not None and parent.fingerprint != found:
        raise UserError(
            f"{encoder}: was trained on shards {parent.fingerprint}, and {shards} is {found}, whose test "
            f"split may hold contents that it has seen; --other-shards evaluates all the same"
        )


def _untrained(encoder: Encoder, seed: int) -> Encoder:
    """The encoder that a training starts from: pretrained weights, and what the seed draws."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if encoder.config.pretrained:
                return Encoder(encoder.config).to(encoder.device)
            start = Encoder(
                encoder.config, model_config=encoder.model_config, pixels=encoder.pixels
            )
            return start.to(encoder.device)
    except UserError as error:
        raise UserError(f"{error}; --no-untrained evaluates without that baseline") from None


def _seed_of(run: Path) -> int:
    """The seed that a run's config names; 0 for an encoder that lies elsewhere."""
    try:
        return int(json.loads((run / "config.json").read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@cache
def blank_picture() -> bytes:
    """A grey JPEG, for a product that has no picture."""
    return encode_jpeg(np.full((32, 32, 3), 235, np.uint8), 80)


def _matched(catalog: ShardReader, row: int, score: float, right: bool) -> MatchedProduct:
    meta = catalog.meta(row)
    name = image_name(0)
    return MatchedProduct(
        product_id=meta["product_id"],
        title=meta["title"],
        score=score,
        image=catalog.read(row, [name])[name] if name in catalog.names(row) else blank_picture(),
        right=right,
        attributes=meta["attributes"],
    )


def _baselines(gallery: Gallery, train_links: np.ndarray, slices: Slices) -> dict[str, Summary]:
    """Popularity, title overlap (BM25) and colour histogram."""
    contents, catalog = gallery.contents, gallery.catalog
    titles = [
        [reader.meta(row)["title"] for row in range(len(reader))] for reader in (contents, catalog)
    ]
    scores = {
        "popularity": popularity_scores(train_links, len(contents)),
        "title overlap": title_overlap_scores(*titles),
        "color histogram": histogram_intersection(_histograms(contents), _histograms(catalog)),
    }
    return {
        name: summarise(per_query(rank_relevant_scores(matrix, gallery.relevant)), slices)
        for name, matrix in scores.items()
    }


def _histograms(reader: ShardReader) -> Float32[np.ndarray, "Q 512"]:
    rows = []
    for row in tqdm(range(len(reader)), desc="color histogram", unit=reader.family, leave=False):
        wanted: Sequence[str] = [n for n in reader.names(row) if n[0] in "fi"]
        pictures = [
            decode_jpeg(data).permute(1, 2, 0).numpy() for data in reader.read(row, wanted).values()
        ]
        rows.append(color_histogram(pictures))
    return np.stack(rows)
