"""Faster R-CNN, on a feature pyramid or on one level, and with a mask head Mask R-CNN.

Shape letters: B images, R regions an image, M ground-truth slots.

Sources: Faster R-CNN (Ren et al. 2015); Feature Pyramid Networks (Lin et al. 2017), section 4; Mask R-CNN (He et al.
2017), section 3. The conventions are torchvision's, except where shapes have to be fixed and for what lies in the
padding: an anchor whose centre lies outside the picture proper is neither trained on nor proposed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHead, BoxHeadConfig
from gesso.models.fpn import FPNConfig
from gesso.models.losses import LossTerm
from gesso.models.mask_head import MaskBranch, MaskHeadConfig
from gesso.models.neck import NeckConfig
from gesso.models.postprocess import PostprocessConfig, detect_regions
from gesso.models.roi import RoIPoolConfig, RoIPooler, RoISample, RoISamplingConfig, hardest, sample_rois
from gesso.models.rpn import Proposals, RPNConfig
from gesso.models.semantic import SegmentationConfig
from gesso.models.two_stage import TwoStageDetector
from gesso.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True, kw_only=True)
class FasterRCNNConfig:
    """Faster R-CNN; the defaults are those with a feature pyramid, for pictures of 800 pixels."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    neck: NeckConfig = field(default_factory=FPNConfig)
    """What makes the levels: a feature pyramid, the simple one of a plain vision transformer, or a single level."""
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    """Anchors of the neck's levels, P2 to P6."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    """The first stage."""
    roi: RoISamplingConfig = field(default_factory=RoISamplingConfig)
    """Which proposals train the second stage."""
    pool: RoIPoolConfig = field(default_factory=RoIPoolConfig)
    """How their features are pooled."""
    box_head: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    """The second stage."""
    mask_head: MaskHeadConfig | None = None
    """A mask of each detection (Mask R-CNN)."""
    segmentation: SegmentationConfig | None = None
    """An auxiliary loss on the pixels, in training."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """What is kept in inference."""

    def __post_init__(self) -> None:
        if self.roi.hard_examples and self.box_head.norm == "batch":
            raise ConfigError(
                "roi.hard_examples would count all proposals in the batch norm of the box head",
                remedy="Set box_head.norm to group or none.",
            )


class FasterRCNN(TwoStageDetector):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> Detections`` in evaluation mode.

    The losses are ``rpn_objectness``, ``rpn_box``, ``box_class``, ``box_regression``, and ``mask`` and ``segmentation``
    where there are such heads. The parts are plain modules: ``backbone``, ``neck``, ``rpn``, ``box_head``,
    ``mask_branch`` and ``segmentation`` hold all the weights.
    """

    def __init__(self, config: FasterRCNNConfig, num_classes: int) -> None:
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
        self.box_head = BoxHead(
            config.box_head, channels=channels, pooled_size=config.pool.size, num_classes=num_classes
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
        """``box_class``, ``box_regression`` and ``mask``, on a sample of the proposals."""
        regions = self.choose(maps, proposals, batch, targets)
        heads = self.box_head(self.pooler(maps, regions.boxes, regions.image), len(batch.images))
        terms: dict[str, LossTerm] = self.box_head.losses(heads, regions)
        if self.mask_branch is not None:
            terms |= self.mask_branch.losses(maps, regions, targets)
        return terms

    def choose(
        self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch, targets: Targets
    ) -> RoISample:
        """The regions that are trained on: a random sample, or the hardest of all (``roi.hard_examples``)."""
        c = self.config.roi
        regions = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, c, every=c.hard_examples)
        if not c.hard_examples:
            return regions
        with torch.no_grad():
            heads = self.box_head(self.pooler(maps, regions.boxes), len(batch.images))
            parts = self.box_head.each_loss(heads, regions).values()
            return hardest(regions, torch.stack(list(parts)).sum(dim=0), c)

    def detect_regions(self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch) -> Detections:
        """The detections among the proposals, with masks where there is a mask head."""
        heads = self.box_head(self.pooler(maps, proposals.boxes), len(batch.images))
        found = detect_regions(
            proposals.boxes,
            proposals.valid,
            self.box_head.scores(heads),
            heads.deltas,
            batch.sizes,
            self.config.box_head.box_weights,
            self.config.postprocess,
        )
        if self.mask_branch is None:
            return found
        return dataclasses.replace(found, masks=self.mask_branch.probabilities(maps, found))

    def region_feature_names(self) -> tuple[str, ...]:
        """roi and the box head's hidden layers."""
        return ("roi", *self.box_head.layer_names)

    def region_features(self, maps: Mapping[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        """roi (B, R, channels, S, S) and fc1, fc2, ... (B, R, width) of boxes (B, R, 4)."""
        pooled = self.pooler(maps, boxes)
        layers = {"roi": pooled, **self.box_head.hidden(pooled)}
        return {name: value.reshape(*boxes.shape[:2], *value.shape[1:]) for name, value in layers.items()}
