"""The interchange format: products, contents and links, as Parquet, CSV or JSONL files in a folder.

| table    | columns                                                                            |
|----------|------------------------------------------------------------------------------------|
| products | product_id, title, images (list of paths or URLs); further columns are attributes   |
| contents | content_id, title, video (a path or URL) or images (list); further columns are kept |
| links    | content_id, product_id, weight (> 0, default 1), split (train, val or test)         |

Paths are relative to the tables' folder, which may be a URL. In CSV a list is a JSON array, or paths
joined by `|`.
"""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at run time, where pyright does not see them.

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from mmrec.data.storage import Place, is_file, local_copy, media_address, place
from mmrec.errors import UserError
from mmrec.manifest import (
    FILE_NAME,
    Manifest,
    fingerprint_of,
    hash_file,
    read_manifest,
    write_manifest,
)

TABLE_NAMES = ("products", "contents", "links")
FORMATS = (".parquet", ".csv", ".jsonl")
SPLITS = ("train", "val", "test")

_REQUIRED = {
    "products": ("product_id", "images"),
    "contents": ("content_id",),
    "links": ("content_id", "product_id"),
}
# All columns with a meaning here; any other is kept as it is.
_KNOWN = {
    "products": ("product_id", "title", "images"),
    "contents": ("content_id", "title", "video", "images"),
    "links": ("content_id", "product_id", "weight", "split"),
}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Three validated tables.

    `products`: product_id string, title string (may be null), images list<string>, then attributes.
    `contents`: content_id string, title string (may be null), video string (may be null), images
    list<string> (may be empty), then further columns.
    `links`: content_id string, product_id string, weight double, and split string where the file
    has it.
    """

    root: Place
    """The folder that relative media paths start from."""
    products: pa.Table
    contents: pa.Table
    links: pa.Table
    fingerprint: str
    """Hash of the three files' bytes."""

    def path_of(self, media: str) -> str:
        """The place of a media file: URLs as they are, paths joined to the tables' folder."""
        return media_address(self.root, media)

    @property
    def attribute_columns(self) -> list[str]:
        """The columns of products that are kept as attributes."""
        return [name for name in self.products.column_names if name not in _KNOWN["products"]]


def read_tables(folder: Place | str) -> Tables:
    """Read and validate the three tables of a folder, local or remote.

    Raises `UserError` naming file, row and column for: a missing table, a missing or misspelt
    column, an empty or duplicate id, a link to an unknown id, a weight that is not positive, a
    split that is not train, val or test or that differs between links of one content, and a content
    without media.
    """
    folder = place(folder)
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected one with products, contents and links tables"
        )
    paths = {name: _find_table(folder, name) for name in TABLE_NAMES}
    products = read_products(paths["products"])
    contents = _read_table(paths["contents"], "contents", text=["title", "video"])
    links = _normalise_links(paths["links"], _read_file(paths["links"], "links"))
    _check_media(paths["contents"], contents)
    _check_links(paths, products, contents, links)
    fingerprint = fingerprint_of({name: hash_file(path) for name, path in paths.items()})
    return Tables(
        root=folder, products=products, contents=contents, links=links, fingerprint=fingerprint
    )


def read_products(path: Place) -> pa.Table:
    """Read and validate a products table alone. Raises `UserError` as `read_tables` does."""
    products = _read_table(path, "products", text=["title"])
    row = _row(pc.equal(pc.list_value_length(products["images"]), 0))
    if row:
        product = products["product_id"][row - 1].as_py()
        raise UserError(f"{path}: row {row}: product '{product}' has no images")
    return products


def _read_table(path: Place, name: str, *, text: list[str]) -> pa.Table:
    """A table with an id, text columns and a list of images, its known columns typed and first."""
    table = _read_file(path, name)
    id_column = f"{name.removesuffix('s')}_id"
    table = _normalise(path, table, id_column, text=text, lists=["images"])
    _check_ids(path, table, id_column)
    return table


