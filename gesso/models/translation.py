"""What the weights of other toolkits have in common once they are turned into ours.

detectron2 and mmdetection publish Faster R-CNN, Mask R-CNN and RetinaNet with nearly the same numbers. Against ours:

- their box head has the background in the last row, ours in the first;
- their anchors are not rounded to whole pixels (``AnchorConfig.rounded``); those of detectron2's RetinaNet are ordered
  by size and then by ratio, ours by ratio and then by size;
- they sample a region at as many points as it has cells, ours at a fixed number of points (shapes are static here);
- pictures may be BGR, of unit deviation. Ours are RGB, of ImageNet's, which the first convolution can carry: where the
  means are the same, black padding stays zero in both.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.build import DetectorConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.losses import BoxLossConfig
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.postprocess import PostprocessConfig
from gesso.models.resnets import resnet_of
from gesso.models.retinanet import RetinaHeadConfig, RetinaNetConfig
from gesso.models.roi import RoIPoolConfig
from gesso.models.rpn import RPNConfig

BODY = "backbone.body."
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of values from 0 to 255
_STAGES_FROZEN = 1  # the stem and the stage of C2, as all three toolkits train by default
_SHOWN = 3
_OVER_MIN_SCORE = 19  # a region has no more classes with a probability over 0.05
_L1 = BoxLossConfig(kind="l1")


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Weights in our names.

    Attributes:
        weights: by our names, with our order of classes, anchors and colours.
        num_classes: without the background; None where there is no detector.
        config: the detector that they belong to; None where we have none, and ``problem`` says why.
        problem: one line.
        notes: what was assumed, changed, or is not the same here; one line each.
        unused: names of the file that have no counterpart.
    """

    weights: dict[str, Tensor]
    num_classes: int | None
    config: DetectorConfig | None
    problem: str | None
    notes: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How pictures are prepared: mean and deviation of each channel, of values from 0 to 255, in the order given."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool


def rename(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under new names, and the names that no rule fits, or whose new name is taken.

    A rule is a pattern of the whole name, and what takes its place.
    """
    ours: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, value in state.items():
        found = next((found.expand(new) for old, new in rules if (found := re.fullmatch(old, name))), None)
        if found is None or found in ours:
            strange.append(name)
        else:
            ours[found] = value
    return ours, strange


def complete_norms(weights: dict[str, Tensor]) -> None:
    """Gives batch norms what frozen ones do not have: a counter; and statistics, where they are part of the weight."""
    for name in [name for name in weights if re.search(r"\.(bn\d|downsample\.1)\.weight$", name)]:
        norm = name.removesuffix("weight")
        weights.setdefault(norm + "running_mean", torch.zeros_like(weights[name]))
        weights.setdefault(norm + "running_var", torch.ones_like(weights[name]))
        weights.setdefault(norm + "num_batches_tracked", torch.zeros((), dtype=torch.int64))


def turn_heads(weights: dict[str, Tensor]) -> None:
    """Puts the background into the first row of the box head's classes, and unfolds its first layer's weight."""
    for name in ("box_head.classes.weight", "box_head.classes.bias"):
        if name in weights:
            weights[name] = weights[name].roll(1, dims=0)
    first = weights.get("box_head.fcs.0.weight")
    size, width = _pool_size(weights), _neck_width(weights)
    if first is not None and size and width:
        weights["box_head.fcs.0.weight"] = first.reshape(len(first), width, size, size)


def turn_pictures(weights: dict[str, Tensor], theirs: Pictures) -> str | None:
    """Makes the first convolution take pictures as ours are prepared; what cannot be done is said in one line."""
    mean, std = (values[::-1] if theirs.bgr else values for values in (theirs.mean, theirs.std))
    if len(mean) != 3 or any(abs(a - b) > 0.01 for a, b in zip(mean, IMAGENET_MEAN, strict=True)):
        return f"its pictures have the mean {theirs.mean}, not ImageNet's {IMAGENET_MEAN}"
    if len(std) != 3 or min(std) <= 0:
        return f"its pictures have the deviation {theirs.std}"
    name = f"{BODY}conv1.weight"
    if name in weights:
        weight = weights[name].flip(1) if theirs.bgr else weights[name]
        factors = [ours / their for ours, their in zip(IMAGENET_STD, std, strict=True)]
        weights[name] = weight if std == IMAGENET_STD else weight * weight.new_tensor(factors)[:, None, None]
    return None


def rows_of(value: Tensor, *counts: int) -> Tensor:
    """Rows (m x n, ...) as (m, n, ...), or as (m, n, k, ...) for two ``counts`` n, k."""
    return value.reshape(-1, *counts, *value.shape[1:])


def ratios_first(value: Tensor, sizes: int, ratios: int) -> Tensor:
    """Rows (sizes x ratios x n, ...) of anchors in our order, (ratios x sizes x n, ...); others stay as they are."""
    if len(value) % (sizes * ratios):
        return value
    rows = rows_of(value, ratios, len(value) // (sizes * ratios))
    return rows.transpose(0, 1).flatten(0, 2)


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    given = list(names)
    more = f" and {len(given) - _SHOWN} more" if len(given) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in given[:_SHOWN]) + more


def read_form(
    weights: Mapping[str, Tensor], *, stride_in_1x1: bool, extra_relu: bool
) -> tuple[DetectorConfig | None, int | None, str | None]:
    """The detector that weights in our names belong to, its classes, and why there is none.

    Sizes are read off the weights; all other numbers are those that detectron2 and mmdetection share.
    """
    name = resnet_of(weights, BODY)
    width = _neck_width(weights)
    if name is None:
        return None, None, "its backbone is none of the residual networks that are known here"
    if width is None:
        return None, None, "it has no feature pyramid"
    bottleneck = f"{BODY}layer1.0.conv3.weight" in weights
    backbone = BackboneConfig(
        name=name, pretrained=False, frozen_stages=_STAGES_FROZEN, stride_in_1x1=stride_in_1x1 and bottleneck
    )
    try:
        if "head.classes.bias" in weights:
            retinanet = _retinanet(weights, backbone, width, extra_relu)
            return retinanet, len(weights["head.classes.bias"]) // retinanet.anchors.per_cell, None
        if "box_head.classes.bias" in weights:
            return _rcnn(weights, backbone, width), len(weights["box_head.classes.bias"]) - 1, None
    except KeyError as missing:
        return None, None, f"it has no {missing}"
    return None, None, "it has neither the heads of Faster R-CNN nor those of RetinaNet"


def departures(config: DetectorConfig | None) -> tuple[str, ...]:
    """What is not the same in the detectors of ``read_form``; one line each."""
    if not isinstance(config, FasterRCNNConfig):
        return ()
    return (
        "regions are read at 2 x 2 points a cell here, there at as many as they are pixels of the map wide and high",
    )


def _rcnn(weights: Mapping[str, Tensor], backbone: BackboneConfig, width: int) -> FasterRCNNConfig:
    count = len(weights["box_head.classes.bias"]) - 1
    masks = weights.get("mask_branch.head.masks.bias")
    hidden = len(weights["rpn.head.convs.0.0.bias"])
    mask_head = None
    if masks is not None:
        mask_head = MaskHeadConfig(
            convs=_layers(weights, r"mask_branch\.head\.convs\.\d+\.0\.bias"),
            width=len(weights["mask_branch.head.deconv.bias"]),
            class_agnostic=len(masks) == 1 < count,
        )
    return FasterRCNNConfig(
        backbone=backbone,
        neck=FPNConfig(width=width),
        anchors=AnchorConfig(rounded=False),
        rpn=RPNConfig(after_nms=1000, box_loss=_L1, width=None if hidden == width else hidden, use_padding=True),
        pool=RoIPoolConfig(size=_pool_size(weights) or 7, aligned=True),
        box_head=BoxHeadConfig(
            fcs=_layers(weights, r"box_head\.fcs\.\d+\.bias"),
            width=len(weights["box_head.fcs.0.bias"]),
            class_agnostic=len(weights["box_head.boxes.bias"]) == 4 < 4 * count,
            box_loss=_L1,
        ),
        mask_head=mask_head,
        postprocess=PostprocessConfig(min_side=0.0, candidates=1000 * min(count, _OVER_MIN_SCORE)),
    )


def _retinanet(
    weights: Mapping[str, Tensor], backbone: BackboneConfig, width: int, extra_relu: bool
) -> RetinaNetConfig:
    hidden = len(weights["head.class_convs.0.0.bias"])
    return RetinaNetConfig(
        backbone=backbone,
        neck=FPNConfig(width=width, inputs=("C3", "C4", "C5"), extra_levels=2, extra="conv_c5", extra_relu=extra_relu),
        anchors=AnchorConfig(scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3)), rounded=False),
        head=RetinaHeadConfig(
            convs=_layers(weights, r"head\.class_convs\.\d+\.0\.bias"),
            width=None if hidden == width else hidden,
            use_padding=True,
        ),
        postprocess=PostprocessConfig(min_side=0.0),
    )


def _layers(weights: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in weights)


def _neck_width(weights: Mapping[str, Tensor]) -> int | None:
    lateral = weights.get("neck.lateral.0.0.bias")
    return None if lateral is None else len(lateral)


def _pool_size(weights: Mapping[str, Tensor]) -> int | None:
    """Cells a side of the regions that the box head's first layer takes, of its flat or unfolded weight."""
    first, width = weights.get("box_head.fcs.0.weight"), _neck_width(weights)
    if first is None or width is None or not len(first):
        return None
    size = round((first[0].numel() / width) ** 0.5)
    return size if size * size * width == first[0].numel() else None
