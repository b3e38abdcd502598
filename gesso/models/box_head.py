"""The second stage: classes and boxes of regions.

Shape letters: B images, R regions an image, K = B * R, C classes (without background), S side of the pooled map.

Sources: Fast R-CNN, section 2; Feature Pyramid Networks, section 4.2 (two fully connected layers); the head of four
convolutions and one such layer is that of Group Normalization, section 4.2.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.losses import BoxLossConfig, LossTerm, box_loss, class_loss
from gesso.models.roi import RoISample


@dataclass(frozen=True, kw_only=True)
class BoxHeadConfig:
    """Layers and losses of the box head."""

    convs: int = 0
    """3x3 convolutions before the fully connected layers."""
    conv_width: int = 256
    """Channels of these."""
    fcs: int = 2
    """Fully connected layers."""
    width: int = 1024
    """Channels of these."""
    class_agnostic: bool = False
    """One box for each region instead of one for each class."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Factors on dx, dy, dw, dh, so that the deltas have about unit variance."""
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    """The loss of the regions' deltas."""

    def __post_init__(self) -> None:
        if self.fcs < 1 or self.convs < 0:
            raise ConfigError(
                f"box_head has {self.convs} convolutions and {self.fcs} fully connected layers",
                remedy="At least one fully connected layer is needed.",
            )
        for name in ("conv_width", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"box_head.{name} is {getattr(self, name)}", remedy="Choose a number above 0.")
        if min(self.box_weights) <= 0:
            raise ConfigError(f"box_head.box_weights is {self.box_weights}", remedy="Give numbers above 0.")


class RegionPredictions(NamedTuple):
    """What the head says of each region.

    Attributes:
        logits: (B, R, C + 1), column 0 = background, class c in column c + 1; in the dtype of the weights.
        deltas: (B, R, C, 4), or (B, R, 1, 4) if class-agnostic.
    """

    logits: Tensor
    deltas: Tensor


class BoxHead(nn.Module):
    """Pooled features -> classes and box deltas."""

    def __init__(self, config: BoxHeadConfig, *, channels: int, pooled_size: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_boxes = 1 if config.class_agnostic else num_classes
        self.convs = nn.ModuleList()
        for _ in range(config.convs):
            conv = nn.Conv2d(channels, config.conv_width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.convs.append(conv)
            channels = config.conv_width
        self.fcs = nn.ModuleList()
        inputs = channels * pooled_size * pooled_size
        for _ in range(config.fcs):
            fc = nn.Linear(inputs, config.width)
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
            self.fcs.append(fc)
            inputs = config.width
        self.classes = nn.Linear(inputs, num_classes + 1)
        self.boxes = nn.Linear(inputs, self.num_boxes * 4)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """fc1, fc2, ...: the names of the hidden layers in ``hidden``."""
        return tuple(f"fc{k + 1}" for k in range(len(self.fcs)))

    def hidden(self, pooled: Tensor) -> dict[str, Tensor]:
        """Activations (K, width) of each fully connected layer, by name, of pooled features (K, channels, S, S)."""
        for conv in self.convs:
            pooled = F.relu(conv(pooled))
        layers: dict[str, Tensor] = {}
        values = pooled.flatten(1)
        for name, fc in zip(self.layer_names, self.fcs, strict=True):
            values = F.relu(fc(values))
            layers[name] = values
        return layers

    def forward(self, pooled: Tensor, batch_size: int) -> RegionPredictions:
        """Predictions for pooled features (B * R, channels, S, S) of ``batch_size`` = B images."""
        values = self.hidden(pooled)[self.layer_names[-1]]
        dtype = self.classes.weight.dtype
        logits = self.classes(values).to(dtype).view(batch_size, -1, self.classes.out_features)
        deltas = self.boxes(values).to(dtype).view(batch_size, -1, self.num_boxes, 4)
        return RegionPredictions(logits=logits, deltas=deltas)

    def losses(self, predictions: RegionPredictions, regions: RoISample) -> dict[str, LossTerm]:
        """``box_class`` and ``box_regression`` on sampled regions."""
        wanted = geometry.encode(regions.boxes, regions.truth, self.config.box_weights)
        deltas = predictions.deltas
        if self.config.class_agnostic:
            own = deltas[:, :, 0]
        else:
            label = (regions.labels - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, 4)
            own = deltas.gather(2, label)[:, :, 0]
        return {
            "box_class": class_loss(predictions.logits, regions.labels, regions.valid),
            "box_regression": box_loss(own, wanted, regions.positive, regions.valid, self.config.box_loss),
        }
