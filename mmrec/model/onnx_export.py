"""An encoder as two ONNX models, for programs that have no torch: contents and products to unit vectors.

Both take the same four inputs, with any number of rows and of pictures a row (at least one place, which the
mask may leave empty):

    images      uint8 (B, T, 3, S, S)   RGB, resized as preprocess.json says; what the mask leaves out is any
    image_mask  bool  (B, T)
    tokens      int64 (B, L)            the title's tokens; any numbers of the vocabulary where it is missing
    text_mask   bool  (B)

and give `embeddings`, float32 (B, D): what `Encoder.embed` gives, with zeros for a row that has nothing. A
query by one picture and no words, on the folder that `mmrec export onnx` writes:

    import json, numpy as np, onnxruntime
    from PIL import Image, ImageOps

    said = json.load(open("my/onnx/preprocess.json"))
    size, length = said["images"]["size"], said["tokens"]["length"]
    picture = ImageOps.fit(Image.open("photo.jpg").convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    session = onnxruntime.InferenceSession("my/onnx/content.onnx")
    (embeddings,) = session.run(["embeddings"], {
        "images": np.asarray(picture).transpose(2, 0, 1)[None, None],
        "image_mask": np.array([[True]]),
        "tokens": np.zeros((1, length), np.int64),
        "text_mask": np.array([False]),
    })

Shape letters: B samples, T frames or images, S side of a picture, L tokens, D embedding width.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmrec.bars import clock
from mmrec.data.batches import ItemBatch
from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    fingerprint_of,
    hash_file,
    new_folder,
    parent_of,
    write_manifest,
)
from mmrec.model.encoder import VIEWS, Encoder, Side
from mmrec.model.fusion import masked_mean
from mmrec.model.tokenizer_files import save_tokenizer

OPSET = 18
TOLERANCE = 1e-4
"""The largest difference of a component from torch's that an export may have."""
INPUTS = ("images", "image_mask", "tokens", "text_mask")


def export_onnx(encoder_folder: Path, out: Path, *, overwrite: bool = False) -> dict[str, float]:
    """Write content.onnx, product.onnx and preprocess.json; the largest difference from torch of each.

    Weights lie beside each model, as NAME.onnx.data. Raises `UserError` where the extra is not installed,
    the towers cannot be exported, or a model's output is further than `TOLERANCE` from torch's.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install 'mmrec[onnx]'") from None
    encoder = Encoder.load(encoder_folder)
    differences: dict[str, float] = {}
    with new_folder(out, kind="onnx", overwrite=overwrite, inputs=[encoder_folder]) as folder:
        for side in VIEWS:
            with clock(f"export {side}.onnx"):
                _export_side(encoder, side, folder / f"{side}.onnx")
            onnx.checker.check_model(str(folder / f"{side}.onnx"))
            differences[side] = _difference(encoder, side, folder / f"{side}.onnx")
            if not differences[side] <= TOLERANCE:
                raise UserError(
                    f"{side}.onnx differs from torch by {differences[side]:.1e}, and {TOLERANCE:.0e} is "
                    f"allowed: the towers {encoder.config.towers} do not export faithfully"
                )
        files = save_tokenizer(encoder.tokenizer, folder)
        said = {**preprocess_of(encoder), "tokenizer_files": files}
        text = json.dumps(said, indent=2)
        (folder / "preprocess.json").write_text(text + "\n", encoding="utf-8")
        parts = {file.name: hash_file(file) for file in folder.iterdir() if file.is_file()}
        write_manifest(
            folder,
            Manifest(
                kind="onnx",
                config=asdict(encoder.config),
                counts={"models": len(differences)},
                parents=[parent_of(out, encoder_folder, "encoder")],
                fingerprint=fingerprint_of({**parts, **files}),
                details={"opset": OPSET, "width": encoder.width, "difference": differences},
            ),
        )
    return differences


def preprocess_of(encoder: Encoder) -> dict[str, Any]:
    """What comes before the models: how pictures are resized, and how titles become tokens."""
    length = encoder.tokenizer([""]).shape[1]
    own = isinstance(encoder.tokenizer, SimpleTokenizer)
    return {
        "images": {
            **{name: encoder.pixels[name] for name in ("size", "interpolation", "resize")},
            "color": "RGB",
            "dtype": "uint8",
            "layout": "rows, pictures, channels, height, width",
            "normalised_in_the_model": {name: encoder.pixels[name] for name in ("mean", "std")},
            "pictures_used": encoder.config.num_frames,
        },
        "tokens": {
            "length": length,
            "dtype": "int64",
            "tokenizer": "open_clip.tokenizer.SimpleTokenizer" if own else "tokenizer/",
            "settings": encoder.model_config["text_cfg"].get("tokenizer_kwargs", {}),
        },
        "embedding": {"width": encoder.width, "widths": list(encoder.widths), "length": 1},
        "encoder": encoder.fingerprint,
    }


def _export_side(encoder: Encoder, side: Side, path: Path) -> None:
    example = _random_items(encoder, rows=3, pictures=2)
    rows, frames = torch.export.Dim("rows", min=1), torch.export.Dim("pictures", min=1)
    try:
        with _quiet_export():
            torch.onnx.export(
                SideGraph(encoder, side).eval(),
                tuple(vars(example)[name] for name in INPUTS),
                str(path),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=["embeddings"],
                dynamic_shapes=({0: rows, 1: frames}, {0: rows, 1: frames}, {0: rows}, {0: rows}),
                external_data=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"towers {encoder.config.towers}: cannot be exported: {reason}") from None


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Without torch's fused attention, which ONNX has no word for, and without the exporter's warnings."""
    fused = torch.backends.mha.get_fastpath_enabled()
    level = logging.getLogger("torch.onnx").level
    torch.backends.mha.set_fastpath_enabled(False)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        logging.getLogger("torch.onnx").setLevel(level)


