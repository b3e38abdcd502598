"""Files of torchvision's detectors: the module that they belong to, and the classes of COCO among its labels.

The published files have 91 labels, COCO's category ids with the background as number 0; eleven of them have no
category. Their rows are left out. In two stages they have a share of the softmax, which training brings close to zero.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.models import detection

from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.resnets import resnet_of
from gesso.models.retinanet import RetinaNetConfig
from gesso.models.torchvision_config import read_config
from gesso.models.torchvision_weights import counterpart, to_ours
from gesso.models.translation import BODY, Translation, rows_of, some

_CATEGORIES: list[str] = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
_LABELS = {name: label for label, name in enumerate(_CATEGORIES) if name not in ("__background__", "N/A")}
COCO = tuple(_LABELS)
"""The 80 names of COCO's classes, in the order of their category ids."""
_OTHER_TASKS = ("roi_heads.keypoint_",)
_STAGES_FROZEN = 1  # what torchvision freezes by default: trainable_backbone_layers = 3


def translate(state: Mapping[str, Tensor]) -> Translation:
    """Ours from the state dictionary of a detector of torchvision's; what has no counterpart is named."""
    config = _config(state)
    if isinstance(config, str):
        return _backbone_only(state, config)
    first: dict[str, str] = {}  # where two names have one counterpart, as in another head with norms, the first
    for name in state:
        ours = counterpart(name, config)
        if ours is not None:
            first.setdefault(ours, name)
    known = {name: state[name] for name in first.values()}
    unused = tuple(name for name in state if name not in known)
    parts = [name for name in unused if not name.startswith(_OTHER_TASKS)]
    weights = to_ours(known, config)
    rows = "head.classes.bias" if isinstance(config, RetinaNetConfig) else "box_head.classes.bias"
    if rows not in weights:
        return _backbone_only(state, f"it has no '{rows}', the classes of the last layer")
    notes: tuple[str, ...] = ()
    if isinstance(config, RetinaNetConfig):
        count = len(weights[rows]) // config.anchors.per_cell
    else:
        count = len(weights[rows]) - 1
    if count == len(_CATEGORIES) - (0 if isinstance(config, RetinaNetConfig) else 1):
        _choose_categories(weights, config, count)
        notes = (f"{count - len(COCO)} of {count} labels have no category of COCO's and are left out",)
        count = len(COCO)
    return Translation(
        weights=weights,
        num_classes=count,
        config=config,
        problem=f"it has parts that have no counterpart here: {some(parts)}" if parts else None,
        notes=notes,
        unused=unused,
    )


def _config(state: Mapping[str, Tensor]) -> FasterRCNNConfig | RetinaNetConfig | str:
    """The configuration of torchvision's own module, read off it; or why there is none."""
    name = resnet_of(state, "backbone.body.")
    if name is None:
        return "its backbone is none of the residual networks that are known here"
    second = any(key in state for key in ("roi_heads.box_head.0.0.weight", "head.classification_head.conv.0.1.weight"))
    if any(key.startswith("head.classification_head.") for key in state):
        kind = "retinanet_resnet50_fpn"
    elif any(key.startswith("roi_heads.mask_predictor.") for key in state):
        kind = "maskrcnn_resnet50_fpn"
    elif any(key.startswith("roi_heads.box_predictor.") for key in state):
        kind = "fasterrcnn_resnet50_fpn"
    else:
        return "it has neither the heads of Faster R-CNN nor those of RetinaNet"
    with torch.device("meta"):
        module = getattr(detection, kind + ("_v2" if second else ""))(weights=None, weights_backbone=None)
    config = read_config(module)
    backbone = dataclasses.replace(config.backbone, name=name, frozen_stages=_STAGES_FROZEN)
    if _published_first(state):
        backbone = dataclasses.replace(backbone, norm_eps=0.0)
    return dataclasses.replace(config, backbone=backbone)


def _published_first(state: Mapping[str, Tensor]) -> bool:
    """One of the first versions, of 91 labels with a frozen batch norm, which torchvision runs with an epsilon of 0."""
    frozen = "backbone.body.bn1.num_batches_tracked" not in state
    labels = len(_CATEGORIES)
    return frozen and any(
        name in state and len(state[name]) in (labels, labels * 9)
        for name in ("roi_heads.box_predictor.cls_score.bias", "head.classification_head.cls_logits.bias")
    )


def _choose_categories(weights: dict[str, Tensor], config: FasterRCNNConfig | RetinaNetConfig, count: int) -> None:
    """Keeps the rows of COCO's classes, of our names."""
    labels = torch.tensor(list(_LABELS.values()))
    if isinstance(config, RetinaNetConfig):
        for name in ("head.classes.weight", "head.classes.bias"):
            weights[name] = rows_of(weights[name], count)[:, labels].flatten(0, 1)
        return
    for name in weights:
        if name.startswith("box_head.classes."):
            weights[name] = weights[name][torch.cat([torch.zeros(1, dtype=torch.int64), labels])]
        elif name.startswith("box_head.boxes."):
            weights[name] = rows_of(weights[name], 4)[labels - 1].flatten(0, 1)
        elif name.startswith("mask_branch.head.masks."):
            weights[name] = weights[name][labels - 1]


def _backbone_only(state: Mapping[str, Tensor], problem: str) -> Translation:
    """Where no detector is recognised: the backbone's own names are ours."""
    weights = {name: value for name, value in state.items() if name.startswith(BODY)}
    return Translation(
        weights=weights,
        num_classes=None,
        config=None,
        problem=problem,
        notes=(),
        unused=tuple(name for name in state if name not in weights),
    )
