"""The mask branch: a mask of each region, for its class.

Shape letters: B images, R regions an image, K regions that are computed, M ground-truth slots, C classes, S side of the
ground truth's grids, T side of a predicted mask.

Source: Mask R-CNN (He et al. 2017), section 3 (four convolutions, a deconvolution, one mask for each class).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.class_rows import ClassRows
from gesso.models.layers import Norm, conv_block
from gesso.models.losses import LossTerm
from gesso.models.roi import RoIPoolConfig, RoIPooler, RoISample
from gesso.structures import Detections, Targets


@dataclass(frozen=True, kw_only=True)
class MaskHeadConfig:
    """Layers and loss of the mask head."""

    convs: int = 4
    """3x3 convolutions before the deconvolution."""
    width: int = 256
    """Channels of these."""
    norm: Norm = "none"
    """The norm behind each of them."""
    pool_size: int = 14
    """Cells a side of the features; the mask has twice as many."""
    class_agnostic: bool = False
    """One mask for each region instead of one for each class."""
    samples: int = 128
    """Positive regions of each image that masks are learnt on, as a mean over the batch; further ones are left out."""
    target_side: int = 112
    """Cells a side of the grid on which the loader gives the mask of an object."""
    weight: float = 1.0
    """Factor on this loss."""
    half_pixel: bool = False
    """Learn masks half a pixel of the picture too far left and above, as torchvision does, which pastes them so too."""

    def __post_init__(self) -> None:
        for name in ("convs", "width", "pool_size", "samples", "target_side"):
            if getattr(self, name) < 1:
                raise ConfigError(f"mask_head.{name} is {getattr(self, name)}", remedy="Choose a number above 0.")
        if self.weight < 0:
            raise ConfigError(f"mask_head.weight is {self.weight}", remedy="Give a number from 0.")


class MaskHead(nn.Module):
    """Pooled features -> the logits of one mask for each region."""

    def __init__(self, config: MaskHeadConfig, *, channels: int, num_classes: int) -> None:
        super().__init__()
        width, self.class_agnostic = config.width, config.class_agnostic
        self.convs = nn.Sequential(
            *(conv_block(width if k else channels, width, 3, norm=config.norm, relu=True) for k in range(config.convs))
        )
        self.deconv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.masks = nn.Conv2d(width, 1 if config.class_agnostic else num_classes, 1)
        for layer in (self.deconv, self.masks):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row for each class; see ``class_rows``."""
        return {} if self.class_agnostic else {"masks.weight": ClassRows(), "masks.bias": ClassRows()}

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Logits (K, T, T) of pooled features (K, channels, T / 2, T / 2), each for its class of ``labels`` (K,).

        The last layer is applied for that class alone.
        """
        hidden = F.relu(self.deconv(self.convs(pooled)))
        own = labels if self.masks.out_channels > 1 else torch.zeros_like(labels)
        weight = self.masks.weight.flatten(1).index_select(0, own)
        assert self.masks.bias is not None
        logits = torch.bmm(weight[:, None], hidden.flatten(2))[:, 0] + self.masks.bias.index_select(0, own)[:, None]
        return logits.to(self.masks.weight.dtype).view(-1, *hidden.shape[2:])


class MaskBranch(nn.Module):
    """The mask head with its own pooling; on a CPU, outside a graph, only the regions in use are computed (but where a
    batch norm looks at them)."""

    def __init__(
        self,
        config: MaskHeadConfig,
        pool: RoIPoolConfig,
        channels: int,
        num_classes: int,
        levels: Sequence[str],
        strides: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.config = config
        self.pooler = RoIPooler(dataclasses.replace(pool, size=config.pool_size), levels, strides)
        self.head = MaskHead(config, channels=channels, num_classes=num_classes)

    def losses(self, maps: Mapping[str, Tensor], regions: RoISample, targets: Targets) -> dict[str, LossTerm]:
        """``mask``: binary cross-entropy on the positive regions, as a mean over the pixels of each.

        Objects without a mask (an all-zero mask frame) are not counted.

        Raises:
            ConfigError: the ground truth has no masks.
        """
        if targets.masks is None or targets.mask_frames is None:
            raise ConfigError(
                "the detector learns masks, but the ground truth has none",
                remedy="Train on data with masks, or without model.mask_head.",
            )
        B, R = regions.positive.shape
        # The statistics of a batch norm would be those of fewer regions, on a CPU alone.
        counts = any(isinstance(part, nn.BatchNorm2d) and part.training for part in self.head.modules())
        place = first(regions.positive.flatten(), B * min(R, self.config.samples), fill=counts)
        chosen = RoISample(*(value.flatten(0, 1).index_select(0, place) for value in regions))
        object_ = chosen.image * targets.valid.shape[1] + chosen.slot
        frames = targets.mask_frames.flatten(0, 1).index_select(0, object_).to(chosen.boxes.dtype)
        masks = targets.masks.flatten(0, 1).index_select(0, object_)
        logits = self.head(self.pooler(maps, chosen.boxes[None], chosen.image[None]), (chosen.labels - 1).clamp(min=0))
        wanted = mask_targets(masks, frames, chosen.boxes, logits.shape[-1], aligned=not self.config.half_pixel)
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))
        counted = chosen.positive & (frames[:, 2] > frames[:, 0])
        return {"mask": LossTerm(self.config.weight * torch.where(counted, each, 0).sum(), counted.sum())}

    @torch.no_grad()
    def probabilities(self, maps: Mapping[str, Tensor], found: Detections) -> Tensor:
        """(B, D, T, T) float32, for each valid detection the probability of its mask on a grid over its box, else 0."""
        B, D = found.valid.shape
        place = first(found.valid.flatten(), B * D)
        boxes = found.boxes.flatten(0, 1).index_select(0, place)
        image = place.div(D, rounding_mode="floor")
        logits = self.head(self.pooler(maps, boxes[None], image[None]), found.labels.flatten().index_select(0, place))
        every = logits.new_zeros(B * D, *logits.shape[1:]).index_copy(0, place, logits.sigmoid())
        return torch.where(found.valid[..., None, None], every.view(B, D, *logits.shape[1:]), 0).float()


def first(wanted: Tensor, most: int, *, fill: bool = False) -> Tensor:
    """Places (K,) int64 of the True elements of ``wanted`` (N,), in order; then of others, to fill up.

    K = ``most``; on a CPU and outside a graph, where nobody has to wait to read it, K is the number of True elements,
    at least 1 and at most ``most``: what would be thrown away is not computed, unless ``fill`` asks for it.
    """
    order = (~wanted).to(torch.int8).argsort(stable=True)
    if wanted.device.type == "cpu" and not torch.compiler.is_compiling() and not fill:
        most = max(1, min(most, int(wanted.numpy().sum())))
    return order[:most]


@torch.no_grad()
def mask_targets(masks: Tensor, frames: Tensor, boxes: Tensor, size: int, *, aligned: bool = False) -> Tensor:
    """The masks of objects as seen through regions: (K, T, T) in [0, 1], T = ``size``.

    RoIAlign of each mask, with as many samples a cell as it covers cells of the grid; sampling a grid is separable, so
    it is a product with one matrix for each axis. Cell k of a grid stands at k + 0.5. Where a grid has a cell for each
    pixel of the picture, it is torchvision's ``project_masks_on_boxes``.

    Args:
        masks: (K, S, S) uint8, 0 or 1.
        frames: (K, 4) xyxy, the region that each mask covers.
        boxes: (K, 4) xyxy, the regions.
        size: T.
        aligned: read where the region is. False reads half a pixel of the picture further on, and regions of
            at least a pixel, as torchvision does.
    """
    S = masks.shape[-1]
    scale = S / (frames[:, 2:] - frames[:, :2]).clamp(min=1e-6)
    corners = (boxes.view(-1, 2, 2) - frames[:, None, :2] + (0.0 if aligned else 0.5)) * scale[:, None] - 0.5
    low, length = corners[:, 0], corners[:, 1] - corners[:, 0]
    length = length.clamp(min=1e-6) if aligned else torch.maximum(length, scale)
    across, down = (_axis_weights(low[:, axis], length[:, axis], size, S) for axis in (0, 1))
    with torch.autocast(boxes.device.type, enabled=False):
        return down @ masks.to(boxes.dtype) @ across.mT


def _axis_weights(low: Tensor, length: Tensor, size: int, S: int) -> Tensor:
    """(K, size, S): the weight of each of S grid cells in each of ``size`` output cells along one axis.

    A positive region is at most twice as long as its object, so 2 S / size samples a cell see all of the grid; regions
    that are longer see every part of it more coarsely.
    """
    most = math.ceil(2 * S / size)
    samples = (length / size).ceil().clamp(max=most)
    step = (length / size)[:, None]
    cell = torch.arange(size, device=low.device, dtype=low.dtype)
    grid = torch.arange(S, device=low.device, dtype=low.dtype)
    weights = low.new_zeros(len(low), size, S)
    for k in range(most):
        at = low[:, None] + (cell + (k + 0.5) / samples[:, None]) * step
        used = (k < samples[:, None]) & (at >= -1) & (at <= S)
        near = (1 - (at.clamp(0, S - 1)[..., None] - grid).abs()).clamp(min=0)
        weights = weights + torch.where(used[..., None], near, 0)
    return weights / samples[:, None, None]
