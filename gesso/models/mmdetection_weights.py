"""Weights of mmdetection's Faster R-CNN, Mask R-CNN and RetinaNet on a ResNet with a feature pyramid, versions 2 and 3.

Beside what ``translation.py`` says: the configuration is a text in the file, of which the preparation of pictures and
the place of the stride are read; RetinaNet's P7 is made of P6 without a ReLU between (``FPNConfig.extra_relu``); the
best anchor of an object is positive in the RPN from an IoU of 0.3 only, ours always; and decoded sides are at least
16 / 1000 of the anchor's.
Version 1 has the background in front and boxes whose width counts a pixel more; it is refused.

Source: mmdetection's modules and configurations (_base_/models).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gesso.errors import ConfigError
from gesso.models.resnets import LAYER
from gesso.models.translation import (
    BODY,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pictures,
    Translation,
    complete_norms,
    departures,
    read_form,
    rename,
    some,
    turn_heads,
    turn_pictures,
)

PREFIXES = ("neck.lateral_convs.", "rpn_head.", "roi_head.", "bbox_head.")
_RULES = (
    (r"backbone\." + LAYER.pattern, BODY + r"\1"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"neck.lateral.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"rpn.head.convs.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.head.objectness.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.head.deltas.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(\w+)", r"box_head.fcs.\1.\2"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"box_head.classes.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"box_head.boxes.\1"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(\w+)", r"mask_branch.head.convs.\1.0.\2"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", r"mask_branch.head.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", r"mask_branch.head.masks.\1"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", r"head.class_convs.\1.0.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", r"head.box_convs.\1.0.\2"),
    (r"bbox_head\.retina_cls\.(\w+)", r"head.classes.\1"),
    (r"bbox_head\.retina_reg\.(\w+)", r"head.deltas.\1"),
)
_OTHER_TASKS = ("roi_head.semantic_head.", "panoptic_fusion_head.", "semantic_head.")
_NUMBERS = r"\s*=\s*[\[\(]([\d.,\s]+)[\]\)]"


def translate(state: Mapping[str, Tensor], meta: Mapping[Any, Any]) -> Translation:
    """Ours from mmdetection's state dictionary; what has no counterpart is named.

    Raises:
        ConfigError: the weights are those of version 1.
    """
    version = meta.get("mmdet_version")
    if (isinstance(version, str) and version.startswith(("0.", "1."))) or "bbox_head.fc_cls.weight" in state:
        raise ConfigError(
            "the weights are of mmdetection 1, which counts boxes and classes in another way",
            remedy="Take those of version 2 or 3.",
        )
    laterals = sum(re.fullmatch(r"neck\.lateral_convs\.\d+\.conv\.weight", name) is not None for name in state)
    outputs = [(rf"neck\.fpn_convs\.{k}\.conv\.(\w+)", rf"neck.output.{k}.0.\1") for k in range(laterals)]
    extra = [(rf"neck\.fpn_convs\.{laterals + k}\.conv\.(\w+)", rf"neck.extra.{k}.\1") for k in range(2)]
    weights, strange = rename(state, (*_RULES, *outputs, *extra))
    complete_norms(weights)
    turn_heads(weights)
    pictures, style, notes = _preparation(meta)
    wrong = turn_pictures(weights, pictures)
    config, count, problem = read_form(weights, stride_in_1x1=style == "caffe", extra_relu=False)
    parts = [name for name in strange if not name.startswith(_OTHER_TASKS)]
    if parts:
        problem = f"it has parts that have no counterpart here: {some(parts)}"
    return Translation(
        weights=weights,
        num_classes=count,
        config=config,
        problem=problem or wrong,
        notes=(*notes, *departures(config)),
        unused=tuple(strange),
    )


def class_names(meta: Mapping[Any, Any]) -> tuple[str, ...] | None:
    """The names of the classes that the file says, in the order of their rows."""
    inner = meta.get("dataset_meta")
    for holder in (inner if isinstance(inner, Mapping) else {}, meta):
        for key in ("classes", "CLASSES"):
            names = holder.get(key)
            if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    return None


def _preparation(meta: Mapping[Any, Any]) -> tuple[Pictures, str, list[str]]:
    """How pictures are prepared and the style of the ResNet, as far as the configuration's text says them."""
    given = (meta.get(key) for key in ("config", "cfg"))
    text = next((text for text in given if isinstance(text, str)), "")
    mean, std = (_numbers(text, name) for name in ("mean", "std"))
    rgb = re.search(r"\b(?:bgr_)?to_rgb\s*=\s*(True|False)", text)
    style = re.search(r"\bstyle\s*=\s*['\"](\w+)['\"]", text)
    name, notes = style[1] if style else "pytorch", []
    if name == "caffe":
        notes.append("the stride of its bottlenecks lies in the 1x1 convolution (backbone.stride_in_1x1)")
    if mean is None or std is None:
        notes.append(
            f"the file does not say how pictures are prepared: taken are RGB, mean {IMAGENET_MEAN} and deviation "
            f"{IMAGENET_STD}, and a stride in the 3x3 convolution of its bottlenecks"
        )
        return Pictures(mean=IMAGENET_MEAN, std=IMAGENET_STD, bgr=False), name, notes
    return Pictures(mean=mean, std=std, bgr=rgb is not None and rgb[1] == "False"), name, notes


def _numbers(text: str, name: str) -> tuple[float, ...] | None:
    found = re.search(rf"\b{name}{_NUMBERS}", text)
    return None if found is None else tuple(map(float, re.findall(r"\d+(?:\.\d*)?", found[1])))
