"""Two encoders side by side: the same figures as the evaluation's, and the queries where they differ."""

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.retrieval.encoder_comparison import EncoderComparison, compare_encoders
from mmrec.retrieval.evaluation import Gallery, measure
from mmrec.retrieval.metrics import METRIC_NAMES, paired_bootstrap, per_query


@pytest.fixture(scope="module")
def encoders(trained: Path) -> dict[str, Encoder]:
    encoder = Encoder.load(trained / "encoder")
    torch.manual_seed(0)
    start = Encoder(encoder.config, model_config=encoder.model_config, pixels=encoder.pixels)
    return {"trained": encoder, "<b>untrained": start.eval()}


@pytest.fixture(scope="module")
def comparison(encoders: dict[str, Encoder], tiny_shards: Path) -> EncoderComparison:
    return compare_encoders(encoders, tiny_shards, split="train")


def test_figures_are_those_of_an_evaluation(
    comparison: EncoderComparison, encoders: dict[str, Encoder], tiny_shards: Path
) -> None:
    gallery = Gallery.open(tiny_shards, "train")
    first, second = (measure(encoder, gallery) for encoder in encoders.values())
    assert [own.metric for own in comparison.metrics] == list(METRIC_NAMES)
    values = [per_query(ranks) for ranks in comparison.ranks.values()]
    for own in comparison.metrics:
        assert own.first == pytest.approx(first[own.metric])
        assert own.value == pytest.approx(second[own.metric])
        right = paired_bootstrap(values[1][own.metric], values[0][own.metric])
        # Sums that tie but for rounding may count towards p, or not.
        assert own.difference.p == pytest.approx(right.p, abs=5e-3)
        assert astuple(replace(own.difference, p=0.0)) == pytest.approx(
            astuple(replace(right, p=0.0))
        )
        assert own.p >= own.difference.p
    table = comparison.to_pandas()
    assert table["trained"].tolist() == [own.first for own in comparison.metrics]
    page = comparison._repr_html_()
    assert "<b>untrained" not in page
    assert page.count("<tr>") == len(METRIC_NAMES) + 1


def test_an_encoder_does_not_differ_from_itself(
    encoders: dict[str, Encoder], tiny_shards: Path
) -> None:
    encoder = encoders["trained"]
    same = compare_encoders({"one": encoder, "two": encoder}, tiny_shards)
    assert not any(own.beyond_chance or own.difference.difference for own in same.metrics)
    assert same.differing() == []


def test_where_two_differ_most_comes_first(comparison: EncoderComparison) -> None:
    found = comparison.differing(3, k=4)
    gaps = [abs(1 / a - 1 / b) for a, b in (own.ranks.values() for own in found)]
    firsts = [np.array([ranks[0] for ranks in own]) for own in comparison.ranks.values()]
    right = np.sort(np.abs(1 / firsts[0] - 1 / firsts[1]))[::-1]
    assert gaps == pytest.approx(right[:3].tolist())
    for own in found:
        for name, matches in own.matches.items():
            places = [p for p, match in enumerate(matches, 1) if match.product_id in own.right]
            assert places[:1] == [own.ranks[name]] if own.ranks[name] <= 4 else not places
        page = own._repr_html_()
        assert page.count("✓ right") == sum(
            match.product_id in own.right for each in own.matches.values() for match in each
        )
        assert "data:image/jpeg;base64" in page
    with pytest.raises(UserError, match="other 'x': expected one of <b>untrained"):
        comparison.differing(other="x")


def test_one_encoder_and_products_are_refused(
    encoders: dict[str, Encoder], tiny_shards: Path
) -> None:
    with pytest.raises(UserError, match="expected two encoders or more, found 1"):
        compare_encoders({"one": encoders["trained"]}, tiny_shards)
    with pytest.raises(UserError, match="split 'catalog' holds products"):
        compare_encoders(encoders, tiny_shards, split="catalog")
