"""The `mmrec` command: embed, index, search, evaluate, inspect.

Nothing heavy is imported until a command runs, so that `mmrec --help` answers at once.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from mmrec.errors import UserError

Result = TypeVar("Result")
Split = Literal["train", "val", "test"]

app = tyro.extras.SubcommandApp()
index_app = tyro.extras.SubcommandApp()
app.command(index_app, name="index", help="Build an index of products.")


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
    overwrite: bool = False,
) -> None:
    """Encode shards into a folder of embeddings.

    Args:
        encoder: An encoder's folder, such as runs/demo/train/encoder.
        shards: The folder written by data_prep/make_shards.py.
        out: The folder to write.
        split: catalog for the products, or a split of the contents.
        device: auto, cpu or cuda.
        batch_size: Items encoded at a time.
        num_workers: Processes that read and decode; 0 does it in this one.
        dtype: How numbers are kept on disk.
        overwrite: Replace the folder if it is there.
    """
    from mmrec.retrieval.embed import embed_shards

    embeddings = embed_shards(
        encoder,
        shards,
        out,
        split=split,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        overwrite=overwrite,
    )
    rows, width = embeddings.vectors.shape
    print(f"embedded {rows:,} items, {width} wide: {out}")


@index_app.command(name="build")
def index_build(
    *, embeddings: Path, out: Path, factory: str = "Flat", overwrite: bool = False
) -> None:
    """Build an index from embeddings of the catalogue.

    Args:
        embeddings: The folder written by `mmrec embed`.
        out: The folder to write.
        factory: A FAISS factory string: Flat is exact; HNSW32 or IVF1024,Flat are faster on many products.
        overwrite: Replace the folder if it is there.
    """
    from mmrec.retrieval.matcher import build_index

    index = build_index(embeddings, out, factory=factory, overwrite=overwrite)
    print(f"indexed {len(index):,} products, {index.width} wide, as {factory}: {out}")


@app.command
def search(
    *,
    index: Path,
    video: str | None = None,
    images: tuple[str, ...] = (),
    text: str | None = None,
    k: int = 10,
    encoder: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: bool = False,
) -> None:
    """Find the products that a video, pictures, words, or a mix of them match.

    Args:
        index: The folder written by `mmrec index build`.
        video: A video file or URL.
        images: Picture files or URLs, instead of a video.
        text: A title or a query in words, alone or beside the video or pictures.
        k: How many products to find.
        encoder: Where the encoder is, if it is no longer where the index remembers it.
        device: auto, cpu or cuda.
        json: Print one JSON object instead of a table.
    """
    from json import dumps

    from mmrec.retrieval.matcher import Matcher

    matcher = Matcher.load(index, encoder=encoder, device=device)
    matches = matcher.match(video=video, images=images, text=text, k=k)
    if json:
        print(dumps(matches.to_dict(), ensure_ascii=False, default=str))
        return
    for place, match in enumerate(matches, 1):
        print(f"{place:3}  {match.score:.3f}  {match.product_id}  {match.title or ''}")


@app.command
def evaluate(
    *,
    encoder: Path,
    shards: Path,
    out: Path,
    split: Split = "test",
    untrained: bool = True,
    baselines: bool = True,
    num_cards: int = 12,
    picture: Path | None = None,
    other_shards: bool = False,
    device: str = "auto",
    batch_size: int = 64,
    num_workers: int = 0,
) -> None:
    """Measure how well contents find their products; writes metrics.json and report.html.

    Args:
        encoder: An encoder's folder.
        shards: The shards it was trained on, for their val or test split.
        out: The folder that gets metrics.json and report.html.
        split: Which contents to ask with.
        untrained: Measure the same encoder before training, too.
        baselines: Measure popularity, title overlap and colour histogram, too.
        num_cards: Queries shown in the report.
        picture: Also draw a PNG of some matches.
        other_shards: Accept shards that the encoder was not trained on.
        device: auto, cpu or cuda.
        batch_size: Items encoded at a time.
        num_workers: Processes that read and decode; 0 does it in this one.
    """
    from mmrec.retrieval.evaluation import evaluate_to_folder

    table = evaluate_to_folder(
        encoder,
        shards,
        out,
        split=split,
        untrained=untrained,
        baselines=baselines,
        num_cards=num_cards,
        picture=picture,
        other_shards=other_shards,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    print(table)


@app.command
def inspect(folder: tyro.conf.Positional[Path], *, json: bool = False) -> None:
    """Show what a folder of the flow holds and the chain that it came from.

    Args:
        folder: Tables, shards, a run, an encoder, embeddings or an index.
        json: Print the manifests as one JSON array.
    """
    from mmrec.manifest import describe, lineage_to_json

    print(lineage_to_json(folder) if json else describe(folder))


def run_program(program: Callable[[], Result]) -> Result:
    """Run a program; a `UserError` becomes one line on stderr and exit status 1."""
    try:
        return program()
    except UserError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not our failure.
        sys.stderr.close()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """The entry point of the `mmrec` command."""
    run_program(lambda: app.cli(prog="mmrec", description="Match content to products."))
