"""The `mmrec` command: shards, embed, index, search, recommend, evaluate, compare, export, hub,
serve, inspect.

Nothing heavy is imported until a command runs, so that `mmrec --help` answers at once.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from mmrec import __version__
from mmrec.bars import quiet_if_asked
from mmrec.errors import UserError
from mmrec.flags import refused_in_one_line, without_typeguard
from mmrec.launcher import stop_with_launcher
from mmrec.retrieval.evaluation_config import EvaluationConfig
from mmrec.serve.config import ServeConfig
from mmrec.terminal import one_line

if TYPE_CHECKING:
    from mmrec.retrieval.batch import BatchCounts

Result = TypeVar("Result")
Split = Literal["train", "val", "test"]
DESCRIPTION = """Match content to products.

Every command takes --quiet (no progress bars); those that make or change something take --json (one JSON
object on stdout)."""

app = tyro.extras.SubcommandApp()
index_app = tyro.extras.SubcommandApp()
app.command(index_app, name="index", help="Build an index of products, change it, ask how it is.")
shards_app = tyro.extras.SubcommandApp()
app.command(shards_app, name="shards", help="Read tars that others wrote as shards.")
export_app = tyro.extras.SubcommandApp()
app.command(export_app, name="export", help="Write an encoder for programs that have no torch.")
hub_app = tyro.extras.SubcommandApp()
app.command(hub_app, name="hub", help="Publish an encoder on the Hugging Face hub.")


@app.command
def embed(
    *,
    encoder: Path,
    shards: Path,
    out: Path,
    split: Literal["catalog", "train", "val", "test"] = "catalog",
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
    dtype: Literal["float16", "float32"] = "float16",
    width: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    json: bool = False,
) -> None:
    """Encode shards into a folder of embeddings.

    `accelerate launch -m mmrec.cli embed ...` takes several GPUs. A run that was killed goes on where it was
    when the same command is given again.

    Args:
        encoder: An encoder's folder, such as runs/demo/train/encoder, or hf://user/name[@revision].
        shards: The folder written by data_prep/make_shards.py.
        out: The folder to write.
        split: catalog for the products, or a split of the contents.
        device: auto, cpu or cuda.
        batch_size: Items encoded at a time.
        num_workers: Processes that read and decode; 0 does it in this one.
        dtype: How numbers are kept on disk.
        width: Numbers kept of each embedding, of an encoder trained with --encoder.widths; all if left out.
        overwrite: Replace the folder if it is there.
        restart: Throw away what an earlier run left unfinished.
        json: Print one JSON object.
    """
    from mmrec.model.download import local_encoder
    from mmrec.retrieval.embed import embed_shards

    summary = embed_shards(
        local_encoder(encoder),
        shards,
        out,
        split=split,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        width=width,
        overwrite=overwrite,
        restart=restart,
    )
    if summary.first:
        facts = {"out": out, **{name: getattr(summary, name) for name in ("rows", "new_rows")}}
        facts |= {"width": summary.width, "seconds": round(summary.seconds, 3)}
        _tell(f"{summary.line()}: {out}", facts, json=json)


@index_app.command(name="build")
def index_build(
    *,
    embeddings: Path,
    out: Path,
    factory: str = "Flat",
    width: int | None = None,
    rerank: bool = False,
    ids: str | None = None,
    memory_gb: float | None = None,
    recall_target: float | None = None,
    queries: str | Path | None = None,
    memory_budget: str | None = None,
    k: int | None = None,
    best_effort: bool = False,
    tuning_sample: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Build an index from embeddings of the catalogue, or of contents.

    With --recall-target kinds of index are measured, and the fastest that reaches the target within the
    memory budget is taken; what was measured is printed, and stays as frontier.json and frontier.png.

    Args:
        embeddings: The folder written by `mmrec embed`, or by clip-retrieval's inference.
        out: The folder to write.
        factory: A FAISS factory string: Flat is exact; HNSW32 or IVF1024,Flat are faster on many products.
        width: Index the leading components alone, of embeddings with nested widths.
        rerank: Keep all components as float16, and score matches again by them.
        ids: The column of the metadata that holds the ids, where mmrec did not write the embeddings.
        memory_gb: Embeddings that do not fit are read a part at a time; left out, half of what is free.
        recall_target: Choose the factory by measurement: the share of the true k nearest that searches find.
        queries: What to measure with: embeddings of contents (mmrec embed --split val), or: catalogue (a
            folder of that name is ./catalogue).
        memory_budget: The most that the index may take, attributes aside: 500MB, 4GB, 4GiB.
        k: Matches that the recall target is about; 10 if left out.
        best_effort: Take what finds most where nothing reaches the target.
        tuning_sample: A larger catalogue is measured on so many of its products, 100,000 if left out; one
            index is built on all.
        seed: Draws that sample, and 2,048 of the queries; 0 if left out.
        overwrite: Replace the index if it is there; readers go on with the one that they opened.
        json: Print one JSON object; what is measured goes to stderr then.
    """
    from mmrec.retrieval.candidates import parse_bytes
    from mmrec.retrieval.matcher import build_index
    from mmrec.retrieval.tuning import TuningGoal

    goal = None
    if recall_target is not None:
        if factory != "Flat":
            raise UserError("--recall-target chooses the factory; leave out --factory")
        goal = TuningGoal(
            recall_target=recall_target,
            k=10 if k is None else k,
            memory_budget=None if memory_budget is None else parse_bytes(memory_budget),
            sample=100_000 if tuning_sample is None else tuning_sample,
            best_effort=best_effort,
            seed=0 if seed is None else seed,
        )
    elif best_effort or (queries, memory_budget, k, tuning_sample, seed) != (None,) * 5:
        raise UserError(
            "--queries, --memory-budget, --k, --tuning-sample, --seed and --best-effort go with "
            "--recall-target"
        )
    index = build_index(
        embeddings,
        out,
        factory=factory,
        width=width,
        rerank=rerank,
        ids=ids,
        memory_gb=memory_gb,
        goal=goal,
        queries=_tuning_queries(queries),
        overwrite=overwrite,
        report=partial(print, file=sys.stderr) if json else print,
    )
    what = "products" if index.key == "product_id" else "contents"
    width = width or index.width
    facts = {"out": out, what: len(index), "width": width, "factory": index.factory}
    _tell(
        f"indexed {len(index):,} {what}, {width} wide, as {index.factory}: {out}", facts, json=json
    )


