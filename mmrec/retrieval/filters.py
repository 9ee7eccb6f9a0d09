"""Filters: from a condition on attributes, as people write it, to the rows that meet it.

    price < 30 and category = 'shoes' and available

The condition is one SQL expression, parsed and evaluated by DuckDB on the table in memory. The connection
lives for one filter, cannot reach files or the network, and cannot be reconfigured; a condition with a
query inside is refused, and so is any function that is not in the list below. All of these give the same
result for the same row: what meets a condition is remembered. A comparison with a missing value is not
met, as always in SQL.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from mmrec.errors import UserError

TIMEOUT_S = 30.0
"""Comparing a hundred million prices takes a second; what takes longer than this was not meant so."""

_ROW = "mmrec row"
# What a condition may call, operators too; nothing that waits, writes, draws or looks at the clock, and
# nothing whose text may be far longer than what it is given: one lpad makes gigabytes of a title, which
# neither the timer nor the limit of memory stops, and so does a replace within a replace.
_FUNCTIONS = """
+ - * / // % ** ^ & | ~ << >> || ~~ !~~ ~~* !~~* ~~~ ^@ @> <@ && -> ->>
like_escape not_like_escape ilike_escape not_ilike_escape
abs add ceil ceiling divide exp fdiv floor fmod greatest isfinite isinf isnan least ln log log10 log2 mod
multiply nullif pow power round sign sqrt subtract trunc
ascii char_length character_length concat concat_ws contains ends_with instr lcase left len length
levenshtein lower ltrim position prefix regexp_extract regexp_full_match regexp_matches
reverse right rtrim split split_part starts_with str_split string_split
strip_accents strlen strpos substr substring suffix trim ucase upper
array_contains array_extract array_has array_has_all array_has_any array_length array_position
cardinality element_at list_contains list_distinct list_extract list_filter list_has list_has_all
list_has_any list_max list_min list_position list_slice list_sum list_value map_contains map_extract
map_keys map_values row struct_extract struct_pack
json_array_length json_contains json_extract json_extract_string
date_add date_diff date_part date_sub date_trunc datediff datepart datetrunc day dayname dayofweek
dayofyear epoch epoch_ms hour isodow last_day make_date make_timestamp minute month monthname quarter
second strftime strptime to_days to_hours to_minutes to_months to_seconds to_weeks to_years
try_strptime week weekday year
"""
_ALLOWED = frozenset(_FUNCTIONS.split())
_REFUSED = {"SUBQUERY": "a query of its own", "WINDOW": "a window", "STAR": "a star"}
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "python_enable_replacements": "false",
    # A condition is met row by row, and needs little; what asks for more grows what it looks at.
    "memory_limit": "512MB",
    "lock_configuration": "true",
}


def matching_rows(products: pa.Table, where: str) -> Bool[np.ndarray, " N"]:
    """Which rows of a table meet a condition.

    Raises `UserError` with the columns that there are when the condition cannot be understood.
    """
    selected = np.zeros(len(products), bool)
    rows = pa.array(np.arange(len(products)))
    connection = duckdb.connect(":memory:", config=_SETTINGS)
    timer = threading.Timer(TIMEOUT_S, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        parsed = _parsed(connection, where)
        connection.register("products", products.append_column(_ROW, rows))
        condition = connection.view("products").filter(where)
        _refuse_other_names(parsed, products.schema)
        found = condition.project(f'"{_ROW}"').to_arrow_table()
    except duckdb.InterruptException:
        raise UserError(f"where {where!r}: takes more than {TIMEOUT_S:g} s") from None
    except duckdb.Error as error:
        raise UserError(f"where {where!r}: {_reason(error)}; {_columns(products)}") from None
    finally:
        timer.cancel()
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
        parsed = _parsed(connection, where)
        connection.register("products", products)
        connection.view("products").filter(where).fetchall()
        _refuse_other_names(parsed, schema)
    except duckdb.Error as error:
        raise UserError(f"where {where!r}: {_reason(error)}; {_columns(products)}") from None
    finally:
        connection.close()
    return parsed["statements"][0]["node"]["where_clause"]


def _parsed(connection: Any, where: str) -> dict[str, Any]:
    """Parse a condition; a query inside could run for ever, and other functions than ours could, too."""
    (text,) = connection.execute(
        "select json_serialize_sql(?::varchar)", [f"select 1 from products where ({where}\n)"]
    ).fetchall()[0]
    try:
        parsed = json.loads(text)
        nodes = list(_nodes(parsed))
    except RecursionError:
        raise duckdb.Error("a condition cannot be nested so deeply") from None
    lambdas = [node for node in nodes if node.get("class") == "LAMBDA"]
    if any(sum(node.get("class") == "LAMBDA" for node in _nodes(own)) > 1 for own in lambdas):
        # Each would multiply what the one around it holds.
        raise duckdb.Error("a condition cannot hold a lambda within a lambda")
    for node in nodes:
        if node.get("class") in _REFUSED:
            raise duckdb.Error(f"a condition cannot hold {_REFUSED[node['class']]}")
        name = node.get("function_name") or "+"
        if node.get("class") == "FUNCTION" and name.lower() not in _ALLOWED:
            raise duckdb.Error(
                f"function '{name}' is not for conditions: they take arithmetic, text, lists and dates, and "
                "no aggregates, files or clocks"
            )
    return parsed


def _refuse_other_names(parsed: dict[str, Any], schema: pa.Schema) -> None:
    """Names that DuckDB knows and that are no columns, such as current_date, and our own column of rows."""
    known = {"products", *(name.lower() for name in schema.names)}
    for node in _nodes(parsed):
        if node.get("class") == "LAMBDA":
            known |= {
                n["column_names"][0].lower() for n in _nodes(node["lhs"]) if "column_names" in n
            }
    for node in _nodes(parsed):
        if node.get("class") != "COLUMN_REF":
            continue
        if (names := [name.lower() for name in node["column_names"]])[
            0
        ] not in known or _ROW in names:
            raise duckdb.Error(f"'{node['column_names'][-1]}' is not a column")


def filterable(products: pa.Table) -> pa.Table:
    """Attributes in types that DuckDB reads.

    Raises `UserError` for names that a condition cannot tell apart, and values that cannot be cast.
    """
    refuse_alike(products.column_names)
    for place, field in enumerate(products.schema):
        if (kind := _FITTING.get(field.type) or _smaller_decimal(field.type)) is None:
            continue
        try:
            products = products.set_column(place, field.name, products[field.name].cast(kind))
        except pa.ArrowException as error:
            raise UserError(f"attribute '{field.name}' is {field.type}: {error}") from None
    return products


# Neither can half floats and decimals of more than 38 digits be compared, nor views of text be read.
_FITTING = {
    pa.float16(): pa.float32(),
    pa.string_view(): pa.string(),
    pa.binary_view(): pa.binary(),
}


def _smaller_decimal(kind: pa.DataType) -> pa.DataType | None:
    return pa.float64() if pa.types.is_decimal256(kind) else None


def refuse_alike(names: Sequence[str]) -> None:
    """Raises `UserError` for columns whose names differ in case alone, and for one that is named as ours."""
    first: dict[str, str] = {}
    for name in names:
        if name.lower() == _ROW:
            raise UserError(f"an attribute cannot be called '{name}': conditions use that name")
        if (other := first.setdefault(name.lower(), name)) != name:
            raise UserError(
                f"attributes '{other}' and '{name}' are one name in a condition; rename one of them"
            )


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
