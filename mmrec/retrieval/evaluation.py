"""How well an encoder matches contents to products, beside things that learn nothing.

Shape letters: Q queries, N catalogue size, D embedding width.
"""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32

import mmrec
from mmrec.bars import progress_bar
from mmrec.data.media import decode_jpeg, encode_jpeg
from mmrec.data.shards import ShardReader, image_name
from mmrec.errors import UserError
from mmrec.manifest import FILE_NAME, check_no_file, read_manifest, write_whole
from mmrec.model.encoder import Encoder
from mmrec.retrieval.approximation import ask_index
from mmrec.retrieval.base import narrowed
from mmrec.retrieval.baselines import (
    color_histogram,
    histogram_intersection,
    popularity_scores,
    title_overlap_scores,
)
from mmrec.retrieval.embed import embed_rows, embed_views, pick_device
from mmrec.retrieval.evaluation_config import EvaluationConfig
from mmrec.retrieval.gallery import Gallery, Slices, count_train_links, query_slices
from mmrec.retrieval.index import ProductIndex
from mmrec.retrieval.matcher import check_encoder
from mmrec.retrieval.metrics import (
    MAIN_METRICS,
    Intervals,
    bootstrap_intervals,
    evaluation,
    format_table,
    paired_bootstraps,
    per_query,
    rank_relevant,
    rank_relevant_scores,
    recall_curve,
    summarise,
)
from mmrec.retrieval.query_results import (
    best_queries,
    results_table,
    spread_queries,
    worst_queries,
    write_results,
)
from mmrec.retrieval.report.evaluation_page import render_report
from mmrec.retrieval.report.gallery import MatchedProduct, QueryCard
from mmrec.retrieval.report.lines import Curve
from mmrec.retrieval.report.picture import draw_picture
from mmrec.training.run import read_metrics

