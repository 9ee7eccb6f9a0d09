"""Filters in Milvus: from a condition in the language of filters.py to an expression that Milvus takes.

    price < 30 and not available   ->   (price is not null and price < 30.0) and (available is not null ...

DuckDB parses the condition; its tree is translated node by node, so that no word of the condition reaches
Milvus except as a literal. A negation is carried down to the comparisons, and every comparison
asks first whether there is a value. So nothing is left to how Milvus negates what is missing, and the rows
that are met are those that DuckDB finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mmrec.errors import UserError
from mmrec.retrieval.filters import parse_condition

Family = Literal["int", "float", "bool", "text", "other"]

_OPERATORS = {
    "COMPARE_EQUAL": "==",
    "COMPARE_NOTEQUAL": "!=",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
}
_NEGATED = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_TURNED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_PATTERNS = {
    "~~": "{}",
    "!~~": "{}",
    "starts_with": "{}%",
    "prefix": "{}%",
    "^@": "{}%",
    "ends_with": "%{}",
    "suffix": "%{}",
    "contains": "%{}%",
}
_FAMILY_NAMES = {"int": "numbers", "float": "numbers", "bool": "true or false", "text": "text"}
_LARGEST_INT = 2**63 - 1
# Beyond these a number as text and the double nearest to it are compared differently by the two engines.
_EXACT_DOUBLE = 2**53
_MOST_DIGITS = 15


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the catalogue as Milvus holds it."""

    name: str
    """Its name in conditions and in tables."""
    field: str
    """Its name in the collection."""
    type: pa.DataType
    nullable: bool = True

    @property
    def family(self) -> Family:
        """What it can be compared with."""
        return family_of(self.type)


def family_of(type_: pa.DataType) -> Family:
    """What values of an Arrow type can be compared with; "other" is kept as JSON."""
    if pa.types.is_integer(type_):
        return "int"
    if pa.types.is_floating(type_):
        return "float"
    if pa.types.is_boolean(type_):
        return "bool"
    text = pa.types.is_string(type_) or pa.types.is_large_string(type_)
    return "text" if text else "other"


def milvus_filter(where: str, columns: Sequence[Column]) -> str:
    """The expression whose rows are those that meet a condition; the first column is the primary key.

    Raises `UserError` when DuckDB does not understand the condition, naming the columns, and when
    Milvus cannot answer it as DuckDB would, with the reason.
    """
    schema = pa.schema([(column.name, column.type) for column in columns])
    return _Translator(where, columns).translated(parse_condition(where, schema), True)