def _tuning_queries(queries: str | Path | None) -> Path | None:
    """`catalogue` as it is; ./catalogue, which a path would not tell from it, as a whole path."""
    if queries is None:
        return None
    named = str(queries) != "catalogue" and str(Path(queries)) == "catalogue"
    return Path(queries).absolute() if named else Path(queries)


@index_app.command(name="upsert")
def index_upsert(
    *,
    index: Path | None = None,
    uri: str | None = None,
    collection: str = "products",
    embeddings: Path,
    ids: str | None = None,
    accept_encoder: bool = False,
    json: bool = False,
) -> None:
    """Add products to an index, or replace those that it has, while it serves.

    Args:
        index: The folder written by `mmrec index build`.
        uri: Where Milvus is, as for `mmrec index push`; instead of --index.
        collection: The collection there.
        embeddings: The folder written by `mmrec embed`, with the encoder that made the index.
        ids: The column of the metadata that holds the ids, where mmrec did not write the embeddings.
        accept_encoder: Take embeddings though it is not known whether one encoder made them and the index.
        json: Print one JSON object.
    """
    from mmrec.retrieval.matcher import open_index, upsert_embeddings

    with open_index(index, uri=uri, collection=collection, device="cpu") as opened:
        count = upsert_embeddings(opened, embeddings, ids=ids, accept_encoder=accept_encoder)
        advice = opened.status().advice
        held = len(opened)
    lines = [f"upserted {count:,}; {index or uri} holds {held:,}", *advice]
    _tell("\n".join(lines), {"upserted": count, "holds": held, "advice": list(advice)}, json=json)