def write_tables(
    folder: Path,
    *,
    products: Sequence[Mapping[str, Any]],
    contents: Sequence[Mapping[str, Any]],
    links: Sequence[Mapping[str, Any]],
    config: dict[str, Any],
    counts: dict[str, Any],
) -> Tables:
    """Write rows as Parquet tables with a manifest, and read them back, validated as any others."""
    for name, rows in (("products", products), ("contents", contents), ("links", links)):
        # Arrow would take the columns of the first row alone.
        columns = dict.fromkeys(column for row in rows for column in row)
        table = pa.table({column: [row.get(column) for row in rows] for column in columns})
        pq.write_table(table, folder / f"{name}.parquet")
    tables = read_tables(folder)
    write_manifest(
        folder,
        Manifest(kind="tables", config=config, counts=counts, fingerprint=tables.fingerprint),
    )
    return tables


def tables_manifest(tables: Tables) -> Manifest:
    """The manifest of a tables' folder; one is made up for tables that somebody else wrote."""
    if is_file(tables.root / FILE_NAME):
        manifest = read_manifest(tables.root, "tables")
        if manifest.fingerprint == tables.fingerprint:
            return manifest
    return Manifest(kind="tables", config={}, counts={}, fingerprint=tables.fingerprint)


def _find_table(folder: Place, name: str) -> Place:
    # By name, since not every remote folder can be listed.
    candidates = [folder / f"{name}{suffix}" for suffix in FORMATS]
    found = [path for path in candidates if is_file(path)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder}: expected one {name} table, found {names}")
    names = " or ".join(path.name for path in candidates)
    raise UserError(f"{folder}: has no {name} table; expected {names}")


def _read_file(path: Place, name: str) -> pa.Table:
    """A table as its file has it, once its columns are known to be the right ones."""
    table = _parse_file(path, name)
    _check_columns(path, name, table)
    return table


