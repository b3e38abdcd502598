"""Regions of interest: which proposals a head is trained on, and their features.

Shape letters: B images, P proposals, M ground-truth slots, R regions an image, C channels, S side of the pooled map.

Source: Fast R-CNN, section 2.3 (sampling); Feature Pyramid Networks, section 4.2 (levels).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.matching import Matches, match, sample, take
from gesso.models.ops.nms import batched_nms
from gesso.models.ops.roi_align import multilevel_roi_align
from gesso.random_key import stream
from gesso.structures import Targets

_STREAM = stream("roi-sample")


@dataclass(frozen=True, kw_only=True)
class RoISamplingConfig:
    """How proposals are matched and sampled for training a head."""

    positive_iou: float = 0.5
    """A proposal is positive from this IoU with an object."""
    negative_iou: float = 0.5
    """A proposal is negative below this IoU with every object."""
    ignore_ioa: float = 0.5
    """A proposal of which this share lies in an ignored object is no negative."""
    samples: int = 512
    """Regions of each image."""
    positive_share: float = 0.25
    """At most this share of them is positive."""
    append_truth: bool = True
    """The ground-truth boxes are proposals too."""
    hard_examples: bool = False
    """Train on the ``samples`` x B proposals of the batch with the highest loss after NMS instead of a random sample
    (online hard example mining); ``positive_share`` has no effect then."""
    hard_nms_iou: float = 0.7
    """With hard_examples: of proposals that overlap by more, the one with the higher loss stays."""

    def __post_init__(self) -> None:
        for name in ("positive_iou", "negative_iou", "ignore_ioa", "positive_share", "hard_nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"roi.{name} is {getattr(self, name)}", remedy="Choose a number from 0 to 1.")
        if self.negative_iou > self.positive_iou:
            raise ConfigError(f"roi.negative_iou {self.negative_iou} is above roi.positive_iou {self.positive_iou}")
        if self.samples < 1:
            raise ConfigError(f"roi.samples is {self.samples}", remedy="Choose a number above 0.")


@dataclass(frozen=True, kw_only=True)
class RoIPoolConfig:
    """How features are pooled from a region."""

    size: int = 7
    """S, cells a side."""
    sampling_ratio: int = 2
    """Samples a cell and axis."""
    canonical_level: int = 4
    """The level of a region of ``canonical_size``."""
    canonical_size: float = 224.0
    """Side in pixels of the region that is read from ``canonical_level``; half the side is read one level finer."""
    aligned: bool = False
    """Shift the samples by half a pixel, so that they lie on pixel centres."""

    def __post_init__(self) -> None:
        for name in ("size", "sampling_ratio", "canonical_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"pool.{name} is {getattr(self, name)}", remedy="Choose a number above 0.")


class RoISample(NamedTuple):
    """Regions with their targets. Those of ``sample_rois`` are positives first, and row b is picture b; those of
    ``hardest`` are hardest first, of any picture.

    Attributes:
        image: (B, R) int64, the picture of each region.
        boxes: (B, R, 4) xyxy, zeros where not valid.
        labels: (B, R) int64, 0 = background, class c is c + 1.
        slot: (B, R) int64, the matched ground-truth slot; of use where ``positive``.
        truth: (B, R, 4) the box of that slot.
        positive: (B, R) bool.
        valid: (B, R) bool.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    slot: Tensor
    truth: Tensor
    positive: Tensor
    valid: Tensor


@torch.no_grad()
def sample_rois(
    boxes: Tensor, valid: Tensor, targets: Targets, key: Tensor, config: RoISamplingConfig, *, every: bool = False
) -> RoISample:
    """Draws the regions that a head is trained on.

    Args:
        boxes: (B, P, 4) proposals.
        valid: (B, P) bool.
        targets: ground truth of the batch.
        key: (B,) int64, ``ImageBatch.key``.
        config: thresholds and counts; R = min(config.samples, P + M).
        every: take all of them, R = P + M, positives first.
    """
    all_truth = targets.boxes.to(boxes.dtype)
    if config.append_truth:
        boxes = torch.cat([boxes, all_truth], dim=1)
        valid = torch.cat([valid, targets.valid & ~targets.ignore], dim=1)
    matches = _match(boxes, targets, config)
    picked = sample(
        matches.positive & valid,
        matches.negative & valid,
        key,
        _STREAM,
        count=boxes.shape[1] if every else config.samples,
        positive_share=1.0 if every else config.positive_share,
    )
    slot = matches.slot.gather(1, picked.place)
    return RoISample(
        image=torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(slot),
        boxes=torch.where(picked.valid[..., None], take(boxes, picked.place), 0),
        labels=torch.where(picked.positive, targets.labels.gather(1, slot) + 1, 0),
        slot=slot,
        truth=take(all_truth, slot),
        positive=picked.positive,
        valid=picked.valid,
    )


