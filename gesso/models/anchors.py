"""Anchors: boxes of fixed sizes and ratios around every cell of the pyramid.

Shape letters: B images, N anchors over all levels, A anchors a cell.

Source: Faster R-CNN, section 3.1.1; Feature Pyramid Networks, section 4.1 (one size a level). The layout is
torchvision's: base anchors are rounded to whole pixels (``rounded``) and centred on multiples of the stride; within a
level the order is row, column, then ratio and scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gesso.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Sizes and ratios of the anchors."""

    sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side in pixels of a square anchor, one for each pyramid level, finest first."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width; the area stays."""
    scales: tuple[float, ...] = (1.0,)
    """Factors on the size, all of them on every level."""
    sizes_per_level: int = 1
    """With n > 1, ``sizes`` holds n sizes of each level in turn, where no factors give them exactly."""
    rounded: bool = True
    """Round half the sides of an anchor to whole pixels, as torchvision does; detectron2 and mmdetection do not."""
    fitted: bool = False
    """Space the anchors of a level by the side of the picture over that of the map, rounded down, as torchvision does,
    instead of by the level's stride. It matters where a side is no multiple of the coarsest stride."""

    def __post_init__(self) -> None:
        for name in ("sizes", "ratios", "scales"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ConfigError(f"anchors.{name} is {values}", remedy="Give one or more numbers above 0.")
        if self.sizes_per_level < 1 or len(self.sizes) % self.sizes_per_level:
            raise ConfigError(f"anchors.sizes has {len(self.sizes)} sizes, {self.sizes_per_level} for each level")

    @property
    def per_cell(self) -> int:
        """A, the anchors of one cell."""
        return len(self.ratios) * len(self.scales) * self.sizes_per_level

    def levels(self) -> list[tuple[float, ...]]:
        """The sides of each level's square anchors, finest level first."""
        n = self.sizes_per_level
        groups = [self.sizes[k : k + n] for k in range(0, len(self.sizes), n)]
        return [tuple(size * scale for size in group for scale in self.scales) for group in groups]


def base_anchors(sides: Sequence[float], ratios: Sequence[float], *, rounded: bool = True) -> Tensor:
    """The anchors (A, 4) of a cell at the origin, ratios outermost, their corners rounded to whole pixels or not."""
    side = torch.tensor(sides)
    heights = torch.tensor(ratios).sqrt()
    w = ((1 / heights)[:, None] * side).flatten()
    h = (heights[:, None] * side).flatten()
    corners = torch.stack([-w, -h, w, h], dim=1) / 2
    return corners.round() if rounded else corners


class AnchorGenerator(nn.Module):
    """Anchors of a whole pyramid, computed from the shapes of its maps."""

    def __init__(self, config: AnchorConfig, strides: Sequence[float]) -> None:
        """Takes the stride of each level in pixels, finest first.

        Raises:
            ConfigError: the sizes are not for as many levels.
        """
        super().__init__()
        levels = config.levels()
        if len(levels) != len(strides):
            raise ConfigError(
                f"anchors.sizes has {len(levels)} levels, the neck {len(strides)}",
                remedy="Give one size (or sizes_per_level) for each of the neck's levels.",
            )
        self.config, self.strides = config, tuple(strides)
        for k, sides in enumerate(levels):
            self.register_buffer(
                f"base{k}", base_anchors(sides, config.ratios, rounded=config.rounded), persistent=False
            )

    def forward(self, shapes: Sequence[tuple[int, int]], image_shape: tuple[int, int]) -> Tensor:
        """Anchors (N, 4) xyxy in pixels, level after level, in the dtype of the module.

        Args:
            shapes: (height, width) of each level's map.
            image_shape: (H, W) of the padded pictures.
        """
        levels = []
        for k, (rows, columns) in enumerate(shapes):
            base: Tensor = self.get_buffer(f"base{k}")
            dy, dx = self.strides[k], self.strides[k]
            if self.config.fitted:
                dy, dx = image_shape[0] // rows, image_shape[1] // columns
            y = torch.arange(rows, device=base.device, dtype=base.dtype) * dy
            x = torch.arange(columns, device=base.device, dtype=base.dtype) * dx
            y, x = y[:, None].expand(rows, columns), x[None, :].expand(rows, columns)
            grid = torch.stack([x, y, x, y], dim=-1)
            levels.append((grid[:, :, None, :] + base).view(-1, 4))
        return torch.cat(levels)


def centres_inside(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Whether the centre of each box (..., N, 4) lies in the picture proper: bool (B, N).

    Args:
        boxes: (N, 4) or (B, N, 4).
        sizes: (B, 2) valid height and width.
    """
    x, y = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
    return (x < sizes[:, 1:]) & (y < sizes[:, :1]) & (x >= 0) & (y >= 0)
