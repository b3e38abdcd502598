"""Weights of detectron2's Faster R-CNN, Mask R-CNN and RetinaNet on a ResNet with a feature pyramid.

Beside what ``translation.py`` says: batch norm is frozen, and of MSRA's networks only its factor and shift are left,
with statistics of 0 and 1. So it has to stay frozen (the norm kinds fixed and affine).

Source: detectron2's modules and configurations (Base-RCNN-FPN, Base-RetinaNet).
"""

import re
from collections.abc import Mapping

from torch import Tensor

from gesso.models.resnets import resnet_of
from gesso.models.translation import (
    BODY,
    Pictures,
    Translation,
    complete_norms,
    departures,
    ratios_first,
    read_form,
    rename,
    some,
    turn_heads,
    turn_pictures,
)

PREFIX = "backbone.bottom_up."
_BODY = r"backbone\.bottom_up\."
_RULES = (
    (_BODY + r"stem\.conv1\.weight", BODY + "conv1.weight"),
    (_BODY + r"stem\.conv1\.norm\.(\w+)", BODY + r"bn1.\1"),
    *(
        rule
        for stage in range(1, 5)
        for rule in (
            (rf"{_BODY}res{stage + 1}\.(\d+)\.(conv[123])\.weight", rf"{BODY}layer{stage}.\1.\2.weight"),
            (rf"{_BODY}res{stage + 1}\.(\d+)\.conv([123])\.norm\.(\w+)", rf"{BODY}layer{stage}.\1.bn\2.\3"),
            (rf"{_BODY}res{stage + 1}\.(\d+)\.shortcut\.weight", rf"{BODY}layer{stage}.\1.downsample.0.weight"),
            (rf"{_BODY}res{stage + 1}\.(\d+)\.shortcut\.norm\.(\w+)", rf"{BODY}layer{stage}.\1.downsample.1.\2"),
        )
    ),
    *((rf"backbone\.top_block\.p{k + 6}\.(\w+)", rf"neck.extra.{k}.\1") for k in range(2)),
    (r"proposal_generator\.rpn_head\.conv\.(\w+)", r"rpn.head.convs.0.0.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(\w+)", r"rpn.head.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(\w+)", r"rpn.head.deltas.\1"),
    *((rf"roi_heads\.box_head\.fc{k + 1}\.(\w+)", rf"box_head.fcs.{k}.\1") for k in range(4)),
    (r"roi_heads\.box_predictor\.cls_score\.(\w+)", r"box_head.classes.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(\w+)", r"box_head.boxes.\1"),
    *(
        (rf"roi_heads\.mask_head\.mask_fcn{k + 1}\.(weight|bias)", rf"mask_branch.head.convs.{k}.0.\1")
        for k in range(8)
    ),
    (r"roi_heads\.mask_head\.deconv\.(\w+)", r"mask_branch.head.deconv.\1"),
    (r"roi_heads\.mask_head\.predictor\.(\w+)", r"mask_branch.head.masks.\1"),
    *((rf"head\.cls_subnet\.{2 * k}\.(\w+)", rf"head.class_convs.{k}.0.\1") for k in range(8)),
    *((rf"head\.bbox_subnet\.{2 * k}\.(\w+)", rf"head.box_convs.{k}.0.\1") for k in range(8)),
    (r"head\.cls_score\.(\w+)", r"head.classes.\1"),
    (r"head\.bbox_pred\.(\w+)", r"head.deltas.\1"),
)
_APART = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.", "anchor_generator.")  # no layers
_OTHER_TASKS = ("roi_heads.keypoint_head.", "sem_seg_head.")
_RETINA_SIZES, _RETINA_RATIOS = 3, 3  # of the anchors of a cell
_MEAN = (103.53, 116.28, 123.675)
_FAIR_STD = (57.375, 57.12, 58.395)


def translate(state: Mapping[str, Tensor]) -> Translation:
    """Ours from detectron2's state dictionary; what has no counterpart is named."""
    found = (re.fullmatch(r"backbone\.fpn_lateral(\d+)\.weight", name) for name in state)
    levels = sorted(int(level[1]) for level in found if level is not None)
    pyramid = [
        (rf"backbone\.fpn_{kind}{level}\.(weight|bias)", rf"neck.{kind}.{k}.0.\1")
        for k, level in enumerate(levels)
        for kind in ("lateral", "output")
    ]
    weights, strange = rename(state, (*_RULES, *pyramid))
    complete_norms(weights)
    turn_heads(weights)
    for name in [name for name in weights if name.startswith(("head.classes.", "head.deltas."))]:
        weights[name] = ratios_first(weights[name], sizes=_RETINA_SIZES, ratios=_RETINA_RATIOS)
    pictures, notes = _pictures(state, resnet_of(weights, BODY) or "")
    wrong = turn_pictures(weights, pictures)
    one_by_one = pictures.bgr and set(pictures.std) == {1.0}
    if one_by_one:
        notes.append("the stride of its bottlenecks is taken to lie in the 1x1 convolution (backbone.stride_in_1x1)")
    config, count, problem = read_form(weights, stride_in_1x1=one_by_one, extra_relu=True)
    parts = [name for name in strange if not name.startswith((*_APART, *_OTHER_TASKS))]
    if parts:
        problem = f"it has parts that have no counterpart here: {some(parts)}"
    if config is not None and "head.classes.bias" in weights:
        notes.append("detectron2 divides RetinaNet's losses by a running mean of positives, ours by those of the batch")
    return Translation(
        weights=weights,
        num_classes=count,
        config=config,
        problem=problem or wrong,
        notes=(*notes, *departures(config)),
        unused=tuple(strange),
    )


def _pictures(state: Mapping[str, Tensor], network: str) -> tuple[Pictures, list[str]]:
    """How its pictures are prepared: as older files say, or as the published configurations do."""
    mean, std = (
        [float(v) for v in state[name].flatten()] if name in state else None for name in ("pixel_mean", "pixel_std")
    )
    if mean is not None and std is not None and len(mean) == len(std) == 3:
        return Pictures(mean=tuple(mean), std=tuple(std), bgr=mean[0] < mean[2]), []
    std = list(_FAIR_STD) if network.startswith("resnext") else [1.0, 1.0, 1.0]
    words = "1" if std[0] == 1 else f"{tuple(std)}"
    return Pictures(mean=_MEAN, std=tuple(std), bgr=True), [
        f"the file does not say how pictures are prepared: taken are BGR, mean {_MEAN} and deviation {words}"
    ]