@torch.no_grad()
def match_rois(boxes: Tensor, valid: Tensor, targets: Targets, config: RoISamplingConfig) -> RoISample:
    """Regions (B, R, 4) as they are, with their targets: the later stages of a cascade draw no new sample.

    Args:
        boxes: xyxy; row b belongs to picture b.
        valid: (B, R) bool; of these, regions that are neither positive nor negative become invalid.
        targets: ground truth of the batch.
        config: the thresholds.
    """
    matches = _match(boxes, targets, config)
    positive, negative = matches.positive & valid, matches.negative & valid
    return RoISample(
        image=torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(valid),
        boxes=boxes,
        labels=torch.where(positive, targets.labels.gather(1, matches.slot) + 1, 0),
        slot=matches.slot,
        truth=take(targets.boxes.to(boxes.dtype), matches.slot),
        positive=positive,
        valid=positive | negative,
    )


def _match(boxes: Tensor, targets: Targets, config: RoISamplingConfig) -> Matches:
    return match(
        boxes,
        targets,
        positive_iou=config.positive_iou,
        negative_iou=config.negative_iou,
        low_quality=False,
        ignore_ioa=config.ignore_ioa,
    )


@torch.no_grad()
def hardest(regions: RoISample, difficulty: Tensor, config: RoISamplingConfig) -> RoISample:
    """The ``config.samples`` * B regions of all pictures with the highest loss after NMS by it, hardest first.

    Each process takes those of its own pictures, so that which ones they are depends on the number of processes.
    Source: Training Region-based Object Detectors with Online Hard Example Mining (Shrivastava et al. 2016), section 4.

    Args:
        regions: all candidates (B, R).
        difficulty: (B, R), the loss of each.
        config: counts and the threshold.
    """
    B, R = difficulty.shape
    count = min(config.samples, R)
    kept = batched_nms(regions.boxes, difficulty, regions.valid, torch.zeros_like(regions.slot), config.hard_nms_iou)
    best = difficulty.masked_fill(~kept, -torch.inf).flatten().topk(B * count).indices

    def pick(value: Tensor) -> Tensor:
        return value.flatten(0, 1).index_select(0, best).view(B, count, *value.shape[2:])

    valid = pick(kept)
    chosen = RoISample(*(pick(value) for value in regions))
    return chosen._replace(valid=valid, positive=chosen.positive & valid, labels=torch.where(valid, chosen.labels, 0))


class RoIPooler(nn.Module):
    """RoIAlign from the levels P2, P3, ... by the size of each region, or from one level."""

    def __init__(self, config: RoIPoolConfig, levels: Sequence[str], strides: Mapping[str, float]) -> None:
        super().__init__()
        self.config = config
        self.levels = tuple(levels)
        self.strides = [strides[name] for name in levels]

    def forward(self, maps: Mapping[str, Tensor], boxes: Tensor, image: Tensor | None = None) -> Tensor:
        """Features (B * R, C, S, S) of boxes (B, R, 4) from maps by name, each (B, C, h, w).

        ``image`` (B, R) int64 says the picture of each box; None = that of its row.
        """
        c = self.config
        return multilevel_roi_align(
            [maps[name] for name in self.levels],
            boxes,
            self.strides,
            image=image,
            output_size=c.size,
            sampling_ratio=c.sampling_ratio,
            canonical_level=c.canonical_level,
            canonical_size=c.canonical_size,
            aligned=c.aligned,
        )
