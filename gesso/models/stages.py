"""The stages of a timm network: where they begin and end, and what is done to one of them.

Parameters stand in the order of the forward pass in every timm network with feature maps. So a stage is a run of them.

Sources: DeepLab (Chen et al. 2017), section 3.1, for stages without stride; Deformable Convolutional Networks (Dai et
al. 2017), section 3.1, for the layers that are made deformable.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from gesso.errors import ConfigError
from gesso.models.ops.deform import DeformableConv2d


@dataclass(frozen=True)
class StageMarks:
    """The modules of a network, by name, between which its stem and its four stages lie."""

    first: str
    """The first module of stage 1; what comes before is the stem."""
    ends: tuple[str, str, str, str]
    """The last module of each stage."""
    whole: bool = False
    """Whether what comes after the last stage belongs to it, such as a norm without a stage of its own."""


def stage_end(body: nn.Module, marks: StageMarks, stage: int, option: str) -> int:
    """How many parameters, from the first on, lie in the stem (stage 0) or in everything up to the end of a stage.

    Raises:
        ConfigError: the module that ends the stage has no weights; it names the ``option`` that asks for the stage.
    """
    names = [name for name, _ in body.named_parameters()]
    if stage == 4 and marks.whole:
        return len(names)
    mark = marks.ends[stage - 1] if stage else marks.first
    inside = [i for i, name in enumerate(names) if name.startswith(mark + ".")]
    if not inside:
        raise ConfigError(
            f"backbone.{option} names stage {stage}, but no weights mark the end of that stage in this backbone",
            remedy="Leave that stage out, or choose another backbone.",
        )
    return inside[-1] + 1 if stage else inside[0]


def freeze(body: nn.Module, marks: StageMarks, stage: int) -> list[str]:
    """Freezes everything up to the end of a stage (0 = the stem, -1 = nothing).

    Returns:
        The modules that have to stay in evaluation mode: those whose parameters are all frozen, whatever else is
        inside them.
    """
    if stage < 0:
        return []
    names = [name for name, _ in body.named_parameters()]
    end = stage_end(body, marks, stage, "frozen_stages")
    frozen, trained = set(names[:end]), names[end:]
    for name in frozen:
        body.get_parameter(name).requires_grad_(False)
    return sorted(_holders(frozen) - _holders(trained))


def _holders(names: Iterable[str]) -> set[str]:
    """Every module around the parameters of these names, "" for the whole."""
    paths = [name.split(".") for name in names]
    return {".".join(path[:depth]) for path in paths for depth in range(len(path))}


def make_deformable(body: nn.Module, marks: StageMarks, stage: int, version: Literal[1, 2], groups: int) -> int:
    """Makes the 3x3 convolutions of a stage deformable, in place; those of its shortcuts stay.

    Returns:
        How many there are.

    Raises:
        ConfigError: the stage has none, or their channels do not fall into as many groups.
    """
    names = [name for name, _ in body.named_parameters()]
    begin, end = (stage_end(body, marks, k, "deformable_stages") for k in (stage - 1, stage))
    holders = dict.fromkeys(name.rpartition(".")[0] for name in names[begin:end])
    found = [name for name in holders if _is_plain_3x3(body.get_submodule(name)) and "downsample" not in name]
    if not found:
        raise ConfigError(
            f"backbone.deformable_stages names stage {stage}, but that stage has no plain 3x3 convolution",
            remedy="Leave that stage out, or choose a residual network such as resnet50.",
        )
    for name in found:
        parent, _, child = name.rpartition(".")
        source = body.get_submodule(name)
        assert isinstance(source, nn.Conv2d)
        setattr(body.get_submodule(parent), child, DeformableConv2d(source, version=version, groups=groups))
    return len(found)


def _is_plain_3x3(module: nn.Module) -> bool:
    """Not a subclass: those standardise their weights or pad by the size of the map."""
    return type(module) is nn.Conv2d and module.kernel_size == (3, 3)


def make_atrous(stage: nn.Module, before: int, after: int) -> None:
    """Takes the stride out of a stage whose blocks are convolutions alone, in place; the receptive fields stay.

    Its cells at the even places are then those that it has with stride, which is why the convolution that had the
    stride keeps the dilation ``before`` of the stage in front, as timm and torchvision have it; those behind it get
    ``after``, twice that.
    """
    seen = False
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            strided = module.stride != (1, 1)
            rate = after if seen and not strided else before
            seen = seen or strided
            module.stride = (1, 1)
            if module.kernel_size != (1, 1):
                module.dilation = (rate, rate)
                module.padding = tuple(rate * (side // 2) for side in module.kernel_size)


def set_norm_eps(body: nn.Module, eps: float) -> int:
    """Gives every batch norm this epsilon, in place; returns how many there are."""
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eps = eps
    return len(norms)
