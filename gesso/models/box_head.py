"""The second stage: classes and boxes of regions.

Shape letters: B images, R regions an image, K = B * R, C classes (without background), S side of the pooled map.

Sources: Fast R-CNN, section 2; Feature Pyramid Networks, section 4.2 (two fully connected layers); the head of four
convolutions and one such layer is that of Group Normalization, section 4.2.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.class_rows import ClassRows
from gesso.models.layers import Norm, RegionLinear, conv_block
from gesso.models.losses import (
    BoxLossConfig,
    LossTerm,
    balance,
    each_box_loss,
    each_class_loss,
    each_sigmoid_class_loss,
)
from gesso.models.ops.linear import Linear
from gesso.models.roi import RoISample


@dataclass(frozen=True, kw_only=True)
class BoxHeadConfig:
    """Layers and losses of the box head."""

    convs: int = 0
    """3x3 convolutions before the fully connected layers."""
    conv_width: int = 256
    """Channels of these."""
    norm: Norm = "none"
    """The norm behind each convolution. Batch norm counts every region of the sample alike, background too."""
    fcs: int = 2
    """Fully connected layers."""
    width: int = 1024
    """Channels of these."""
    class_agnostic: bool = False
    """One box for each region instead of one for each class."""
    classifier: Literal["softmax", "sigmoid"] = "softmax"
    """One distribution over the classes and the background, or a yes or no for each class."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Factors on dx, dy, dw, dh, so that the deltas have about unit variance."""
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    """The loss of the regions' boxes."""

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
        logits: (B, R, C + 1), column 0 = background, class c in column c + 1; with a sigmoid (B, R, C); in the dtype of
            the weights.
        deltas: (B, R, C, 4), or (B, R, 1, 4) if class-agnostic.
    """

    logits: Tensor
    deltas: Tensor


class RegionHead(nn.Module):
    """What heads on regions share: scores and losses of their predictions."""

    def __init__(self, config: BoxHeadConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_scores = num_classes + (config.classifier == "softmax")
        self.num_boxes = 1 if config.class_agnostic else num_classes

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with rows for each class; see ``class_rows``."""
        return {
            f"{layer}.{kind}": rows for layer, rows in self._layers_of_classes().items() for kind in ("weight", "bias")
        }

    def _layers_of_classes(self, before: int = 1) -> dict[str, ClassRows]:
        """The layers whose outputs are those of classes, in ``before`` blocks."""
        layers = {"classes": ClassRows(background=self.config.classifier == "softmax", before=before)}
        if not self.config.class_agnostic:
            layers["boxes"] = ClassRows(before=before, after=4)
        return layers

    def scores(self, predictions: RegionPredictions) -> Tensor:
        """(B, R, C) in [0, 1], the probability of each class."""
        if self.config.classifier == "sigmoid":
            return predictions.logits.sigmoid()
        return predictions.logits.softmax(dim=-1)[..., 1:]

    def losses(self, predictions: RegionPredictions, regions: RoISample) -> dict[str, LossTerm]:
        """``box_class`` and ``box_regression`` on sampled regions."""
        counted, share = regions.valid.sum(), balance(regions.positive, regions.valid)
        each = self.each_loss(predictions, regions)
        return {name: LossTerm(of.sum(), counted, share if name == "box_class" else None) for name, of in each.items()}

    def each_loss(self, predictions: RegionPredictions, regions: RoISample) -> dict[str, Tensor]:
        """The same of every region by itself (B, R), 0 where it is not valid."""
        c = self.config
        classify = each_class_loss if c.classifier == "softmax" else each_sigmoid_class_loss
        deltas = deltas_of(predictions.deltas, regions.labels)
        box = each_box_loss(deltas, regions.boxes, regions.truth, regions.positive, c.box_loss, c.box_weights)
        return {
            "box_class": classify(predictions.logits, regions.labels, regions.valid),
            "box_regression": box,
        }


class BoxHead(RegionHead):
    """Pooled features -> classes and box deltas."""

    def __init__(self, config: BoxHeadConfig, *, channels: int, pooled_size: int, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.convs = nn.Sequential()
        for _ in range(config.convs):
            self.convs.append(conv_block(channels, config.conv_width, 3, norm=config.norm, relu=True))
            channels = config.conv_width
        self.fcs = nn.ModuleList([RegionLinear(channels, pooled_size, config.width)])
        for _ in range(config.fcs - 1):
            fc = Linear(config.width, config.width)
            nn.init.kaiming_uniform_(fc.weight, a=1)
            nn.init.zeros_(fc.bias)
            self.fcs.append(fc)
        self.classes = Linear(config.width, self.num_scores)
        self.boxes = Linear(config.width, self.num_boxes * 4)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """fc1, fc2, ...: the names of the hidden layers in ``hidden``."""
        return tuple(f"fc{k + 1}" for k in range(len(self.fcs)))

    def hidden(self, pooled: Tensor) -> dict[str, Tensor]:
        """Activations (K, width) of each fully connected layer, by name, of pooled features (K, channels, S, S)."""
        values = self.convs(pooled)
        layers: dict[str, Tensor] = {}
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


def deltas_of(deltas: Tensor, labels: Tensor) -> Tensor:
    """The deltas (B, R, 4) of each region's own class, of (B, R, C, 4) or class-agnostic (B, R, 1, 4) ones.

    ``labels`` (B, R) are 0 = background, class c is c + 1; the background gets those of class 0.
    """
    if deltas.shape[2] == 1:
        return deltas[:, :, 0]
    own = (labels - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, 4)
    return deltas.gather(2, own)[:, :, 0]
