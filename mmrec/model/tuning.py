"""How much of the towers learns, and what a step of them costs; none of it changes what an encoder is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mmrec.errors import UserError
from mmrec.model.encoder import Encoder
from mmrec.model.layers import hold_frozen, layer_depths
from mmrec.model.lora import add_lora
from mmrec.ranges import CountOrZero, check_ranges

Layers = int | Literal["all"]


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What of the towers is trained, and how."""

    frozen_image_layers: Layers = 0
    """Layers of the image tower, from its input, that keep their weights; all locks it (LiT)."""
    frozen_text_layers: Layers = 0
    """The same for the text tower. The stem is one layer, each block or stage one, the projection one."""
    lora_rank: CountOrZero = 0
    """Rank of low-rank adapters, which then learn instead of the towers' weights; 0 for none."""
    checkpoint_towers: bool = False
    """Compute activations again in backward instead of keeping them: less memory, a third more time.

    Gradients stay as they are; batch normalisation counts each batch twice in its running statistics."""
    compile_towers: bool = False
    """Compile the towers by torch.compile: a minute or more at the start, faster steps on a GPU."""


def tune(encoder: Encoder, config: TuningConfig) -> None:
    """Freeze, adapt, checkpoint and compile an encoder's towers, in place.

    Locked towers are those of LiT (Zhai et al. 2022). Raises `UserError` for more layers than a tower has,
    and for a tower that cannot be cut, adapted or checkpointed.
    """
    check_ranges(config, "tuning.")
    for kind, tower in _towers(encoder):
        layers = config.frozen_image_layers if kind == "image" else config.frozen_text_layers
        frozen = frozen_names(tower, layers, flag=f"--tuning.frozen-{kind}-layers")
        for name in frozen:
            tower.get_parameter(name).requires_grad_(False)
        if config.lora_rank and layers != "all":
            add_lora(tower, config.lora_rank, frozen=frozen)
        if config.checkpoint_towers:
            _checkpoint(tower)
        if config.compile_towers:
            compile_tower(tower)
    hold_frozen(encoder)


def frozen_names(tower: nn.Module, layers: Layers, *, flag: str) -> set[str]:
    """Names of the parameters in a tower's first layers; `flag` names the setting in a complaint."""
    names = {name for name, _ in tower.named_parameters()}
    if layers == "all" or layers == 0:
        return names if layers == "all" else set()
    if not isinstance(layers, int):
        raise UserError(f"{flag} {layers}: expected a number of layers or all")
    depths = layer_depths(tower)
    count = max(depths.values()) + 1
    if not 0 <= layers <= count:
        raise UserError(f"{flag} {layers}: expected 0 to {count}, the layers of this tower, or all")
    return {name for name in names if depths[name] < layers}


def compile_tower(tower: nn.Module, **options: Any) -> None:
    """Compile in place, so that names in a state dict stay as they are; `options` as torch.compile's."""
    tower.compile(**options)


def _towers(encoder: Encoder) -> Iterator[tuple[str, nn.Module]]:
    for kind, towers in (
        ("image", (encoder.image_tower, encoder.product_image_tower)),
        ("text", (encoder.text_tower, encoder.product_text_tower)),
    ):
        for tower in towers:
            if tower is not None:
                yield kind, tower


def _checkpoint(tower: nn.Module) -> None:
    # open_clip's wrapper of timm only warns where the trunk cannot; asked directly, it says so.
    owner: Any = getattr(tower, "trunk", tower)
    try:
        owner.set_grad_checkpointing(True)
    except Exception as error:  # each architecture refuses in its own way
        raise UserError(
            f"--tuning.checkpoint-towers: {type(owner).__name__} cannot compute its activations again "
            f"({str(error)[:100]}); leave it out"
        ) from None
