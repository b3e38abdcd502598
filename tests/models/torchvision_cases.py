"""torchvision's detectors with random weights that find many things, and comparisons with ours."""

import copy
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection

CLASSES = 9  # as torchvision counts them
SIZES = ((70, 100), (120, 90))
TWO_STAGE = {"rpn_post_nms_top_n_test": 150, "box_detections_per_img": 60}
WITH_MASKS = {"rpn_post_nms_top_n_test": 100, "box_detections_per_img": 24}
KINDS: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn": TWO_STAGE,
    "maskrcnn_resnet50_fpn": WITH_MASKS,
    "retinanet_resnet50_fpn": {"detections_per_img": 80, "score_thresh": 0.3},
}
SECOND: dict[str, dict[str, Any]] = {
    "fasterrcnn_resnet50_fpn_v2": TWO_STAGE,
    "maskrcnn_resnet50_fpn_v2": WITH_MASKS,
    "retinanet_resnet50_fpn_v2": KINDS["retinanet_resnet50_fpn"],
}
# What each last layer gives on the pictures: its standard deviation, and what is added to it.
SPREAD = {
    "rpn.head.cls_logits": (2.0, 0.0),
    "rpn.head.bbox_pred": (0.3, 0.0),
    "roi_heads.box_predictor.cls_score": (1.5, 0.0),
    "roi_heads.box_predictor.bbox_pred": (1.5, 0.0),
    "roi_heads.mask_predictor.mask_fcn_logits": (3.0, 0.2),
    "head.classification_head.cls_logits": (1.5, -2.0),
    "head.regression_head.bbox_reg": (0.4, 0.0),
}


def pictures(seed: int = 0, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[np.ndarray]:
    """uint8 (height, width, 3): coarse patches of colour with noise."""
    g = np.random.default_rng(seed)
    out = []
    for height, width in sizes:
        coarse = g.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3))
        fine = np.kron(coarse, np.ones((8, 8, 1), np.int64))[:height, :width] + g.integers(-40, 40, (height, width, 3))
        out.append(fine.clip(0, 255).astype(np.uint8))
    return out


def as_theirs(given: list[np.ndarray], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(picture).permute(2, 0, 1).to(dtype) / 255 for picture in given]


def build(kind: str, **changes: Any) -> nn.Module:
    """A new module of torchvision's with small pictures; random weights, nothing downloaded."""
    options: dict[str, Any] = {"num_classes": CLASSES, "min_size": 96, "max_size": 128} | changes
    return getattr(detection, kind)(weights=None, weights_backbone=None, **options)


def spread(module: nn.Module, given: list[np.ndarray]) -> nn.Module:
    """Scales the last layers by what they give on the pictures, so that scores and boxes spread."""
    for part in module.modules():  # norms that do something
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.bias, -0.2, 0.2)
    hooks = []
    for name, (std, shift) in SPREAD.items():
        if name in dict(module.named_modules()):
            layer = module.get_submodule(name)

            def scale(layer: nn.Module, _: Any, out: Tensor, std: float = std, shift: float = shift) -> Tensor:
                if hasattr(layer, "done"):
                    return out
                layer.done = True
                every = [k for k in range(out.ndim) if k != 1]
                mean = out.mean(dim=every, keepdim=True)
                factor = std / (out - mean).std()
                layer.weight.mul_(factor)
                layer.bias.sub_(mean.flatten()).mul_(factor).add_(shift)
                return (out - mean) * factor + shift

            hooks.append(layer.register_forward_hook(scale))
    with torch.no_grad():
        module.eval()(as_theirs(given, next(module.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return module


@functools.lru_cache
def _made(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return spread(build(kind, **(KINDS | SECOND)[kind]).double(), pictures())


def made(kind: str) -> nn.Module:
    """A copy of the module of that kind, in float64 and evaluation mode."""
    return copy.deepcopy(_made(kind))


def differences(theirs: dict[str, Tensor], xyxy: Any, scores: Any, labels: Any) -> tuple[float, float, list[int]]:
    """Pairs equal detections one to one and gives the largest differences of boxes and scores, and theirs for each.

    The classes are equal, boxes closest, scores within 1e-4; scores in order are equal within 1e-4 anyway.
    """
    assert len(theirs["scores"]) == len(scores)
    mine, other = torch.as_tensor(np.asarray(scores)).double(), theirs["scores"].double()
    assert (mine - other).abs().max() < 1e-4
    box = (torch.as_tensor(np.asarray(xyxy)).double()[:, None] - theirs["boxes"].double()[None]).abs().amax(-1)
    close = (mine[:, None] - other).abs() < 1e-4
    close &= torch.as_tensor(np.asarray(labels))[:, None] == theirs["labels"]
    box = box.masked_fill(~close, torch.inf)
    pairs: dict[int, int] = {}
    for place in box.flatten().argsort(stable=True).tolist():
        here, there = divmod(place, len(other))
        if here not in pairs and there not in pairs.values():
            pairs[here] = there
    order = [pairs[k] for k in range(len(other))]
    apart = box.gather(1, torch.tensor(order)[:, None]) if order else box
    return float(apart.max()), float((mine - other[order]).abs().max()), order