def quoted(text: str) -> str:
    """A string literal for an expression."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    for character, name in (("\n", "n"), ("\r", "r"), ("\t", "t")):
        escaped = escaped.replace(character, f"\\{name}")
    return f'"{escaped}"'


class _Translator:
    """One condition on its way: what its refusals quote, and the columns that it may name."""

    def __init__(self, where: str, columns: Sequence[Column]) -> None:
        self.where = where
        self.columns = columns
        # Every string is at least the empty one, and a primary key is never missing.
        self.always = f'{columns[0].field} >= ""'
        self.never = f'{columns[0].field} < ""'

    def refused(self, reason: str) -> UserError:
        return UserError(
            f"where {self.where!r}: {reason}, which a filter in Milvus does not do as DuckDB does; "
            "it takes comparisons of a column with a value, in, between, like with % alone, is null, "
            "and, or, not"
        )

    def translated(self, node: dict[str, Any], holds: bool) -> str:
        """The expression for rows where a node is true, or (`holds` False) where it is false."""
        kind = node["type"]
        if kind in ("CONJUNCTION_AND", "CONJUNCTION_OR"):
            word = " and " if (kind == "CONJUNCTION_AND") == holds else " or "
            return "(" + word.join(self.translated(c, holds) for c in node["children"]) + ")"
        translate: dict[str, Callable[[dict[str, Any], bool], str]] = {
            "OPERATOR_NOT": lambda n, h: self.translated(n["children"][0], not h),
            "OPERATOR_IS_NULL": lambda n, h: self._null(n["children"][0], h),
            "OPERATOR_IS_NOT_NULL": lambda n, h: self._null(n["children"][0], not h),
            "COMPARE_DISTINCT_FROM": self._distinct,
            "COMPARE_NOT_DISTINCT_FROM": lambda n, h: self._distinct(n, not h),
            "COMPARE_BETWEEN": self._between,
            "COMPARE_IN": self._in,
            "FUNCTION": self._pattern,
            "COLUMN_REF": self._flag,
            "VALUE_CONSTANT": self._constant,
        }
        if kind in _OPERATORS:
            return self._comparison(node, holds)
        if kind not in translate:
            raise self.refused(f"it holds {kind.lower().replace('_', ' ')}")
        return translate[kind](node, holds)

    # ------------------------------------------------------------------------------------ the nodes

    def _comparison(self, node: dict[str, Any], holds: bool) -> str:
        left, right, operator = node["left"], node["right"], _OPERATORS[node["type"]]
        if left["class"] == "CONSTANT":
            left, right, operator = right, left, _TURNED[operator]
        return self._compared(
            self._column(left), operator if holds else _NEGATED[operator], self._value(right)
        )

    def _distinct(self, node: dict[str, Any], holds: bool) -> str:
        column, value = self._column(_without_cast(node["left"])), self._value(node["right"])
        if value["kind"] == "NULL_LITERAL":
            return self._missing(column, not holds)
        if not holds:
            return self._compared(column, "==", value)
        return f"({self._missing(column, True)} or {self._compared(column, '!=', value)})"

    def _between(self, node: dict[str, Any], holds: bool) -> str:
        column = self._column(node["input"])
        low, high = self._value(node["lower"]), self._value(node["upper"])
        parts = [
            self._compared(column, ">=" if holds else "<", low),
            self._compared(column, "<=" if holds else ">", high),
        ]
        return "(" + (" and " if holds else " or ").join(parts) + ")"

    def _in(self, node: dict[str, Any], holds: bool) -> str:
        first, *rest = node["children"]
        column, values = self._column(first), [self._value(child) for child in rest]
        known = [value for value in values if value["kind"] != "NULL_LITERAL"]
        if len(known) < len(values) and not holds:
            return self.never  # It might be the missing one.
        parts = [self._compared(column, "==" if holds else "!=", value) for value in known]
        if not parts:
            return self.never
        if column.family == "text":
            words = ", ".join(quoted(value["text"]) for value in known)
            return self._guarded(column, f"{column.field} {'in' if holds else 'not in'} [{words}]")
        return "(" + (" or " if holds else " and ").join(parts) + ")"

    def _pattern(self, node: dict[str, Any], holds: bool) -> str:
        name = node["function_name"]
        arguments = [argument.get("expression", argument) for argument in _arguments(node)]
        if name not in _PATTERNS or len(arguments) != 2:
            raise self.refused(f"it calls {name}")
        column, value = self._column(arguments[0]), self._value(arguments[1])
        if value["kind"] == "NULL_LITERAL":
            return self.never
        if column.family != "text" or value["kind"] != "STRING":
            raise self.refused(f"it takes {column.name} ({column.type}) for text")
        text = value["text"]
        # In Milvus a backslash escapes, and what _ stands for differs between versions.
        if any(sign in text for sign in ("\\", "_", *([] if "~~" in name else "%"))):
            raise self.refused(f"the pattern {text!r} has more than % in it")
        matched = f"{column.field} like {quoted(_PATTERNS[name].format(text))}"
        return self._guarded(column, matched if holds == (name != "!~~") else f"not ({matched})")

    def _flag(self, node: dict[str, Any], holds: bool) -> str:
        column = self._column(node)
        if column.family != "bool":
            raise self.refused(f"it takes {column.name} ({column.type}) for true or false")
        return self._guarded(column, f"{column.field} == {'true' if holds else 'false'}")

    def _constant(self, node: dict[str, Any], holds: bool) -> str:
        value = self._value(node)
        if value["kind"] not in ("BOOLEAN", "NULL_LITERAL"):
            raise self.refused(f"it takes {value['text']!r} for true or false")
        met = value["kind"] == "BOOLEAN" and (value["text"] == "true") == holds
        return self.always if met else self.never

    def _null(self, node: dict[str, Any], holds: bool) -> str:
        return self._missing(self._column(node), holds)

    # ------------------------------------------------------------------------------------ their parts

    def _missing(self, column: Column, holds: bool) -> str:
        if not column.nullable:
            return self.never if holds else self.always
        return f"{column.field} is {'' if holds else 'not '}null"

    def _guarded(self, column: Column, expression: str) -> str:
        return f"({self._missing(column, False)} and {expression})"

    def _column(self, node: dict[str, Any]) -> Column:
        if node["class"] != "COLUMN_REF" or len(node["column_names"]) != 1:
            raise self.refused("it computes with columns, or compares what is no column")
        (name,) = node["column_names"]
        # As in SQL upper and lower case are one.
        found = [c for c in self.columns if c.name.casefold() == name.casefold()]
        if len(found) != 1:
            raise self.refused(f"{name} may be any of {', '.join(c.name for c in found)}")
        return found[0]

    def _value(self, node: dict[str, Any]) -> dict[str, str]:
        """Kind and text of a constant."""
        if node["class"] == "COLUMN_REF":
            raise self.refused("it compares two columns")
        if node["class"] != "CONSTANT" or "literal" not in node:
            raise self.refused("it computes the value to compare with")
        return node["literal"]

    def _compared(self, column: Column, operator: str, value: dict[str, str]) -> str:
        family, kind, text = column.family, value["kind"], value["text"]
        if family == "other":
            raise self.refused(f"{column.name} ({column.type}) is kept as JSON")
        if kind == "NULL_LITERAL":
            return self.never
        number = kind in ("INTEGER", "NUMERIC")
        fits = {"int": number, "float": number, "bool": kind == "BOOLEAN", "text": kind == "STRING"}
        if not fits[family]:
            raise self.refused(f"{column.name} holds {_FAMILY_NAMES[family]}, and {text!r} is none")
        if family == "bool":
            if operator not in ("==", "!="):
                raise self.refused(f"it orders {column.name} (bool)")
            return self._guarded(column, f"{column.field} {operator} {text}")
        if family == "text":
            return self._guarded(column, f"{column.field} {operator} {quoted(text)}")
        self._check_number(kind, text)
        if family == "int":
            return self._whole(column, operator, text)
        return self._guarded(column, f"{column.field} {operator} {_double(column.type, text)!r}")

    def _check_number(self, kind: str, text: str) -> None:
        digits = len(Decimal(text).normalize().as_tuple().digits)
        if kind == "NUMERIC" and (digits > _MOST_DIGITS or abs(Decimal(text)) >= _EXACT_DOUBLE):
            raise self.refused(f"{text} has more digits than a double")
        if kind == "INTEGER" and abs(int(text)) > _LARGEST_INT:
            raise self.refused(f"{text} is beyond 64 bits")

    def _whole(self, column: Column, operator: str, text: str) -> str:
        """A comparison of a whole number: a fraction becomes the nearest whole one that says the same."""
        value = Decimal(text)
        floor = int(value // 1) if value >= 0 or value == int(value) else int(value) - 1
        if value == floor:
            return self._guarded(column, f"{column.field} {operator} {floor}")
        if operator in ("==", "!="):
            return self.never if operator == "==" else self._missing(column, False)
        # Nothing lies between the fraction and its neighbours.
        below = operator in ("<", "<=")
        return self._guarded(column, f"{column.field} {'<=' if below else '>'} {floor}")


def _without_cast(node: dict[str, Any]) -> dict[str, Any]:
    """`available is true` comes with a cast to what it is already."""
    boolean = node["class"] == "CAST" and node["type_expr"].get("type_name") == "BOOLEAN"
    return node["child"] if boolean else node


def _arguments(node: dict[str, Any]) -> list[dict[str, Any]]:
    return node.get("arguments") or node.get("children") or []


def _double(type_: pa.DataType, text: str) -> float:
    """The number that DuckDB compares with: a decimal is first brought to a column of single precision."""
    value = float(text)
    single = pa.types.is_float32(type_) and "e" not in text.casefold()
    return float(np.float32(value)) if single else value
