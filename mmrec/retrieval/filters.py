"""Filters: from a condition on attributes, as people write it, to the rows that meet it.

    price < 30 and category = 'shoes' and available

The condition is one SQL expression, parsed and evaluated by DuckDB on the table in memory. The connection
lives for one filter, cannot reach files or the network, and cannot be reconfigured; a condition with a
query inside is refused. A comparison with a missing value is not met, as always in SQL.
"""

import json
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from mmrec.errors import UserError

_ROW = "mmrec row"
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "python_enable_replacements": "false",
    "memory_limit": "4GB",
    "lock_configuration": "true",
}


def matching_rows(products: pa.Table, where: str) -> Bool[np.ndarray, " N"]:
    """Which rows of a table meet a condition.

    Raises `UserError` with the columns that there are when the condition cannot be understood.
    """
    selected = np.zeros(len(products), bool)
    rows = pa.array(np.arange(len(products)))
    connection = duckdb.connect(":memory:", config=_SETTINGS)
    try:
        _refuse_queries(connection, where)
        connection.register("products", products.append_column(_ROW, rows))
        condition = connection.view("products").filter(where)
        found = condition.project(f'"{_ROW}"').to_arrow_table()
    except duckdb.Error as error:
        raise UserError(f"where {where!r}: {_reason(error)}; {_columns(products)}") from None
    finally:
        connection.close()
    selected[found.column(0).to_numpy()] = True
    return selected


def parse_condition(where: str, schema: pa.Schema) -> dict[str, Any]:
    """DuckDB's tree of a condition on columns of a schema.

    Raises `UserError` as `matching_rows` does.
    """
    products = schema.empty_table()
    connection = duckdb.connect(":memory:", config=_SETTINGS)
    try:
        parsed = _refuse_queries(connection, where)
        connection.register("products", products)
        connection.view("products").filter(where).fetchall()
    except duckdb.Error as error:
        raise UserError(f"where {where!r}: {_reason(error)}; {_columns(products)}") from None
    finally:
        connection.close()
    return parsed["statements"][0]["node"]["where_clause"]


def _refuse_queries(connection: Any, where: str) -> dict[str, Any]:
    """Parse a condition; a query inside could run for ever, and has no business there."""
    (text,) = connection.execute(
        "select json_serialize_sql(?::varchar)", [f"select 1 from products where ({where}\n)"]
    ).fetchall()[0]
    parsed = json.loads(text)
    if any(node.get("class") == "SUBQUERY" for node in _nodes(parsed)):
        raise duckdb.Error("a condition cannot hold a query of its own")
    return parsed


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a parsed statement."""
    if isinstance(tree, dict):
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(part)


def _reason(error: Exception) -> str:
    """DuckDB's complaint in a line, without the statement that it was wrapped in."""
    first = str(error).split("\nLINE", 1)[0].split("\nCandidate", 1)[0]
    return " ".join(first.split())


def _columns(products: pa.Table) -> str:
    return "columns: " + ", ".join(f"{field.name} ({field.type})" for field in products.schema)
