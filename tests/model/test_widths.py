"""Nested widths: prefixes made unit again, the mean loss over them, and what asks for them."""

from pathlib import Path

import pytest
import torch
from small_towers import random_items, random_pairs, small_encoder
from torch.nn.functional import cross_entropy, normalize

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.model.losses import Objectives, contrastive_loss
from mmrec.model.widths import nested_loss, truncate


def test_truncated_views_are_unit_prefixes() -> None:
    vectors = normalize(torch.randn(3, 8), dim=-1)
    vectors[2] = 0
    mask = torch.tensor([True, True, False])
    narrow, same = truncate({"video": (vectors, mask)}, 3)["video"]
    assert torch.allclose(narrow[0], vectors[0, :3] / vectors[0, :3].norm())
    assert narrow[2].tolist() == [0, 0, 0]
    assert same is mask
    assert truncate({"video": (vectors, mask)}, 8)["video"][0] is vectors


def test_the_loss_is_the_mean_over_widths(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, widths=(4, 8))
    assert encoder.widths == (4, 8, 16)
    batch = random_pairs(encoder)
    views, scale = encoder(batch)
    losses = nested_loss(
        views, encoder.widths, lambda v: contrastive_loss(v, batch, scale, Objectives())
    )
    expected = []
    for width in (4, 8, 16):
        rows, columns = (
            normalize(views[name][0][:, :width], dim=-1) for name in ("content", "product")
        )
        logits, target = scale * rows @ columns.T, torch.arange(len(rows))
        one = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        assert torch.allclose(losses[f"loss/{width}"], one, atol=1e-5)
        expected.append(one)
    assert torch.allclose(losses["loss"], torch.stack(expected).mean(), atol=1e-5)
    assert torch.equal(losses["content_product"], losses["loss/16"])


def test_without_widths_the_loss_is_as_it_was(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    batch = random_pairs(encoder)
    views, scale = encoder(batch)
    plain = contrastive_loss(views, batch, scale, Objectives(video_image=0.5))
    nested = nested_loss(
        views,
        encoder.widths,
        lambda v: contrastive_loss(v, batch, scale, Objectives(video_image=0.5)),
    )
    assert plain.keys() == nested.keys()
    assert all(torch.equal(plain[name], nested[name]) for name in plain)


def test_embedding_at_a_width(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, widths=(4,)).eval()
    items = random_items(encoder, [1, 0], ["a", None])
    full, narrow = encoder.embed(items, "product"), encoder.embed(items, "product", width=4)
    assert torch.allclose(narrow[0], normalize(full[0, :4], dim=0), atol=1e-6)
    assert narrow[1].abs().sum() == 0


def test_widths_are_saved(tmp_path: Path) -> None:
    small_encoder(tmp_path, widths=(4, 16)).save(tmp_path / "encoder")
    again = Encoder.load(tmp_path / "encoder")
    assert again.config.widths == (4, 16)
    assert again.widths == (4, 16)


@pytest.mark.parametrize("widths", [(0,), (8, 4), (4, 4), (4, 17)])
def test_widths_that_do_not_nest_are_refused(widths: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.widths .*: expected ascending .* from 1 to 16"):
        small_encoder(tmp_path, widths=widths)
