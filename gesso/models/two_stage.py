"""Detectors of two stages: a region proposal network, then heads on its proposals.

Shape letters: B images, P proposals an image, M ground-truth slots.
"""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from gesso.errors import ConfigError, nearest
from gesso.models.anchors import AnchorConfig, AnchorGenerator
from gesso.models.backbone import BackboneConfig
from gesso.models.detector import Detector
from gesso.models.losses import LossTerm
from gesso.models.model import image_shape
from gesso.models.neck import NeckConfig
from gesso.models.rpn import AnchorPredictions, Proposals, RegionProposalNetwork, RPNConfig
from gesso.models.semantic import SegmentationConfig, SegmentationHead
from gesso.structures import Detections, ImageBatch, Targets


class TwoStageDetector(Detector):
    """The first stage, and where wanted an auxiliary segmentation head; a subclass adds what is done with proposals."""

    def __init__(
        self,
        *,
        backbone: BackboneConfig,
        neck: NeckConfig,
        anchors: AnchorConfig,
        rpn: RPNConfig,
        segmentation: SegmentationConfig | None,
        num_classes: int,
    ) -> None:
        super().__init__(backbone, neck, num_classes)
        levels = self.neck.rpn_levels
        self.rpn = RegionProposalNetwork(
            rpn,
            channels=self.channels[levels[0]],
            anchors=AnchorGenerator(anchors, [self.strides[name] for name in levels]),
        )
        self.segmentation = (
            None
            if segmentation is None
            else SegmentationHead(segmentation, self._channels_of(segmentation.level), num_classes)
        )

    def losses(self, maps: Mapping[str, Tensor], batch: ImageBatch, targets: Targets) -> dict[str, LossTerm]:
        """``rpn_objectness``, ``rpn_box``, those of ``region_losses``, and ``segmentation`` where it is wanted."""
        predictions = self._first_stage(maps, batch)
        terms = self.rpn.losses(predictions, targets, batch.key)
        terms |= self.region_losses(maps, self.rpn.propose(predictions, batch.sizes), batch, targets)
        if self.segmentation is not None:
            logits = self.segmentation(maps[self.segmentation.config.level])
            terms |= self.segmentation.losses(logits, targets, image_shape(batch), batch.sizes)
        return terms

    def infer(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> Detections:
        """The detections of the second stage."""
        return self.detect_regions(maps, self.rpn.propose(self._first_stage(maps, batch), batch.sizes), batch)

    @abstractmethod
    def region_losses(
        self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch, targets: Targets
    ) -> dict[str, LossTerm]:
        """The losses of the second stage."""

    @abstractmethod
    def detect_regions(self, maps: Mapping[str, Tensor], proposals: Proposals, batch: ImageBatch) -> Detections:
        """The detections among the proposals."""

    def _first_stage(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> AnchorPredictions:
        predictions: AnchorPredictions = self.rpn(
            [maps[name] for name in self.neck.rpn_levels], image_shape(batch), batch.sizes
        )
        return predictions

    def _channels_of(self, level: str) -> int:
        if level not in self.channels:
            raise ConfigError(f"segmentation.level is {level}", remedy=nearest(level, self.channels))
        return self.channels[level]
