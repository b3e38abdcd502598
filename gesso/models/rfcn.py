"""R-FCN and R-FCN-3000: position-sensitive score maps, and thousands of classes beside one objectness.

Shape letters: B images, R regions an image, C classes, S cells a side of a region.

Sources: R-FCN: Object Detection via Region-based Fully Convolutional Networks (Dai et al. 2016), section 2;
R-FCN-3000 at 30fps: Decoupling Detection and Classification (Singh et al. 2018), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig, RegionHead, RegionPredictions
from gesso.models.class_rows import ClassRows
from gesso.models.losses import BoxLossConfig, LossTerm, each_class_loss
from gesso.models.ops.linear import Linear
from gesso.models.ops.roi_align import multilevel_roi_align
from gesso.models.postprocess import PostprocessConfig, detect_regions
from gesso.models.roi import RoISample, RoISamplingConfig, hardest, sample_rois
from gesso.models.rpn import Proposals, RPNConfig
from gesso.models.semantic import SegmentationConfig
from gesso.models.single_level import SingleLevelConfig
from gesso.models.two_stage import TwoStageDetector
from gesso.structures import Detections, ImageBatch, Targets


@dataclass(frozen=True, kw_only=True)
class PositionSensitiveConfig:
    """The head of R-FCN."""

    size: int = 7
    """S: every class has S x S score maps, one for each cell of a region; the cells' mean is the score."""
    sampling_ratio: int = 2
    """Samples a cell and axis."""
    class_agnostic: bool = True
    """One box for each region instead of one for each class; always so beside a fine classifier."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Factors on dx, dy, dw, dh, so that the deltas have about unit variance."""
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    """The loss of the regions' boxes."""

    def __post_init__(self) -> None:
        for name in ("size", "sampling_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"head.{name} is {getattr(self, name)}", remedy="Choose a number above 0.")
        if not min(self.box_weights) > 0:
            raise ConfigError(f"head.box_weights is {self.box_weights}", remedy="Give numbers above 0.")


@dataclass(frozen=True, kw_only=True)
class FineClassifierConfig:
    """The classifier of R-FCN-3000: C5 averaged over each region, one hidden layer, a softmax over all classes."""

    width: int = 1024
    """Channels of the hidden layer."""
    samples: int = 7
    """Samples a side of the average over a region."""
    weight: float = 1.0
    """Factor on its loss."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.samples < 1 or self.weight < 0:
            raise ConfigError(f"fine: width {self.width}, samples {self.samples} or weight {self.weight} is too small")


@dataclass(frozen=True, kw_only=True)
class RFCNConfig:
    """R-FCN; with ``fine`` it is R-FCN-3000. The defaults are R-FCN's, with the stride of C5 at 16."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet101", output_stride=16))
    """The backbone."""
    neck: SingleLevelConfig = field(default_factory=lambda: SingleLevelConfig(width=1024))
    """The projection that the score maps are made from."""
    anchors: AnchorConfig = field(default_factory=lambda: AnchorConfig(sizes=(16.0,), scales=(4.0, 8.0, 16.0, 32.0)))
    """Anchors of the one level."""
    rpn: RPNConfig = field(default_factory=lambda: RPNConfig(width=512, before_nms=6000, after_nms=300))
    """The first stage."""
    roi: RoISamplingConfig = field(default_factory=lambda: RoISamplingConfig(samples=128, hard_examples=True))
    """Which proposals train the second stage; R-FCN mines hard examples."""
    head: PositionSensitiveConfig = field(default_factory=PositionSensitiveConfig)
    """The second stage."""
    fine: FineClassifierConfig | None = None
    """Decouple: the head learns objectness alone, this the classes; a score is the product."""
    segmentation: SegmentationConfig | None = None
    """An auxiliary loss on the pixels, in training."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """What is kept in inference."""

    def __post_init__(self) -> None:
        if not isinstance(self.neck, SingleLevelConfig):
            raise ConfigError(f"R-FCN has one level, and the neck is a {type(self.neck).__name__}")
        if self.segmentation is not None and self.segmentation.level.startswith("P"):
            raise ConfigError(
                f"segmentation.level is {self.segmentation.level}, but R-FCN has no pyramid",
                remedy="Choose conv_proj, or a map of the backbone such as C4.",
            )


class PositionSensitiveHead(RegionHead):
    """Score maps and box maps; a region reads each of its S x S cells from maps of its own, and averages."""

    def __init__(
        self, config: PositionSensitiveConfig, *, channels: int, num_classes: int | None, stride: float
    ) -> None:
        """``num_classes`` None is objectness: one score that is no category's."""
        shared = BoxHeadConfig(
            class_agnostic=config.class_agnostic, box_weights=config.box_weights, box_loss=config.box_loss
        )
        super().__init__(shared, 1 if num_classes is None else num_classes)
        self.objectness = num_classes is None
        self.size, self.sampling_ratio, self.stride = config.size, config.sampling_ratio, stride
        cells = config.size * config.size
        self.classes = nn.Conv2d(channels, cells * self.num_scores, 1)
        self.boxes = nn.Conv2d(channels, cells * self.num_boxes * 4, 1)
        for layer in (self.classes, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def _layers_of_classes(self, before: int = 1) -> dict[str, ClassRows]:
        return {} if self.objectness else super()._layers_of_classes(before * self.size * self.size)

    def forward(self, projected: Tensor, boxes: Tensor, image: Tensor | None = None) -> RegionPredictions:
        """Predictions for boxes (B, R, 4) on the map (B, channels, h, w); ``image`` as of ``RoIPooler``."""
        dtype = self.classes.weight.dtype
        logits = self._vote(self.classes(projected), boxes, image).to(dtype)
        deltas = self._vote(self.boxes(projected), boxes, image).to(dtype)
        return RegionPredictions(logits=logits, deltas=deltas.view(*deltas.shape[:2], self.num_boxes, 4))

    def _vote(self, maps: Tensor, boxes: Tensor, image: Tensor | None) -> Tensor:
        """(B, R, n) from maps (B, S * S * n, h, w), whose channels are ordered by cell, then by output."""
        pooled = multilevel_roi_align(
            [maps],
            boxes,
            [self.stride],
            image=image,
            output_size=self.size,
            sampling_ratio=self.sampling_ratio,
            aligned=True,
            position_sensitive=True,
        )
        return pooled.mean(dim=(2, 3)).view(*boxes.shape[:2], -1)


class FineClassifier(nn.Module):
    """The class of a region that is known to be an object."""

    def __init__(self, config: FineClassifierConfig, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.fc = Linear(channels, config.width)
        self.classes = Linear(config.width, num_classes)

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row for each class; see ``class_rows``."""
        return {"classes.weight": ClassRows(), "classes.bias": ClassRows()}

    def hidden(self, averaged: Tensor) -> Tensor:
        """The hidden layer (..., width) of averages (..., channels), after the ReLU."""
        return F.relu(self.fc(averaged))

    def forward(self, averaged: Tensor) -> Tensor:
        """Logits (..., C) of averages (..., channels)."""
        logits: Tensor = self.classes(self.hidden(averaged))
        return logits.to(self.classes.weight.dtype)


class RFCN(TwoStageDetector):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> Detections`` in evaluation mode.

    The losses are ``rpn_objectness``, ``rpn_box``, ``box_class`` (with a fine classifier that of an object against the
    background), ``box_regression``, and ``fine_class`` and ``segmentation`` where there are such heads.
    """

    def __init__(self, config: RFCNConfig, num_classes: int) -> None:
        super().__init__(
            backbone=config.backbone,
            neck=config.neck,
            anchors=config.anchors,
            rpn=config.rpn,
            segmentation=config.segmentation,
            num_classes=num_classes,
        )
        self.config = config
        self.head = PositionSensitiveHead(
            config.head,
            channels=config.neck.width,
            num_classes=num_classes if config.fine is None else None,
            stride=self.strides["conv_proj"],
        )
        self.fine = (
            None
            if config.fine is None
            else FineClassifier(config.fine, channels=self.channels["C5"], num_classes=num_classes)
        )

    def region_losses(
        self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch, targets: Targets
    ) -> dict[str, LossTerm]:
        """``box_class``, ``box_regression``, and ``fine_class`` on the positive regions."""
        c = self.config.roi
        regions = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, c, every=c.hard_examples)
        if c.hard_examples:
            with torch.no_grad():
                every = self.head(maps["conv_proj"], regions.boxes)
                parts = self.head.each_loss(every, self._coarse(regions)).values()
                regions = hardest(regions, torch.stack(list(parts)).sum(dim=0), c)
        predictions = self.head(maps["conv_proj"], regions.boxes, regions.image)
        terms: dict[str, LossTerm] = self.head.losses(predictions, self._coarse(regions))
        if self.fine is not None:
            logits = self.fine(self.averaged(maps, regions.boxes, regions.image))
            each = each_class_loss(logits, (regions.labels - 1).clamp(min=0), regions.positive)
            terms["fine_class"] = LossTerm(self.fine.config.weight * each.sum(), regions.positive.sum())
        return terms

    def detect_regions(self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch) -> Detections:
        """The detections among the proposals."""
        predictions = self.head(maps["conv_proj"], proposals.boxes)
        scores = self.head.scores(predictions)
        if self.fine is not None:
            scores = scores * self.fine(self.averaged(maps, proposals.boxes)).softmax(dim=-1)
        return detect_regions(
            proposals.boxes,
            proposals.valid,
            scores,
            predictions.deltas,
            batch.sizes,
            self.config.head.box_weights,
            self.config.postprocess,
        )

    def averaged(self, maps: Mapping[str, Tensor], boxes: Tensor, image: Tensor | None = None) -> Tensor:
        """C5 averaged over each region: (B, R, c5) of boxes (B, R, 4)."""
        samples = (self.config.fine or FineClassifierConfig()).samples
        pooled = multilevel_roi_align(
            [maps["C5"]], boxes, [self.strides["C5"]], image=image, output_size=1, sampling_ratio=samples
        )
        return pooled.flatten(1).view(*boxes.shape[:2], -1)

    def region_feature_names(self) -> tuple[str, ...]:
        """roi, and with a fine classifier fc1."""
        return ("roi",) if self.fine is None else ("roi", "fc1")

    def region_features(self, maps: Mapping[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        """roi (B, R, c5), C5 averaged over each of boxes (B, R, 4), and fc1 (B, R, width)."""
        averaged = self.averaged(maps, boxes)
        return {"roi": averaged} if self.fine is None else {"roi": averaged, "fc1": self.fine.hidden(averaged)}

    def _coarse(self, regions: RoISample) -> RoISample:
        """With a fine classifier the head knows one class, object."""
        return regions if self.fine is None else regions._replace(labels=regions.labels.clamp(max=1))
