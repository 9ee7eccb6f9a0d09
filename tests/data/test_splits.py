"""Rules of splitting: shares, stability, time, cold products, and near duplicates."""

import datetime
import math
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from mmrec.data.splits import (
    SplitConfig,
    assign_splits,
    check_filled,
    check_splits,
    cold_products,
    held_out_from,
    make_claims,
    straddling,
)
from mmrec.errors import UserError

IDS = [f"content-{i}" for i in range(5_000)]
FREE = [False] * len(IDS)


def test_splits_by_hash_are_stable_and_of_the_right_size() -> None:
    config = SplitConfig(val=0.1, test=0.2)
    splits = dict(zip(IDS, assign_splits(config, IDS, groups=IDS, barred=FREE), strict=True))
    shares = {split: count / 5_000 for split, count in Counter(splits.values()).items()}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.02)
    some = IDS[::-7]
    again = assign_splits(config, some, groups=some, barred=FREE[: len(some)])
    assert again == [splits[content] for content in some]


def test_a_group_goes_where_the_latest_of_it_would() -> None:
    config = SplitConfig(val=0.2, test=0.2)
    alone = assign_splits(config, IDS, groups=IDS, barred=FREE)
    groups = [i // 3 for i in range(len(IDS))]
    together = assign_splits(config, IDS, groups=groups, barred=FREE)
    assert straddling(groups, together) == []
    assert straddling(groups, alone)
    order = ["train", "val", "test"]
    for first in range(0, len(IDS), 3):
        assert set(together[first : first + 3]) == {max(alone[first : first + 3], key=order.index)}
    allowed = SplitConfig(val=0.2, test=0.2, near_duplicates="allow")
    assert assign_splits(allowed, IDS, groups=groups, barred=FREE) == alone


def test_what_is_barred_does_not_train() -> None:
    config = SplitConfig(val=0.1, test=0.3)
    barred = [i % 2 == 0 for i in range(len(IDS))]
    free = assign_splits(config, IDS, groups=IDS, barred=FREE)
    splits = assign_splits(config, IDS, groups=IDS, barred=barred)
    moved = Counter(s for s, f, b in zip(splits, free, barred, strict=True) if b and f == "train")
    assert set(moved) == {"val", "test"}
    assert moved["test"] / moved.total() == pytest.approx(0.75, abs=0.05)
    pairs = zip(splits, free, barred, strict=True)
    assert all(s == f for s, f, b in pairs if not b or f != "train")


@pytest.mark.parametrize(
    ("share", "num_products", "num_cold"),
    [(0.05, 6, 1), (0.2, 20, 4), (0.1, 3_000, 300), (0.33, 10, 3), (0.001, 3, 1), (0.0, 50, 0)],
)
def test_cold_products_are_exactly_the_share(
    share: float, num_products: int, num_cold: int
) -> None:
    products = [f"p{i}" for i in range(num_products)]
    cold = cold_products(SplitConfig(cold_products=share), products)
    assert len(cold) == num_cold
    assert cold <= set(products)
    assert cold_products(SplitConfig(cold_products=share), products[::-1]) == cold


def test_most_cold_products_stay_cold_when_the_catalogue_grows() -> None:
    config = SplitConfig(cold_products=0.1)
    products = [f"p{i}" for i in range(3_300)]
    before, after = cold_products(config, products[:3_000]), cold_products(config, products)
    # A tenth more products: as many of the cold ones are new, and few of the old ones train.
    assert len(before - after) <= 15
    assert len(after & before) >= 285


def test_a_column_splits_in_order_and_parts_no_equals() -> None:
    days = [datetime.date(2025, 1, 1 + i // 10) for i in range(200)]  # ten a day
    ids = IDS[:200]
    config = SplitConfig(split_by="day", val=0.12, test=0.2)
    splits = assign_splits(config, ids, groups=ids, barred=FREE[:200], values=days[::-1])[::-1]
    assert splits == ["train"] * 130 + ["val"] * 30 + ["test"] * 40
    assert held_out_from(config, days) == datetime.date(2025, 1, 14)
    none = SplitConfig(split_by="day", val=0.0, test=0.0)
    assert set(assign_splits(none, ids, groups=ids, barred=FREE[:200], values=days)) == {"train"}
    with pytest.raises(UserError, match="content 'content-1' has no value"):
        assign_splits(config, ids, groups=ids, barred=FREE[:200], values=[1, None, *range(198)])
    with pytest.raises(UserError, match="cannot be ordered"):
        assign_splits(config, ids[:2], groups=[0, 1], barred=FREE[:2], values=[{}, {"one": 1}])


@pytest.mark.parametrize(
    "missing", [None, math.nan, math.inf, Decimal("NaN"), "", " "], ids=lambda value: repr(value)
)
def test_a_value_that_is_missing_is_refused(missing: Any) -> None:
    config = SplitConfig(split_by="day", val=0.2, test=0.2)
    values = [missing if i == 3 else float(i) for i in range(10)]
    with pytest.raises(UserError, match="--split-by day: content 'content-3' has no value there"):
        assign_splits(config, IDS[:10], groups=IDS[:10], barred=FREE[:10], values=values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["9/2022", "10/2021"], "has '9/2022', and text is ordered letter by letter"),
        (["2024-01-02", "2/1/2024"], "'content-1' has '2/1/2024', and text"),
        (["2024-01-31", "2024-31-01"], "'content-1' has '2024-31-01', and text"),
        (["10", "9"], "has '10', and text"),
        (["2024-01-02", "2024-01"], "has '2024-01' where another has '2024-01-02'"),
        (["2024-01-02T10:00Z", "2024-01-02T10:00+02:00"], "where another has"),
        (["2024-01-02T10:00+01:00", "2024-01-02T10:00+02:00"], "where another has"),
    ],
)
def test_text_that_does_not_sort_as_time_is_refused(values: list[str], message: str) -> None:
    config = SplitConfig(split_by="day", val=0.0, test=0.5)
    with pytest.raises(UserError) as caught:
        assign_splits(config, IDS[:2], groups=IDS[:2], barred=FREE[:2], values=values)
    assert message in str(caught.value)
    assert "write all alike, as 2025-01-31" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        ["2023", "2024"],
        ["2023-12", "2024-01"],
        ["2023-12-31", "2024-01-01"],
        ["2023-12-31T23:59", "2024-01-01T00:00"],
        ["2023-12-31 23:59:01.250Z", "2023-12-31 23:59:01.500Z"],
    ],
)
def test_text_that_sorts_as_time_decides(values: list[str]) -> None:
    config = SplitConfig(split_by="day", val=0.0, test=0.5)
    splits = assign_splits(config, IDS[:2], groups=IDS[:2], barred=FREE[:2], values=values)
    assert splits == ["train", "test"]


