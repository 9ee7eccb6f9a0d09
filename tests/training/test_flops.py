"""Floating point operations of towers and steps, against published and counted figures."""

import pytest
import torch

from mmrec.data.batches import ItemBatch, PairBatch
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.training.flops import FlopCount, peak_flops

# Image and text tower together, forward, in GFLOP: the table of open_clip's docs/model_profile.csv.
PUBLISHED = {"ViT-B-32": 14.78, "ViT-B-16": 41.09}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pair_costs_what_open_clip_publishes(name: str) -> None:
    count = FlopCount(Encoder(EncoderConfig(towers=name)))
    assert (count.of_image(224) + count.of_title(77)) / 1e9 == pytest.approx(
        PUBLISHED[name], rel=0.01
    )


def items(masks: list[list[bool]], titles: list[bool], size: int) -> ItemBatch:
    return ItemBatch(
        images=torch.zeros(len(masks), len(masks[0]), 3, size, size, dtype=torch.uint8),
        image_mask=torch.tensor(masks),
        tokens=torch.zeros(len(masks), 24, dtype=torch.long),
        text_mask=torch.tensor(titles),
    )


def test_a_step_counts_the_rows_that_are_there_three_times() -> None:
    count = FlopCount(Encoder(EncoderConfig(towers="mmrec-tiny")))
    batch = PairBatch(
        content=items([[True, True], [True, False]], [True, False], 64),
        product=items([[True], [False]], [False, False], 64),
        product_number=torch.tensor([0, 1]),
        links=torch.tensor([[0], [1]]),
        weights=torch.ones(2, 1),
        samples=torch.tensor([0, 1]),
    )
    expected = 3 * (4 * count.of_image(64) + count.of_title(24))
    assert count.of_step(batch) == expected > 0
    assert count.of_image(128) > 3.5 * count.of_image(64)


@pytest.mark.parametrize(
    ("name", "half", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989.4),
        ("NVIDIA H100 PCIe", True, 756.4),
        ("NVIDIA A100-SXM4-80GB", False, 19.5),
        ("Tesla T4", True, 65.1),
    ],
)
def test_peaks_are_found_by_a_part_of_the_name(name: str, half: bool, teraflops: float) -> None:
    assert peak_flops(name, half=half) == pytest.approx(teraflops * 1e12)


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("Somebody's accelerator", half=True) is None
