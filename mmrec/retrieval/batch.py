"""Many queries at once: a table of contents, or a folder of embeddings, in; a table of matches out.

    query        the content's or product's id, or the row's number where the table has no ids
    rank         1 is the best match
    product_id   the match; content_id in an index of contents
    score

Shape letters: Q queries, D embedding width.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from mmrec.bars import progress_bar
from mmrec.data.storage import media_address, place
from mmrec.errors import UserError
from mmrec.manifest import FILE_NAME, check_no_file
from mmrec.model.encoder import Side
from mmrec.retrieval.backend import CatalogueIndex
from mmrec.retrieval.embed import read_embeddings
from mmrec.retrieval.matcher import Matcher, check_encoder, encoder_of, warn_of_unknown_encoder
from mmrec.retrieval.parts import VECTORS

_EMBEDDED = 32
_SEARCHED = 1_024
_ID_COLUMNS = ("query", "content_id", "product_id", "id")
_QUERY_COLUMNS = ("title", "video", "images")

Queries = tuple[list[Any], Float32[np.ndarray, "Q D"]]
"""Names and vectors of some queries."""


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """What became of the queries."""

    queries: int
    matches: int
    dropped: dict[str, int] = field(default_factory=dict)
    """Queries without an answer, by reason."""


def match_table(
    matcher: Matcher,
    queries: Path,
    out: Path,
    *,
    k: int,
    where: str | None = None,
    side: Side | None = None,
    rerank: bool | None = None,
) -> BatchCounts:
    """Match every row of a Parquet table with columns title, video or images, any of them.

    Media are paths, relative to the table, or URLs. A row that cannot be read is left out and counted.
    Raises `UserError` when the table is not one of queries, and when `out` cannot be written.
    """
    _check_out(out, queries)
    dropped: Counter[str] = Counter()
    parts = _embedded(matcher, queries, side, dropped)
    counts = _write_matches(matcher.index, parts, out, k=k, where=where, rerank=rerank)
    total = counts.queries + sum(dropped.values())
    return BatchCounts(queries=total, matches=counts.matches, dropped=dict(dropped))


def match_embeddings(
    index: CatalogueIndex,
    embeddings: Path,
    out: Path,
    *,
    k: int,
    where: str | None = None,
    rerank: bool | None = None,
    ids: str | None = None,
) -> BatchCounts:
    """Match every row of a folder of embeddings, of contents or of products.

    `ids` names the column that queries are called by in a folder that mmrec did not write; without it they
    are numbered. Raises `UserError` when another encoder made them than made the index, and warns where that
    cannot be known.
    """
    _check_out(out, embeddings)
    loaded = read_embeddings(embeddings, ids=ids, queries=True)
    theirs = loaded.manifest.encoder
    if theirs is not None:
        check_encoder(index, theirs)
    if theirs is None or encoder_of(index) is None:
        warn_of_unknown_encoder(f"{embeddings} and the index")
    starts = range(0, len(loaded.ids), _SEARCHED)
    parts = ((loaded.ids[s : s + _SEARCHED], loaded.vectors[s : s + _SEARCHED]) for s in starts)
    return _write_matches(index, parts, out, k=k, where=where, rerank=rerank)


def _embedded(
    matcher: Matcher, path: Path, side: Side | None, dropped: Counter[str]
) -> Iterator[Queries]:
    """The rows of a table as vectors, some at a time."""
    file = _open_table(path)
    names = file.schema_arrow.names
    id_column = next((name for name in _ID_COLUMNS if name in names), None)
    first = 0
    for batch in file.iter_batches(_EMBEDDED):
        ids, pictures, titles = [], [], []
        for number, row in enumerate(batch.to_pylist(), first):
            try:
                if id_column and row[id_column] is None:
                    raise UserError(f"no {id_column}")
                own = _pictures(matcher, path, row)
            except UserError as error:
                # Without the path, so that equal faults add up.
                dropped[str(error).rsplit(": ", 1)[-1]] += 1
                continue
            title = row.get("title")
            if not own and not (title and title.strip()):
                dropped["no video, images or title"] += 1
                continue
            ids.append(str(row[id_column]) if id_column else str(number))
            pictures.append(own)
            titles.append(title)
        first += len(batch)
        if ids:
            yield ids, matcher.embed_many(pictures, titles, side=side)


def _open_table(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).split("\n")[0]
        raise UserError(f"{path}: not a Parquet file that can be read ({first_line})") from None
    schema = file.schema_arrow
    if not set(schema.names) & set(_QUERY_COLUMNS):
        raise UserError(
            f"{path}: expected a column title, video or images; found {', '.join(schema.names) or 'none'}"
        )
    for name in set(schema.names) & set(_QUERY_COLUMNS):
        _check_type(path, name, schema.field(name).type)
    return file


def _check_type(path: Path, name: str, found: pa.DataType) -> None:
    """Refuse a column of queries that holds neither text nor, for images, lists of text."""
    own, expected = found, "text"
    if name == "images":
        lists = pa.types.is_list(found) or pa.types.is_large_list(found)
        own, expected = found.value_type if lists else found, "lists of text"
        if not lists and not pa.types.is_null(found):
            own = pa.binary()
    if pa.types.is_dictionary(own):
        own = own.value_type
    if not (pa.types.is_string(own) or pa.types.is_large_string(own) or pa.types.is_null(own)):
        raise UserError(f"{path}: column '{name}' holds {found}; expected {expected}")


def _check_out(out: Path, queries: Path) -> None:
    """Refuse an output that is a folder, or the queries themselves."""
    check_no_file(out.parent)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; give --out the name of a file")
    if out.exists() and out.samefile(queries):
        raise UserError(f"{out}: holds the queries; give another --out")


def _pictures(matcher: Matcher, path: Path, row: dict[str, Any]) -> list[np.ndarray]:
    folder = place(path.parent)
    video = row.get("video")
    if None in (row.get("images") or []):
        raise UserError("an image is null")
    images = [media_address(folder, image) for image in row.get("images") or []]
    return matcher.read(media_address(folder, video) if video else None, images)


def _write_matches(
    index: CatalogueIndex,
    parts: Iterator[Queries],
    out: Path,
    *,
    k: int,
    where: str | None,
    rerank: bool | None,
) -> BatchCounts:
    schema = pa.schema(
        [
            ("query", pa.string()),
            ("rank", pa.int32()),
            (index.key, pa.string()),
            ("score", pa.float32()),
        ]
    )
    queries = matches = 0
    temporary = out.parent / f".{out.name}.tmp"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            pq.ParquetWriter(temporary, schema) as writer,
            progress_bar(desc="match", unit="query") as bar,
        ):
            for names, vectors in parts:
                result = index.search(vectors, k, where=where, rerank=rerank)
                lengths = [len(found) for found in result.ids]
                columns = [
                    pa.array(np.repeat(np.array(names, object), lengths), pa.string()),
                    pa.array([rank for n in lengths for rank in range(1, n + 1)], pa.int32()),
                    pa.array([id_ for found in result.ids for id_ in found], pa.string()),
                    pa.array(result.scores[np.isfinite(result.scores)], pa.float32()),
                ]
                writer.write_table(pa.table(columns, schema=schema))
                queries, matches = queries + len(names), matches + sum(lengths)
                bar.update(len(names))
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return BatchCounts(queries=queries, matches=matches)


def is_embeddings(path: Path) -> bool:
    """Whether queries are given as a folder that `mmrec embed`, or clip-retrieval, wrote."""
    return (path / FILE_NAME).is_file() or (path / VECTORS).is_dir()
