"""Weights of classifiers of torchvision and timm as those of our backbone: residual networks and Swin transformers.

Residual networks have the same names in both. torchvision's Swin numbers its parts, and the names of timm are those of
its authors, but that the authors' file has the step to the next stage at the end of a stage and timm at the beginning.
The classifier itself, and the norm before it, are not used.

Two things of Swin are not the same in the backbone: it shifts windows in maps of one window too, and where a map is not
made of whole windows it shifts before it pads, as timm does, while torchvision pads before it shifts.
"""

from collections.abc import Mapping

from torch import Tensor

from gesso.models.resnets import LAYER, resnet_of
from gesso.models.translation import BODY, Translation, rename

_RESNET = ((LAYER.pattern, BODY + r"\1"),)
_WINDOWS = "its windows are shifted in maps of one window too, and padding comes after the shift, as in timm"
_IN_BLOCK = r"((?:norm[12]|attn\.qkv|attn\.proj)\.(?:weight|bias)|attn\.relative_position_bias_table)"
_TORCHVISION_SWIN = (
    (r"features\.0\.0\.(\w+)", BODY + r"patch_embed.proj.\1"),
    (r"features\.0\.2\.(\w+)", BODY + r"patch_embed.norm.\1"),
    *(
        rule
        for stage in range(4)
        for rule in (
            (rf"features\.{2 * stage + 1}\.(\d+)\.{_IN_BLOCK}", rf"{BODY}layers_{stage}.blocks.\1.\2"),
            (rf"features\.{2 * stage + 1}\.(\d+)\.mlp\.0\.(\w+)", rf"{BODY}layers_{stage}.blocks.\1.mlp.fc1.\2"),
            (rf"features\.{2 * stage + 1}\.(\d+)\.mlp\.3\.(\w+)", rf"{BODY}layers_{stage}.blocks.\1.mlp.fc2.\2"),
            (rf"features\.{2 * stage + 2}\.((?:norm|reduction)\.\w+)", rf"{BODY}layers_{stage + 1}.downsample.\1"),
        )
    ),
)


def is_resnet(state: Mapping[str, Tensor]) -> bool:
    """Named as a ResNet of torchvision or timm."""
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state


def is_torchvision_swin(state: Mapping[str, Tensor]) -> bool:
    """Named as torchvision's Swin transformer, first version."""
    return "features.1.0.attn.relative_position_bias_table" in state


def is_swin(state: Mapping[str, Tensor]) -> bool:
    """Named as timm's Swin transformer, first version."""
    return "layers.0.blocks.0.attn.relative_position_bias_table" in state


def translate(state: Mapping[str, Tensor]) -> Translation:
    """The weights of our backbone; ``state`` is one of the three."""
    notes: tuple[str, ...] = ()
    if is_resnet(state):
        weights, unused = rename(state, _RESNET)
        network = resnet_of(weights, BODY) or "a residual network"
    else:
        weights, unused = rename(state, _TORCHVISION_SWIN if is_torchvision_swin(state) else _swin_rules(state))
        network, notes = "a Swin transformer", (_WINDOWS,)
    return Translation(
        weights=weights,
        num_classes=None,
        config=None,
        problem=f"it holds a classifier, {network}, of which the backbone can be used",
        notes=notes,
        unused=tuple(unused),
    )


def _swin_rules(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    late = int("layers.0.downsample.reduction.weight" in state)
    return [
        (r"(patch_embed\.(?:proj|norm)\.\w+)", BODY + r"\1"),
        (rf"layers\.(\d+)\.blocks\.(\d+)\.({_IN_BLOCK}|mlp\.fc[12]\.\w+)", BODY + r"layers_\1.blocks.\2.\3"),
        *(
            (rf"layers\.{stage}\.downsample\.((?:norm|reduction)\.\w+)", rf"{BODY}layers_{stage + late}.downsample.\1")
            for stage in range(4)
        ),
    ]