def _random_items(encoder: Encoder, *, rows: int, pictures: int, seed: int = 0) -> ItemBatch:
    """Items of noise; every third row has no title, the next no pictures, and some lack a frame."""
    draw = torch.Generator().manual_seed(seed)
    size = encoder.preprocess.size
    shape = (rows, pictures, 3, size, size)
    image_mask = torch.ones(rows, pictures, dtype=torch.bool)
    image_mask[2::3] = False
    image_mask[::2, 1:2] = False
    length = encoder.tokenizer([""]).shape[1]
    top = encoder.model_config["text_cfg"].get("vocab_size", 1_000)
    return ItemBatch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw),
        image_mask=image_mask,
        tokens=torch.randint(0, top, (rows, length), generator=draw),
        text_mask=torch.arange(rows) % 3 != 1,
    )


def _difference(encoder: Encoder, side: Side, path: Path) -> float:
    """The largest difference of any component from torch's, over batches of several shapes."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for seed, (rows, pictures) in enumerate([(1, 1), (2, 1), (4, 3)]):
        items = _random_items(encoder, rows=rows, pictures=pictures, seed=seed)
        (ours,) = session.run(["embeddings"], feed(items))
        found.append(np.abs(np.asarray(ours) - encoder.embed(items, side).numpy()).max())
    return float(max(found))


def feed(items: ItemBatch) -> Mapping[str, np.ndarray]:
    """A batch as an onnxruntime session takes it."""
    return {name: vars(items)[name].contiguous().numpy() for name in INPUTS}


class SideGraph(nn.Module):
    """One side of an encoder as a graph of tensors alone: what a mask leaves out is computed and dropped.

    The encoder leaves it out before the towers, which a graph of fixed form cannot.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, side: Side) -> None:
        super().__init__()
        own = side == "product"
        self.image_tower = (own and encoder.product_image_tower) or encoder.image_tower
        self.text_tower = (own and encoder.product_text_tower) or encoder.text_tower
        self.gate = encoder.gates[side]
        self.pool = encoder.pools[side] if encoder.pools else None
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(encoder, name).view(3, 1, 1))

    def forward(
        self,
        images: UInt8[Tensor, "B T 3 S S"],
        image_mask: Bool[Tensor, "B T"],
        tokens: Int[Tensor, "B L"],
        text_mask: Bool[Tensor, " B"],
    ) -> Float[Tensor, "B D"]:
        """As `Encoder.embed`."""
        pixels = (images.flatten(0, 1).float() - self.mean) / self.std  # (B * T, 3, S, S)
        frames = normalize(self.image_tower(pixels), dim=-1)
        frames = frames.unflatten(0, image_mask.shape)  # (B, T, D)
        frames = frames.masked_fill(~image_mask[:, :, None], 0.0)
        pooled = (
            self.pool(frames, image_mask) if self.pool else masked_mean(frames, image_mask)
        )  # (B, D)
        titles = normalize(self.text_tower(tokens), dim=-1)
        titles = titles.masked_fill(~text_mask[:, None], 0.0)  # (B, D)
        present = torch.stack([image_mask.any(1), text_mask], dim=1)  # (B, 2)
        return self.gate(torch.stack([normalize(pooled, dim=-1), titles], dim=1), present)
