"""Semantic segmentation: a class for every pixel, by PSPNet's head or DeepLab's on a backbone with dilated stages.

Shape letters: B images, H x W padded pixels, h x w cells, C classes (without background), K scores of a cell: C + 1,
or C where there is no background.

Sources: Pyramid Scene Parsing Network (Zhao et al. 2017), sections 3.2 and 3.3; DeepLab (Chen et al. 2017), sections
3.1 and 3.2; Deformable Convolutional Networks (Dai et al. 2017), section 4.1, for the plain head.
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
from gesso.models.context import PyramidPooling
from gesso.models.dropout import drop_channels
from gesso.models.layers import Norm, conv_block
from gesso.models.losses import LossTerm
from gesso.models.model import Model, image_shape
from gesso.random_key import stream
from gesso.structures import ImageBatch, Targets

MOST_CLASSES = 254
"""A semantic map has 8 bits: 0 is the background, 255 is no class."""

_DROPOUT, _AUXILIARY_DROPOUT = stream("segmenter.dropout"), stream("segmenter.auxiliary_dropout")
_UNCOUNTED = -1
_AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True)
class PSPConfig:
    """PSPNet's head: pyramid pooling on the last map, and an auxiliary head on C4 in training."""

    bins: tuple[int, ...] = (1, 2, 3, 6)
    """Parts a side that the map is averaged over. The single part of 1 has no norm, as ``PyramidPooling`` says."""
    width: int = 512
    """Channels that the scores are made from."""
    auxiliary: float = 0.4
    """Factor on the loss of the auxiliary head (a 3x3 convolution to a quarter of C4's channels, and the scores); 0
    leaves the head out. Of a plain vision transformer it stands on the one map there is."""
    dropout: float = 0.1
    """Share of the channels in front of the scores that are dropped in training, in both heads."""
    norm: Norm = "batch"
    """The norm behind the convolutions of both heads."""

    def __post_init__(self) -> None:
        if not self.bins or min(self.bins) < 1:
            raise ConfigError(f"head.bins is {self.bins}", remedy="Give one or more numbers above 0.")
        if self.width < 1:
            raise ConfigError(f"head.width is {self.width}", remedy="Choose a number above 0.")
        if not self.auxiliary >= 0:
            raise ConfigError(f"head.auxiliary is {self.auxiliary}", remedy="Give a factor from 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"head.dropout is {self.dropout}", remedy="Choose a rate from 0 to below 1.")


@dataclass(frozen=True, kw_only=True)
class DeepLabConfig:
    """DeepLab's head: the scores of a cell right from the last map."""

    rates: tuple[int, ...] = ()
    """Empty: one 1x1 convolution, as Deformable Convolutional Networks has it. Otherwise the sum of one 3x3 convolution
    for each of these dilations (ASPP); DeepLab's are 6, 12, 18 and 24 at stride 8."""

    def __post_init__(self) -> None:
        if self.rates and min(self.rates) < 1:
            raise ConfigError(f"head.rates is {self.rates}", remedy="Give numbers above 0, or none.")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """A backbone and a head that scores every cell of its last map. The defaults are PSPNet's, with ResNet-50."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="resnet50", output_stride=8))
    """The backbone; an ``output_stride`` of 8 or 16 keeps its last map fine."""
    head: PSPConfig | DeepLabConfig = field(default_factory=PSPConfig)
    """What stands on the last map."""
    background: bool = True
    """Whether value 0 of a semantic map is a class of its own, as in PASCAL VOC; otherwise pixels of value 0 do not
    count, as in ADE20K."""


class PixelHead(nn.Module):
    """Layers, dropout, and the scores of every cell: the sum of one or more convolutions."""

    def __init__(
        self, layers: nn.Module, scores: list[nn.Conv2d], *, background: bool, dropout: float, chance: int
    ) -> None:
        super().__init__()
        self.layers = layers
        self.scores = nn.ModuleList(scores)
        self.background, self.dropout, self.chance = background, dropout, chance
        for layer in scores:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row for each class; see ``class_rows``."""
        rows = ClassRows(background=self.background)
        return {f"scores.{k}.{kind}": rows for k in range(len(self.scores)) for kind in ("weight", "bias")}

    def forward(self, values: Tensor, key: Tensor) -> Tensor:
        """Logits (B, K, h, w) in the dtype of the weights of a map (B, channels, h, w); ``key`` (B,) for the chance."""
        values = self.layers(values)
        if self.training:
            values = drop_channels(values, key, self.dropout, self.chance)
        first, *others = self.scores
        logits: Tensor = first(values)
        for layer in others:
            logits = logits + layer(values)
        return logits.to(first.weight.dtype)  # type: ignore[arg-type]


class Segmenter(Model):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> logits`` in evaluation mode.

    The losses are ``segmentation``, and ``auxiliary`` where there is such a head: means over the pixels that count of
    the global batch. The logits are (B, K, h, w) float32 at the resolution of the last map, padding included;
    ``class_map`` turns those of a picture into classes of its pixels.

    Attributes:
        config: what it was built from.
        map_name: the map that the head stands on, the last of the backbone.
        auxiliary_name: the map that the auxiliary head stands on.
    """

    semantic = True
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"backbone": ("backbone",), "head": ("head", "auxiliary")}

    def __init__(self, config: SegmenterConfig, num_classes: int) -> None:
        super().__init__(config.backbone, num_classes)
        if num_classes > MOST_CLASSES:
            raise ConfigError(
                f"a segmenter of {num_classes} classes: the maps have 8 bits and hold {MOST_CLASSES} at most",
                remedy="Choose fewer classes (gesso data select).",
            )
        self.config = config
        self.map_name = next(reversed(self.channels))
        self.auxiliary_name = "C4"  # also the name of a plain transformer's one map
        channels, K = self.channels[self.map_name], num_classes + config.background
        self.auxiliary: PixelHead | None = None
        if isinstance(config.head, DeepLabConfig):
            self.head = _deeplab(config.head, channels, K, config.background)
        else:
            pooling = PyramidPooling(channels, config.head.width, config.head.bins, norm=config.head.norm)
            self.head = _psp(config.head, pooling, config.head.width, K, config.background, _DROPOUT)
            if config.head.auxiliary:
                self.auxiliary = self._auxiliary(config.head, K)

    def _auxiliary(self, config: PSPConfig, K: int) -> PixelHead:
        channels = self.channels[self.auxiliary_name]
        width = max(channels // 4, 1)
        layers = conv_block(channels, width, 3, norm=config.norm, relu=True)
        return _psp(config, layers, width, K, self.config.background, _AUXILIARY_DROPOUT)

    def losses(self, maps: Mapping[str, Tensor], batch: ImageBatch, targets: Targets) -> dict[str, LossTerm]:
        """``segmentation``, and ``auxiliary``: softmax cross-entropy over the pixels that count, at full resolution."""
        if targets.semantic is None:
            raise ConfigError(
                "the segmenter learns semantic maps, but the ground truth has none",
                remedy="Train on data with semantic maps.",
            )
        labels, samples = self._labels(targets.semantic, batch)
        total = _pixel_loss(self.head(maps[self.map_name], batch.key), labels)
        terms = {"segmentation": LossTerm(total, samples)}
        if self.auxiliary is not None and isinstance(self.config.head, PSPConfig):
            logits = self.auxiliary(maps[self.auxiliary_name], batch.key)
            terms["auxiliary"] = LossTerm(self.config.head.auxiliary * _pixel_loss(logits, labels), samples)
        return terms

    @torch.no_grad()
    def infer(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> Tensor:
        """Logits (B, K, h, w) float32 of the cells of the last map, those in the padding too."""
        logits: Tensor = self.head(maps[self.map_name], batch.key)
        return logits.float()

    def _labels(self, semantic: Tensor, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """The score (B, H, W) int64 that each pixel should have highest, or ``_UNCOUNTED``; and how many count.

        Neither padding counts nor a value that is no class, such as 255.
        """
        H, W = image_shape(batch)
        rows = torch.arange(H, device=semantic.device) < batch.sizes[:, :1]
        columns = torch.arange(W, device=semantic.device) < batch.sizes[:, 1:]
        labels = semantic.long() - int(not self.config.background)
        known = (labels >= 0) & (semantic <= self.num_classes)
        counted = known & rows[:, :, None] & columns[:, None, :]
        return torch.where(counted, labels, _UNCOUNTED), counted.sum()


def _psp(config: PSPConfig, layers: nn.Module, width: int, K: int, background: bool, chance: int) -> PixelHead:
    scores = [nn.Conv2d(width, K, 1)]
    return PixelHead(layers, scores, background=background, dropout=config.dropout, chance=chance)


def _deeplab(config: DeepLabConfig, channels: int, K: int, background: bool) -> PixelHead:
    scores = [nn.Conv2d(channels, K, 3, padding=rate, dilation=rate) for rate in config.rates]
    scores = scores or [nn.Conv2d(channels, K, 1)]
    return PixelHead(nn.Identity(), scores, background=background, dropout=0.0, chance=_DROPOUT)


def _pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, h, w), brought to the size of labels (B, H, W) bilinearly, summed."""
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    # In rows: the spatial form of the loss adds in no fixed order on a GPU.
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)
    return F.cross_entropy(rows, labels.flatten(), ignore_index=_UNCOUNTED, reduction="none").sum()


