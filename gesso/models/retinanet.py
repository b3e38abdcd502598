"""RetinaNet: classes and boxes of every anchor in one stage, trained with focal loss.

Shape letters: B images, N anchors over all levels, A anchors a cell, C classes, M ground-truth slots.

Source: Focal Loss for Dense Object Detection (Lin et al. 2017), sections 3 and 4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig, AnchorGenerator, centres_inside
from gesso.models.backbone import BackboneConfig
from gesso.models.class_rows import ClassRows
from gesso.models.detector import Detector
from gesso.models.fpn import FPNConfig
from gesso.models.layers import Norm, conv_block
from gesso.models.losses import BoxLossConfig, LossTerm, balance, each_box_loss, focal_loss
from gesso.models.matching import match, take
from gesso.models.model import image_shape
from gesso.models.neck import NeckConfig
from gesso.models.postprocess import PostprocessConfig, select_detections
from gesso.models.rpn import has_extent
from gesso.structures import Detections, ImageBatch, Targets

_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RetinaHeadConfig:
    """Layers, matching and losses of the head."""

    convs: int = 4
    """3x3 convolutions before each of the two outputs."""
    width: int | None = None
    """Channels of these; None = those of the pyramid."""
    norm: Norm = "none"
    """The norm behind each of them."""
    prior: float = 0.01
    """The probability that new weights give every class, so that the many negatives do not swamp the first steps."""
    positive_iou: float = 0.5
    """An anchor is positive from this IoU with an object; the best anchors of each object are so anyway."""
    negative_iou: float = 0.4
    """An anchor is negative below this IoU with every object."""
    ignore_ioa: float = 0.5
    """An anchor of which this share lies in an ignored object is no negative."""
    alpha: float = 0.25
    """Weight of positives in the focal loss; negatives have 1 - alpha."""
    gamma: float = 2.0
    """How much easy examples are weighted down."""
    box_loss: BoxLossConfig = field(default_factory=lambda: BoxLossConfig(kind="l1"))
    """The loss of the anchors' boxes."""
    mean: Literal["batch", "image"] = "batch"
    """The losses are divided by the positives of the whole batch, or image by image, as torchvision does."""
    candidates: int = 1000
    """At most this many (anchor, class) pairs of each level enter NMS, the best ones."""
    use_padding: bool = False
    """Anchors centred in the padding are trained on and detect too, as in torchvision."""

    def __post_init__(self) -> None:
        for name in ("positive_iou", "negative_iou", "ignore_ioa", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"head.{name} is {getattr(self, name)}", remedy="Choose a number from 0 to 1.")
        if self.negative_iou > self.positive_iou:
            raise ConfigError(f"head.negative_iou {self.negative_iou} is above head.positive_iou {self.positive_iou}")
        if not 0 < self.prior < 1 or self.gamma < 0:
            raise ConfigError(
                f"head.prior is {self.prior}, head.gamma {self.gamma}",
                remedy="The prior lies between 0 and 1, gamma is not negative.",
            )
        if self.convs < 0 or self.candidates < 1 or (self.width is not None and self.width < 1):
            raise ConfigError(f"head: convs {self.convs}, candidates {self.candidates} or width {self.width} too small")


