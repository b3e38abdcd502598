"""What all detectors share: a neck behind the backbone, and detections.

Shape letters: B images, H x W padded pixels, R regions an image.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from gesso.models.backbone import BackboneConfig
from gesso.models.model import Model
from gesso.models.neck import NeckConfig, build_neck
from gesso.structures import Detections, ImageBatch


class Detector(Model):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> Detections`` in evaluation mode.

    Attributes:
        neck: makes the maps that the heads stand on.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "backbone": ("backbone",),
        "neck": ("neck",),
        "rpn": ("rpn",),
        "box_head": ("box_head", "box_heads", "head", "fine"),
        "mask_head": ("mask_branch", "segmentation"),
    }

    def __init__(self, backbone: BackboneConfig, neck: NeckConfig, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.neck = build_neck(neck, self.backbone.channels, self.backbone.strides)
        self.channels |= self.neck.channels
        self.strides |= self.neck.strides

    @abstractmethod
    def infer(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> Detections:
        """The detections, from the maps of ``maps``."""

    def maps(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Every map (B, channels, h, w) of backbone and neck, by its name."""
        found = super().maps(batch)
        return {**found, **self.neck(found)}

    def feature_names(self) -> tuple[str, ...]:
        """The names that ``features`` knows, from the picture to the last layer."""
        return (*self.backbone.channels, *self.neck.names, *self.region_feature_names())
