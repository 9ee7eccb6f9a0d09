"""Which contents train, validate and test: never the same in two, nor near duplicates of each other.

Every rule is a pure function of ids, links, groups of near duplicates, and a column to split by, so
that it can be checked again on finished shards.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from mmrec.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
# Text whose order as text is that of time: from a year to fractions of a second, as ISO 8601 writes them.
_ISO_TIME = re.compile(
    r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01])"
    r"([T ]([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d+)?)?(?P<zone>Z|[+-]\d\d:?\d\d)?)?)?)?"
)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How contents are split where the links table has no split column."""

    val: float = 0.1
    """Share of contents for validation."""
    test: float = 0.1
    """Share of contents for the test."""
    split_by: str | None = None
    """A column of contents, such as a date: the last ones test, those before them validate. It holds
    numbers, dates or times, or text like 2025-01-31, and no value is missing. None splits by a hash of
    ids, so that a content keeps its split when the tables grow."""
    cold_products: float = 0.0
    """Share of products held out of training: contents that link to one of them are kept for validation
    and test. It is the share of all products, rounded to a whole number and at least one: those whose ids
    have the smallest hashes. When the catalogue grows, new products take some of their places."""
    near_duplicates: Literal["together", "allow"] = "together"
    """Contents whose frames look the same to a perceptual hash (duplicates.py says what that finds)
    go to one split: where any of them would be tested, all are.
    A split column in links is not changed: there the training copies of what is tested (or validated)
    are dropped. `allow` leaves them where they fall."""


def check_splits(config: SplitConfig, *, has_column: bool, columns: Sequence[str]) -> None:
    """Raise `UserError` for settings out of range, or at odds with the tables."""
    for name in ("val", "test", "cold_products"):
        if not 0 <= getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(config, name)}: expected from 0 to below 1")
    if config.val + config.test >= 1:
        raise UserError("--val and --test: expected a sum below 1")
    if config.cold_products and not config.val + config.test:
        raise UserError("--cold-products needs --val or --test above 0 to put their contents in")
    if has_column and (config.cold_products or config.split_by):
        flag = "--split-by" if config.split_by else "--cold-products"
        raise UserError(
            f"{flag}: links have a split column, which decides already; remove it from the table, or the "
            "flag from the command"
        )
    if config.split_by and config.split_by not in columns:
        listed = ", ".join(columns) or "none"
        raise UserError(
            f"--split-by {config.split_by}: contents have no such column; found {listed}"
        )


def cold_products(config: SplitConfig, product_ids: Sequence[str]) -> set[str]:
    """The products held out of training: of all product ids that the tables have, lost ones among them."""
    if not config.cold_products:
        return set()
    ordered = sorted(set(product_ids), key=lambda p: (_place("cold", p), p))
    return set(ordered[: max(1, round(config.cold_products * len(ordered)))])


def assign_splits(
    config: SplitConfig,
    content_ids: Sequence[str],
    *,
    groups: Sequence[Hashable],
    barred: Sequence[bool],
    values: Sequence[Any] | None = None,
) -> list[Split]:
    """The split of each content.

    `groups` numbers groups of near duplicates, `barred` tells who must not train (it links to a cold
    product), `values` are those of the column to split by. Raises `UserError` for a missing value, and for
    values without an order that is known to be meant.
    """
    splits: list[Split]
    if values is None:
        splits = [_split_at(_place("split", c), config) for c in content_ids]
    else:
        splits = _split_in_order(config, content_ids, values)
    splits = [
        _held_out(config, content) if bar and split == "train" else split
        for content, bar, split in zip(content_ids, barred, splits, strict=True)
    ]
    if config.near_duplicates == "allow":
        return splits
    last: dict[Hashable, Split] = {}
    for group, split in zip(groups, splits, strict=True):
        last[group] = _later(last.get(group, "train"), split)
    return [last[group] for group in groups]


def straddling(groups: Sequence[Hashable], splits: Sequence[Split]) -> list[int]:
    """Positions of contents that look like one of a later split: train before val before test."""
    last: dict[Hashable, Split] = {}
    for group, split in zip(groups, splits, strict=True):
        last[group] = _later(last.get(group, "train"), split)
    pairs = enumerate(zip(groups, splits, strict=True))
    return [number for number, (group, split) in pairs if split != last[group]]


