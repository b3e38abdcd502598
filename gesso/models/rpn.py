"""The region proposal network.

Shape letters: B images, N anchors over all levels, A anchors a cell, P proposals an image, M ground-truth slots.

Source: Faster R-CNN, section 3.1; Feature Pyramid Networks, section 4.1 (one head for all levels).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.anchors import AnchorGenerator, centres_inside
from gesso.models.layers import Norm, conv_block
from gesso.models.losses import BoxLossConfig, LossTerm, box_loss, objectness_loss
from gesso.models.matching import match, sample, take
from gesso.models.ops.nms import batched_nms
from gesso.random_key import stream
from gesso.structures import Targets

_STREAM = stream("rpn-sample")
_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class RPNConfig:
    """How anchors are matched and sampled, and how many proposals there are."""

    positive_iou: float = 0.7
    """An anchor is positive from this IoU with an object; the best anchors of each object are so anyway."""
    negative_iou: float = 0.3
    """An anchor is negative below this IoU with every object."""
    ignore_ioa: float = 0.5
    """An anchor of which this share lies in an ignored object is no negative."""
    samples: int = 256
    """Anchors of each image that the loss is taken on."""
    positive_share: float = 0.5
    """At most this share of them is positive."""
    before_nms: int = 2000
    """Proposals of each level that enter NMS in training."""
    before_nms_test: int = 1000
    """The same in inference."""
    after_nms: int = 2000
    """Proposals of each image, over all levels, in training."""
    after_nms_test: int = 1000
    """The same in inference."""
    nms_iou: float = 0.7
    """NMS within a level drops what overlaps a better proposal by more."""
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    """The loss of the anchors' deltas."""
    convs: int = 1
    """3x3 convolutions before the two outputs."""
    width: int | None = None
    """Channels of these; None = those of the maps."""
    norm: Norm = "none"
    """The norm behind each of them."""
    use_padding: bool = False
    """Anchors centred in the padding are trained on and proposed too, as in torchvision."""

    def __post_init__(self) -> None:
        for name in ("positive_iou", "negative_iou", "ignore_ioa", "positive_share", "nms_iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rpn.{name} is {getattr(self, name)}", remedy="Choose a number from 0 to 1.")
        if self.negative_iou > self.positive_iou:
            raise ConfigError(f"rpn.negative_iou {self.negative_iou} is above rpn.positive_iou {self.positive_iou}")
        for name in ("samples", "before_nms", "before_nms_test", "after_nms", "after_nms_test", "convs", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"rpn.{name} is {getattr(self, name)}", remedy="Choose a number above 0.")


