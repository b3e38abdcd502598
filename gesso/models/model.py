"""What all models share, whatever they predict: a backbone, its maps by name, and the two ways on from them.

Shape letters: B images, H x W padded pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gesso.errors import ConfigError, nearest
from gesso.models.backbone import Backbone, BackboneConfig
from gesso.models.losses import BatchLosses, LossTerm, over_global_batch
from gesso.structures import ImageBatch, Targets


class Model(nn.Module, ABC):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> predictions`` in evaluation mode.

    Attributes:
        backbone: the part that makes the maps.
        num_classes: C, without background.
        channels, strides: of every map, by its name.
        mask_side: side of the grids on which the ground truth's masks are wanted; 0 where no masks are learnt.
        semantic: whether the ground truth's semantic maps are wanted.
        parts: the modules that each part of ``weights.PARTS`` consists of; a model has some of these parts.
    """

    mask_side = 0
    semantic = False
    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: BackboneConfig, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Backbone(backbone)
        self.channels: dict[str, int] = dict(self.backbone.channels)
        self.strides: dict[str, float] = dict(self.backbone.strides)
        for name, values in (("mean", self.backbone.mean), ("std", self.backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(
        self,
        batch: ImageBatch,
        targets: Targets | None = None,
        *,
        counts: Tensor | None = None,
        counted: bool = False,
    ) -> Any:
        """Losses in training mode, predictions in evaluation mode.

        Args:
            batch: the pictures.
            targets: ground truth; needed in training mode, not looked at in evaluation mode.
            counts: of the whole global batch, where this is a part of it (``losses.over_global_batch``).
            counted: give the counts and the ratios of samples beside the losses (``losses.BatchLosses``).

        Returns:
            In training mode 0-dim tensors by name, each a mean over the samples of the global batch; the loss is their
            sum. With several processes they are this process's share of these means, which add up over them. In
            evaluation mode what ``infer`` gives.
        """
        maps = self.maps(batch)
        if not self.training:
            return self.infer(maps, batch)
        assert targets is not None, "training mode needs targets"
        found: BatchLosses = over_global_batch(self.losses(maps, batch, targets), counts)
        return found if counted else found.losses

    @abstractmethod
    def losses(self, maps: Mapping[str, Tensor], batch: ImageBatch, targets: Targets) -> dict[str, LossTerm]:
        """The parts of the loss, from the maps of ``maps``."""

    @abstractmethod
    def infer(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> Any:
        """The predictions, from the maps of ``maps``."""

    def maps(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Every map (B, channels, h, w) of the backbone, by its name."""
        found: dict[str, Tensor] = self.backbone(self.normalise(batch))
        return found

    def normalise(self, batch: ImageBatch) -> Tensor:
        """Pictures (B, 3, H, W) as the backbone expects them, zero in the padding, channels_last."""
        images = batch.images.to(memory_format=torch.channels_last)
        values = (images.to(self.mean.dtype) - self.mean) / self.std
        rows = torch.arange(images.shape[2], device=images.device) < batch.sizes[:, :1]
        columns = torch.arange(images.shape[3], device=images.device) < batch.sizes[:, 1:]
        return values * (rows[:, None, :, None] & columns[:, None, None, :])

    def feature_names(self) -> tuple[str, ...]:
        """The names that ``features`` knows, from the picture to the last layer."""
        return (*self.channels, *self.region_feature_names())

    def region_feature_names(self) -> tuple[str, ...]:
        """Those of them that need boxes; a model without regions has none."""
        return ()

    def region_features(self, maps: Mapping[str, Tensor], boxes: Tensor) -> dict[str, Tensor]:
        """Every feature (B, R, ...) of ``region_feature_names`` inside ``boxes`` (B, R, 4)."""
        return {}

    @torch.no_grad()
    def features(self, batch: ImageBatch, names: Sequence[str], *, boxes: Tensor | None = None) -> dict[str, Tensor]:
        """Activations by name, in the module's current mode (call ``eval()`` first).

        - C2 to C5: (B, channels, H / s, W / s) of the backbone, s its ``strides[name]``.
        - P2 to P7: (B, width, H / s, W / s) of a pyramid; or conv_proj: (B, width, H / s, W / s), the projected C5.
        - roi: (B, R, channels, S, S), pooled inside ``boxes`` from the pyramid or from conv_proj; in R-FCN (B, R, c5),
          the mean of C5 inside them.
        - fc1, fc2, ...: (B, R, width), the box head's hidden layers, after the ReLU.

        Args:
            batch: the pictures.
            names: of ``feature_names``.
            boxes: (B, R, 4) xyxy on the padded picture, needed for roi, fc1, ...: the ground truth's, or others.

        Raises:
            ConfigError: a name is unknown, or boxes are needed and missing.
        """
        known = self.feature_names()
        for name in names:
            if name not in known:
                raise ConfigError(f"the model has no feature '{name}'", remedy=nearest(name, known))
        found = self.maps(batch)
        regional = set(self.region_feature_names()) & set(names)
        if regional:
            if boxes is None:
                raise ConfigError(f"the feature '{min(regional)}' needs boxes", remedy="Pass boxes=(B, R, 4).")
            found |= self.region_features(found, boxes)
        return {name: found[name] for name in names}


def image_shape(batch: ImageBatch) -> tuple[int, int]:
    """(H, W), the padded pixels."""
    return batch.images.shape[2], batch.images.shape[3]
