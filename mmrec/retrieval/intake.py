"""Intake: what is checked of vectors and attributes before an index takes them.

Shape letters: Q queries, N products, D width, I indexed width.
"""

import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from mmrec.errors import UserError
from mmrec.retrieval.base import narrowed
from mmrec.retrieval.filters import filterable, refuse_alike

# Unit length as float16 and bfloat16 can hold it; what is further off was never normalised.
_LENGTH_TOLERANCE = 0.01
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_ids(ids: Sequence[Any]) -> None:
    """Refuse ids that are not text, or that no file could hold."""
    if isinstance(ids, str):
        raise UserError(f"expected a list of ids, found the text '{ids[:40]}'")
    wrong = next((id_ for id_ in ids if not isinstance(id_, str)), "")
    if wrong != "":
        raise UserError(
            f"ids are text, and {wrong!r} is {type(wrong).__name__}; make it text first"
        )
    broken = next((id_ for id_ in ids if not id_.isascii() and _SURROGATE.search(id_)), None)
    if broken is not None:
        raise UserError(f"{broken!r}: holds half of a character (a lone surrogate)")


def checked_vectors(
    ids: Sequence[str], vectors: np.ndarray, width: int | None = None
) -> Float32[np.ndarray, "N D"]:
    """Vectors that can be indexed. Raises `UserError`, naming ids, for those that cannot."""
    if not len(ids):
        raise UserError("there are no products to index")
    check_ids(ids)
    right_width = vectors.ndim == 2 and vectors.shape[1] == (width or vectors.shape[1]) > 0
    if not right_width or len(vectors) != len(ids):
        wanted = "D" if width is None else width
        raise UserError(
            f"vectors have shape {vectors.shape}; expected ({len(ids)}, {wanted}), a row for each "
            f"id: {name_ids(ids)}"
        )
    twice = [id_ for id_, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(f"ids that occur more than once: {name_ids(twice)}")
    vectors = np.ascontiguousarray(vectors, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    _refuse(ids, np.logical_not(np.isfinite(lengths)), "vectors with NaN or infinity")
    _refuse(ids, lengths == 0, "vectors of length zero")
    _refuse(ids, np.abs(lengths - 1) > _LENGTH_TOLERANCE, "vectors that are not of unit length")
    return vectors


def checked_indexed(
    ids: Sequence[str], vectors: Float32[np.ndarray, "N D"], indexed_width: int
) -> Float32[np.ndarray, "N I"]:
    """The leading components of vectors, of unit length. Raises `UserError` where there are none."""
    if not 0 < indexed_width <= vectors.shape[1]:
        raise UserError(
            f"an index of width {indexed_width} cannot be made of vectors {vectors.shape[1]} wide"
        )
    indexed = narrowed(vectors, indexed_width)
    _refuse(
        ids,
        np.abs(indexed).max(axis=1) == 0,
        f"vectors that are zero in the first {indexed_width} components",
    )
    return indexed


def checked_k(k: Any) -> int:
    """How many matches are wanted, as Python's own number: a table's are numpy's, which FAISS refuses."""
    try:
        number = operator.index(k)
    except TypeError:
        raise UserError(f"k is {k!r}; expected a whole number") from None
    if number < 1:
        raise UserError(f"k is {number}; expected at least 1")
    return number


def checked_queries(queries: np.ndarray, width: int) -> Float32[np.ndarray, "Q D"]:
    """Queries that can be searched with. Raises `UserError`, naming a row, for those that cannot."""
    queries = np.asarray(queries)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise UserError(f"queries have shape {queries.shape}; this index expects (Q, {width})")
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite, and is refused.
        queries = np.ascontiguousarray(queries, np.float32)
        squares = np.einsum("qd,qd->q", queries, queries)
    good = (squares > 0) & (squares < np.inf)  # NaN is neither.
    if not good.all():
        wrong = ~good
        raise UserError(
            f"{np.count_nonzero(wrong)} queries are zero, NaN, infinite or too large to score; the first is "
            f"row {np.flatnonzero(wrong)[0]}"
        )
    return queries


def joined_attributes(ids: Sequence[str], attributes: pa.Table | None, key: str) -> pa.Table:
    """A table of ids and attributes, in the order of `ids`, the ids first."""
    id_column = pa.array(ids, pa.string())
    if attributes is None:
        return pa.table({key: id_column})
    if key not in attributes.column_names:
        found = ", ".join(attributes.column_names)
        raise UserError(f"attributes have no column '{key}'; found {found or 'none'}")
    table = filterable(attributes)
    known = table[key].cast(pa.string()).to_pylist()
    rows = {id_: row for row, id_ in enumerate(known)}
    if len(rows) < len(known):
        twice = [id_ for id_, count in Counter(known).items() if count > 1]
        raise UserError(f"attributes have more than one row for {name_ids(twice)}")
    missing = [id_ for id_ in ids if id_ not in rows]
    if missing:
        raise UserError(f"attributes have no row for {name_ids(missing)}")
    rest = [name for name in table.column_names if name != key]
    taken = table.select(rest).take(pa.array([rows[id_] for id_ in ids], pa.int64()))
    return pa.table([id_column, *taken.columns], names=[key, *rest])


def fitted_attributes(products: pa.Table, schema: pa.Schema) -> pa.Table:
    """Attributes brought to the types that an index has; columns that it lacks are kept as they are.

    Raises `UserError` naming a column whose values do not fit.
    """
    refuse_alike([*schema.names, *products.column_names])
    columns = []
    for field in products.schema:
        column = products[field.name]
        known = schema.field(field.name).type if field.name in schema.names else field.type
        try:
            columns.append(column if pa.types.is_null(known) else column.cast(known))
        except pa.ArrowException as error:
            reason = str(error).split("\n")[0]
            raise UserError(
                f"attribute '{field.name}' is {known} in this index, and here {field.type} ({reason})"
            ) from None
    return pa.table(columns, names=products.column_names)


def name_ids(ids: Sequence[str]) -> str:
    """The first few ids, for a message."""
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return ", ".join(f"'{id_}'" for id_ in ids[:3]) + more


def _refuse(ids: Sequence[str], bad: np.ndarray, what: str) -> None:
    if bad.any():
        raise UserError(f"{what}: {name_ids([ids[row] for row in np.flatnonzero(bad).tolist()])}")
