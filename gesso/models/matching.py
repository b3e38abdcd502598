"""Which boxes stand for which objects, and which of them are trained on.

Shape letters: B images, N boxes (anchors or proposals), M ground-truth slots, K samples.

Sources: Faster R-CNN, section 3.1.2 (thresholds, low-quality matches) and 3.1.3 (sampling).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gesso import boxes as geometry
from gesso import random_key
from gesso.structures import Targets

_TINY = 1e-9


class Matches(NamedTuple):
    """What each box stands for; a box that is neither positive nor negative is not trained on.

    Attributes:
        slot: (B, N) int64, the ground-truth slot with the highest IoU; of use where ``positive``.
        positive: (B, N) bool.
        negative: (B, N) bool.
    """

    slot: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def match(
    boxes: Tensor, targets: Targets, *, positive_iou: float, negative_iou: float, low_quality: bool, ignore_ioa: float
) -> Matches:
    """Matches boxes to ground truth by IoU.

    A box is positive from ``positive_iou``, negative below ``negative_iou``, otherwise neither. Ignored objects are
    never matched; a box that lies in one of them by ``ignore_ioa`` of its own area is no negative.

    Args:
        boxes: (1, N, 4) or (B, N, 4) xyxy.
        targets: ground truth of B images.
        positive_iou: see above.
        negative_iou: see above.
        low_quality: also makes the boxes that have the highest IoU with an object positive, as long as it is above 0;
            each still stands for the object that it overlaps most.
        ignore_ioa: see above.
    """
    used = _slots_in_use(targets.valid)
    usable = (targets.valid & ~targets.ignore)[:, :used]
    truth = targets.boxes[:, :used].to(boxes.dtype)
    # The long axis stands last. An infinite area makes the IoU of slots that may not match zero.
    area = geometry.area(truth).clamp(min=_TINY).masked_fill(~usable, torch.inf)[..., None]
    ignored = (targets.valid & targets.ignore)[:, :used, None].to(boxes.dtype)
    overlaps, best, slot, inside = [], [], [], []
    for part in torch.split(boxes, _chunk(boxes, truth), dim=1):
        common = geometry.intersection(truth, part)
        own = geometry.area(part)
        overlap = common / (area + own[..., None, :]).sub_(common)
        overlaps.append(overlap)
        highest = overlap.max(dim=1)
        best.append(highest.values)
        slot.append(highest.indices)
        inside.append(common.mul_(ignored).amax(dim=1) >= (ignore_ioa * own).clamp(min=_TINY))
    best_iou = torch.cat(best, dim=1)
    positive = best_iou >= positive_iou
    if low_quality:
        peak = torch.stack([overlap.amax(dim=2) for overlap in overlaps]).amax(dim=0)[..., None]
        peak = torch.where(peak > 0, peak, torch.inf)
        positive = positive | torch.cat([(overlap - peak).amax(dim=1) >= 0 for overlap in overlaps], dim=1)
    negative = (best_iou < negative_iou) & ~positive & ~torch.cat(inside, dim=1)
    return Matches(slot=torch.cat(slot, dim=1), positive=positive, negative=negative)


def _slots_in_use(valid: Tensor) -> int:
    """How many of M slots hold an object in any picture; on a GPU or in a graph all, since nobody may wait to know."""
    if valid.device.type != "cpu" or torch.compiler.is_compiling():
        return valid.shape[1]
    places = valid.any(dim=0).numpy().nonzero()[0]
    return int(places[-1]) + 1 if len(places) else min(1, valid.shape[1])


def _chunk(boxes: Tensor, truth: Tensor) -> int:
    """How many of N boxes are compared at a time: on a CPU what its cache holds, in a graph or on a GPU all of them."""
    if boxes.device.type != "cpu" or torch.compiler.is_compiling():
        return boxes.shape[1]
    return max(256, (1 << 17) // max(1, truth.shape[0] * truth.shape[1]))


class Sample(NamedTuple):
    """A fixed number of boxes of each image.

    Attributes:
        place: (B, K) int64, places among the N boxes; positives first.
        positive: (B, K) bool.
        valid: (B, K) bool; other samples fill up and count for nothing.
    """

    place: Tensor
    positive: Tensor
    valid: Tensor


@torch.no_grad()
def sample(
    positive: Tensor, negative: Tensor, key: Tensor, stream: int, *, count: int, positive_share: float
) -> Sample:
    """Draws up to ``count`` boxes an image without replacement: positives up to their share, negatives for the rest.

    Every box has a priority that hashes (key, stream, its place), so the draw of an image depends on its key and on
    nothing else in the batch.

    Args:
        positive: (B, N) bool.
        negative: (B, N) bool; no box is both.
        key: (B,) int64, ``ImageBatch.key``.
        stream: of ``random_key.stream``.
        count: boxes of each image; K = min(count, N).
        positive_share: at most int(count * share) of them are positive.
    """
    N = positive.shape[1]
    every = torch.arange(N, device=positive.device)
    priority = random_key.fold(key[:, None], stream, every[None, :])
    most = min(int(count * positive_share), N)
    chosen = torch.zeros_like(positive)
    if most:
        index = torch.where(positive, priority, -1).topk(most, dim=1).indices
        chosen = chosen.scatter(1, index, positive.gather(1, index))
    rank = priority + (chosen.long() * 2 + negative.long()) * (1 << 32)
    index = rank.topk(min(count, N), dim=1).indices
    picked = chosen.gather(1, index)
    return Sample(place=index, positive=picked, valid=picked | negative.gather(1, index))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, D) of ``values`` (B, N, D) at ``index`` (B, K), by gather; its backward adds in order on a CPU."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