def make_claims(
    content_ids: Sequence[str],
    splits: Sequence[Split],
    *,
    groups: Sequence[Hashable],
    links: Mapping[str, Sequence[tuple[str, float]]],
    cold: Collection[str],
    cold_asked: float = 0.0,
    values: Sequence[Any] | None = None,
    held_out_from: Any = None,
) -> dict[str, Any]:
    """What can be said of how honest the splits are, as counts that anybody can take again.

    Every count that should be 0 says how often its rule is broken: `in_two_splits` contents that
    occur in several splits, `straddling` contents that look like one of a later split,
    `linked_in_training` links of training to a product held out, `too_late` training
    contents that come after the first one held out by --split-by (equal values count). Beside them stand
    the share of cold products that was asked for and their number, and the first and last value of each
    split, in which a reader sees whether the order is the one that was meant.
    """
    seen: dict[str, set[Split]] = {}
    for content_id, split in zip(content_ids, splits, strict=True):
        seen.setdefault(content_id, set()).add(split)
    sizes = [size for size in Counter(groups).values() if size > 1]
    train = [c for c, split in zip(content_ids, splits, strict=True) if split == "train"]
    claims: dict[str, Any] = {
        "contents": {"in_two_splits": sum(len(found) > 1 for found in seen.values())},
        "near_duplicates": {
            "groups": len(sizes),
            "contents": sum(sizes),
            "straddling": len(straddling(groups, splits)),
        },
        "cold_products": {
            "asked": cold_asked,
            "held_out": len(cold),
            "linked_in_training": sum(p in cold for c in train for p, _ in links[c]),
        },
    }
    if values is not None and held_out_from is not None:
        late = zip(splits, values, strict=True)
        claims["split_by"] = {
            "held_out_from": _plain(held_out_from),
            "too_late": sum(split == "train" and value >= held_out_from for split, value in late),
            "spans": _spans(splits, values),
        }
    return claims


def _spans(splits: Sequence[Split], values: Sequence[Any]) -> dict[str, list[Any]]:
    """The first and last value of each split."""
    found: dict[Split, list[Any]] = {}
    for split, value in zip(splits, values, strict=True):
        found.setdefault(split, []).append(value)
    return {s: [_plain(end(found[s])) for end in (min, max)] for s in SPLITS if s in found}


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)


def check_filled(splits: Mapping[str, Split], config: SplitConfig, *, has_column: bool) -> None:
    """Raise `UserError` for a split that was asked for and is empty."""
    wanted: set[Split] = {"train"}
    source = "the links table's split column"
    if not has_column:
        wanted |= {split for split in ("val", "test") if getattr(config, split) > 0}
        source = f"--val {config.val} and --test {config.test}"
        source += f" by {config.split_by}" if config.split_by else ""
        source += f" beside --cold-products {config.cold_products}" if config.cold_products else ""
    for split in sorted(wanted - set(splits.values())):
        hint = f"; --{split} 0 goes without it, and a split column in links decides by hand"
        raise UserError(
            f"split '{split}' is empty: {source} put none of {len(splits)} contents in it"
            + (hint if split != "train" else "")
        )


def _later(one: Split, other: Split) -> Split:
    return one if SPLITS.index(one) >= SPLITS.index(other) else other


def _place(purpose: str, name: str) -> float:
    """A number from 0 to 1 that depends on a name alone."""
    # Splits by plain id are what earlier shards have.
    text = name if purpose == "split" else f"{purpose}\0{name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _split_at(place: float, config: SplitConfig) -> Split:
    if place < config.test:
        return "test"
    return "val" if place < config.test + config.val else "train"


def _held_out(config: SplitConfig, content_id: str) -> Split:
    share = config.test / (config.test + config.val)
    return "test" if _place("held out", content_id) < share else "val"


def _split_in_order(
    config: SplitConfig, content_ids: Sequence[str], values: Sequence[Any]
) -> list[Split]:
    """The last in order test, those before validate; equal values are never parted."""
    _check_order(config, content_ids, values)
    val_from, test_from = _starts(config, values)
    return [
        "test"
        if test_from is not None and value >= test_from
        else "val"
        if val_from is not None and value >= val_from
        else "train"
        for value in values
    ]


def _check_order(config: SplitConfig, content_ids: Sequence[str], values: Sequence[Any]) -> None:
    """Raise `UserError` for a missing value, and for text whose order is not that of time."""
    first: re.Match[str] | None = None
    for content_id, value in zip(content_ids, values, strict=True):
        where = f"--split-by {config.split_by}: content '{content_id}' has"
        if _is_missing(value):
            raise UserError(f"{where} no value there")
        if not isinstance(value, str):
            continue
        found = _ISO_TIME.fullmatch(value)
        mend = "write all alike, as 2025-01-31 or 2025-01-31T18:30, or make it a column of dates or numbers"
        if found is None:
            raise UserError(f"{where} '{value}', and text is ordered letter by letter; {mend}")
        first = first or found
        if (len(value), found["zone"]) != (len(first[0]), first["zone"]):
            raise UserError(f"{where} '{value}' where another has '{first[0]}'; {mend}")


def _is_missing(value: Any) -> bool:
    if isinstance(value, float | Decimal):
        return not math.isfinite(value)
    return value is None or (isinstance(value, str) and not value.strip())


def held_out_from(config: SplitConfig, values: Sequence[Any]) -> Any:
    """The value from which on contents do not train, where a column decides; None if all train."""
    val_from, test_from = _starts(config, values)
    return test_from if val_from is None else val_from


def _starts(config: SplitConfig, values: Sequence[Any]) -> tuple[Any, Any]:
    """The first values of validation and of the test; None for a share of 0."""
    try:
        ordered = sorted(values)
    except TypeError:
        raise UserError(f"--split-by {config.split_by}: values cannot be ordered") from None
    num_test, num_val = round(config.test * len(ordered)), round(config.val * len(ordered))
    test_at = len(ordered) - num_test
    test_from = ordered[test_at] if num_test else None
    return ordered[test_at - num_val] if num_val else None, test_from
