"""Weights of torchvision's detectors as ours, and back.

Served are Faster R-CNN, Mask R-CNN and RetinaNet on a ResNet with a feature pyramid, as ``fasterrcnn_resnet50_fpn``,
``maskrcnn_resnet50_fpn``, ``retinanet_resnet50_fpn`` and their second versions (``_v2``) build them;
``torchvision_config.py`` reads their numbers.

What differs: the weight of our first fully connected layer is (width, channels, S, S), torchvision's is flat; and
torchvision's two-stage detectors have box deltas and a mask of the background too, which nothing reads. These rows are
left out on the way in and are zero on the way out, so torchvision -> ours -> torchvision is the same but for them.
Their label k is our class k - 1. RetinaNet's labels are our classes, with number 0, which published weights leave
unused.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gesso.errors import ConfigError
from gesso.models.build import DetectorConfig, build_detector
from gesso.models.detector import Detector
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.retinanet import RetinaNetConfig

_SHOWN = 3
_COUNTER = "num_batches_tracked"
_OLDER: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (  # names in files from before torchvision 0.13
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", lambda m: f"{m[1]}.0.{m[2]}"),
    (r"rpn\.head\.conv\.(weight|bias)", lambda m: f"rpn.head.conv.0.0.{m[1]}"),
    (r"(head\.\w+_head\.conv)\.(\d+)\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
    (r"(roi_heads\.mask_head)\.mask_fcn(\d+)\.(weight|bias)", lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
)


def to_ours(state: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """Our state dictionary from torchvision's, also from older files with the names of their time.

    Counters of batch norm that frozen ones do not have become 0.

    Raises:
        ConfigError: names do not belong to such a detector.
    """
    pairs = list(_prefixes(config))
    ours: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, value in state.items():
        new = _renamed(_modern(name), pairs)
        if new is None:
            strange.append(name)
            continue
        ours[new] = _turn_in(new, value, config)
        if new.endswith(".running_var"):
            ours.setdefault(new.removesuffix("running_var") + _COUNTER, torch.zeros((), dtype=torch.int64))
    if strange:
        raise ConfigError(
            f"{_some(strange)} of the weights do not belong to torchvision's {_kind(config)}",
            remedy=f"Expected are names that start with {', '.join(sorted({theirs for theirs, _ in pairs}))}",
        )
    return ours


def counterpart(name: str, config: DetectorConfig) -> str | None:
    """Our name of a weight of torchvision's; None where such a detector has none.

    Raises:
        ConfigError: torchvision has no such detector.
    """
    return _renamed(_modern(name), list(_prefixes(config)))


def to_theirs(state: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """torchvision's state dictionary from ours: the inverse of ``to_ours``; unused rows of the background are zero.

    Raises:
        ConfigError: torchvision has no such detector, or names do not belong to it.
    """
    if config.backbone.stride_in_1x1:
        raise ConfigError(
            "torchvision's bottlenecks have no stride in their 1x1 convolution, as backbone.stride_in_1x1"
        )
    pairs = [(ours, theirs) for theirs, ours in _prefixes(config)]
    named = {name: _renamed(name, pairs) for name in state}
    strange = [name for name, new in named.items() if new is None]
    if strange:
        raise ConfigError(f"{_some(strange)} of the weights have no counterpart in torchvision's {_kind(config)}")
    return {new: _turn_out(name, state[name]) for name, new in named.items() if new is not None}


def from_torchvision_state(state: Mapping[str, Tensor], config: DetectorConfig) -> Detector:
    """Our detector with torchvision's weights, on the CPU, in training mode; in float64 where the weights are.

    The classes are counted in the weights. Published weights of the first versions want ``backbone.norm_eps`` 0.0.

    Args:
        state: of ``module.state_dict()``.
        config: of ``read_config``, or one of ours of the same form.

    Raises:
        ConfigError: the weights are those of another architecture.
    """
    ours = to_ours(state, config)
    pairs = [(our, their) for their, our in _prefixes(config)]
    last = "head.classes.bias" if isinstance(config, RetinaNetConfig) else "box_head.classes.bias"
    if last not in ours:
        raise ConfigError(f"the weights have no '{_renamed(last, pairs)}', which torchvision's {_kind(config)} has")
    two_stage = not isinstance(config, RetinaNetConfig)
    count = len(ours[last]) - 1 if two_stage else len(ours[last]) // config.anchors.per_cell
    detector = build_detector(config, count)
    if ours[last].dtype == torch.float64:
        detector = detector.double()
    own = detector.state_dict()
    wrong = [f"'{_renamed(name, pairs)}' is missing" for name in own if name not in ours]
    wrong += [f"'{_renamed(name, pairs)}' is not expected" for name in ours if name not in own]
    wrong += [
        f"'{_renamed(name, pairs)}' has the shape {tuple(_turn_out(name, ours[name]).shape)} instead of "
        f"{tuple(_turn_out(name, value).shape)}"
        for name, value in own.items()
        if name in ours and ours[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ConfigError(
            f"the weights do not fit {_kind(config)} on {config.backbone.name}: {', '.join(wrong[:_SHOWN])}{more}",
            remedy="Take the configuration of their own module (read_config).",
        )
    detector.load_state_dict(ours)
    return detector


def _kind(config: DetectorConfig) -> str:
    if isinstance(config, RetinaNetConfig):
        return "RetinaNet"
    return "Mask R-CNN" if isinstance(config, FasterRCNNConfig) and config.mask_head else "Faster R-CNN"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more


def _prefixes(config: DetectorConfig) -> Iterator[tuple[str, str]]:
    """Pairs of how names of weights start there and here."""
    neck = config.neck
    if not isinstance(config, FasterRCNNConfig | RetinaNetConfig) or not isinstance(neck, FPNConfig):
        raise ConfigError(
            f"torchvision has no counterpart of {type(config).__name__} with {type(neck).__name__}",
            remedy="Faster R-CNN, Mask R-CNN and RetinaNet on a feature pyramid have one.",
        )
    yield "backbone.body.", "backbone.body."
    yield "backbone.fpn.inner_blocks.", "neck.lateral."
    yield "backbone.fpn.layer_blocks.", "neck.output."
    if neck.extra != "subsample":
        for k in range(neck.extra_levels):
            yield f"backbone.fpn.extra_blocks.p{k + 6}.", f"neck.extra.{k}."
    if isinstance(config, RetinaNetConfig):
        yield "head.classification_head.conv.", "head.class_convs."
        yield "head.classification_head.cls_logits.", "head.classes."
        yield "head.regression_head.conv.", "head.box_convs."
        yield "head.regression_head.bbox_reg.", "head.deltas."
        return
    yield "rpn.head.conv.", "rpn.head.convs."
    yield "rpn.head.cls_logits.", "rpn.head.objectness."
    yield "rpn.head.bbox_pred.", "rpn.head.deltas."
    box = config.box_head
    if box.class_agnostic or box.classifier != "softmax" or (config.mask_head and config.mask_head.class_agnostic):
        raise ConfigError("torchvision has no class-agnostic heads and no sigmoid classifier in two stages")
    for k in range(box.convs):
        yield f"roi_heads.box_head.{k}.", f"box_head.convs.{k}."
    for k in range(box.fcs):
        yield f"roi_heads.box_head.{box.convs + 1 + 2 * k if box.convs else f'fc{k + 6}'}.", f"box_head.fcs.{k}."
    yield "roi_heads.box_predictor.cls_score.", "box_head.classes."
    yield "roi_heads.box_predictor.bbox_pred.", "box_head.boxes."
    if config.mask_head is not None:
        yield "roi_heads.mask_head.", "mask_branch.head.convs."
        yield "roi_heads.mask_predictor.conv5_mask.", "mask_branch.head.deconv."
        yield "roi_heads.mask_predictor.mask_fcn_logits.", "mask_branch.head.masks."


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def _modern(name: str) -> str:
    for pattern, new in _OLDER:
        found = re.fullmatch(pattern, name)
        if found is not None:
            return new(found)
    return name


def _turn_in(name: str, value: Tensor, config: DetectorConfig) -> Tensor:
    """A weight of torchvision's as we have it, under our ``name``."""
    if name == "box_head.fcs.0.weight" and isinstance(config, FasterRCNNConfig):
        S = config.pool.size
        if value.ndim == 2 and value.shape[1] % (S * S) == 0:
            return value.view(len(value), -1, S, S)
    if name.startswith("box_head.boxes."):
        return value[4:]
    return value[1:] if name.startswith("mask_branch.head.masks.") else value


def _turn_out(name: str, value: Tensor) -> Tensor:
    """The inverse of ``_turn_in``."""
    if name == "box_head.fcs.0.weight":
        return value.flatten(1)
    rows = 4 if name.startswith("box_head.boxes.") else int(name.startswith("mask_branch.head.masks."))
    return torch.cat([value.new_zeros(rows, *value.shape[1:]), value]) if rows else value
