"""The loss against a short dense float64 reference, in one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from loss_cases import CASES, Case, example, gradients, leaves_of, ours, reference
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.data.sampler import GlobalBatches, SamplerConfig
from mmrec.errors import UserError
from mmrec.model.losses import (
    EDGES,
    ExtraColumns,
    LossConfig,
    Objectives,
    check_loss,
    contrastive_loss,
    edge_loss,
    log_expected_columns,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_every_gradient_equal_the_reference(case: Case) -> None:
    x = example()
    leaves = leaves_of(x)
    value, expected = ours(x, case), reference(x, case)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
    for name, a, b in zip(
        leaves, gradients(value, leaves), gradients(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_rows", [1, 4, 5, 9, 12, 1000])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_chunks_change_nothing(kind: str, chunk_rows: int) -> None:
    case = Case(kind, "shared", 0.7, "all")
    results = []
    for rows in (3, chunk_rows):
        x = example()
        leaves = leaves_of(x)
        value = ours(x, case, rows)
        results.append([value, *gradients(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def plain(count: int = 6, **changes: Tensor) -> dict[str, Tensor]:
    """Distinct products, one link a row, nothing masked."""
    x = example(count, num_extra=0)
    x["products"] = torch.arange(count)
    x["log_q"] = torch.zeros(count, dtype=torch.float64)
    x["links"] = torch.stack([x["products"], torch.full((count,), -1)], 1)
    x["row_mask"] = x["column_mask"] = torch.ones(count, dtype=torch.bool)
    return x | changes


@pytest.mark.parametrize("positives", ["shared", "masked", "diagonal"])
def test_with_distinct_products_it_is_clips_loss_and_siglips(positives: str) -> None:
    x = plain()
    logits = x["scale"] * x["rows"] @ x["columns"].T
    right = torch.arange(6)
    clip = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(ours(x, Case("softmax", positives, 0.0, "none")), clip)
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    siglip = -logsigmoid(signs * (logits + x["bias"])).sum() / 6
    torch.testing.assert_close(ours(x, Case("sigmoid", positives, 0.0, "none")), siglip)


def test_positives_differ_where_products_repeat() -> None:
    x = example()
    values = {p: ours(x, Case("softmax", p, 0.0, "none")) for p in ("shared", "masked", "diagonal")}
    assert len({round(float(value), 6) for value in values.values()}) == 3


def test_a_linked_product_is_no_negative_even_as_an_extra_column() -> None:
    case = Case("softmax", "diagonal", 0.0, "all")
    alone = ours(plain(), replace(case, extra="none"))
    draw = torch.randn(1, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    extra = {"extra": draw, "extra_mask": torch.ones(1, dtype=torch.bool)}
    for product in (3, 99):  # Shown by a column too, or by none.
        numbers = torch.tensor([product])
        x = plain(**extra, extra_products=numbers, extra_rows=torch.tensor([0]))
        everyone = ours(x, case)
        only_first = ours(x, replace(case, extra="own"))
        assert everyone > only_first > alone
        x["links"] = torch.stack([x["products"], numbers.expand(6)], 1)
        for scope in ("all", "own"):
            torch.testing.assert_close(ours(x, replace(case, extra=scope)), alone)


def test_a_batch_with_nothing_to_compare_costs_nothing() -> None:
    for kind in ("softmax", "sigmoid"):
        x = example(4)
        leaves = leaves_of(x)
        x["row_mask"] = x["column_mask"] = torch.zeros(4, dtype=torch.bool)
        loss = ours(x, Case(kind, "shared", 0.7, "own"))
        assert loss == 0
        assert all((part == 0).all() for part in gradients(loss, leaves))


def test_a_row_without_a_positive_is_a_negative_of_columns_alone() -> None:
    x = example(8)
    x["links"][2] = torch.tensor([70, 71])
    leaves = leaves_of(x)
    case = Case("softmax", "shared", 0.0, "none")
    for a, b in zip(
        gradients(ours(x, case), leaves), gradients(reference(x, case), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_mixed_precision_computes_logits_in_float32() -> None:
    x = example(9)
    for name in ("rows", "columns"):
        x[name] = x[name].bfloat16()
    x = {name: part.float() if part.dtype == torch.float64 else part for name, part in x.items()}
    case = Case("softmax", "shared", 0.7, "own")
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, case)
    assert loss.dtype == torch.float32
    exact = {n: part.double() if part.is_floating_point() else part for n, part in x.items()}
    torch.testing.assert_close(loss.double(), reference(exact, case), rtol=1e-5, atol=0)


# --- objectives --------------------------------------------------------------------------------


def pair_batch(x: dict[str, Tensor]) -> PairBatch:
    count = len(x["products"])
    items = ItemBatch(
        images=torch.zeros(count, 1, 3, 2, 2, dtype=torch.uint8),
        image_mask=torch.ones(count, 1, dtype=torch.bool),
        tokens=torch.zeros(count, 3, dtype=torch.long),
        text_mask=torch.ones(count, dtype=torch.bool),
    )
    return PairBatch(
        content=items,
        product=items,
        product_number=x["products"],
        links=x["links"],
        weights=x["weights"].float(),
        samples=torch.arange(count),
    )


def views_of(x: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    sides = {
        ("content", "video", "content_title"): ("rows", "row_mask"),
        ("product", "image", "product_title"): ("columns", "column_mask"),
    }
    return {view: (x[a], x[b]) for views, (a, b) in sides.items() for view in views}


def test_objectives_are_weighted_and_inactive_ones_left_out() -> None:
    x = example(8)
    objectives = Objectives(video_title=0.5)
    losses = contrastive_loss(views_of(x), pair_batch(x), x["scale"], objectives)
    assert set(losses) == {"content_product", "video_title", "loss"}
    expected = losses["content_product"] + 0.5 * losses["video_title"]
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("positives", ["shared", "masked"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_every_edge_has_its_own_positives_and_correction(
    kind: str, positives: str, name: str
) -> None:
    x = example(10)
    x["weights"] = x["weights"].float().double()
    leaves = leaves_of(x)
    off = {edge: 0.0 for edge in EDGES}
    config = LossConfig(kind=kind, positives=positives, logq=0.7, chunk_rows=4)  # pyright: ignore
    extra = ExtraColumns(
        views={"product": (x["extra"], x["extra_mask"]), "image": (x["extra"], x["extra_mask"])},
        products=x["extra_products"],
    )
    found = contrastive_loss(
        views_of(x),
        pair_batch(x),
        x["scale"],
        Objectives(**off | {name: 1.0}),
        config=config,
        bias=x["bias"],
        log_q=x["log_q"],
        extra_columns=extra,
    )["loss"]
    case = Case(
        kind, positives, 0.7, "all" if name in ("content_product", "video_image") else "none"
    )
    if name in ("video_title", "image_title"):
        side = ("rows", "row_mask") if name == "video_title" else ("columns", "column_mask")
        x["rows"] = x["columns"] = x[side[0]]
        x["row_mask"] = x["column_mask"] = x[side[1]]
    if name == "video_title":  # Contents are not drawn by popularity.
        case = replace(case, logq=0.0)
    if name == "image_title":
        # A product's title is that of no other.
        x["links"] = torch.stack([x["products"], torch.full((10,), -1)], 1)
        x["weights"] = torch.ones(10, 2, dtype=torch.float64)
        case = replace(case, between_products=kind == "softmax")
    expected = reference(x, case)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for a, b in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("positives", ["shared", "masked"])
def test_contents_that_link_to_each_others_products_are_no_negatives(positives: str) -> None:
    x = plain(2, links=torch.tensor([[0, 1], [0, 1]]))  # One shows product 0, the other product 1.
    x["weights"] = torch.ones(2, 2)
    leaves = leaves_of(x)
    objectives = Objectives(content_product=0.0, video_title=1.0)
    config = LossConfig(positives=positives)  # pyright: ignore
    views = {"video": (x["rows"], x["row_mask"]), "content_title": (x["columns"], x["row_mask"])}
    loss = contrastive_loss(views, pair_batch(x), x["scale"], objectives, config=config)["loss"]
    # Each video is asked to be as near to one title as to the other, or nothing at all.
    rows, columns, *_ = gradients(loss, leaves)
    logits = x["scale"] * x["rows"] @ x["columns"].T
    fair = sum(-torch.log_softmax(logits, dim).mean() for dim in (0, 1)) / 2
    expected = gradients(fair if positives == "shared" else 0 * fair, leaves)
    torch.testing.assert_close(rows, expected[0])
    torch.testing.assert_close(columns, expected[1])


# --- frequencies -------------------------------------------------------------------------------


@pytest.mark.parametrize("unique", [False, True])
def test_expected_columns_are_those_that_the_sampler_deals(unique: bool) -> None:
    rng = np.random.default_rng(0)
    links = [[int(p)] for p in rng.integers(0, 12, 90) ** 2 // 12]
    links += [[0, 9, 11]] * 30
    weights = [[1.0] * len(row) if len(row) == 1 else [1.0, 2.0, 5.0] for row in links]
    config = SamplerConfig(batch_size=12, unique_products=unique)
    batches = GlobalBatches(config, shard_sizes=[60, 60], products=links, weights=weights)
    counts = np.zeros(13)
    for epoch in range(300):
        for batch in batches.epoch(epoch):
            for row in batch:
                counts[batches.product_of(row)] += row.brings_product
    seen = counts / (300 * batches.steps_per_epoch)
    expected = log_expected_columns(links, weights, num_products=13, sampler=config)
    assert expected[12] == 0  # Never drawn.
    drawn = seen > 0
    # Batches are cut from a permutation, so a product meets itself a little less than by chance.
    np.testing.assert_allclose(expected.exp().numpy()[drawn], seen[drawn], rtol=0.06)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_under_a_limit_the_rows_that_popular_products_lose_go_to_the_others(
    limit: int, unique: bool
) -> None:
    # One product of 600 contents, ten of 20, and twenty of 10.
    links = [[0]] * 600 + [[1 + i % 10] for i in range(200)] + [[11 + i % 20] for i in range(200)]
    config = SamplerConfig(batch_size=16, max_rows_per_product=limit, unique_products=unique)
    weights = [[1.0]] * 1000
    batches = GlobalBatches(config, shard_sizes=[100] * 10, products=links, weights=weights)
    counts = np.zeros(31)
    for epoch in range(10):
        for row in (row for batch in batches.epoch(epoch) for row in batch):
            counts[batches.product_of(row)] += row.brings_product
    seen = counts / (10 * batches.steps_per_epoch)
    expected = log_expected_columns(links, weights, num_products=31, sampler=config).exp().numpy()
    for group in (slice(1), slice(1, 11), slice(11, 31)):
        np.testing.assert_allclose(expected[group].mean(), seen[group].mean(), rtol=0.1)


def test_a_cap_on_rows_caps_the_expected_columns() -> None:
    config = SamplerConfig(batch_size=8, max_rows_per_product=2)
    links = [[0]] * 10 + [[1]] * 5 + [[2]] * 5
    expected = log_expected_columns(links, [[1.0]] * 20, num_products=3, sampler=config)
    torch.testing.assert_close(expected.exp(), torch.tensor([2.0, 2.0, 2.0]))


def test_logq_makes_the_batch_sum_an_estimate_of_the_catalogues() -> None:
    """At strength 1 a batch's sum of e^logit over columns is on average that over all products."""
    generator = torch.Generator().manual_seed(0)
    q = torch.softmax(torch.randn(20, generator=generator), 0).double()
    logits = torch.randn(20, generator=generator).double()
    draws = torch.multinomial(q, 64 * 4000, replacement=True, generator=generator).view(4000, 64)
    corrected = (logits - torch.log(64 * q))[draws].exp().sum(1)
    torch.testing.assert_close(corrected.mean(), logits.exp().sum(), rtol=0.01, atol=0)


# --- refusals ----------------------------------------------------------------------------------


def test_a_sigmoid_without_a_bias_is_refused() -> None:
    with pytest.raises(UserError, match="start-bias"):
        check_loss(LossConfig(kind="sigmoid"), has_bias=False)


def test_without_a_config_it_is_the_default() -> None:
    x = example(6)
    names = ["rows", "columns", "row_mask", "column_mask", "links", "weights", "products", "scale"]
    value = edge_loss(**{name: x[name] for name in names})
    torch.testing.assert_close(value, reference(x, Case("softmax", "shared", 0.0, "none")))
