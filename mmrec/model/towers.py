"""Image and text towers: every open_clip architecture by name, and small ones of our own for CPUs.

Ours lie in `configs/` in open_clip's format, on small residual networks registered with timm below. To
add a tower, add a JSON file there, or give `towers` the path of one.
"""

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import timm.models
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from mmrec.data.batches import Tokenizer
from mmrec.errors import UserError
from mmrec.manifest import fingerprint_of
from mmrec.model.padding import accept_short_titles

_OURS = Path(__file__).parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Towers:
    """Two towers and what surrounds them."""

    image: nn.Module
    """(B, 3, S, S) normalised pixels -> (B, D)"""
    text: nn.Module
    """(B, L) tokens -> (B, D)"""
    width: int
    """D: the width of both outputs."""
    pixels: dict[str, Any]
    """How pictures are prepared: size, interpolation, resize, and mean and std per channel in 0..1."""
    model_config: dict[str, Any]
    """The architecture in open_clip's format, complete: enough to build it again with no name."""


def build_towers(
    name: str,
    *,
    pretrained: str = "",
    pixels_of: str = "",
    image_size: int | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Towers:
    """Build towers by an open_clip name, one of ours, or the path of a model config in JSON.

    `pretrained` is a tag that open_clip knows for that name, or a local file of weights; empty means
    random weights. A tag also says how pictures are prepared; `pixels_of` names one for a local file.
    `model_config` stands in for the name's own, as a saved encoder's does.

    Raises `UserError` for an unknown name or tag, a config that cannot be built, and weights that do not fit.
    """
    given, name = name, _register(name, model_config)
    tags = open_clip.list_pretrained_tags_by_model(name)
    listed = f"its tags: {', '.join(tags) or 'none'}"
    if pretrained and not Path(pretrained).is_file() and pretrained not in tags:
        raise UserError(
            f"pretrained '{pretrained}' is neither a file nor a tag of {given}; {listed}"
        )
    if pixels_of and pixels_of not in tags:
        raise UserError(f"pixels-of '{pixels_of}' is not a tag of {given}; {listed}")
    try:
        # Text and image parts in modules of their own, whatever layout the architecture is written in.
        with _quiet_about_random_weights():
            model: Any = open_clip.create_model(
                name,
                pretrained=pretrained or None,
                force_custom_text=True,
                force_image_size=image_size,
                pretrained_text=False,
            )
    except Exception as error:  # a file that holds something else raises whatever its reader met
        if not pretrained and image_size is None and not given.endswith(".json"):
            raise
        # Its first sentence: torch goes on to recommend loading files without caution.
        reason = " ".join(str(error).split()).split(". ")[0][:300] or type(error).__name__
        raise UserError(_complaint(given, pretrained, image_size) + reason) from None
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"towers '{given}': open_clip has no model config for it")
    pixels: dict[str, Any] = open_clip.get_model_preprocess_cfg(model)
    if pixels_of:
        told = open_clip.get_pretrained_cfg(name, pixels_of)
        pixels |= {
            key: told[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in told
        }
    size = pixels["size"]
    accept_short_titles(model.text)
    return Towers(
        # Convolutions in channels-last order run up to twice as fast, on CPUs and GPUs alike.
        image=model.visual.to(memory_format=torch.channels_last),
        text=model.text,
        width=config["embed_dim"],
        pixels={
            "size": size if isinstance(size, int) else size[0],
            "interpolation": pixels.get("interpolation", "bicubic"),
            "resize": "squash" if pixels.get("resize_mode") == "squash" else "shortest",
            "mean": list(pixels["mean"]),
            "std": list(pixels["std"]),
        },
        model_config=config,
    )


def build_tokenizer(name: str, model_config: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer that belongs to an architecture; some are fetched from a hub by open_clip."""
    return open_clip.get_tokenizer(_register(name, model_config))


def _complaint(given: str, pretrained: str, image_size: int | None) -> str:
    if pretrained and Path(pretrained).is_file():
        return (
            f"pretrained '{pretrained}' does not fit {given}: expected its state dict in open_clip's names, "
            "by torch.save or as .safetensors; found "
        )
    if pretrained:
        return f"the weights '{pretrained}' of {given} cannot be loaded: "
    at_size = f" with an image size of {image_size}" if image_size else ""
    return f"towers '{given}'{at_size}: expected a model config that open_clip can build; found "


@contextmanager
def _quiet_about_random_weights() -> Iterator[None]:
    # open_clip warns on the root logger when no weights are loaded; here that is what was asked for.
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _register(name: str, model_config: Mapping[str, Any] | None) -> str:
    """Make sure that open_clip knows a name, and return the name it knows it by."""
    path = Path(name)
    if path.suffix == ".json":
        if model_config is None:
            model_config = _read_model_config(path)
        name = path.stem
    elsewhere = name.startswith(("hf-hub:", "local-dir:"))
    if model_config is not None and (elsewhere or open_clip.get_model_config(name) != model_config):
        text = json.dumps(model_config, sort_keys=True)
        # A name of its own, so that open_clip's architecture of the same name stays as it is.
        name = f"{re.sub('[^A-Za-z0-9.-]+', '-', name)}--{fingerprint_of({'config': text})}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.json"
            file.write_text(text, encoding="utf-8")
            open_clip.add_model_config(file)
        return name
    if open_clip.get_model_config(name) is None and (_OURS / f"{name}.json").is_file():
        open_clip.add_model_config(_OURS / f"{name}.json")
    if open_clip.get_model_config(name) is None:
        names = [*open_clip.list_models(), *(file.stem for file in _OURS.glob("*.json"))]
        close = get_close_matches(name, names, n=3, cutoff=0.4)
        raise UserError(
            f"towers '{name}' are not known to open_clip or mmrec, nor a path to a .json model config"
            + (f"; close: {', '.join(close)}" if close else "")
        )
    return name


def _read_model_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a model config: {error}") from None
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        found = config.get(key) if isinstance(config, dict) else None
        if not isinstance(found, kind) or found == 0:
            raise UserError(
                f"{path}: a model config in open_clip's format has {key}, "
                f"{'a number above 0' if kind is int else 'an object'}; found {json.dumps(found)}"
            )
    return config


def _small_resnet(
    variant: str, layers: tuple[int, ...], widths: tuple[int, ...], **kwargs: Any
) -> nn.Module:
    """A residual network that starts with two strided convolutions.

    ResNet's own stem works at half resolution and pools, and costs as much as all stages together at
    these widths on a CPU; this one is at a quarter of the resolution after its second layer.
    """
    kwargs.pop("pretrained_cfg", None)
    kwargs.pop("pretrained_cfg_overlay", None)
    network = timm.models.build_model_with_cfg(
        ResNet,
        variant,
        pretrained=False,
        pretrained_cfg={"url": "", "num_classes": 1000, "pool_size": (3, 3), "classifier": "fc"},
        block=BasicBlock,
        layers=layers,
        channels=widths,
        stem_type="deep",
        stem_width=widths[0] // 2,
        avg_down=True,
        zero_init_last=True,
        **kwargs,
    )
    half = widths[0] // 2
    network.conv1 = nn.Sequential(
        nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, widths[0], 3, stride=2, padding=1, bias=False),
    )
    network.maxpool = nn.Identity()
    return network


@timm.models.register_model
def mmrec_resnet10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """One basic block a stage, 32 to 256 channels: 1.3 M parameters, for demos and tests."""
    return _small_resnet("mmrec_resnet10", (1, 1, 1, 1), (32, 64, 128, 256), **kwargs)


@timm.models.register_model
def mmrec_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Two basic blocks a stage, 32 to 256 channels: 2.9 M parameters, for thousands of photos on a CPU."""
    return _small_resnet("mmrec_resnet18", (2, 2, 2, 2), (32, 64, 128, 256), **kwargs)


@timm.models.register_model
def mmrec_resnet18_s16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`mmrec_resnet18` whose last stage keeps the resolution of the third: four times the places."""
    kwargs.setdefault("output_stride", 16)
    return _small_resnet("mmrec_resnet18_s16", (2, 2, 2, 2), (32, 64, 128, 256), **kwargs)
