"""The layers of a tower, counted from its input: what is frozen, and what learns more slowly.

Layer 0 is the stem (patches, embeddings of tokens and positions), then one a transformer block or residual
stage, and the last is the projection into the joint space.
"""

from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from timm.models import group_parameters
from torch import nn

from mmrec.errors import UserError

# In timm's form: a number in the pattern numbers a layer, 99999 joins the one before, and what no pattern
# matches is the last.
_TRANSFORMER = {
    "stem": r"^(?:conv1|class_embedding|positional_embedding|ln_pre|token_embedding|cls_emb)",
    "blocks": [(r"^transformer\.resblocks\.(\d+)", None), (r"^ln_(?:post|final)", (99999,))],
}
_RESNET = {"stem": r"^(?:conv|bn)\d", "stages": r"^layer(\d+)"}


def layer_depths(tower: nn.Module) -> dict[str, int]:
    """The layer of each parameter of a tower, by the parameter's name.

    Knows open_clip's transformers and ResNets, and every timm network that groups its own parameters.
    Raises `UserError` for another structure.
    """
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "group_matcher"):
        return _timm_depths(tower)
    if isinstance(tower, ModifiedResNet):
        return _grouped(tower, _RESNET)
    if hasattr(getattr(tower, "transformer", None), "resblocks"):
        return _grouped(tower, _TRANSFORMER)
    raise UserError(
        f"{type(tower).__name__}: expected a tower whose layers mmrec can count (a transformer or ResNet of "
        'open_clip, a timm backbone), found another; freeze 0 layers or "all", and leave layer-decay at 1'
    )


def hold_frozen(module: nn.Module) -> None:
    """Put every part that has parameters, none of which learn, into evaluation mode."""
    for part in module.children():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()
        else:
            hold_frozen(part)


def _grouped(module: nn.Module, matcher: Any) -> dict[str, int]:
    return dict(group_parameters(module, matcher, reverse=True))


def _timm_depths(tower: TimmModel) -> dict[str, int]:
    trunk: Any = tower.trunk
    # Coarse: a residual stage is one layer, as a transformer's block is.
    depths = _grouped(trunk, trunk.group_matcher(coarse=True))
    if not depths:
        return {name: 0 for name, _ in tower.named_parameters()}
    head = max(depths.values()) + 1
    return {
        name: depths[name.removeprefix("trunk.")] if name.startswith("trunk.") else head
        for name, _ in tower.named_parameters()
    }