@dataclass(frozen=True, kw_only=True)
class RetinaNetConfig:
    """RetinaNet; the defaults are the paper's, for pictures of 800 pixels."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    neck: NeckConfig = field(
        default_factory=lambda: FPNConfig(inputs=("C3", "C4", "C5"), extra_levels=2, extra="conv_c5")
    )
    """What makes the levels P3 to P7."""
    anchors: AnchorConfig = field(default_factory=lambda: AnchorConfig(scales=(1.0, 2 ** (1 / 3), 2 ** (2 / 3))))
    """Anchors of the neck's levels."""
    head: RetinaHeadConfig = field(default_factory=RetinaHeadConfig)
    """Classes and boxes of the anchors."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """What is kept in inference; ``head.candidates`` counts instead of its candidates."""


class RetinaHead(nn.Module):
    """Two towers of convolutions, for classes and for boxes, shared by all levels.

    The towers start as He et al. 2015 and not with the paper's deviation of 0.01, which lets the signal die in towers
    that are narrower than the paper's.
    """

    def __init__(self, config: RetinaHeadConfig, *, channels: int, anchors_per_cell: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        width = config.width or channels
        self.class_convs, self.box_convs = (
            nn.Sequential(
                *(
                    conv_block(width if k else channels, width, 3, norm=config.norm, relu=True)
                    for k in range(config.convs)
                )
            )
            for _ in range(2)
        )
        width = width if config.convs else channels
        self.classes = nn.Conv2d(width, anchors_per_cell * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(width, anchors_per_cell * 4, 3, padding=1)
        for layer in (self.classes, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.classes.bias, -math.log((1 - config.prior) / config.prior))  # type: ignore[arg-type]

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row for each anchor of a cell and each class; see ``class_rows``."""
        rows = ClassRows(before=self.classes.out_channels // self.num_classes)
        return {"classes.weight": rows, "classes.bias": rows}

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each map (B, channels, h, w): logits (B, h w A, C) and deltas (B, h w A, 4), in the anchors' order."""
        logits = [self.classes(self.class_convs(level)).permute(0, 2, 3, 1) for level in maps]
        deltas = [self.deltas(self.box_convs(level)).permute(0, 2, 3, 1) for level in maps]
        B, C = len(maps[0]), self.num_classes
        return [level.reshape(B, -1, C) for level in logits], [level.reshape(B, -1, 4) for level in deltas]


class DensePredictions(NamedTuple):
    """What the head says of every anchor.

    Attributes:
        logits: of each level (B, n, C).
        deltas: of each level (B, n, 4).
        anchors: (N, 4) xyxy, level after level.
        inside: (B, N) bool, the anchor is in use: its centre lies in the picture proper.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: Tensor
    inside: Tensor


class RetinaNet(Detector):
    """``(ImageBatch, Targets) -> losses`` in training mode, ``(ImageBatch) -> Detections`` in evaluation mode.

    The losses are ``focal`` and ``box``.
    """

    def __init__(self, config: RetinaNetConfig, num_classes: int) -> None:
        super().__init__(config.backbone, config.neck, num_classes)
        self.config = config
        levels = self.neck.rpn_levels
        self.anchors = AnchorGenerator(config.anchors, [self.strides[name] for name in levels])
        self.head = RetinaHead(
            config.head,
            channels=self.channels[levels[0]],
            anchors_per_cell=config.anchors.per_cell,
            num_classes=num_classes,
        )

    def predictions(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> DensePredictions:
        """Runs the head on every level."""
        used = [maps[name] for name in self.neck.rpn_levels]
        logits, deltas = self.head(used)
        anchors = self.anchors([(m.shape[-2], m.shape[-1]) for m in used], image_shape(batch))
        inside = centres_inside(anchors, batch.sizes)
        if self.config.head.use_padding:
            inside = torch.ones_like(inside)
        return DensePredictions(logits=logits, deltas=deltas, anchors=anchors, inside=inside)

    def losses(self, maps: Mapping[str, Tensor], batch: ImageBatch, targets: Targets) -> dict[str, LossTerm]:
        """``focal`` on all anchors that are positive or negative, ``box`` on the positive ones; divided by these."""
        c = self.config.head
        found = self.predictions(maps, batch)
        matches = match(
            found.anchors[None],
            targets,
            positive_iou=c.positive_iou,
            negative_iou=c.negative_iou,
            low_quality=True,
            ignore_ioa=c.ignore_ioa,
        )
        positive, valid = matches.positive & found.inside, (matches.positive | matches.negative) & found.inside
        dtype = self.mean.dtype
        labels = targets.labels.gather(1, matches.slot)
        deltas = torch.cat(found.deltas, dim=1).to(dtype)
        counted = [level.shape[1] for level in found.logits]
        rows = (torch.split(value, counted, dim=1) for value in (labels, positive, valid))
        levels = zip(found.logits, *rows, strict=True)  # joined, the logits would be copied there and back
        parts = [focal_loss(*level, alpha=c.alpha, gamma=c.gamma).to(dtype) for level in levels]
        focal = torch.stack(parts).sum(dim=0)
        anchors = found.anchors.expand(len(deltas), -1, -1)
        truth = take(targets.boxes.to(dtype), matches.slot)
        box = each_box_loss(deltas, anchors, truth, positive, c.box_loss, _WEIGHTS).sum(dim=1)
        counts = positive.sum(dim=1)
        share = balance(positive, valid)
        return {"focal": self._term(focal, counts)._replace(balance=share), "box": self._term(box, counts)}

    def _term(self, sums: Tensor, counts: Tensor) -> LossTerm:
        """Sums (B,) over the anchors of each image, which has ``counts`` (B,) positive ones."""
        if self.config.head.mean == "image":
            return LossTerm((sums / counts.clamp(min=1)).sum(), torch.ones_like(counts).sum())
        return LossTerm(sums.sum(), counts.sum())

    @torch.no_grad()
    def infer(self, maps: Mapping[str, Tensor], batch: ImageBatch) -> Detections:
        """The best (anchor, class) pairs of each level before decoding, NMS within a class, the best of all."""
        c, C = self.config, self.num_classes
        found = self.predictions(maps, batch)
        scores, labels, boxes, first = [], [], [], 0
        for logits, deltas in zip(found.logits, found.deltas, strict=True):
            count = logits.shape[1]
            here = slice(first, first + count)
            usable = logits.to(self.mean.dtype).masked_fill(~found.inside[:, here, None], -torch.inf).flatten(1)
            best = usable.topk(min(c.head.candidates, count * C), dim=1)
            anchor = best.indices.div(C, rounding_mode="floor")
            reference = found.anchors[here].index_select(0, anchor.flatten()).view(*anchor.shape, 4)
            decoded = geometry.decode(reference, take(deltas, anchor).to(reference.dtype), _WEIGHTS)
            scores.append(best.values.sigmoid())
            labels.append(best.indices % C)
            boxes.append(geometry.clip(decoded, batch.sizes))
            first += count
        every, score = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
        good = (score > c.postprocess.min_score) & has_extent(every, c.postprocess.min_side)
        return select_detections(every, score, torch.cat(labels, dim=1), good, c.postprocess)