class RPNHead(nn.Module):
    """3x3 convolutions, then objectness and box deltas of each anchor, shared by all levels."""

    def __init__(self, config: RPNConfig, channels: int, anchors_per_cell: int) -> None:
        super().__init__()
        width = config.width or channels
        self.convs = nn.Sequential(
            *(conv_block(width if k else channels, width, 3, norm=config.norm, relu=True) for k in range(config.convs))
        )
        self.objectness = nn.Conv2d(width, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(width, anchors_per_cell * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each map (B, channels, h, w): logits (B, h w A) and deltas (B, h w A, 4), in the anchors' order."""
        logits, deltas = [], []
        for level in maps:
            hidden = self.convs(level)
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(hidden).permute(0, 2, 3, 1).reshape(len(level), -1, 4))
        return logits, deltas


class AnchorPredictions(NamedTuple):
    """What the head says of every anchor.

    Attributes:
        logits: (B, N) objectness, in the dtype of the weights.
        deltas: (B, N, 4).
        anchors: (N, 4) xyxy.
        inside: (B, N) bool, the anchor is in use: its centre lies in the picture proper.
        counts: anchors of each level; their sum is N.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    inside: Tensor
    counts: tuple[int, ...]


class Proposals(NamedTuple):
    """A fixed number of proposals, by falling score.

    Attributes:
        boxes: (B, P, 4) xyxy, clipped to the picture; detached.
        scores: (B, P) objectness logits, -inf in empty slots.
        valid: (B, P) bool.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor


class RegionProposalNetwork(nn.Module):
    """Proposes boxes from the maps of a pyramid, and learns to."""

    def __init__(self, config: RPNConfig, *, channels: int, anchors: AnchorGenerator) -> None:
        super().__init__()
        self.config = config
        self.anchors = anchors
        self.head = RPNHead(config, channels, anchors.config.per_cell)

    def forward(self, maps: Sequence[Tensor], image_shape: tuple[int, int], sizes: Tensor) -> AnchorPredictions:
        """Runs the head on maps (B, channels, h, w) of pictures of ``sizes`` (B, 2), padded to ``image_shape``."""
        dtype = self.head.objectness.weight.dtype
        logits, deltas = self.head(maps)
        anchors = self.anchors([(m.shape[-2], m.shape[-1]) for m in maps], image_shape)
        inside = centres_inside(anchors, sizes)
        if self.config.use_padding:
            inside = torch.ones_like(inside)
        return AnchorPredictions(
            logits=torch.cat(logits, dim=1).to(dtype),
            deltas=torch.cat(deltas, dim=1).to(dtype),
            anchors=anchors,
            inside=inside,
            counts=tuple(level.shape[1] for level in logits),
        )

    @torch.no_grad()
    def propose(self, predictions: AnchorPredictions, sizes: Tensor) -> Proposals:
        """The best boxes of each image: the top of each level before decoding, NMS in a level, the top of all."""
        c = self.config
        before = c.before_nms if self.training else c.before_nms_test
        after = c.after_nms if self.training else c.after_nms_test
        ranked = predictions.logits.masked_fill(~predictions.inside, -torch.inf)
        scores, index, levels, first = [], [], [], 0
        for level, count in enumerate(predictions.counts):
            best = ranked[:, first : first + count].topk(min(before, count), dim=1)
            scores.append(best.values)
            index.append(best.indices + first)
            levels.append(torch.full_like(best.indices, level))
            first += count
        score, at = torch.cat(scores, dim=1), torch.cat(index, dim=1)
        anchors = predictions.anchors.index_select(0, at.flatten()).view(*at.shape, 4)
        boxes = geometry.clip(geometry.decode(anchors, take(predictions.deltas, at), _WEIGHTS), sizes)
        valid = has_extent(boxes, 1e-3) & (score > -torch.inf)
        valid = valid & batched_nms(boxes, score, valid, torch.cat(levels, dim=1), c.nms_iou)
        best = score.masked_fill(~valid, -torch.inf).topk(min(after, score.shape[1]), dim=1)
        kept = valid.gather(1, best.indices)
        boxes = torch.where(kept[..., None], take(boxes, best.indices), 0)
        return Proposals(boxes=boxes, scores=best.values, valid=kept)

    def losses(self, predictions: AnchorPredictions, targets: Targets, key: Tensor) -> dict[str, LossTerm]:
        """``rpn_objectness`` and ``rpn_box`` on a sample of the anchors.

        Args:
            predictions: of ``forward``.
            targets: ground truth of the batch.
            key: (B,) int64, ``ImageBatch.key``.
        """
        c = self.config
        matches = match(
            predictions.anchors[None],
            targets,
            positive_iou=c.positive_iou,
            negative_iou=c.negative_iou,
            low_quality=True,
            ignore_ioa=c.ignore_ioa,
        )
        picked = sample(
            matches.positive & predictions.inside,
            matches.negative & predictions.inside,
            key,
            _STREAM,
            count=c.samples,
            positive_share=c.positive_share,
        )
        anchors = predictions.anchors.index_select(0, picked.place.flatten()).view(*picked.place.shape, 4)
        truth = take(targets.boxes.to(anchors.dtype), matches.slot.gather(1, picked.place))
        logits, deltas = predictions.logits.gather(1, picked.place), take(predictions.deltas, picked.place)
        return {
            "rpn_objectness": objectness_loss(logits, picked.positive, picked.valid),
            "rpn_box": box_loss(deltas, anchors, truth, picked.positive, picked.valid, c.box_loss, _WEIGHTS),
        }


def has_extent(boxes: Tensor, least: float) -> Tensor:
    """Whether boxes (..., 4) are at least ``least`` pixels wide and high; False where a side is not a number."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return (width >= least) & (height >= least)
