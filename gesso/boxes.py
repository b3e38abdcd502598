"""Geometry of boxes: float32 ``(..., 4)`` xyxy in absolute pixels. The only owner of box arithmetic on tensors.

All functions are free of loops, of shapes that depend on data and of host synchronisation. Widths are x2 - x1: no +1.
"""

import math

import torch
from torch import Tensor

_EPS = 1e-9
MAX_LOG_RATIO = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """Areas (...,) of boxes (..., 4); never negative."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Intersection areas (..., N, M) of boxes a (..., N, 4) and b (..., M, 4); fastest with the longer side last."""
    ax1, ay1, ax2, ay2 = a[..., :, None, :].unbind(-1)
    bx1, by1, bx2, by2 = b.transpose(-1, -2).contiguous()[..., None, :].unbind(-3)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    return width.mul_(torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (..., N, M) of boxes a (..., N, 4) and b (..., M, 4); 0 for two empty boxes."""
    common = intersection(a, b)
    union = area(a)[..., :, None] + area(b)[..., None, :] - common
    return common / union.clamp(min=_EPS)


def ioa(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over the area of a (..., N, M): how much of each a lies in each b."""
    return intersection(a, b) / area(a)[..., :, None].clamp(min=_EPS)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clips boxes (B, N, 4) to pictures of ``sizes`` (B, 2) height and width."""
    limit = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode(reference: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Deltas (..., 4) dx, dy, dw, dh that turn ``reference`` (anchors or proposals) into ``boxes``.

    Source: Faster R-CNN, section 3.1.2; ``weights`` multiply the deltas. Degenerate boxes give finite values.
    """
    ref_size = (reference[..., 2:] - reference[..., :2]).clamp(min=_EPS)
    box_size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=_EPS)
    ref_centre = reference[..., :2] + 0.5 * ref_size
    box_centre = boxes[..., :2] + 0.5 * box_size
    dx, dy = ((box_centre - ref_centre) / ref_size).unbind(-1)
    dw, dh = torch.log(box_size / ref_size).unbind(-1)
    return torch.stack([d * weight for d, weight in zip((dx, dy, dw, dh), weights, strict=True)], dim=-1)


def decode(reference: Tensor, deltas: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes (..., 4) from ``reference`` (..., 4) and ``deltas`` (..., 4): the inverse of ``encode``.

    dw and dh are clamped at log(1000 / 16), as all two-stage detectors do.
    """
    dx, dy, dw, dh = (d / weight for d, weight in zip(deltas.unbind(-1), weights, strict=True))
    ref_size = reference[..., 2:] - reference[..., :2]
    centre = reference[..., :2] + 0.5 * ref_size + torch.stack([dx, dy], dim=-1) * ref_size
    half = 0.5 * ref_size * torch.exp(torch.stack([dw, dh], dim=-1).clamp(max=MAX_LOG_RATIO))
    return torch.cat([centre - half, centre + half], dim=-1)
