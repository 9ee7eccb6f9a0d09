"""Titles without their padding come out as with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_towers import TEXT, random_items, small_encoder

from mmrec.model import padding
from mmrec.model.encoder import Encoder, EncoderConfig
from mmrec.retrieval.queries import encode

TITLES = ["mug", "a red mug", "mug " * 40, "three words here", "one two three four five six seven"]


@pytest.mark.parametrize(
    ("text", "can_be_cut"),
    [
        ({}, True),
        ({"pool_type": "eos", "eos_id": 49407}, True),
        ({"no_causal_mask": True}, False),
        ({"pool_type": "last"}, False),
        ({"embed_cls": True}, False),
    ],
)
def test_titles_come_out_as_with_their_padding(
    text: dict[str, object], can_be_cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"context_length": 40} | text).items():
        monkeypatch.setitem(TEXT, name, value)
    encoder = small_encoder(tmp_path).eval()
    tokens = encoder.tokenizer(TITLES)
    lengths: list[int] = []
    encoder.text_tower.register_forward_pre_hook(lambda _, rows: lengths.append(rows[0].shape[1]))
    with torch.no_grad():
        whole = encoder.title_features(tokens, "content")
        cut = encoder.title_features_cut(tokens, "content")
    torch.testing.assert_close(cut, whole, atol=2e-6, rtol=1e-5)
    # The long title alone takes all tokens.
    assert lengths == ([40, 9, 40] if can_be_cut else [40, 40])


def test_queries_are_encoded_as_the_encoder_embeds(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path, separate_towers=True).eval()
    with torch.no_grad():
        for part in encoder.product_text_tower.parameters():  # pyright: ignore
            part.mul_(1.1)
    items = random_items(encoder, [2, 0, 1, 0], ["a red mug", "mug " * 40, None, "mug"])
    for side in ("content", "product"):
        found = encode(encoder, items, side, width=encoder.width)
        expected = encoder.embed(items, side)
        vectors = torch.tensor(np.stack([query.vector for query in found]))
        torch.testing.assert_close(vectors, expected, atol=2e-6, rtol=1e-5)


def test_towers_of_ours_look_at_all_tokens() -> None:
    encoder = Encoder(EncoderConfig(towers="mmrec-tiny", image_size=32))
    assert padding.ends_of(encoder.text_tower, encoder.tokenizer(TITLES)) is None
