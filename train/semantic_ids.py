"""Cut semantic IDs from the embeddings of a catalogue.

Input: a folder of embeddings of products (`mmrec embed`), and any of contents that are to share the codebook.
Output: a folder of IDs with a report.

    python train/semantic_ids.py --embeddings runs/demo/embeddings --out runs/demo/ids \
        --codebook-size 16 --levels 2

New products get IDs from the frozen codebook, and no old one changes:

    python train/semantic_ids.py --embeddings more/embeddings --extend runs/demo/ids --out runs/demo/more_ids

Where there is no encoder, IDs can be cut from words of titles and from neighbours in training sessions:
--tables instead of --embeddings (see mmrec/generative/item_vectors.py). Prints usage, entropy, fan-out,
error and collisions; report.json and report.png have them too. For 12,000 products seconds from embeddings,
and a minute from tables, on 2 cores.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from mmrec.cli import run_program
from mmrec.errors import UserError
from mmrec.generative.ids_report import describe_ids, draw_report, format_report
from mmrec.generative.semantic_ids import KIND, SemanticIdConfig, SemanticIds, build_ids
from mmrec.generative.sessions import SplitBy, read_sessions, split_sessions
from mmrec.manifest import Parent, check_output, find_parent, parent_of, read_manifest
from mmrec.ranges import Count, check_ranges
from mmrec.retrieval.embed import Embeddings, read_embeddings


@dataclass(frozen=True, kw_only=True)
class SemanticIdsProgram:
    """What IDs are cut from, and how."""

    out: Path
    """The folder to write."""
    embeddings: Path | None = None
    """Embeddings of the catalogue."""
    contents: tuple[Path, ...] = ()
    """Embeddings of contents, by the same encoder: they get codes of the same codebook."""
    extend: Path | None = None
    """IDs to add to: their codebook is taken as it is, and none of them changes."""
    tables: Path | None = None
    """A folder of sessions (mmrec/generative/sessions.py), instead of embeddings."""
    of: tuple[Literal["titles", "sessions"], ...] = ("titles", "sessions")
    """What of the tables products are told by: words of titles, neighbours in training sessions, or both."""
    width: Count = 128
    """Numbers that each of these gives a product."""
    by: SplitBy | None = "leave-one-out"
    """How targets are held out, as train/generator.py is told: IDs see none of them. None learns from all."""
    ids: tyro.conf.OmitArgPrefixes[SemanticIdConfig] = field(default_factory=SemanticIdConfig)
    category: str = "category"
    """The attribute of products that the report compares codes with, where they have it."""
    overwrite: bool = False
    """Replace the folder if it is there."""


def main(config: SemanticIdsProgram) -> Path:
    """Read, cut, measure, write; returns the folder."""
    check(config)
    parents: list[Parent] = []
    counts: dict[str, int] = {}
    if config.tables is not None:
        product_ids, vectors, categories = vectors_of_tables(config, counts)
        parents.append(parent_of(config.out, config.tables))
    else:
        assert config.embeddings is not None
        products = read_embeddings(config.embeddings)
        parents += parents_of(config.out, config.embeddings)
        product_ids, vectors = products.ids, products.vectors
        categories = categories_of(products, config.category)
    if config.extend is not None:
        earlier = SemanticIds.load(config.extend)
        check_encoder(config.extend, earlier, parents)
        ids = earlier.extended(product_ids, vectors, categories)
        counts["new"] = len(ids) - len(earlier)
        parents.append(parent_of(config.out, config.extend, KIND))
    else:
        contents = read_contents(config, parents)
        ids = build_ids(
            product_ids,
            vectors,
            config.ids,
            content_ids=[id_ for one in contents for id_ in one.ids],
            content_vectors=np.concatenate([one.vectors for one in contents]) if contents else None,
            categories=categories,
        )

    # --- report and save -----------------------------------------------------------------------
    # Of what was extended the old embeddings may be gone: the report is of the products at hand.
    rows = [ids.rows[id_] for id_ in product_ids]
    measured = ids if config.extend is None else ids.taken(rows)
    report = describe_ids(measured, vectors)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "report.png"
        draw_report(measured, report, picture)
        files = {
            "report.json": (json.dumps(report, indent=2) + "\n").encode(),
            "report.png": picture.read_bytes(),
        }
    inputs = [p for p in (config.embeddings, config.tables, config.extend, *config.contents) if p]
    ids.save(
        config.out,
        parents=parents,
        inputs=inputs,
        files=files,
        counts=counts,
        # Which sessions the IDs have seen: a generator's targets must not be among them.
        details={"by": config.by} if config.tables and "sessions" in config.of else {},
        overwrite=config.overwrite,
    )
    print(format_report(report))
    if "new" in counts:
        print(
            f"{counts['new']:,} new products; the IDs of {len(ids) - counts['new']:,} are as before"
        )
    print(f"semantic IDs: {config.out}")
    return config.out


def check(config: SemanticIdsProgram) -> None:
    """Refuse what cannot work before any work is done."""
    check_ranges(config)
    if not config.of:
        raise UserError("--of: expected titles, sessions, or both")
    if (config.embeddings is None) == (config.tables is None):
        raise UserError("give --embeddings FOLDER, or --tables FOLDER where there is no encoder")
    if config.contents and (config.extend or config.tables):
        raise UserError("--contents goes with --embeddings, and not with --extend")
    if config.tables is not None and config.extend is not None:
        raise UserError(
            "--extend wants --embeddings: words and neighbours of other tables are other vectors"
        )
    inputs = [p for p in (config.embeddings, config.tables, config.extend, *config.contents) if p]
    check_output(config.out, kind=KIND, overwrite=config.overwrite, inputs=inputs)


def vectors_of_tables(
    config: SemanticIdsProgram, counts: dict[str, int]
) -> tuple[list[str], np.ndarray, list[str | None] | None]:
    """Ids, vectors and categories of the products of tables; adds to the counts."""
    assert config.tables is not None
    try:
        from mmrec.generative.item_vectors import joined_vectors, sequence_vectors, title_vectors
    except ImportError:
        raise UserError("--tables needs scipy: pip install 'mmrec[generative]'") from None
    path = config.tables / "products.parquet"
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a table with product_id and title")
    products = pq.read_table(path)
    product_ids = products["product_id"].cast(pa.string()).to_pylist()
    parts = []
    if "titles" in config.of:
        if "title" not in products.column_names:
            raise UserError(f"{path}: has no column title; give --of sessions")
        parts.append(title_vectors(products["title"].to_pylist(), config.width))
    if "sessions" in config.of:
        sessions = read_sessions(config.tables)
        training = sessions.events
        if config.by is not None:
            training = split_sessions(sessions, config.by, "val").train
        parts.append(
            sequence_vectors([own.tolist() for own in training], len(product_ids), config.width)
        )
    vectors, counts["without_vector"] = joined_vectors(parts)
    if counts["without_vector"]:
        print(
            f"{counts['without_vector']:,} of {len(product_ids):,} products have neither; "
            "their IDs are chance"
        )
    categories = None
    if config.category in products.column_names:
        categories = products[config.category].cast(pa.string()).to_pylist()
    return product_ids, vectors, categories


def parents_of(out: Path, embeddings: Path) -> list[Parent]:
    """The embeddings, and the encoder that made them, as a folder at `out` remembers them."""
    if not (embeddings / "manifest.json").is_file():
        return []  # Others' embeddings.
    found = [parent_of(out, embeddings, "embeddings")]
    record = read_manifest(embeddings).parent("encoder")
    if record is None:
        return found
    encoder = find_parent(embeddings, "encoder")
    return [*found, record if encoder is None else parent_of(out, Path(str(encoder)), "encoder")]


def read_contents(config: SemanticIdsProgram, parents: list[Parent]) -> list[Embeddings]:
    """The contents' embeddings, added to the parents. Raises `UserError` for those of another encoder."""
    made_by = {parent.fingerprint for parent in parents if parent.kind == "encoder"}
    contents = []
    for folder in config.contents:
        own = parents_of(config.out, folder)
        if {parent.fingerprint for parent in own if parent.kind == "encoder"} != made_by:
            raise UserError(
                f"{folder}: was embedded by another encoder than {config.embeddings}; embed both with one"
            )
        parents += [parent for parent in own if parent.kind != "encoder"]
        contents.append(read_embeddings(folder))
    return contents


def check_encoder(folder: Path, ids: SemanticIds, parents: Sequence[Parent]) -> None:
    """Refuse to extend IDs by embeddings of another encoder than theirs."""
    before = ids.manifest.encoder if ids.manifest else None
    now = next((parent.fingerprint for parent in parents if parent.kind == "encoder"), None)
    if before != now:
        raise UserError(
            f"{folder}: its IDs were cut from embeddings of encoder {before or 'unknown'}, and these are of "
            f"{now or 'unknown'}; embed the new products with the former, or make all IDs anew"
        )


def categories_of(embeddings: Embeddings, name: str) -> list[str | None] | None:
    """Each product's category, where any has one."""
    table = embeddings.metadata
    if name in table.column_names:
        values: list[Any] = table[name].to_pylist()
    elif "attributes" in table.column_names:
        values = [json.loads(text or "{}").get(name) for text in table["attributes"].to_pylist()]
    else:
        return None
    known = [None if value is None else str(value) for value in values]
    return known if any(value is not None for value in known) else None


if __name__ == "__main__":
    run_program(lambda: main(tyro.cli(SemanticIdsProgram, prog="semantic_ids.py")))
