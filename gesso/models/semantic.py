"""Segmentation supervision: an auxiliary class for each cell of one pyramid level, in training only.

Shape letters: B images, C classes (without background), M ground-truth slots, S mask side, h x w cells of the level.

Source: MegDet's challenge entry (Peng et al. 2018, section 4.3) names it and prints no setting: level, layers and
weight are ours. So are the labels: masks where there are any, else filled boxes, the smallest object in front.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.class_rows import ClassRows
from gesso.models.layers import conv_block
from gesso.models.losses import LossTerm
from gesso.structures import Targets

_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """The auxiliary head that tells the class of each cell."""

    weight: float = 0.1
    """Factor on its loss."""
    level: str = "P3"
    """The level of the neck it stands on. Its logits are (B, C + 1, h, w) in float32: with many classes a coarser level
    saves memory."""
    convs: int = 2
    """3x3 convolutions before the classes."""
    width: int = 128
    """Channels of these."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"segmentation.weight is {self.weight}", remedy="Give a number from 0.")
        if self.convs < 0 or self.width < 1:
            raise ConfigError(
                f"segmentation has {self.convs} convolutions of width {self.width}",
                remedy="Give convs from 0 and a width above 0.",
            )
        if not self.level:
            raise ConfigError("segmentation.level is empty", remedy="Name a level of the pyramid, such as P3.")


class SegmentationHead(nn.Module):
    """One level of the pyramid -> a class for each of its cells."""

    def __init__(self, config: SegmentationConfig, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.convs = nn.Sequential()
        for _ in range(config.convs):
            self.convs.append(conv_block(channels, config.width, 3, relu=True))
            channels = config.width
        self.classes = nn.Conv2d(channels, num_classes + 1, 1)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.zeros_(self.classes.bias)  # type: ignore[arg-type]

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row for each class; see ``class_rows``."""
        return {"classes.weight": ClassRows(background=True), "classes.bias": ClassRows(background=True)}

    def forward(self, level: Tensor) -> Tensor:
        """Logits (B, C + 1, h, w) in the dtype of the weights of a map (B, channels, h, w); 0 = background."""
        logits: Tensor = self.classes(self.convs(level))
        return logits.to(self.classes.weight.dtype)

    def losses(
        self, logits: Tensor, targets: Targets, image_shape: tuple[int, int], sizes: Tensor
    ) -> dict[str, LossTerm]:
        """``segmentation``: softmax cross-entropy over the cells of ``cell_labels`` that count.

        Args:
            logits: (B, C + 1, h, w) of ``forward``.
            targets: ground truth of the batch.
            image_shape: (H, W) of the padded pictures.
            sizes: (B, 2) valid height and width.
        """
        labels, counted = cell_labels(targets, (logits.shape[2], logits.shape[3]), image_shape, sizes)
        # In rows: the spatial form of the loss adds in no fixed order on a GPU.
        rows = logits.permute(0, 2, 3, 1).flatten(0, 2)
        each = F.cross_entropy(rows, labels.flatten(), reduction="none").view_as(counted)
        total = self.config.weight * torch.where(counted, each, 0).sum()
        return {"segmentation": LossTerm(total, counted.sum())}


@torch.no_grad()
def cell_labels(
    targets: Targets, shape: tuple[int, int], image_shape: tuple[int, int], sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """What stands at the centre of each cell: the smallest object by its box (of equal ones the first), or background.

    An object covers what its mask covers, or its box where the mask's frame is all zero. A cell in the padding or in an
    ignored object does not count.

    Args:
        targets: ground truth of B images.
        shape: (h, w), the cells.
        image_shape: (H, W) of the padded pictures.
        sizes: (B, 2) valid height and width.

    Returns:
        Labels (B, h, w) int64, 0 = background, class c = c + 1; and which cells count, (B, h, w) bool.
    """
    B, M = targets.valid.shape
    y, x = (
        (torch.arange(cells, device=sizes.device, dtype=torch.float32) + 0.5) * (side / cells)
        for cells, side in zip(shape, image_shape, strict=True)
    )
    usable = targets.valid & ~targets.ignore
    order = torch.where(usable, geometry.area(targets.boxes), torch.inf).argsort(dim=1, stable=True)
    # The rank of an object: 0 = nothing there, 1 to M = usable, the smallest highest; M + 1 = ignored, above all.
    rank = torch.where(usable, M - order.argsort(dim=1), torch.where(targets.valid, M + 1, 0)).short()
    top = torch.zeros(B, *shape, dtype=torch.short, device=sizes.device)
    step = max(1, _AT_ONCE // max(1, B * shape[0] * shape[1]))
    for first in range(0, M, step):
        part = slice(first, first + step)
        top = torch.maximum(top, _highest(targets, part, rank[:, part], y, x))
    by_rank = F.pad(targets.labels.gather(1, order).flip(1) + 1, (1, 1))
    labels = by_rank.gather(1, top.flatten(1).long()).view_as(top)
    counted = (y < sizes[:, :1])[:, :, None] & (x < sizes[:, 1:])[:, None, :] & (top <= M)
    return labels, counted


def _highest(targets: Targets, part: slice, rank: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The highest rank (B, h, w) int16 of the objects in ``part`` that cover a cell; ``rank`` (B, m) is theirs."""
    boxes, masks, frames = targets.boxes[:, part], targets.masks, targets.mask_frames
    if masks is None or frames is None:
        return _within(boxes, rank, y, x).amax(dim=1)
    frames = frames[:, part]
    bare = (frames == 0).all(dim=2)
    frames = torch.where(bare[..., None], boxes, frames)
    S = masks.shape[-1]
    low, high = frames[..., :2, None], frames[..., 2:, None]
    v, u = (
        ((at - low[:, :, axis]) / (high - low)[:, :, axis].clamp(min=1e-6) * S).clamp(0, S - 1).long()
        for axis, at in ((1, y), (0, x))
    )
    lines = masks[:, part].gather(2, v[..., None].expand(-1, -1, -1, S))
    inside = lines.gather(3, u[:, :, None, :].expand(-1, -1, len(y), -1)) > 0
    return (_within(frames, rank, y, x) & -(inside | bare[..., None, None]).short()).amax(dim=1)


def _within(boxes: Tensor, rank: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """``rank`` (B, m) int16 at the cells (B, m, h, w) whose centre lies in the box (B, m, 4), 0 elsewhere."""
    x1, y1, x2, y2 = boxes[..., None].unbind(2)
    rows = torch.where((y >= y1) & (y < y2), rank[..., None], 0)
    columns = -((x >= x1) & (x < x2)).short()  # -1 has all bits set
    return rows[..., :, None] & columns[..., None, :]
