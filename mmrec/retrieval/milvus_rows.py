"""Products as rows of a Milvus collection, and back: which field a column becomes, and in what form.

Numbers, flags and strings keep their types and can be filtered; every other type (dates, decimals, lists,
structs) is kept as JSON, and comes back as what it was.
"""

import datetime
import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from mmrec.errors import UserError
from mmrec.retrieval.intake import name_ids
from mmrec.retrieval.milvus_filters import Column, family_of

VECTOR = "vector"
MAX_BYTES = 65_535
"""What Milvus allows a string."""

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
# Words of Milvus's expressions, and a name of ours.
_TAKEN = set(
    f"{VECTOR} and or not in like is null exists true false iso interval phrase_match text_match "
    "json_contains json_contains_all json_contains_any array_contains array_contains_all "
    "array_contains_any array_length random_sample inf nan id meta timestamptz".split()
)


def columns_of(schema: pa.Schema) -> list[Column]:
    """The columns of a catalogue, the id first; a name that Milvus does not take becomes `column_3`."""
    columns = []
    for place, field in enumerate(schema):
        plain = _FIELD.fullmatch(field.name) and field.name.casefold() not in _TAKEN
        plain = plain and not field.name.startswith("column_")
        columns.append(
            Column(
                name=field.name,
                field=field.name if plain else f"column_{place}",
                type=plain_type(field.type),
                nullable=place > 0,
            )
        )
    return columns


def plain_type(type_: pa.DataType) -> pa.DataType:
    """A dictionary's values stand for it."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def to_rows(
    products: pa.Table, vectors: np.ndarray, columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Rows for `upsert`; a column that `products` lacks is null.

    Raises `UserError`, naming column and ids, for what Milvus cannot hold as it is.
    """
    ids = products[columns[0].name].to_pylist()
    fields: dict[str, list[Any]] = {VECTOR: list(vectors)}
    for column in columns:
        if column.name in products.column_names:
            fields[column.field] = _stored(ids, products[column.name], column)
        else:
            fields[column.field] = [None] * len(ids)
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def _stored(ids: Sequence[str], values: pa.ChunkedArray, column: Column) -> list[Any]:
    stored = values.cast(column.type).to_pylist()
    if column.family == "text":
        _refuse(ids, [len((v or "").encode()) > MAX_BYTES for v in stored], column, "long strings")
    elif column.family == "float":
        # DuckDB orders NaN above all numbers and Milvus does not.
        _refuse(ids, [v is not None and math.isnan(v) for v in stored], column, "NaN")
    elif column.family == "int":
        _refuse(ids, [v is not None and v >= 2**63 for v in stored], column, "more than 63 bits")
    elif column.family == "other":
        return [_as_json(id_, value, column) for id_, value in zip(ids, stored, strict=True)]
    return stored


def _refuse(ids: Sequence[str], bad: Sequence[bool], column: Column, what: str) -> None:
    if any(bad):
        named = name_ids([id_ for id_, is_bad in zip(ids, bad, strict=True) if is_bad])
        raise UserError(f"attribute '{column.name}' holds {what}, which Milvus cannot: {named}")


def _as_json(id_: str, value: Any, column: Column) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        # In an object, since not every version takes a list or a string at the top.
        return {"value": json.loads(json.dumps(value, default=_as_text, allow_nan=False))}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"attribute '{column.name}' ({column.type}) of '{id_}' cannot be kept as JSON ({error})"
        ) from None


def _as_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not for JSON")


def from_rows(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> pa.Table:
    """A table of what Milvus gave back, in the types that went in."""
    return pa.table({c.name: _restored([row.get(c.field) for row in rows], c) for c in columns})


def _restored(values: list[Any], column: Column) -> pa.Array:
    if family_of(column.type) != "other":
        return pa.array(values, column.type)
    inner = [value and (json.loads(value) if isinstance(value, str) else value) for value in values]
    inner = [value and value["value"] for value in inner]
    if pa.types.is_null(column.type) or pa.types.is_nested(column.type):
        try:
            return pa.array(inner, column.type)
        except pa.ArrowException:
            raise UserError(
                f"attribute '{column.name}' ({column.type}) does not come back from Milvus as it was; build "
                "the index without it"
            ) from None
    return pa.array(inner, pa.string()).cast(column.type)
