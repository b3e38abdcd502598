"""Non-maximum suppression with a fixed shape: a keep mask for padded boxes of a whole batch, as one torch operator.

On the CPU, groups of a few boxes are handled all at once, and each larger one by ``torchvision.ops.nms``. On a CUDA
device it is two Triton kernels (``triton_nms.py``) that make the same decisions, have fixed shapes, and never let the
host wait. Where there is no Triton, a CUDA device runs what the CPU runs, and the host waits inside, many times a call.
From outside, the shapes are fixed and a graph holds the operator whole.

Shape letters: B images, N box slots, P valid slots, G groups, n boxes of a group.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
import torchvision
from torch import Tensor

from gesso import boxes as geometry

_SMALL = (1, 4, 16, 32, 64)
"""Groups of up to so many boxes are padded to the same size and handled together."""
_TOGETHER = 1024
"""So many groups at once."""


def largest_not_above(value: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``value``: each x of the dtype is above both or neither."""
    nearest = torch.tensor(value, dtype=dtype)
    if nearest.item() > value:
        nearest = torch.nextafter(nearest, torch.tensor(-torch.inf, dtype=dtype))
    return nearest.item()


def _too_near(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """Whether the IoU of boxes a (..., N, 4) and b (..., M, 4) is above the threshold, rounded as torchvision's is."""
    a_area, b_area = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    common = geometry.intersection(a, b)
    union = (a_area[..., :, None] + b_area[..., None, :]).sub_(common)
    return common.div_(union) > threshold


def _keep_in_order(near: Tensor) -> Tensor:
    """Which boxes (..., n) stay, from near (..., n, n): each that stays drops the later ones that are near it."""
    near = near.triu(1)
    keep = torch.ones_like(near[..., 0])
    for k in range(near.shape[-1] - 1):
        keep &= ~(near[..., k, :] & keep[..., k : k + 1])
    return keep


def _keep_of_small_groups(boxes: Tensor, start: Tensor, size: Tensor, most: int, threshold: float) -> Tensor:
    """Places, in boxes (P, 4) sorted by group and score, of what stays of groups (G,) of at most ``most`` boxes."""
    lane = torch.arange(most, device=boxes.device)
    place = start[:, None] + lane
    there = lane < size[:, None]
    if most > 1:
        padded = boxes[place.clamp(max=len(boxes) - 1)]
        there = there & _keep_in_order(_too_near(padded, padded, threshold))
    return place[there]


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, imported when the first CUDA tensor comes; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("gesso.models.ops.triton_nms")


@torch.library.custom_op("gesso::batched_nms", mutates_args=())
def _batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """All (image, group) pairs are slices of one list that is sorted by pair and score."""
    kernels = _kernels() if boxes.is_cuda else None
    if kernels is not None:
        kept: Tensor = kernels.batched_nms(boxes, scores, valid, groups, iou_threshold)
        return kept
    B, N = scores.shape
    keep = torch.zeros(B * N, dtype=torch.bool, device=boxes.device)
    slots = valid.flatten().nonzero().flatten()
    if slots.numel() == 0:
        return keep.view(B, N)
    slots = slots[scores.flatten()[slots].sort(stable=True, descending=True).indices]
    groups = groups - groups.min()
    image = torch.arange(B, device=boxes.device)[:, None] * (groups.max() + 1)
    ids, order = (image + groups).flatten()[slots].sort(stable=True)
    slots = slots[order]
    size = torch.unique_consecutive(ids, return_counts=True)[1]
    start = size.cumsum(0) - size
    ordered, ranked = boxes.reshape(-1, 4)[slots], scores.flatten()[slots]
    threshold = largest_not_above(iou_threshold, boxes.dtype)
    survivors = []
    for least, most in zip((0, *_SMALL), _SMALL, strict=False):
        here = (size > least) & (size <= most)
        for some, sizes in zip(torch.split(start[here], _TOGETHER), torch.split(size[here], _TOGETHER), strict=True):
            survivors.append(_keep_of_small_groups(ordered, some, sizes, most, threshold))
    here = size > _SMALL[-1]
    for first, count in zip(start[here].tolist(), size[here].tolist(), strict=True):
        part = slice(first, first + count)
        survivors.append(first + torchvision.ops.nms(ordered[part], ranked[part], iou_threshold))
    keep[slots[torch.cat(survivors)]] = True
    return keep.view(B, N)


@_batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid, memory_format=torch.contiguous_format)


def batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS within each group of each image; boxes of different groups never suppress each other.

    The decisions are those of ``torchvision.ops.nms`` on the CPU, on either device: intersection over union, rounded in
    the dtype of the boxes, greater than the threshold. Not differentiable. On a GPU it takes B * N * ceil(N / 64) * 8
    bytes for a while, or as much as one image needs if that is more than 1 GiB.

    Args:
        boxes: (B, N, 4) float32 or float64, xyxy.
        scores: (B, N) of the same dtype; equal scores are taken in the order of their slots.
        valid: (B, N) bool; other slots neither suppress nor are kept, whatever they hold.
        groups: (B, N) int64, a level or a class.
        iou_threshold: a box is dropped if its IoU with a kept one is greater than this.

    Returns:
        (B, N) bool, True for the boxes that stay.
    """
    keep: Tensor = _batched_nms(boxes.detach(), scores.detach(), valid, groups, iou_threshold)
    return keep
