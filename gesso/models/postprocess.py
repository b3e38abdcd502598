"""From predictions of regions to a fixed number of detections.

Shape letters: B images, R regions an image, C classes, K candidates, D detections.

Source: Fast R-CNN, section 2.2 (NMS for each class); score threshold and counts are those of Feature Pyramid Networks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.matching import take
from gesso.models.ops.nms import batched_nms
from gesso.models.rpn import has_extent
from gesso.structures import Detections


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """What is kept of the predictions."""

    detections: int = 100
    """D, detections of each image."""
    min_score: float = 0.05
    """A detection has a higher score than this."""
    nms_iou: float = 0.5
    """NMS within a class drops what overlaps a better detection by more."""
    candidates: int = 2000
    """At most this many (region, class) pairs of each image enter NMS, the best ones."""
    min_side: float = 1e-2
    """A detection is at least this wide and high, in pixels; 0 keeps all, as torchvision's RetinaNet does."""

    def __post_init__(self) -> None:
        if not 0 < self.detections <= self.candidates:
            raise ConfigError(
                f"postprocess.detections is {self.detections} of {self.candidates} candidates",
                remedy="Choose at least 1, and no more than postprocess.candidates.",
            )
        for name in ("min_score", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"postprocess.{name} is {getattr(self, name)}", remedy="Choose a number from 0 to 1.")


@torch.no_grad()
def detect_regions(
    regions: Tensor,
    valid: Tensor,
    scores: Tensor,
    deltas: Tensor,
    sizes: Tensor,
    box_weights: tuple[float, float, float, float],
    config: PostprocessConfig,
) -> Detections:
    """Detections from regions (B, R, 4), ``valid`` (B, R), and what a head says of them.

    Args:
        regions: xyxy on the padded picture.
        valid: other regions give no detection.
        scores: (B, R, C) in [0, 1].
        deltas: (B, R, C, 4), or (B, R, 1, 4) if class-agnostic.
        sizes: (B, 2) valid height and width, to which the boxes are clipped.
        box_weights: of the deltas.
        config: counts and thresholds.
    """
    scores = scores.masked_fill(~valid[..., None], 0)
    C = scores.shape[-1]
    best = scores.flatten(1).topk(min(config.candidates, scores[0].numel()), dim=1)
    region, labels = best.indices.div(C, rounding_mode="floor"), best.indices % C
    chosen = take(deltas.flatten(1, 2), best.indices if deltas.shape[2] > 1 else region)
    boxes = geometry.clip(geometry.decode(take(regions, region), chosen, box_weights), sizes)
    good = (best.values > config.min_score) & has_extent(boxes, config.min_side)
    return select_detections(boxes, best.values, labels, good, config)


def select_detections(
    boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, config: PostprocessConfig
) -> Detections:
    """NMS within each class, then the best D of candidates (B, K, 4), (B, K), (B, K), (B, K)."""
    kept = valid & batched_nms(boxes, scores, valid, labels, config.nms_iou)
    missing = max(0, config.detections - scores.shape[1])
    best = scores.masked_fill(~kept, 0).topk(min(config.detections, scores.shape[1]), dim=1)
    kept = kept.gather(1, best.indices)
    boxes = torch.where(kept[..., None], take(boxes, best.indices), 0)
    labels = torch.where(kept, labels.gather(1, best.indices), 0)
    return Detections(
        boxes=F.pad(boxes, (0, 0, 0, missing)).float(),
        scores=F.pad(best.values, (0, missing)).float(),
        labels=F.pad(labels, (0, missing)),
        valid=F.pad(kept, (0, missing)),
    )
