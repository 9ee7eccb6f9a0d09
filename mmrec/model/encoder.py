"""The encoder: contents and products, whatever of them is there, to unit vectors in one space.

Shape letters: B samples, T frames or images, D embedding width.
"""

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import normalize

from mmrec.data.batches import ItemBatch, PairBatch, Preprocess, Tokenizer, normalise_pixels
from mmrec.errors import UserError
from mmrec.manifest import (
    Manifest,
    Parent,
    fingerprint_of,
    hash_file,
    new_folder,
    read_manifest,
    write_manifest,
)
from mmrec.model.download import download_encoder, local_encoder
from mmrec.model.fusion import AttentionPool, GatedSum, masked_mean
from mmrec.model.layers import hold_frozen
from mmrec.model.lora import count_parameters, merged_weights
from mmrec.model.padding import run_without_padding
from mmrec.model.tokenizer_files import (
    check_tokenizer_settings,
    load_tokenizer,
    save_tokenizer,
)
from mmrec.model.towers import build_tokenizer, build_towers
from mmrec.model.widths import Views, check_widths, truncate
from mmrec.ranges import Count, Positive

Side = Literal["content", "product"]
TowerOutputs = dict[Side, tuple[Float[Tensor, "_N D"], Float[Tensor, "_M D"]]]
"""What the towers give for a side's pictures and for its titles: those that are there, in row order."""

VIEWS: dict[Side, tuple[str, str, str]] = {
    "content": ("content", "video", "content_title"),
    "product": ("product", "image", "product_title"),
}
"""Each side as a whole, its pictures alone, and its title alone."""

MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What an encoder is made of."""

    towers: str = "ViT-B-32"
    """An open_clip architecture, mmrec-tiny, mmrec-small, or the path of a model config in JSON."""
    pretrained: str = ""
    """A tag of that architecture (fetched by open_clip) or a local file of weights; empty for random ones."""
    pixels_of: str = ""
    """A tag of that architecture whose mean, std and resizing go with a local file of weights."""
    image_size: Count | None = None
    """Side of the image tower's input in pixels; None keeps the architecture's own."""
    separate_towers: bool = False
    """Give products towers of their own, starting from equal weights, instead of sharing."""
    num_frames: Count = 8
    """Frames of a content, and images of a product, that are looked at when embedding."""
    start_scale: Positive = 1 / 0.07
    """Where the learned scale of similarities starts (CLIP's is 1/0.07)."""
    start_bias: float | None = None
    """Where the learned bias of the sigmoid loss starts (SigLIP's is -10); None has no bias."""
    pooling: Literal["mean", "attention"] = "mean"
    """How a clip's frames, and a product's images, become one vector; attention starts as the mean."""
    fusion: Literal["gated", "mean"] = "gated"
    """How pictures and a title become one vector: under learned gates, or with equal weights."""
    widths: tuple[int, ...] = ()
    """Nested widths, ascending: each prefix of an embedding is trained to be one by itself (Matryoshka)."""


class Encoder(nn.Module):
    """Two towers shared by both sides, frame pooling, and a gated sum a side.

    `embed` is what an index wants; `forward` gives every view that the loss compares.
    """

    mean: Float[Tensor, " 3"]
    std: Float[Tensor, " 3"]

    def __init__(
        self,
        config: EncoderConfig,
        *,
        model_config: Mapping[str, Any] | None = None,
        pixels: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the towers. `model_config` and `pixels` are a saved encoder's, and replace the name's."""
        super().__init__()
        towers = build_towers(
            config.towers,
            pretrained=config.pretrained if model_config is None else "",
            pixels_of=config.pixels_of,
            image_size=config.image_size,
            model_config=model_config,
        )
        self.config = config
        self.model_config = towers.model_config
        # A pretrained tag decides how pictures are prepared, so that is saved beside the weights.
        self.pixels = dict(pixels) if pixels else towers.pixels
        self.preprocess = Preprocess(
            **{k: self.pixels[k] for k in ("size", "interpolation", "resize")}
        )
        self.width = towers.width
        self.image_tower = towers.image
        self.text_tower = towers.text
        self.product_image_tower = deepcopy(towers.image) if config.separate_towers else None
        self.product_text_tower = deepcopy(towers.text) if config.separate_towers else None
        check_widths(config.widths, self.width)
        self.gates = nn.ModuleDict({side: GatedSum(self.width) for side in VIEWS})
        if config.fusion == "mean":
            self.gates.requires_grad_(False)  # As they start: equal.
        pools = {side: AttentionPool(self.width) for side in VIEWS if config.pooling == "attention"}
        self.pools = nn.ModuleDict(pools)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.start_scale)))
        self.logit_bias = None
        if config.start_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.start_bias))
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(self.pixels[name]) * 255, persistent=False)
        self.fingerprint: str | None = None
        """Set by `save` and `load`; None for an encoder that is not on disk."""
        self.parents: list[Parent] = []
        """What it was trained on, by record; set by `save` and `load`."""
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Titles to tokens, (B, L); made at first use, since some tokenizers are fetched."""
        if self._tokenizer is None:
            self._tokenizer = build_tokenizer(self.config.towers, self.model_config)
        return self._tokenizer

    @property
    def widths(self) -> tuple[int, ...]:
        """Every width that is trained, ascending; the last is the full one."""
        return (*(width for width in self.config.widths if width < self.width), self.width)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The learned scale of similarities: an inverse temperature."""
        # FSDP2 gives it a dimension of one, which this takes away again.
        return self.log_scale.exp().sum()

    @torch.no_grad()
    def cap_scale(self) -> None:
        """Hold the scale at 100 or below, as CLIP does; called after each optimizer step."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def train(self, mode: bool = True) -> "Encoder":
        """As any module's, but frozen parts stay as they are in use: no dropout, no batch statistics."""
        super().train(mode)
        hold_frozen(self)
        return self

    def forward(self, batch: PairBatch | None) -> tuple[Views, Float[Tensor, ""]]:
        """Every view of both sides of a batch of training rows, and the scale.

        The scale comes out of here, not of the attribute, so that DDP sees it used. Without a batch there
        is nothing but the scale: enough for DDP to reduce gradients that were added up without it.
        """
        scale = self.scale
        if self.logit_bias is not None:
            # The loss reads the bias from the attribute; DDP must find it behind an output.
            scale = scale + 0 * self.logit_bias
        sides: dict[Side, ItemBatch] = {}
        if batch is not None:
            sides = {"content": batch.content, "product": batch.product}
        return self.views_of(sides, self.tower_outputs(sides)), scale

    def views(self, items: ItemBatch, side: Side) -> Views:
        """The views of one side: pictures alone, title alone, and both fused."""
        return self.views_of({side: items}, self.tower_outputs({side: items}))

    def tower_outputs(self, sides: Mapping[Side, ItemBatch]) -> TowerOutputs:
        """Run all pictures and titles of both sides, or of one, through their towers."""
        # Padding is left out before the towers: it costs nothing, and never reaches batch statistics.
        pictures = self._run(
            {"content": self.image_tower, "product": self.product_image_tower},
            {side: self.normalise_pixels(items.pictures()) for side, items in sides.items()},
        )
        texts = self._run(
            {"content": self.text_tower, "product": self.product_text_tower},
            {side: items.tokens[items.text_mask] for side, items in sides.items()},
        )
        return {side: (pictures[side], texts[side]) for side in sides}

    def picture_features(
        self, pictures: UInt8[Tensor, "N 3 H W"], side: Side
    ) -> Float[Tensor, "N D"]:
        """Some pictures of one side through its tower."""
        own = self.product_image_tower if side == "product" else None
        return self._run_one(own or self.image_tower, self.normalise_pixels(pictures))

    def title_features(self, tokens: Int[Tensor, "N L"], side: Side) -> Float[Tensor, "N D"]:
        """Some titles of one side through its tower."""
        own = self.product_text_tower if side == "product" else None
        return self._run_one(own or self.text_tower, tokens)

    def title_features_cut(self, tokens: Int[Tensor, "N L"], side: Side) -> Float[Tensor, "N D"]:
        """The same of tokens on the CPU, in less time: padding is left out where nothing depends on it.

        For queries. Rounding depends on the titles that are run together.
        """
        own = self.product_text_tower if side == "product" else None
        found = run_without_padding(own or self.text_tower, tokens, self.device)
        return self.title_features(tokens.to(self.device), side) if found is None else found

    def views_of(self, sides: Mapping[Side, ItemBatch], outputs: TowerOutputs) -> Views:
        """Pool and fuse what the towers gave."""
        views: Views = {}
        for side, items in sides.items():
            frames = _scatter(normalize(outputs[side][0], dim=-1), items.image_mask)  # (B, T, D)
            images = self._pool(side, frames, items.image_mask)  # (B, D)
            titles = _scatter(normalize(outputs[side][1], dim=-1), items.text_mask)  # (B, D)
            has_images = items.image_mask.any(1)
            present = torch.stack([has_images, items.text_mask], dim=1)  # (B, 2)
            fused = self.gates[side](torch.stack([images, titles], dim=1), present)
            whole, picture, title = VIEWS[side]
            views |= {
                whole: (fused, present.any(1)),
                picture: (images, has_images),
                title: (titles, items.text_mask),
            }
        return views

    def _pool(
        self, side: Side, frames: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B D"]:
        pooled = self.pools[side](frames, mask) if self.pools else masked_mean(frames, mask)
        return normalize(pooled, dim=-1)

    def _run(
        self, towers: Mapping[Side, nn.Module | None], inputs: Mapping[Side, Tensor]
    ) -> dict[Side, Float[Tensor, "_N D"]]:
        """Run each side's rows through its tower, in one call where the sides share it.

        One call is faster, and it keeps batch normalisation honest: frames and product images differ,
        and statistics taken of each alone in training are not those of both that are kept for later.
        """
        if len(inputs) > 1 and towers["product"] is None:
            sizes = [len(rows) for rows in inputs.values()]
            outputs = self._run_one(towers["content"], torch.cat(list(inputs.values())))
            return dict(zip(inputs, outputs.split(sizes), strict=True))
        return {
            side: self._run_one(towers[side] or towers["content"], rows)
            for side, rows in inputs.items()
        }

    def _run_one(self, tower: nn.Module | None, rows: Tensor) -> Float[Tensor, "_N D"]:
        assert tower is not None
        if len(rows):
            return tower(rows)
        if isinstance(self, FSDPModule):
            # Ranks gather a tower's weights together, so one that has no row runs it on a blank.
            return tower(rows.new_zeros(1, *rows.shape[1:]))[:0]
        # Part of the graph all the same: a rank without titles must still join in gathering gradients.
        learned = next((part for part in tower.parameters() if part.requires_grad), None)
        zeros = torch.zeros(0, self.width, device=self.device)
        return zeros if learned is None else zeros + 0 * learned.sum()

    @torch.inference_mode()
    def embed(
        self, items: ItemBatch, side: Side, *, width: int | None = None
    ) -> Float[Tensor, "B D"]:
        """Unit vectors of contents or products, in float32, or their first `width` numbers made unit again.

        An item with neither pictures nor a title has no embedding: its row is zero.
        """
        views = self.views(items.to(self.device), side)
        vectors, _ = truncate(views, width or self.width)[side]
        return vectors.float()

    def embed_content(self, items: ItemBatch) -> Float[Tensor, "B D"]:
        """Unit vectors of contents."""
        return self.embed(items, "content")

    def embed_product(self, items: ItemBatch) -> Float[Tensor, "B D"]:
        """Unit vectors of products."""
        return self.embed(items, "product")

    def normalise_pixels(self, images: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        """Bytes to the floats that the image tower was trained on."""
        return normalise_pixels(images, self.mean, self.std)

    def save(
        self, folder: Path | str, *, parents: list[Parent] | None = None, overwrite: bool = False
    ) -> str:
        """Write config.json, model.safetensors and a manifest; returns the encoder's fingerprint.

        The files of a tokenizer that transformers reads go with them once it has been used. Raises
        `UserError` when the folder is there already and `overwrite` is false.
        """
        with new_folder(folder, kind="encoder", overwrite=overwrite) as temporary:
            config = {
                "encoder": asdict(self.config),
                "towers": self.model_config,
                "pixels": self.pixels,
            }
            text = json.dumps(config, indent=2)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
            weights = {
                name: part.detach().cpu().contiguous()
                for name, part in merged_weights(self).items()
            }
            save_file(weights, temporary / "model.safetensors")
            digest = hash_file(temporary / "model.safetensors")
            self.fingerprint = _fingerprint(config, digest)
            self.parents = parents or []
            details: dict[str, Any] = {
                "width": self.width,
                "widths": self.widths,
                "tokenizer": self.config.towers,
            }
            files = save_tokenizer(self._tokenizer, temporary) if self._tokenizer else {}
            if files:
                details["tokenizer_files"] = files
            write_manifest(
                temporary,
                Manifest(
                    kind="encoder",
                    config=asdict(self.config),
                    counts={"parameters": count_parameters(self)},
                    parents=self.parents,
                    fingerprint=self.fingerprint,
                    details=details,
                ),
            )
        return self.fingerprint

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> "Encoder":
        """Read an encoder written by `save`, ready to embed; `hf://user/name` is fetched from the hub.

        Raises `UserError` when the folder holds no encoder, or a broken one.
        """
        folder = local_encoder(folder)
        manifest = read_manifest(folder, "encoder")
        try:
            text = (folder / "config.json").read_text(encoding="utf-8")
            config = json.loads(text)
            digest = hash_file(folder / "model.safetensors")
            changed = _fingerprint(config, digest) != manifest.fingerprint
            weights = load_file(folder / "model.safetensors", device="cpu")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder}: the encoder cannot be read: {error}") from None
        if changed:
            raise UserError(
                f"{folder}: config or weights are not those that the manifest names "
                f"({manifest.fingerprint}); export the encoder again"
            )
        check_tokenizer_settings(config["towers"])
        known = {field.name for field in fields(EncoderConfig)}
        own = {k: v for k, v in config["encoder"].items() if k in known}
        own["widths"] = tuple(own.get("widths", ()))  # JSON has lists alone
        encoder = cls(
            EncoderConfig(**own),
            model_config=config["towers"],
            pixels=config["pixels"],
        )
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f"{folder}: weights and config do not fit: {str(error)[:300]}"
            ) from None
        encoder.fingerprint = manifest.fingerprint
        encoder.parents = manifest.parents
        files = manifest.details.get("tokenizer_files", {})
        encoder._tokenizer = load_tokenizer(folder, encoder.model_config, files)
        return encoder.eval().to(device)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: Path | str,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: torch.device | str = "cpu",
    ) -> "Encoder":
        """Read an encoder from a folder, or from a repository of the Hugging Face hub ("user/name").

        `revision` is a branch, a tag or a commit; `token` is for a private repository, where
        `hf auth login` or HF_TOKEN has not said it already. What was fetched is kept in the hub's cache, and
        compared with the encoder's fingerprint; nothing in it is run or unpickled.

        Raises `UserError` where there is no such repository or it cannot be fetched, and as `load` does.
        """
        if Path(repo_or_folder).is_dir():
            if revision is not None:
                raise UserError(
                    f"{repo_or_folder}: is a folder, which has no revision; leave it out"
                )
            return cls.load(repo_or_folder, device=device)
        folder = download_encoder(str(repo_or_folder), revision=revision, token=token)
        return cls.load(folder, device=device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Publish the encoder on the Hugging Face hub with a model card; returns the commit's URL.

        `metrics` is what `mmrec evaluate` wrote to metrics.json, and `license` an identifier of the hub's
        (apache-2.0); the card has either only where it is given. The repository is made if it is missing;
        `private` says how. Of an earlier push the card is replaced; its figures and tokenizer are removed. A
        text tower of transformers (hf_model_name) still has its config fetched from where it came from.

        Raises `UserError` where metrics are another encoder's, or the hub refuses.
        """
        from mmrec.model.hub import push_encoder

        return push_encoder(
            self,
            repo_id,
            metrics=metrics,
            license=license,
            private=private,
            revision=revision,
            token=token,
        )


def _fingerprint(config: Mapping[str, Any], weights: str) -> str:
    """Of what decides an encoder's output: not of where its towers' config and weights came from."""
    own = {k: v for k, v in config["encoder"].items() if k not in ("towers", "pretrained")}
    parts = {"encoder": own, "towers": config["towers"], "pixels": config["pixels"]}
    text = json.dumps(parts, sort_keys=True)
    return fingerprint_of({"config": text, "weights": weights})


def _scatter(rows: Float[Tensor, "_N D"], mask: Bool[Tensor, "*rest"]) -> Float[Tensor, "*rest D"]:
    """Put rows where the mask is true, in its order, and zeros elsewhere."""
    places = rows.new_zeros(*mask.shape, rows.shape[-1])
    places[mask] = rows
    return places
