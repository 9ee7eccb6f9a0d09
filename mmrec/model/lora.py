"""Low-rank adapters on towers (LoRA: Hu et al. 2021), by peft; merged into plain weights when saved.

They go to the towers' linear layers: in timm's transformers to all of them, in open_clip's to the two of
each block's MLP. open_clip's attention is torch's `MultiheadAttention`, which reads its weights without
calling a layer, so an adapter on its output projection would silently do nothing.
"""

from collections.abc import Collection
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from mmrec.errors import UserError


def add_lora(tower: nn.Module, rank: int, *, frozen: Collection[str] = ()) -> None:
    """Freeze a tower and give its linear layers adapters of that rank, which start without effect.

    Layers with a parameter among `frozen` get none. Raises `UserError` where peft is not installed, and
    for a tower without linear layers to adapt.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--tuning.lora-rank needs peft: pip install 'mmrec[lora]'") from None
    names = [name for name in adaptable(tower) if f"{name}.weight" not in frozen]
    if not names:
        raise UserError(
            f"--tuning.lora-rank {rank}: expected a tower with linear layers that learn (a transformer), "
            f"found {type(tower).__name__} with none; freeze all of that tower, or leave the rank at 0"
        )
    # Twice the rank is the usual strength; it scales the adapters as a learning rate would.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    inject_adapter_in_model(config, tower)


def adaptable(tower: nn.Module) -> list[str]:
    """Names of the linear layers inside a tower's blocks: neither an attention's own nor the projection."""
    return [
        name
        for name, layer in tower.named_modules()
        # Exactly this type: the output projection of MultiheadAttention is a subclass.
        if type(layer) is nn.Linear and not name.startswith("head.") and "." in name
    ]


def has_lora(module: nn.Module) -> bool:
    """Whether adapters are in a module."""
    return any(hasattr(part, "lora_A") for part in module.modules())


def merged_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's state with its adapters merged in: the names and shapes of one that never had any."""
    return _merged(module).state_dict()


def count_parameters(module: nn.Module) -> int:
    """The parameters of a module, adapters left out."""
    names = (name for name, _ in module.named_parameters() if ".lora_" not in name)
    return sum(module.get_parameter(name).numel() for name in names)


def _merged(module: nn.Module) -> nn.Module:
    if not has_lora(module):
        return module
    module = deepcopy(module)
    adapted: list[tuple[str, Any]] = [
        (name, part) for name, part in module.named_modules() if hasattr(part, "lora_A")
    ]
    for name, layer in adapted:
        layer.merge()
        module.set_submodule(name, layer.get_base_layer())
    return module
