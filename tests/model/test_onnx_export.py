"""Encoders as ONNX models: outputs equal torch's, whatever is masked or missing."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmrec import cli
from mmrec.data.batches import ItemBatch
from mmrec.errors import UserError
from mmrec.manifest import read_manifest
from mmrec.model import onnx_export
from mmrec.model.encoder import Encoder, EncoderConfig, Side
from mmrec.model.onnx_export import export_onnx, feed

onnxruntime = pytest.importorskip("onnxruntime", reason="an extra: pip install 'mmrec[onnx]'")
pytest.importorskip("onnxscript", reason="an extra: pip install 'mmrec[onnx]'")

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
RESNET = {
    "timm_model_name": "mmrec_resnet10",
    "timm_pool": "avg",
    "timm_proj": "linear",
    "image_size": 32,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit": (VIT, {"pooling": "attention"}),
    "resnet": (RESNET, {"separate_towers": True, "widths": (8,)}),
}


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Encoder, Path]:
    """An encoder whose every part has something to say, and its export."""
    vision, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = folder / "towers.json"
    config.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(towers=str(config), **settings))
    with torch.no_grad():
        for part in (encoder.gates, encoder.pools, encoder.product_image_tower):
            for weight in part.parameters() if part is not None else ():
                weight.add_(torch.randn_like(weight) * 0.3)
    # Statistics of batch normalisation, as a training leaves them.
    encoder.train()
    for side in ("content", "product"):
        encoder.views(random_items(encoder, 6, 2, 0), side)
    encoder.save(folder / "encoder")
    cli.export_onnx(encoder=folder / "encoder", out=folder / "onnx")
    return Encoder.load(folder / "encoder"), folder / "onnx"


def random_items(encoder: Encoder, rows: int, pictures: int, seed: int) -> ItemBatch:
    """Rows of noise of which anything may be missing."""
    draw = torch.Generator().manual_seed(seed)
    size = encoder.preprocess.size
    words = ["a red mug", "blue", "", "shoes for running"]
    return ItemBatch(
        images=torch.randint(
            0, 256, (rows, pictures, 3, size, size), dtype=torch.uint8, generator=draw
        ),
        image_mask=torch.rand(rows, pictures, generator=draw) < 0.6,
        tokens=encoder.tokenizer([words[(seed + row) % 4] for row in range(rows)]),
        text_mask=torch.rand(rows, generator=draw) < 0.6,
    )


def run(folder: Path, side: str, items: ItemBatch) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(folder / f"{side}.onnx"))
    return session.run(["embeddings"], dict(feed(items)))[0]


@pytest.mark.parametrize("side", ["content", "product"])
def test_outputs_equal_torchs(exported: tuple[Encoder, Path], side: Side) -> None:
    encoder, folder = exported
    seen = set()
    for seed, (rows, pictures) in enumerate([(1, 1), (1, 4), (2, 1), (3, 2), (7, 5), (16, 3)]):
        items = random_items(encoder, rows, pictures, seed)
        expected = encoder.embed(items, side).numpy()
        np.testing.assert_allclose(run(folder, side, items), expected, atol=1e-4)
        kinds = zip(items.image_mask.any(1).tolist(), items.text_mask.tolist(), strict=True)
        seen |= set(kinds)
    assert len(seen) == 4  # Rows with both, with either, and with nothing.


def test_masked_frames_do_not_count(exported: tuple[Encoder, Path]) -> None:
    encoder, folder = exported
    items = random_items(encoder, 4, 3, 9)
    mask = torch.tensor([[True, False, True]] * 4)
    first = ItemBatch(**(vars(items) | {"image_mask": mask}))
    noise = items.images.clone()
    noise[:, 1] = 255 - noise[:, 1]
    second = ItemBatch(**(vars(first) | {"images": noise}))
    shown = ItemBatch(**(vars(second) | {"image_mask": torch.ones_like(mask)}))
    np.testing.assert_array_equal(run(folder, "content", first), run(folder, "content", second))
    assert np.abs(run(folder, "content", first) - run(folder, "content", shown)).max() > 1e-3


def test_sides_have_models_of_their_own(exported: tuple[Encoder, Path]) -> None:
    encoder, folder = exported
    items = random_items(encoder, 3, 2, 3)
    difference = np.abs(run(folder, "content", items) - run(folder, "product", items)).max()
    assert difference > 1e-3


def test_the_folder_says_what_it_is(exported: tuple[Encoder, Path]) -> None:
    import onnx

    encoder, folder = exported
    manifest = read_manifest(folder, "onnx")
    parent = manifest.parent("encoder")
    assert parent
    assert parent.fingerprint == encoder.fingerprint
    model = onnx.load(str(folder / "content.onnx"), load_external_data=False)
    assert [(s.domain, s.version) for s in model.opset_import if not s.domain] == [("", 18)]
    assert manifest.details["opset"] == 18
    assert set(manifest.details["difference"]) == {"content", "product"}
    said = json.loads((folder / "preprocess.json").read_text())
    assert said["images"]["size"] == 32
    assert said["tokens"]["length"] == 12
    assert said["encoder"] == encoder.fingerprint


def test_the_example_runs_as_written(exported: tuple[Encoder, Path], tmp_path: Path) -> None:
    _, folder = exported
    (tmp_path / "my").mkdir()
    (tmp_path / "my/onnx").symlink_to(folder)
    Image.new("RGB", (50, 40), (200, 30, 60)).save(tmp_path / "photo.jpg")
    text = onnx_export.__doc__ or ""
    (example,) = re.findall(r"^    import json, .*?(?=\n\nShape)", text, re.M | re.S)
    code = textwrap.dedent(example) + "\nprint(*embeddings[0].tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 16
    assert sum(float(number) ** 2 for number in done.stdout.split()) == pytest.approx(1, abs=1e-4)


def test_an_unfaithful_export_is_refused(
    exported: tuple[Encoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = exported
    steps: list[str] = []

    @contextmanager
    def noted(step: str) -> Iterator[None]:
        steps.append(step)
        yield

    def copied(_: Encoder, side: str, path: Path) -> None:
        for file in folder.glob(f"{side}.onnx*"):
            shutil.copy(file, path.parent)

    monkeypatch.setattr(onnx_export, "clock", noted)
    monkeypatch.setattr(onnx_export, "_export_side", copied)
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: 0.01)
    with pytest.raises(UserError, match=r"content.onnx differs from torch by 1.0e-02"):
        export_onnx(folder.parent / "encoder", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    assert steps == ["export content.onnx"]


def test_without_the_extra_it_is_named(
    exported: tuple[Encoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'mmrec\[onnx\]'"):
        export_onnx(exported[1].parent / "encoder", tmp_path / "onnx")
