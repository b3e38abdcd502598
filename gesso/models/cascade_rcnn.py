"""Cascade R-CNN: box heads in a row, each trained on the boxes of the one before at a higher IoU.

Shape letters: B images, R regions an image.

Source: Cascade R-CNN: Delving into High Quality Object Detection (Cai and Vasconcelos 2018), section 4.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHead, BoxHeadConfig, RegionPredictions
from gesso.models.fpn import FPNConfig
from gesso.models.losses import LossTerm
from gesso.models.mask_head import MaskBranch, MaskHeadConfig
from gesso.models.neck import NeckConfig
from gesso.models.postprocess import PostprocessConfig, detect_regions
from gesso.models.roi import RoIPoolConfig, RoIPooler, RoISamplingConfig, match_rois, sample_rois
from gesso.models.rpn import Proposals, RPNConfig, has_extent
from gesso.models.semantic import SegmentationConfig
from gesso.models.two_stage import TwoStageDetector
from gesso.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True, kw_only=True)
class CascadeRCNNConfig:
    """Cascade R-CNN on a feature pyramid; the defaults are the paper's, three heads with class-agnostic boxes."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    neck: NeckConfig = field(default_factory=FPNConfig)
    """What makes the levels."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Anchors of the neck's levels."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    """The first stage."""
    roi: RoISamplingConfig = field(default_factory=RoISamplingConfig)
    """Which proposals train the first head."""
    pool: RoIPoolConfig = field(default_factory=RoIPoolConfig)
    """How features are pooled."""
    box_head: BoxHeadConfig = field(default_factory=lambda: BoxHeadConfig(class_agnostic=True))
    """The form of each head; ``box_weights`` are those of the first one."""
    ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """The IoU from which a region is positive, for each head; that of the first replaces ``roi.positive_iou`` and
    ``roi.negative_iou``."""
    sharpness: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Factors on ``box_head.box_weights`` for each head: later ones learn smaller corrections."""
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Factors on the losses of each head."""
    mask_head: MaskHeadConfig | None = None
    """A mask of each detection, learnt on the regions of the first head."""
    segmentation: SegmentationConfig | None = None
    """An auxiliary loss on the pixels, in training."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """What is kept in inference."""

    def __post_init__(self) -> None:
        if not len(self.ious) == len(self.sharpness) == len(self.stage_weights) > 0:
            raise ConfigError(
                f"{len(self.ious)} ious, {len(self.sharpness)} sharpness and {len(self.stage_weights)} stage_weights",
                remedy="Give one of each for every head of the cascade.",
            )
        if not all(0 < iou < 1 for iou in self.ious):
            raise ConfigError(f"ious is {self.ious}", remedy="Choose numbers between 0 and 1.")
        if not min(self.sharpness) > 0 or not min(self.stage_weights) >= 0:
            raise ConfigError(
                f"sharpness is {self.sharpness}, stage_weights {self.stage_weights}",
                remedy="Give factors above 0, and weights from 0.",
            )
        if not self.box_head.class_agnostic:
            raise ConfigError(
                "the heads of a cascade pass on one box for each region", remedy="Set box_head.class_agnostic to true."
            )
        if self.roi.hard_examples:
            raise ConfigError("roi.hard_examples has no meaning in a cascade", remedy="Leave it out.")


class CascadeRCNN(TwoStageDetector):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> Detections`` in evaluation mode.

    The losses are ``rpn_objectness``, ``rpn_box``, ``box_class1``, ``box_regression1``, ``box_class2``, ..., and
    ``mask`` and ``segmentation`` where there are such heads. ``box_heads`` are the heads in their order.
    """

    def __init__(self, config: CascadeRCNNConfig, num_classes: int) -> None:
        super().__init__(
            backbone=config.backbone,
            neck=config.neck,
            anchors=config.anchors,
            rpn=config.rpn,
            segmentation=config.segmentation,
            num_classes=num_classes,
        )
        self.config = config
        levels = self.neck.roi_levels
        channels = self.channels[levels[0]]
        self.pooler = RoIPooler(config.pool, levels, self.strides)
        self.box_heads = nn.ModuleList(
            BoxHead(
                dataclasses.replace(config.box_head, box_weights=_scaled(config.box_head.box_weights, factor)),
                channels=channels,
                pooled_size=config.pool.size,
                num_classes=num_classes,
            )
            for factor in config.sharpness
        )
        self.mask_branch = (
            None
            if config.mask_head is None
            else MaskBranch(config.mask_head, config.pool, channels, num_classes, levels, self.strides)
        )
        self.mask_side = 0 if config.mask_head is None else config.mask_head.target_side

    def region_losses(
        self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch, targets: Targets
    ) -> dict[str, LossTerm]:
        """The losses of each head; a head's boxes, detached, are the regions of the next."""
        terms: dict[str, LossTerm] = {}
        boxes, valid = proposals.boxes, proposals.valid
        for k, head in enumerate(self._heads()):
            sampling = self._sampling(k)
            if k == 0:
                regions = sample_rois(boxes, valid, targets, batch.key, sampling)
                valid = regions.valid
                if self.mask_branch is not None:
                    terms |= self.mask_branch.losses(maps, regions, targets)
            else:
                regions = match_rois(boxes, valid, targets, sampling)
            predictions = head(self.pooler(maps, regions.boxes), len(batch.images))
            for name, term in head.losses(predictions, regions).items():
                terms[f"{name}{k + 1}"] = term._replace(total=self.config.stage_weights[k] * term.total)
            boxes, valid = self._refine(head, predictions, regions.boxes, valid, batch.sizes)
        return terms

    def detect_regions(self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch) -> Detections:
        """The boxes of the last head; a score is the mean of those that all heads gave on their own regions."""
        boxes, valid = proposals.boxes, proposals.valid
        scores: list[Tensor] = []
        for head in self._heads():
            regions, usable = boxes, valid
            predictions = head(self.pooler(maps, regions), len(batch.images))
            scores.append(head.scores(predictions))
            boxes, valid = self._refine(head, predictions, regions, usable, batch.sizes)
        found = detect_regions(
            regions,
            usable,
            torch.stack(scores).mean(dim=0),
            predictions.deltas,
            batch.sizes,
            head.config.box_weights,
            self.config.postprocess,
        )
        if self.mask_branch is None:
            return found
        return dataclasses.replace(found, masks=self.mask_branch.probabilities(maps, found))

    def region_feature_names(self) -> tuple[str, ...]:
        """roi and the hidden layers of the last head."""
        return ("roi", *self._heads()[-1].layer_names)

    def region_features(self, maps: Mapping[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        """roi (B, R, channels, S, S) and fc1, fc2, ... (B, R, width) of boxes (B, R, 4)."""
        pooled = self.pooler(maps, boxes)
        layers = {"roi": pooled, **self._heads()[-1].hidden(pooled)}
        return {name: value.reshape(*boxes.shape[:2], *value.shape[1:]) for name, value in layers.items()}

    def _heads(self) -> list[BoxHead]:
        return list(self.box_heads)  # type: ignore[arg-type]

    def _sampling(self, k: int) -> RoISamplingConfig:
        iou = self.config.ious[k]
        return dataclasses.replace(self.config.roi, positive_iou=iou, negative_iou=iou)

    @staticmethod
    @torch.no_grad()
    def _refine(
        head: BoxHead, predictions: RegionPredictions, regions: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The boxes (B, R, 4) that a head makes of its regions, clipped to the pictures, and which are of use."""
        decoded = geometry.decode(regions, predictions.deltas[:, :, 0], head.config.box_weights)
        boxes = geometry.clip(decoded, sizes)
        valid = valid & has_extent(boxes, 1e-3)
        return torch.where(valid[..., None], boxes, 0), valid


def _scaled(weights: tuple[float, float, float, float], factor: float) -> tuple[float, float, float, float]:
    a, b, c, d = weights
    return a * factor, b * factor, c * factor, d * factor