@index_app.command(name="delete")
def index_delete(
    *,
    index: Path | None = None,
    uri: str | None = None,
    collection: str = "products",
    ids: Path,
    json: bool = False,
) -> None:
    """Take products out of an index while it serves.

    Args:
        index: The folder written by `mmrec index build`.
        uri: Where Milvus is, as for `mmrec index push`; instead of --index.
        collection: The collection there.
        ids: A text file with an id on each line; blanks around it do not count.
        json: Print one JSON object.
    """
    from mmrec.retrieval.matcher import open_index

    try:
        # An id may hold what `splitlines` cuts at, such as U+2028.
        lines = [line.strip(" \t") for line in ids.read_text(encoding="utf-8-sig").split("\n")]
        wanted = [line for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{ids}: not a text file of ids ({error})") from None
    with open_index(index, uri=uri, collection=collection, device="cpu") as opened:
        count = opened.delete(wanted)
        held = len(opened)
    missing = len(set(wanted)) - count
    text = f"deleted {count:,}; {index or uri} holds {held:,}"
    text += f"\n{missing:,} of the ids were not there" if missing else ""
    _tell(text, {"deleted": count, "missing": missing, "holds": held}, json=json)


@index_app.command(name="compact")
def index_compact(*, index: Path, json: bool = False) -> None:
    """Fold what was upserted and deleted into a new generation of an index.

    Args:
        index: The folder written by `mmrec index build`.
        json: Print one JSON object.
    """
    from mmrec.bars import clock
    from mmrec.retrieval.index import ProductIndex

    with ProductIndex.load(index, device="cpu") as opened:
        with clock(f"compact {len(opened):,} rows"):
            done = opened.compact()
        generation = opened.status().generation
        rows = len(opened)
    text = f"generation {generation}, {rows:,} rows" if done else "nothing to compact"
    _tell(text, {"compacted": done, "generation": generation, "rows": rows}, json=json)


@index_app.command(name="status")
def index_status(
    index: tyro.conf.Positional[Path | None] = None,
    *,
    uri: str | None = None,
    collection: str = "products",
    json: bool = False,
) -> None:
    """Show what an index holds, how far it has drifted since it was built, and what should be done.

    Args:
        index: The folder written by `mmrec index build`.
        uri: Where Milvus is, as for `mmrec index push`; instead of the folder.
        collection: The collection there.
        json: Print one JSON object.
    """
    from dataclasses import asdict
    from json import dumps

    from mmrec.retrieval.matcher import open_index

    with open_index(index, uri=uri, collection=collection, device="cpu") as opened:
        status = opened.status()
    print(dumps(asdict(status)) if json else "\n".join(status.lines()))


@index_app.command(name="verify")
def index_verify(index: tyro.conf.Positional[Path], *, json: bool = False) -> None:
    """Read every file of an index and compare it with what was written.

    Args:
        index: The folder written by `mmrec index build`.
        json: Print one JSON object.
    """
    from mmrec.retrieval.index import ProductIndex

    opened = ProductIndex.load(index, device="cpu", verify=True)
    status = opened.status()
    facts = {"whole": True, "generation": status.generation, "changes": status.changes}
    _tell(
        f"{index}: generation {status.generation} and {status.changes:,} changes are whole",
        facts,
        json=json,
    )


@index_app.command(name="push")
def index_push(
    *,
    index: Path,
    uri: str,
    collection: str = "products",
    kind: Literal["FLAT", "HNSW", "IVF_FLAT", "IVF_SQ8"] = "FLAT",
    json: bool = False,
) -> None:
    """Move an index into a Milvus collection, for catalogues past one machine.

    The collection takes its name, and the place of an earlier one, once all products are in it; run again, a
    push that was broken off goes on. A token is read from the environment, as MILVUS_TOKEN.

    Args:
        index: The folder written by `mmrec index build`, of a kind that keeps vectors.
        uri: Of a Milvus server, http://localhost:19530; or a path that ends in .db, for milvus-lite.
        collection: The collection's name.
        kind: Milvus's index type; FLAT is exact.
        json: Print one JSON object.
    """
    from mmrec.retrieval.milvus_push import push_index

    done = push_index(index, uri, collection=collection, kind=kind, progress=True)
    before = f", {done.resumed:,} of them by an earlier push" if done.resumed else ""
    text = f"pushed {done.products:,} products{before}: collection '{collection}' at {uri}"
    facts = {"products": done.products, "resumed": done.resumed, "collection": collection}
    _tell(text, facts, json=json)


@shards_app.command(name="index")
def shards_index(
    *,
    tars: tuple[str, ...],
    out: Path,
    split: Split,
    frames: str = "jpg,jpeg,png,webp",
    title: str | None = None,
    content_id: str = "key",
    product_id: str = "key",
    product_images: str | None = None,
    product_title: str | None = None,
    decode: bool = False,
    num_workers: int = 0,
    max_dropped: float = 0.05,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Index tars made by img2dataset, or other webdataset tars of images, where they lie.

    The folder written is one of shards: training, embed and evaluate read it. A further run with another
    split adds that split. A place of text is a member's name after the key (txt), a field of a JSON member
    (json:uid, json:meta.uid), or key; a place of pictures is a name or a pattern (frame_*.jpg). Of several
    with commas between, the first that holds something counts.

    Args:
        tars: Paths or URLs, with braces ({00000..00099}) and wildcards.
        out: The folder to write, or to add the split to.
        split: The split that these tars are.
        frames: Places of a content's pictures.
        title: Place of a content's title; left out, txt or json:caption unless the product's title is there.
        content_id: Place of the content's id, which occurs once.
        product_id: Place of the id of the product that the content leads to.
        product_images: Places of the product's pictures.
        product_title: Place of the product's title; without it and pictures the caption is the product.
        decode: Decode every picture and leave out those that cannot be; else their first bytes are looked at.
        num_workers: Processes that read tars; 0 takes one per core.
        max_dropped: Largest share of samples that may be dropped before this fails.
        overwrite: Replace the split if it is there.
        json: Print one JSON object.
    """
    from mmrec.data.foreign import ForeignMapping, index_tars

    mapping = ForeignMapping(
        frames=frames,
        title=title,
        content_id=content_id,
        product_id=product_id,
        product_images=product_images,
        product_title=product_title,
    )
    manifest = index_tars(
        tars,
        out,
        split=split,
        mapping=mapping,
        decode=decode,
        num_workers=num_workers,
        max_dropped=max_dropped,
        overwrite=overwrite,
    )
    part = manifest.details["splits"][split]
    catalog = manifest.details["catalog"]
    lines = [f"{out}: {part['contents']:,} contents of split {split} in {part['shards']:,} tars"]
    lines += [f"  catalog: {catalog:,} products"]
    for what in ("dropped", "images_skipped"):
        for reason, count in part[what].items():
            lines += [f"  {what.replace('_', ' ')}: {reason}: {count:,}"]
    _tell("\n".join(lines), {"out": out, "split": split, "catalog": catalog, **part}, json=json)


@app.command
def search(
    *,
    index: Path | None = None,
    backend: Literal["faiss", "milvus"] = "faiss",
    uri: str | None = None,
    collection: str = "products",
    video: str | None = None,
    images: tuple[str, ...] = (),
    text: str | None = None,
    product_id: str | None = None,
    content_id: str | None = None,
    queries: Path | None = None,
    query_ids: str | None = None,
    out: Path | None = None,
    k: int = 10,
    where: str | None = None,
    side: Literal["content", "product"] | None = None,
    rerank: bool | None = None,
    encoder: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Find the products that a video, pictures, words, or a mix of them match.

    Args:
        index: The folder written by `mmrec index build`.
        backend: faiss for such a folder, milvus for what `mmrec index push` moved to a server.
        uri: Where Milvus is, http://localhost:19530, or a path that ends in .db; instead of --index.
        collection: The collection there.
        video: A video file or URL.
        images: Picture files or URLs, instead of a video.
        text: A title or a query in words, alone or beside the video or pictures.
        product_id: A product of the index instead, to find what is near it.
        content_id: The same, of an index of contents.
        queries: Many queries: a Parquet file with columns title, video or images, or a folder of embeddings.
        query_ids: The column that names queries in a folder that mmrec did not write; else they are numbered.
        out: The Parquet file of matches to write, with --queries.
        k: How many products to find.
        where: A condition on attributes: "price < 30 and category = 'shoes' and available".
        side: What a query is; left out, a content if the index holds products, and a product if contents.
        rerank: Score matches again at full width; left out, as the index was built.
        encoder: Where the encoder is, or hf://user/name, if it is not where the index remembers it.
        device: auto, cpu or cuda.
        json: Print one JSON object instead of a table; with --queries, of counts.
    """
    from json import dumps

    from mmrec.retrieval.batch import is_embeddings, match_embeddings, match_table
    from mmrec.retrieval.matcher import Matcher, open_index

    if (backend == "milvus") != (uri is not None) or (index is None) == (uri is None):
        raise UserError("give --index FOLDER, or --backend milvus --uri URI")
    if (queries is None) != (out is None):
        raise UserError("--queries and --out go together")
    single = (video, text, product_id, content_id, *images)
    if queries and any(single):
        raise UserError("give --queries, or one query, not both")
    if queries and out and is_embeddings(queries):
        opened = open_index(index, uri=uri, collection=collection, device=device)
        counts = match_embeddings(
            opened, queries, out, k=k, where=where, rerank=rerank, ids=query_ids
        )
        _tell(*_matched(counts, out), json=json)
        return
    matcher = Matcher.load(index, uri=uri, collection=collection, encoder=encoder, device=device)
    if queries and out:
        counts = match_table(matcher, queries, out, k=k, where=where, side=side, rerank=rerank)
        _tell(*_matched(counts, out), json=json)
        return
    matches = matcher.match(
        video=video,
        images=images,
        text=text,
        product_id=product_id,
        content_id=content_id,
        k=k,
        where=where,
        side=side,
        rerank=rerank,
    )
    if json:
        print(dumps(matches.to_dict(), ensure_ascii=False, default=str))
        return
    print(matches)


@app.command
def evaluate(*, config: tyro.conf.OmitArgPrefixes[EvaluationConfig], json: bool = False) -> None:
    """Measure how well contents find their products; writes metrics.json, queries.parquet and report.html.

    Args:
        config: What is measured, and how.
        json: Print metrics.json instead of the table.
    """
    from mmrec.model.download import local_encoder
    from mmrec.retrieval.evaluation import evaluate_to_folder, result_text, to_json

    metrics = evaluate_to_folder(replace(config, encoder=local_encoder(config.encoder)))
    print(to_json(metrics) if json else result_text(metrics, config.out))


@app.command
def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    *,
    out: Path | None = None,
    json: bool = False,
    seed: int = 0,
) -> None:
    """Set evaluations side by side: the first against each other one, and what is beyond chance.

    All must be of the same split of the same shards. Differences have 95% intervals by the paired bootstrap
    over queries, and are marked where they hold with a correction for how many there are.

    Args:
        runs: Two or more folders that `mmrec evaluate` wrote.
        out: Also write a page: compare.html.
        json: Print one JSON object instead of the table.
        seed: Draws the resamples.
    """
    from json import dumps

    from mmrec.retrieval.comparison import compare_folders, comparison_text

    compared = compare_folders(runs, out=out, seed=seed)
    if json:
        print(dumps(compared, ensure_ascii=False))
        return
    print(comparison_text(compared))
    if out is not None:
        print(f"\nreport: {out}")


@app.command
def serve(config: Annotated[ServeConfig, tyro.conf.arg(name="")]) -> None:
    """Answer queries over HTTP, with a page for people at /.

    A SIGTERM ends it once requests under way are answered. What replaces the index while it runs is taken
    up without a failed request.
    """
    from mmrec.serve.threads import let_idle_threads_sleep

    let_idle_threads_sleep()
    try:
        from mmrec.serve.server import main as run_service
    except ImportError as error:
        raise UserError(f"{error}; the service is an extra: pip install 'mmrec[serve]'") from None

    run_service(config)


@export_app.command(name="onnx")
def export_onnx(*, encoder: Path, out: Path, overwrite: bool = False, json: bool = False) -> None:
    """Write an encoder as ONNX models: content.onnx, product.onnx, and preprocess.json beside them.

    Any number of rows and of frames, with masks; outputs are compared with torch's before anything is kept.

    Args:
        encoder: An encoder's folder, or hf://user/name[@revision].
        out: The folder to write.
        overwrite: Replace the folder if it is there.
        json: Print one JSON object.
    """
    from mmrec.model.download import local_encoder
    from mmrec.model.onnx_export import OPSET
    from mmrec.model.onnx_export import export_onnx as export

    found = export(local_encoder(encoder), out, overwrite=overwrite)
    differences = ", ".join(f"{side} {value:.0e}" for side, value in found.items())
    text = f"exported to ONNX, opset {OPSET}: {out}; largest difference from torch: {differences}"
    _tell(text, {"out": out, "opset": OPSET, "difference": found}, json=json)


@hub_app.command(name="push")
def hub_push(
    *,
    encoder: Path,
    repo: str,
    metrics: Path | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    json: bool = False,
) -> None:
    """Publish an encoder on the Hugging Face hub, with a model card of its figures and lineage.

    `hf auth login`, or HF_TOKEN, says who you are; HF_ENDPOINT names another hub than huggingface.co.

    Args:
        encoder: An encoder's folder, such as runs/demo/train/encoder.
        repo: The repository, user/name; it is made if it is missing.
        metrics: The metrics.json of `mmrec evaluate`; left out, it is looked for near the encoder.
        license: An identifier of the hub's, such as apache-2.0; left out, the card names none.
        private: Make the repository private; left out, as the account's settings say.
        revision: The branch to push to; main if left out.
        json: Print one JSON object.
    """
    from mmrec.model.encoder import Encoder
    from mmrec.model.hub import find_metrics, find_training, push_encoder, read_metrics_file

    loaded = Encoder.load(encoder)
    url = push_encoder(
        loaded,
        repo,
        metrics=read_metrics_file(metrics) if metrics else find_metrics(encoder),
        training=find_training(encoder),
        license=license,
        private=private,
        revision=revision,
    )
    facts = {"encoder": loaded.fingerprint, "repo": repo, "commit": url}
    _tell(f"pushed encoder {loaded.fingerprint}: {url}", facts, json=json)


@app.command
def inspect(
    folder: tyro.conf.Positional[Path],
    *,
    json: bool = False,
    verify: bool = False,
    report: Path | None = None,
    num_samples: int = 6,
) -> None:
    """Show what a folder of the flow holds and the chain that it came from.

    Args:
        folder: Tables, shards, a run, an encoder, embeddings or an index.
        json: Print the manifests as one JSON array; the first has the summary or checks of shards beside it.
        verify: Of shards: take everything that the manifest claims again from the tars, a line a claim; the
            exit status is 1 where one does not hold.
        report: Of shards: also write a contact sheet, one HTML page with figures and samples.
        num_samples: Samples of each split on the contact sheet.
    """
    from mmrec.manifest import describe, lineage_to_json, read_manifest

    kind = read_manifest(folder).kind
    if kind != "shards":
        if verify or report is not None:
            flag = "--verify" if verify else "--report"
            raise UserError(f"{folder}: {flag} is for shards, and this holds {kind}")
        print(lineage_to_json(folder) if json else describe(folder))
        return
    _inspect_shards(folder, json, verify, report, num_samples)


def _inspect_shards(
    folder: Path, json: bool, verify: bool, report: Path | None, num_samples: int
) -> None:
    from dataclasses import asdict

    from mmrec.data.inspection import format_summary, inspection_to_json, read_facts, summarize
    from mmrec.manifest import describe

    if report is not None:
        from mmrec.data.contact_sheet import write_contact_sheet

        write_contact_sheet(folder, report, num_samples=num_samples)
    if verify:
        from mmrec.data.verification import verify_shards

        checks = verify_shards(folder)
        lines = [check.line() for check in checks]
        found = inspection_to_json(folder, {"checks": [asdict(check) for check in checks]})
        print(found if json else "\n".join(lines))
        differing = [check.claim for check in checks if check.holds is False]
        if differing:
            raise UserError(f"{folder}: not what its manifest claims: {', '.join(differing)}")
        return
    summary = summarize(read_facts(folder))
    if json:
        print(inspection_to_json(folder, {"summary": summary}))
    else:
        print(f"{describe(folder)}\n\n{format_summary(summary)}")
        if report is not None:
            print(f"contact sheet: {report}")


@app.command
def recommend(
    *,
    generator: Path,
    history: tuple[str, ...] = (),
    video: str | None = None,
    images: tuple[str, ...] = (),
    title: str | None = None,
    k: int = 10,
    num_beams: int | None = None,
    seen: bool = True,
    unavailable: Path | None = None,
    ids: Path | None = None,
    encoder: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Generate the products that a history, a content, or both lead to.

    How both act together is learned by a generator that was trained with --watched.

    Args:
        generator: A run of train/generator.py.
        history: Ids of products, oldest first; unknown ones are left out and counted.
        video: A video file or URL.
        images: Picture files or URLs, instead of a video.
        title: The content's title.
        k: How many products to recommend.
        num_beams: Beams of the search; left out, twice k or 50.
        seen: Whether products of the history may come again.
        unavailable: A text file of product ids that must not come, one a line.
        ids: The semantic IDs, where they are not where they were, or were extended since.
        encoder: Where the encoder is, if it is no longer where the IDs remember it.
        device: auto, cpu or cuda.
        json: Print one JSON object instead of a table.
    """
    from json import dumps

    from mmrec.generative.recommender import Recommender

    recommender = Recommender.load(generator, ids=ids, encoder=encoder, device=device)
    if unavailable is not None:
        try:
            lines = unavailable.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{unavailable}: cannot be read as text ({error})") from None
        recommender.set_unavailable(line.strip() for line in lines if line.strip())
    found = recommender.recommend(
        history, video=video, images=images, title=title, k=k, num_beams=num_beams, seen=seen
    )
    if json:
        print(dumps(found.to_dict(), ensure_ascii=False))
        return
    if found.unknown_items:
        print(f"products of the history without an ID, left out: {found.unknown_items}")
    for place, one in enumerate(found, 1):
        print(f"{place:3}  {one.score:8.3f}  {one_line(one.product_id)}")


@app.command
def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print what a shell reads to complete commands and flags: eval "$(mmrec completion bash)".

    For zsh, write it to a file _mmrec in a folder of $fpath; for fish, to
    ~/.config/fish/completions/mmrec.fish.

    Args:
        shell: The shell.
    """
    from mmrec.completion import completion_script

    def of_tyro() -> None:
        app.cli(prog="mmrec", args=["--tyro-print-completion", shell])

    print(completion_script(shell, of_tyro), end="")


def _matched(counts: "BatchCounts", out: Path) -> tuple[str, dict[str, object]]:
    """What a search with many queries did, as text and as facts."""
    lines = [f"{counts.matches:,} matches of {counts.queries:,} queries: {out}"]
    lines += [f"  dropped: {reason}: {count:,}" for reason, count in counts.dropped.items()]
    return "\n".join(lines), {"out": out, **vars(counts)}


def _tell(text: str, facts: Mapping[str, object], *, json: bool) -> None:
    """Print what a command did, for a person or for a script."""
    from json import dumps

    print(dumps(facts, ensure_ascii=False, default=str) if json else text)


def run_program(program: Callable[[], Result]) -> Result:
    """Run a program; a `UserError`, or a refused flag, becomes one line on stderr and exit status 1.

    --quiet is taken from any command line here: no progress bars.
    """
    stop_with_launcher()
    try:
        with quiet_if_asked(), without_typeguard():
            return refused_in_one_line(program)
    except UserError as error:
        print("error:", one_line(str(error)), file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not our failure.
        sys.stderr.close()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """The entry point of the `mmrec` command."""
    import warnings

    if sys.argv[1:] == ["--version"]:
        print(f"mmrec {__version__}")
        return
    # One line each, as errors are.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    run_program(lambda: app.cli(prog="mmrec", description=DESCRIPTION))


if __name__ == "__main__":
    main()
