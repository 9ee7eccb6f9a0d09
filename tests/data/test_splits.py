"""Rules of splitting: shares, stability, time, cold products, and near duplicates."""

import datetime
from collections import Counter

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


def test_cold_products_are_a_share_that_does_not_depend_on_the_others() -> None:
    config = SplitConfig(cold_products=0.1)
    products = [f"p{i}" for i in range(3_000)]
    cold = cold_products(config, products)
    assert len(cold) / 3_000 == pytest.approx(0.1, abs=0.02)
    assert cold_products(config, products[::2]) == cold & set(products[::2])
    assert cold_products(SplitConfig(), products) == set()


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
        assign_splits(config, ids[:2], groups=[0, 1], barred=FREE[:2], values=[1, "one"])


def test_claims_count_what_breaks_them() -> None:
    links = {"a": [("p", 1.0)], "b": [("p", 1.0), ("q", 1.0)], "c": [("q", 1.0)], "d": [("r", 1.0)]}
    honest = make_claims(
        ["a", "b", "c", "d"],
        ["test", "test", "train", "train"],
        groups=["a", "a", "c", "d"],
        links=links,
        cold={"p"},
        values=[9, 3, 1, 2],
        held_out_from=5,
    )
    assert honest == {
        "contents": {"in_two_splits": 0},
        "near_duplicates": {"groups": 1, "contents": 2, "straddling": 0},
        "cold_products": {"held_out": 1, "linked_in_training": 0},
        "split_by": {"held_out_from": 5, "too_late": 0},
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