@torch.no_grad()
def class_map(
    logits: Tensor,
    padded: tuple[int, int],
    size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    background: bool = True,
) -> Tensor:
    """The classes of one picture's pixels, at the resolution at which it is stored.

    The logits are brought to the padded picture bilinearly, as in training; its valid part is cut out and brought to
    the stored picture's size, again bilinearly; the highest wins (of equal ones the first).

    Args:
        logits: (K, h, w) of ``Segmenter``.
        padded: (H, W) of the batch's pictures.
        size: height and width of the valid part (``ImageBatch.sizes``).
        original_size: height and width of the stored picture (``ImageBatch.original_sizes``).
        background: whether the first score is that of the background.

    Returns:
        uint8 of that size, with the values of a semantic map: 0 is the background, 1 + c is class c.
    """
    shape = (int(original_size[0]), int(original_size[1]))
    best = torch.full(shape, -torch.inf, dtype=logits.dtype, device=logits.device)
    found = torch.zeros(shape, dtype=torch.uint8, device=logits.device)
    step = max(1, _AT_ONCE // max(shape[0] * shape[1], padded[0] * padded[1]))
    for first in range(0, len(logits), step):  # a few classes at a time: K large maps would need much memory
        some = F.interpolate(logits[None, first : first + step], size=padded, mode="bilinear", align_corners=False)
        some = some[:, :, : int(size[0]), : int(size[1])]
        value, which = F.interpolate(some, size=shape, mode="bilinear", align_corners=False)[0].max(dim=0)
        higher = value > best
        found = torch.where(higher, which + (first + int(not background)), found).to(torch.uint8)
        best = torch.where(higher, value, best)
    return found