Ranks = list[np.ndarray]
"""For each query the ascending ranks of its right products."""
_TRAINED, _UNTRAINED = "trained", "untrained"
_MODALITIES = {"video alone": "video", "title alone": "content_title"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured."""

    metrics: dict[str, Any]
    """The contents of `metrics.json`."""
    results: pa.Table
    """What each query found, as in `queries.parquet`."""
    gallery: Gallery
    slices: Slices


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """One encoder's vectors of the queries, by view, and of the catalogue."""

    queries: dict[str, Float32[np.ndarray, "Q D"]]
    products: Float32[np.ndarray, "N D"]

    def ranks(self, gallery: Gallery, view: str = "content", width: int | None = None) -> Ranks:
        """Ranks by exact search, with one view of the queries and the leading components alone."""
        queries, products = self.queries[view], self.products
        if width is not None:
            queries, products = narrowed(queries, width), narrowed(products, width)
        return rank_relevant(queries, products, gallery.relevant)


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


def evaluate(encoder: Encoder, config: EvaluationConfig, *, seed: int = 0) -> Evaluation:
    """Measure an encoder on a split; `config` names its shards, and `encoder` is loaded already.

    With `config.untrained` there is a further baseline: the same encoder with the weights that a training
    with `seed` starts from. Beside the usual keys `metrics` has: "widths", the same slices at each nested
    width; "modalities", with only the pictures or only the title of each content; "system_intervals",
    intervals of the main metrics for all of these and the baselines; "recall_curves", R@K of every system
    for K from 1 to 100; "index", where there is one, see `_ask`; and "timing", the seconds taken.
    """
    started = time.perf_counter()
    if config.index is not None:
        _open_index(config.index, encoder).close()  # A stranger is refused before the long part.
    gallery = Gallery.open(config.shards, config.split)
    train_links = count_train_links(config.shards, gallery.catalog)
    slices = query_slices(
        gallery, train_links, columns=config.slice_by, max_values=config.max_values
    )
    trained = _embed(encoder, gallery, _TRAINED, config)
    untrained = None
    if config.untrained:
        untrained = _embed(_untrained(encoder, seed), gallery, _UNTRAINED, config)
    embedded = time.perf_counter()
    ranks = trained.ranks(gallery)
    widths = {
        str(width): trained.ranks(gallery, width=width)
        for width in (encoder.widths if len(encoder.widths) > 1 else ())
    }
    modalities = {}
    if trained.queries["content_title"].any():  # Rows without a title are zero.
        modalities = {name: trained.ranks(gallery, view) for name, view in _MODALITIES.items()}
    baselines = {} if untrained is None else {_UNTRAINED: untrained.ranks(gallery)}
    if config.baselines:
        baselines |= _baselines(gallery, train_links, config)
    metrics = _metrics(gallery, slices, ranks, widths, modalities, baselines)
    if config.index is not None:
        metrics["index"] = _ask(config.index, encoder, gallery, trained, ranks, slices)
    metrics["timing"] = {
        "embed_s": round(embedded - started, 2),
        "total_s": round(time.perf_counter() - started, 2),
    }
    queries = trained.queries["content"]
    return Evaluation(
        metrics=metrics,
        results=results_table(gallery, slices, ranks, queries, trained.products),
        gallery=gallery,
        slices=slices,
    )


def evaluate_to_folder(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a saved encoder, write metrics.json, queries.parquet and report.html, and return the metrics.

    The report shows the curves of the run that the encoder lies in. Raises `UserError` when the encoder
    was trained on other shards, unless `config.other_shards` allows it, and when `config.index` was not
    built with it.
    """
    check_no_file(config.out)
    if not config.other_shards:
        check_same_shards(config.encoder, config.shards)
    run = config.encoder.parent
    encoder = Encoder.load(config.encoder, device=pick_device(config.device))
    found = evaluate(encoder, config, seed=_seed_of(run))
    metrics = found.metrics
    metrics["encoder"] = encoder.fingerprint
    metrics["shards"] = read_manifest(config.shards, "shards").fingerprint
    metrics["split"] = config.split
    galleries = _galleries(found, config.num_cards)
    page = render_report(
        title=f"{config.out.resolve().name}: matching content to products",
        facts=_facts(metrics, encoder, run),
        metrics=metrics,
        curves=read_curves(run),
        galleries=galleries,
    )
    config.out.mkdir(parents=True, exist_ok=True)
    write_results(config.out, found.results)
    write_whole(config.out / "metrics.json", to_json(metrics) + "\n")
    write_whole(config.out / "report.html", page)
    if config.picture is not None:
        config.picture.parent.mkdir(parents=True, exist_ok=True)
        cards = next(iter(galleries.values()))
        draw_picture(cards[:: max(1, len(cards) // 6)][:6], config.picture)
    return metrics


def to_json(metrics: Mapping[str, Any]) -> str:
    """The text of `metrics.json`."""
    return json.dumps(metrics, indent=2, allow_nan=False)


def result_text(metrics: Mapping[str, Any], out: Path) -> str:
    """What `mmrec evaluate` prints: the table, what an index loses, and where the report is."""
    parts = [format_table(metrics)]
    if "index" in metrics:
        index = metrics["index"]
        recall = ", ".join(f"{share:.4f} of the first {k}" for k, share in index["recall"].items())
        latency = index["latency_ms"]
        parts.append(
            f"index {index['factory']}: finds {recall} by exact search; a query takes "
            f"{latency['index']['median']:.2f} ms, exact {latency['exact']['median']:.2f} ms"
        )
    return "\n\n".join([*parts, f"report: {out / 'report.html'}"])


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


def make_cards(
    gallery: Gallery, results: pa.Table, slices: Slices, chosen: Sequence[int], num_matches: int = 5
) -> list[QueryCard]:
    """What the chosen queries look like and found."""
    rows = {product_id: row for row, product_id in enumerate(gallery.product_ids)}
    cards = []
    for query in chosen:
        found = results.slice(query, 1).to_pylist()[0]
        names = gallery.contents.names(query)
        frames = gallery.contents.read(query, [n for n in names if n.startswith("f")])
        pairs = list(zip(found["top_ids"], found["top_scores"], strict=True))[:num_matches]
        cards.append(
            QueryCard(
                content_id=found["content_id"],
                title=found["title"],
                frames=list(frames.values()),
                slice="cold" if "cold" in slices and slices["cold"][query] else "warm",
                right_titles=[
                    gallery.product_metas[rows[product_id]]["title"] or product_id
                    for product_id in found["product_ids"]
                ],
                matches=[
                    _matched(gallery, rows[product_id], score, product_id in found["product_ids"])
                    for product_id, score in pairs
                ],
                rank=found["rank"],
                margin=found["margin"],
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


def _embed(encoder: Encoder, gallery: Gallery, name: str, config: EvaluationConfig) -> _Embedded:
    sizes = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    return _Embedded(
        queries=embed_views(encoder, gallery.contents, progress=f"{name}: contents", **sizes),
        products=embed_rows(encoder, gallery.catalog, progress=f"{name}: products", **sizes),
    )


def _metrics(
    gallery: Gallery,
    slices: Slices,
    ranks: Ranks,
    widths: Mapping[str, Ranks],
    modalities: Mapping[str, Ranks],
    baselines: Mapping[str, Ranks],
) -> dict[str, Any]:
    """What `metrics.json` says of all systems."""

    def summaries(group: Mapping[str, Ranks]) -> dict[str, Any]:
        return {name: summarise(per_query(own), slices) for name, own in group.items()}

    values = per_query(ranks)
    metrics = evaluation(
        gallery=len(gallery.catalog),
        queries=len(gallery.contents),
        slices=summarise(values, slices),
        intervals=bootstrap_intervals(values, slices),
        baselines=summaries(baselines),
    )
    if widths:
        metrics["widths"] = summaries(widths)
    if modalities:
        metrics["modalities"] = summaries(modalities)
    widest = max(map(int, widths), default=0)  # That is the trained encoder itself.
    narrower = {f"{width} wide": own for width, own in widths.items() if int(width) < widest}
    others = {**narrower, **modalities, **baselines}
    metrics["system_intervals"] = _intervals_of(others, slices)
    longest = min(100, len(gallery.catalog))
    metrics["recall_curves"] = {
        name: [round(float(share), 6) for share in recall_curve(own, longest)]
        for name, own in {_TRAINED: ranks, **others}.items()
    }
    return metrics


def _intervals_of(systems: Mapping[str, Ranks], slices: Slices) -> dict[str, Intervals]:
    """Intervals of the main metrics of several systems, by the same draws of queries for all."""
    columns = {
        (system, metric): values[metric]
        for system, values in ((name, per_query(own)) for name, own in systems.items())
        for metric in MAIN_METRICS
    }
    if not columns:
        return {}
    drawn = bootstrap_intervals({f"{s}\0{m}": v for (s, m), v in columns.items()}, slices)
    return {
        system: {
            name: {metric: own[f"{system}\0{metric}"] for metric in MAIN_METRICS}
            for name, own in drawn.items()
        }
        for system in systems
    }


def _ask(
    folder: Path,
    encoder: Encoder,
    gallery: Gallery,
    trained: _Embedded,
    ranks: Ranks,
    slices: Slices,
) -> dict[str, Any]:
    """What `ask_index` measures of an index, its slices, and how far these differ from exact search's."""
    with _open_index(folder, encoder) as index:
        facts, found = ask_index(
            index,
            trained.queries["content"],
            trained.products,
            gallery.product_ids,
            gallery.relevant,
        )
        factory = index.status().factory
        fingerprint = index.manifest.fingerprint if index.manifest else None
    ours, theirs = per_query(found), per_query(ranks)
    differences = paired_bootstraps(ours, theirs)
    return {
        "fingerprint": fingerprint,
        "factory": factory,
        **facts,
        "slices": summarise(ours, slices),
        "intervals": bootstrap_intervals(ours, {"all": slices["all"]}),
        "differences": {
            metric: {"difference": own.difference, "low": own.low, "high": own.high}
            for metric, own in differences.items()
        },
    }


def _open_index(folder: Path, encoder: Encoder) -> ProductIndex:
    index = ProductIndex.load(folder, device="cpu" if encoder.device.type == "cpu" else "auto")
    check_encoder(index, encoder.fingerprint)
    return index


def _galleries(found: Evaluation, num_cards: int) -> dict[str, list[QueryCard]]:
    """Three galleries: of queries from all over the split, of the best and of the worst."""
    half = -(-num_cards // 2)
    chosen = {
        "all over": spread_queries(len(found.results), num_cards),
        "best": best_queries(found.results, half),
        "worst": worst_queries(found.results, half),
    }
    return {
        name: make_cards(found.gallery, found.results, found.slices, rows)
        for name, rows in chosen.items()
    }


def _facts(metrics: Mapping[str, Any], encoder: Encoder, run: Path) -> dict[str, str]:
    """How the report came about."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, encoder on {encoder.device}",
        "encoder": f"{encoder.config.towers}, {encoder.width} wide, {encoder.fingerprint}",
        "shards": str(metrics["shards"]),
        "split": str(metrics["split"]),
        "evaluation": f"{metrics['timing']['total_s']} s",
        "mmrec": mmrec.__version__,
    }
    if "index" in metrics:
        facts["index"] = f"{metrics['index']['factory']}, {metrics['index']['fingerprint']}"
    if (run / FILE_NAME).is_file():
        facts["training"] = f"{read_manifest(run).details.get('minutes')} minutes"
    return facts


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


def _matched(gallery: Gallery, row: int, score: float, right: bool) -> MatchedProduct:
    meta = gallery.product_metas[row]
    name, catalog = image_name(0), gallery.catalog
    return MatchedProduct(
        product_id=meta["product_id"],
        title=meta["title"],
        score=score,
        image=catalog.read(row, [name])[name] if name in catalog.names(row) else blank_picture(),
        right=right,
        attributes=meta["attributes"],
    )


def _baselines(
    gallery: Gallery, train_links: np.ndarray, config: EvaluationConfig
) -> dict[str, Ranks]:
    """Popularity, title overlap (BM25) and colour histogram."""
    titles = [
        [meta["title"] for meta in metas]
        for metas in (gallery.content_metas, gallery.product_metas)
    ]
    histograms = [_histograms(reader) for reader in (gallery.contents, gallery.catalog)]
    scores = {
        "popularity": popularity_scores(train_links, len(gallery.contents)),
        "title overlap": title_overlap_scores(*titles),
        "color histogram": histogram_intersection(*histograms),
    }
    return {name: rank_relevant_scores(matrix, gallery.relevant) for name, matrix in scores.items()}


def _histograms(reader: ShardReader) -> Float32[np.ndarray, "Q 512"]:
    rows = []
    for row in progress_bar(
        range(len(reader)), desc="color histogram", unit=reader.family, leave=False
    ):
        wanted: Sequence[str] = [n for n in reader.names(row) if n[0] in "fi"]
        pictures = [
            decode_jpeg(data).permute(1, 2, 0).numpy() for data in reader.read(row, wanted).values()
        ]
        rows.append(color_histogram(pictures))
    return np.stack(rows)
