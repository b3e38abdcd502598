"""Classification of whole pictures: the mean of the last map, and one linear layer.

Shape letters: B images, C classes, n cells a side, h x w cells of a map.

Source: Deep Residual Learning for Image Recognition (He et al. 2016), section 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.backbone import BackboneConfig
from gesso.models.class_rows import ClassRows
from gesso.models.dropout import drop_channels
from gesso.models.losses import LossTerm
from gesso.models.model import Model
from gesso.models.ops.linear import Linear
from gesso.random_key import stream
from gesso.structures import ImageBatch, Targets

_DROPOUT = stream("classifier.dropout")
_PRESENT = 1


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A backbone, the mean of its last map, and one linear layer."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    dropout: float = 0.0
    """Share of the channels of the mean that are dropped in training."""
    label_smoothing: float = 0.0
    """Share of the wanted probability that goes to all classes alike (Szegedy et al. 2016, section 7)."""

    def __post_init__(self) -> None:
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", remedy="Choose a share from 0 to below 1.")


class Classifier(Model):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> logits`` in evaluation mode.

    The loss is ``class``, a mean over the pictures that count of the global batch: those with exactly one class that
    is verified as present. The logits are (B, C) float32.

    Attributes:
        config: what it was built from.
        map_name: the map whose mean is taken, the last of the backbone.
        fc: the linear layer.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"backbone": ("backbone",), "head": ("fc",)}

    def __init__(self, config: ClassifierConfig, num_classes: int) -> None:
        super().__init__(config.backbone, num_classes)
        self.config = config
        self.map_name = next(reversed(self.channels))
        self.fc = Linear(self.channels[self.map_name], num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row for each class; see ``class_rows``."""
        return {"fc.weight": ClassRows(), "fc.bias": ClassRows()}

    def losses(self, maps: Mapping[str, Tensor], batch: ImageBatch, targets: Targets) -> dict[str, LossTerm]:
        """``class``: softmax cross-entropy."""
        if targets.verified is None:
            raise ConfigError(
                "the classifier learns classes of whole pictures, but the ground truth has none",
                remedy="Train on data with image-level labels.",
            )
        pooled = drop_channels(maps["pooled"], batch.key, self.config.dropout, _DROPOUT)
        present = targets.verified == _PRESENT
        counted = present.sum(dim=1) == 1
        labels = present.to(torch.uint8).argmax(dim=1)
        smoothing = self.config.label_smoothing
        each = F.cross_entropy(self._scores(pooled), labels, label_smoothing=smoothing, reduction="none")
        return {"class": LossTerm(torch.where(counted, each, 0).sum(), counted.sum())}

    @torch.no_grad()
    def infer(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> Tensor:
        """Logits (B, C) float32."""
        return self._scores(maps["pooled"]).float()

    def _scores(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.fc(pooled)
        return logits.to(self.fc.weight.dtype)

    def maps(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Every map (B, channels, h, w) of the backbone, by its name, and ``pooled`` (B, channels), the last one's mean
        over the valid part of the picture.
        """
        found = super().maps(batch)
        mean = pool_valid(found[self.map_name], batch.sizes, self.strides[self.map_name])
        return {**found, "pooled": mean.flatten(1)}

    def feature_names(self) -> tuple[str, ...]:
        """The maps of the backbone, and pooled."""
        return (*super().feature_names(), "pooled")


def pool_valid(values: Tensor, sizes: Tensor, stride: float, n: int = 1) -> Tensor:
    """Divides the valid part of each picture into n x n cells and takes the mean of a map over each of them.

    A cell of the map counts by the share of it that lies there, so that any n fits any map; of a whole picture and an n
    that divides the sides of the map these are the plain means.

    Args:
        values: (B, channels, h, w), also in bfloat16.
        sizes: (B, 2) int64, valid height and width in pixels.
        stride: pixels a cell of the map.
        n: cells a side of the result.

    Returns:
        (B, channels, n, n) float32, or float64 where ``values`` are.
    """
    kind = torch.float64 if values.dtype == torch.float64 else torch.float32
    rows, columns = (_shares(sizes[:, axis].to(kind) / stride, cells, n) for axis, cells in enumerate(values.shape[2:]))
    with torch.autocast(values.device.type, enabled=False):
        means = torch.einsum("bchw,bjw->bchj", values.to(kind), columns)
        return torch.einsum("bchj,bih->bcij", means, rows)


def _shares(length: Tensor, cells: int, n: int) -> Tensor:
    """The weights (B, n, cells), with sums of 1, of the cells in n equal parts of the first ``length`` (B,) of them."""
    length = length.clamp(max=cells)[:, None]
    borders = length * torch.arange(n + 1, device=length.device) / n
    low, high = borders[:, :-1, None], borders[:, 1:, None]
    start = torch.arange(cells, device=length.device)
    share = (torch.minimum(high, start + 1) - torch.maximum(low, start)).clamp(min=0)
    return share / share.sum(dim=2, keepdim=True)
