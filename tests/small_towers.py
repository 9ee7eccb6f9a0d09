"""Model configs of small towers in open_clip's format, one of each structure, and batches for them."""

import json
from pathlib import Path
from typing import Any

import torch

from mmrec.data.batches import ItemBatch, PairBatch, collate_items
from mmrec.model.encoder import Encoder, EncoderConfig

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm-vit": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
        "timm_proj": "linear",
        "image_size": 224,
    },
    "ours": {
        "timm_model_name": "mmrec_resnet10",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    },
}


def small_encoder(folder: Path, kind: str = "vit", **config: Any) -> Encoder:
    """An encoder of small towers, its weights the same in every call."""
    path = folder / f"small-{kind}.json"
    path.write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": VISION[kind], "text_cfg": TEXT}),
        encoding="utf-8",
    )
    torch.manual_seed(0)
    return Encoder(EncoderConfig(towers=str(path), **config))


def random_items(
    encoder: Encoder, pictures: list[int], titles: list[str | None], *, seed: int = 1
) -> ItemBatch:
    """Items with as many random pictures and with these titles."""
    generator = torch.Generator().manual_seed(seed)
    size = encoder.preprocess.size
    images = [
        [
            torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)
            for _ in range(count)
        ]
        for count in pictures
    ]
    return collate_items(images, titles, tokenizer=encoder.tokenizer, size=size)


def random_pairs(encoder: Encoder, rows: int = 4, *, seed: int = 1) -> PairBatch:
    """Training rows of two frames and one product image, each with titles and a product of its own."""
    numbers = torch.arange(rows)
    return PairBatch(
        content=random_items(encoder, [2] * rows, [f"clip {i}" for i in range(rows)], seed=seed),
        product=random_items(encoder, [1] * rows, [f"mug {i}" for i in range(rows)], seed=seed + 1),
        product_number=numbers,
        links=numbers[:, None],
        weights=torch.ones(rows, 1),
        samples=numbers,
    )