def _parse_file(path: Place, name: str) -> pa.Table:
    try:
        file = local_copy(path)
        if path.suffix == ".parquet":
            return pq.read_table(file)
        if path.suffix == ".csv":
            # Ids such as 00123 must not become numbers, so the known columns are read as text.
            known = dict.fromkeys(_KNOWN[name], pa.string())
            return pyarrow.csv.read_csv(
                file,
                parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=known, strings_can_be_null=True, null_values=[""]
                ),
            )
        return pyarrow.json.read_json(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = path.suffix[1:]
        raise UserError(f"{path}: cannot be read as {kind}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_columns(path: Place, name: str, table: pa.Table) -> None:
    found = table.column_names
    missing = [column for column in _REQUIRED[name] if column not in found]
    if name == "contents" and not {"video", "images"} & set(found):
        missing.append("video' or 'images")
    others = [column for column in found if column not in _KNOWN[name]]
    if missing:
        close = _closest(missing[0].split("'")[0], others, cutoff=0.7)
        hint = f"; rename '{close}'?" if close else ""
        listed = ", ".join(found) or "none"
        raise UserError(f"{path}: missing column '{missing[0]}'; found {listed}{hint}")
    # An optional column is silently missed when its name is off by a letter: `Split`, `weights`.
    for column in _KNOWN[name]:
        close = None if column in found else _closest(column, others, cutoff=0.8)
        if close:
            raise UserError(
                f"{path}: column '{close}' reads like a misspelt '{column}'; rename it to that, or to "
                "something less like it"
            )
    twice = next((column for column in found if found.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: has {found.count(twice)} columns called '{twice}'")
    for column in found:
        if pa.types.is_binary(table.schema.field(column).type):
            raise UserError(f"{path}: column '{column}' holds bytes that are not UTF-8 text")


def _closest(wanted: str, columns: list[str], *, cutoff: float) -> str | None:
    from difflib import get_close_matches

    plain = {column.lower().replace("_", "").replace(" ", ""): column for column in columns}
    close = get_close_matches(wanted.replace("_", ""), plain, n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def _normalise(
    path: Place, table: pa.Table, id_column: str, *, text: list[str], lists: list[str]
) -> pa.Table:
    """Give the known columns their types and put them first."""
    columns: dict[str, pa.Array | pa.ChunkedArray] = {id_column: _as_text(path, table, id_column)}
    for name in text:
        column = _as_text(path, table, name) if name in table.column_names else None
        if column is not None:
            blank = pc.equal(pc.utf8_trim_whitespace(column), "")
            column = pc.if_else(blank, pa.scalar(None, pa.string()), column)
        columns[name] = column if column is not None else pa.nulls(len(table), pa.string())
    for name in lists:
        columns[name] = _as_lists(path, table, name)
    for name in table.column_names:
        if name not in columns:
            columns[name] = table[name]
    return pa.table(columns)


def _as_text(path: Place, table: pa.Table, name: str) -> pa.ChunkedArray:
    try:
        return table[name].cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"{path}: column '{name}' is {table[name].type}, expected text") from None


def _as_lists(path: Place, table: pa.Table, name: str) -> pa.Array | pa.ChunkedArray:
    list_type = pa.list_(pa.string())
    if name not in table.column_names or pa.types.is_null(table[name].type):
        return pa.array([[]] * len(table), list_type)
    column = table[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _split_lists(path, column)
    try:
        lists = pc.coalesce(column.cast(list_type), pa.scalar([], list_type))
    except pa.ArrowException:
        raise UserError(
            f"{path}: column '{name}' is {column.type}, expected a list of paths or URLs"
        ) from None
    return pa.chunked_array([_without_blanks(chunk) for chunk in lists.chunks], list_type)


def _split_lists(path: Place, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The lists that cells of text hold, a chunk at a time: cells as Python strings take much room."""
    list_type = pa.list_(pa.string())
    chunks = []
    row = 0
    for chunk in column.cast(pa.string()).chunks:
        if pc.any(pc.starts_with(chunk, "[")).as_py():
            cells = [_split_list(path, row + i, cell) for i, cell in enumerate(chunk.to_pylist())]
            chunks.append(pa.array(cells, list_type))
        else:
            parts = pc.split_pattern(pc.fill_null(chunk, ""), "|")
            trimmed = pc.utf8_trim_whitespace(parts.flatten())
            lists = pa.ListArray.from_arrays(_offsets(pc.list_value_length(parts)), trimmed)
            chunks.append(_without_blanks(lists))
        row += len(chunk)
    return pa.chunked_array(chunks, list_type)


def _without_blanks(lists: pa.ListArray) -> pa.ListArray:
    """The same lists without entries that are null or blank."""
    entries = lists.flatten()
    kept = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(entries), ""), False)
    if pc.all(kept).as_py():
        return lists
    rows = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
    lengths = np.bincount(rows[kept.to_numpy(zero_copy_only=False)], minlength=len(lists))
    return pa.ListArray.from_arrays(_offsets(lengths), entries.filter(kept))


def _offsets(lengths: Any) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _split_list(path: Place, row: int, cell: str | None) -> list[str]:
    if not cell:
        return []
    is_json = cell.startswith('["') or (cell.startswith("[") and cell.endswith("]"))
    if not is_json:
        return [part.strip() for part in cell.split("|") if part.strip()]
    try:
        return [str(part) for part in json.loads(cell) if part]
    except ValueError:
        raise UserError(f"{path}: row {row + 1}: '{cell}' is not a JSON array of paths") from None


def _normalise_links(path: Place, table: pa.Table) -> pa.Table:
    columns = {name: _as_text(path, table, name) for name in ("content_id", "product_id")}
    if "weight" in table.column_names:
        try:
            weight = table["weight"].cast(pa.float64())
        except pa.ArrowException as error:
            reason = _first_line(error)
            raise UserError(f"{path}: column 'weight' is not numeric: {reason}") from None
        columns["weight"] = pc.coalesce(weight, pa.scalar(1.0))
    else:
        columns["weight"] = pa.chunked_array([pa.array([1.0] * len(table))])
    if "split" in table.column_names:
        columns["split"] = _as_text(path, table, "split")
    return pa.table(columns)


def _row(mask: pa.ChunkedArray | pa.Array) -> int | None:
    """The 1-based number of the first row where the mask holds, or None."""
    position = pc.index(mask, True).as_py()
    return None if position < 0 else position + 1


def _check_ids(path: Place, table: pa.Table, column: str) -> None:
    if not len(table):
        raise UserError(f"{path}: has no rows")
    ids = table[column]
    row = _row(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(ids), ""), True))
    if row:
        raise UserError(f"{path}: row {row}: {column} is empty")
    counts = pc.value_counts(ids)
    if len(counts) < len(ids):
        twice = pc.filter(counts.field("values"), pc.greater(counts.field("counts"), 1))[0].as_py()
        rows = pc.indices_nonzero(pc.equal(ids, twice)).to_pylist()
        raise UserError(
            f"{path}: row {rows[1] + 1}: duplicate {column} '{twice}', first in row {rows[0] + 1}"
        )


def _check_media(path: Place, contents: pa.Table) -> None:
    no_images = pc.equal(pc.list_value_length(contents["images"]), 0)
    row = _row(pc.and_(pc.is_null(contents["video"]), no_images))
    if row:
        content = contents["content_id"][row - 1].as_py()
        raise UserError(f"{path}: row {row}: content '{content}' has neither video nor images")


def _check_links(
    paths: Mapping[str, Place], products: pa.Table, contents: pa.Table, links: pa.Table
) -> None:
    path = paths["links"]
    if not len(links):
        raise UserError(f"{path}: has no rows, so there is nothing to learn from")
    for table, column in ((contents, "content_id"), (products, "product_id")):
        row = _row(pc.invert(pc.is_in(links[column], value_set=table[column].combine_chunks())))
        if row:
            unknown = links[column][row - 1].as_py()
            raise UserError(
                f"{path}: row {row}: {column} '{unknown}' is not in {paths[column[:-3] + 's'].name}"
            )
    good = pc.and_(pc.greater(links["weight"], 0), pc.is_finite(links["weight"]))
    row = _row(pc.invert(good))
    if row:
        weight = links["weight"][row - 1].as_py()
        raise UserError(f"{path}: row {row}: weight {weight} is not positive and finite")
    _check_pairs(path, links)
    if "split" in links.column_names:
        _check_splits(path, links)


def _check_pairs(path: Place, links: pa.Table) -> None:
    pairs = links.group_by(["content_id", "product_id"]).aggregate([([], "count_all")])
    row = _row(pc.greater(pairs["count_all"], 1))
    if row:
        pair = pairs.slice(row - 1, 1).to_pylist()[0]
        content, product = pair["content_id"], pair["product_id"]
        same = pc.and_(
            pc.equal(links["content_id"], content), pc.equal(links["product_id"], product)
        )
        rows = pc.indices_nonzero(same).to_pylist()
        raise UserError(
            f"{path}: row {rows[1] + 1}: duplicate link '{content}' -> '{product}', first in row "
            f"{rows[0] + 1}"
        )


def _check_splits(path: Place, links: pa.Table) -> None:
    known = pc.fill_null(pc.is_in(links["split"], value_set=pa.array(SPLITS)), False)
    row = _row(pc.invert(known))
    if row:
        found = links["split"][row - 1].as_py()
        raise UserError(f"{path}: row {row}: split '{found}' is not train, val or test")
    per_content = links.group_by("content_id").aggregate([("split", "count_distinct")])
    row = _row(pc.greater(per_content["split_count_distinct"], 1))
    if row:
        content = per_content["content_id"][row - 1].as_py()
        raise UserError(f"{path}: content '{content}' has links in more than one split")
