"""The simple feature pyramid of a plain vision transformer: C4 -> P2 to P6.

Source: Exploring Plain Vision Transformer Backbones for Object Detection (Li et al. 2022), section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from gesso.errors import ConfigError

_FACTORS = (4.0, 2.0, 1.0, 0.5)


@dataclass(frozen=True, kw_only=True)
class SimplePyramidConfig:
    """A pyramid from the one map of a plain vision transformer."""

    width: int = 256
    """Channels of the pyramid's levels."""
    levels: int = 4
    """How many levels, finest first, of those with 4, 2, 1 and 1/2 times the cells a side of the backbone's map: 4
    gives P2 to P5."""
    subsampled_levels: int = 1
    """How many coarser levels follow by taking every second cell; 1 gives P6."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"neck.width is {self.width}", remedy="Choose a number above 0.")
        if not 1 <= self.levels <= len(_FACTORS):
            raise ConfigError(f"neck.levels is {self.levels}", remedy="Choose a number from 1 to 4.")
        if self.subsampled_levels < 0:
            raise ConfigError(f"neck.subsampled_levels is {self.subsampled_levels}", remedy="Choose 0 or above.")


class SimplePyramid(nn.Module):
    """Each level resamples the same last map, then a 1x1 and a 3x3 convolution, both with layer norm.

    The sides are rounded up, and cell k of every level begins at pixel k times its stride.

    Attributes:
        names: P2, P3, ...: of the output maps, finest first.
        channels: of each output map, by its name.
        strides: pixels of the picture per cell of each output map, by its name.
        rpn_levels: the maps that proposals come from: all.
        roi_levels: the maps that regions are pooled from: all but the subsampled ones.
    """

    def __init__(self, config: SimplePyramidConfig, channels: Mapping[str, int], strides: Mapping[str, float]) -> None:
        """Takes the channels and strides of the backbone's only map, by its name.

        Raises:
            ConfigError: the backbone has more than one map.
        """
        super().__init__()
        if len(channels) != 1:
            raise ConfigError(
                f"a simple pyramid needs a backbone with one map, this one has {', '.join(channels)}",
                remedy="Use FPNConfig, or a plain vision transformer such as vit_small_patch14_dinov2.",
            )
        self.source = next(iter(channels))
        inputs, stride = channels[self.source], strides[self.source]
        self.subsampled_levels = config.subsampled_levels
        factors = _FACTORS[: config.levels]
        self.stages = nn.ModuleList(_stage(inputs, config.width, factor) for factor in factors)
        of_levels = [stride / factor for factor in factors]
        for _ in range(config.subsampled_levels):
            of_levels.append(2 * of_levels[-1])
        self.names: tuple[str, ...] = tuple(f"P{2 + k}" for k in range(len(of_levels)))
        self.channels: dict[str, int] = dict.fromkeys(self.names, config.width)
        self.strides: dict[str, float] = dict(zip(self.names, of_levels, strict=True))
        self.rpn_levels: tuple[str, ...] = self.names
        self.roi_levels: tuple[str, ...] = self.names[: config.levels]

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"C4": (B, c, h, w)}`` -> ``{"P2": (B, width, 4h, 4w), ..., "P5": (B, width, h/2, w/2), "P6": ...}``."""
        levels: list[Tensor] = [stage(maps[self.source]) for stage in self.stages]
        for _ in range(self.subsampled_levels):
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return dict(zip(self.names, levels, strict=True))


def _stage(inputs: int, width: int, factor: float) -> nn.Sequential:
    """(B, inputs, h, w) -> (B, width, factor h, factor w), sides rounded up."""
    parts: list[nn.Module] = []
    now = inputs
    if factor == 4:
        parts += [_deconvolution(now, inputs // 2), LayerNorm2d(inputs // 2), nn.GELU()]
        now = inputs // 2
    if factor > 1:
        parts.append(_deconvolution(now, now // 2))
        now //= 2
    if factor < 1:
        parts.append(nn.MaxPool2d(2, stride=2, ceil_mode=True))
    parts += [nn.Conv2d(now, width, 1, bias=False), LayerNorm2d(width)]
    parts += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
    return nn.Sequential(*parts)


def _deconvolution(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
