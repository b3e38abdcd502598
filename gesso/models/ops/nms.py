"""Non-maximum suppression with a fixed shape: a keep mask for padded boxes of a whole batch, as one torch operator.

The one place under ``models`` that waits for the device: on a GPU the operator waits inside, several times a call (a
``nonzero``, the sizes of the groups as a list, one ``torchvision.ops.nms`` a group). From outside, its shapes are fixed
and a graph holds it whole. One pass over all groups, told apart by an offset of their boxes, would need no list of
sizes, but compares the boxes of every group with those of all others.

Shape letters: B images, N box slots.
"""

import torch
import torchvision
from torch import Tensor


@torch.library.custom_op("gesso::batched_nms", mutates_args=())
def _batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """One greedy pass for each (image, group), on slices of one sorted list. On a GPU it waits for the device, here."""
    B, N = scores.shape
    keep = torch.zeros(B * N, dtype=torch.bool, device=boxes.device)
    slots = valid.flatten().nonzero().flatten()
    if slots.numel() == 0:
        return keep.view(B, N)
    groups = groups - groups.min()
    image = torch.arange(B, device=boxes.device)[:, None] * (groups.max() + 1)
    ids, order = (image + groups).flatten()[slots].sort(stable=True)
    slots = slots[order]
    sizes = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    flat_boxes, flat_scores = boxes.reshape(-1, 4)[slots], scores.flatten()[slots]
    parts = zip(torch.split(slots, sizes), torch.split(flat_boxes, sizes), torch.split(flat_scores, sizes), strict=True)
    kept = [slot[torchvision.ops.nms(box, score, iou_threshold)] for slot, box, score in parts]
    keep[torch.cat(kept)] = True
    return keep.view(B, N)


@_batched_nms.register_fake
def _(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid, memory_format=torch.contiguous_format)


def batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS within each group of each image; boxes of different groups never suppress each other.

    The operator has a registered fake version, so a compiled graph takes it whole. On a GPU the host waits inside it,
    several times a call: shapes inside depend on the boxes, and ``torchvision.ops.nms`` runs for each group that is
    present. On the CPU there is nothing to wait for. Not differentiable.

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
