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
from gesso.models.matching import match, sample, take
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

    def __post_init__(self) -> None:
        for name in ("positive_iou", "negative_iou", "ignore_ioa", "positive_share"):
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
    """Regions with their targets; positives first.

    Attributes:
        boxes: (B, R, 4) xyxy, zeros where not valid.
        labels: (B, R) int64, 0 = background, class c is c + 1.
        slot: (B, R) int64, the matched ground-truth slot; of use where ``positive``.
        truth: (B, R, 4) the box of that slot.
        positive: (B, R) bool.
        valid: (B, R) bool.
    """

    boxes: Tensor
    labels: Tensor
    slot: Tensor
    truth: Tensor
    positive: Tensor
    valid: Tensor


@torch.no_grad()
def sample_rois(boxes: Tensor, valid: Tensor, targets: Targets, key: Tensor, config: RoISamplingConfig) -> RoISample:
    """Draws the regions that a head is trained on.

    Args:
        boxes: (B, P, 4) proposals.
        valid: (B, P) bool.
        targets: ground truth of the batch.
        key: (B,) int64, ``ImageBatch.key``.
        config: thresholds and counts; R = min(config.samples, P + M).
    """
    all_truth = targets.boxes.to(boxes.dtype)
    if config.append_truth:
        boxes = torch.cat([boxes, all_truth], dim=1)
        valid = torch.cat([valid, targets.valid & ~targets.ignore], dim=1)
    matches = match(
        boxes,
        targets,
        positive_iou=config.positive_iou,
        negative_iou=config.negative_iou,
        low_quality=False,
        ignore_ioa=config.ignore_ioa,
    )
    picked = sample(
        matches.positive & valid,
        matches.negative & valid,
        key,
        _STREAM,
        count=config.samples,
        positive_share=config.positive_share,
    )
    slot = matches.slot.gather(1, picked.place)
    labels = torch.where(picked.positive, targets.labels.gather(1, slot) + 1, 0)
    return RoISample(
        boxes=torch.where(picked.valid[..., None], take(boxes, picked.place), 0),
        labels=labels,
        slot=slot,
        truth=take(all_truth, slot),
        positive=picked.positive,
        valid=picked.valid,
    )


class RoIPooler(nn.Module):
    """RoIAlign from the levels P2, P3, ... by the size of each region."""

    def __init__(self, config: RoIPoolConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.levels = tuple(levels)

    def forward(self, maps: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
        """Features (B * R, C, S, S) of boxes (B, R, 4) from maps by name, each (B, C, h, w)."""
        c = self.config
        return multilevel_roi_align(
            [maps[name] for name in self.levels],
            boxes,
            [2 ** int(name[1:]) for name in self.levels],
            output_size=c.size,
            sampling_ratio=c.sampling_ratio,
            canonical_level=c.canonical_level,
            canonical_size=c.canonical_size,
            aligned=c.aligned,
        )