def test_claims_count_what_breaks_them() -> None:
    links = {"a": [("p", 1.0)], "b": [("p", 1.0), ("q", 1.0)], "c": [("q", 1.0)], "d": [("r", 1.0)]}
    honest = make_claims(
        ["a", "b", "c", "d"],
        ["test", "test", "train", "train"],
        groups=["a", "a", "c", "d"],
        links=links,
        cold={"p"},
        cold_asked=0.2,
        values=[9, 3, 1, 2],
        held_out_from=5,
    )
    assert honest == {
        "contents": {"in_two_splits": 0},
        "near_duplicates": {"groups": 1, "contents": 2, "straddling": 0},
        "cold_products": {"asked": 0.2, "held_out": 1, "linked_in_training": 0},
        "split_by": {
            "held_out_from": 5,
            "too_late": 0,
            "spans": {"train": [1, 2], "test": [3, 9]},
        },
    }
    broken = make_claims(
        ["a", "b", "c", "a"],
        ["test", "train", "train", "train"],
        groups=["a", "a", "c", "a"],
        links=links,
        cold={"p"},
        values=[9, 3, 5, 2],
        held_out_from=5,
    )
    assert broken["contents"]["in_two_splits"] == 1
    assert broken["near_duplicates"]["straddling"] == 2
    assert broken["cold_products"]["linked_in_training"] == 2
    assert broken["split_by"]["too_late"] == 1


@pytest.mark.parametrize(
    ("config", "has_column", "message"),
    [
        (SplitConfig(val=0.6, test=0.5), False, "a sum below 1"),
        (SplitConfig(cold_products=1.5), False, r"--cold-products 1\.5: expected from 0"),
        (SplitConfig(val=0.0, test=0.0, cold_products=0.1), False, "needs --val or --test above 0"),
        (SplitConfig(cold_products=0.1), True, "--cold-products: links have a split column"),
        (SplitConfig(split_by="day"), True, "--split-by: links have a split column"),
        (SplitConfig(split_by="days"), False, "no such column; found day, likes"),
    ],
)
def test_settings_at_odds(config: SplitConfig, has_column: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_splits(config, has_column=has_column, columns=["day", "likes"])


def test_an_empty_split_is_named_with_what_left_it_empty() -> None:
    with pytest.raises(UserError, match=r"split 'val' is empty: --val 0\.1 and --test 0\.1 by day"):
        check_filled({"a": "train", "b": "test"}, SplitConfig(split_by="day"), has_column=False)
    with pytest.raises(UserError, match="'train' is empty: the links table's split column"):
        check_filled({"a": "test"}, SplitConfig(), has_column=True)
    check_filled({"a": "train"}, SplitConfig(), has_column=True)
