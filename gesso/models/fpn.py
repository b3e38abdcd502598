"""The feature pyramid: C2 to C5 -> P2 to P6.

Source: Feature Pyramid Networks for Object Detection, section 3; P6 by subsampling as in its section 4.1.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, a top-down path by nearest neighbour, and a 3x3 convolution on each level."""

    def __init__(self, channels: Mapping[str, int], width: int, *, subsampled_levels: int = 1) -> None:
        """Takes maps named C2, C3, ...

        Args:
            channels: of each input map by its name, finest first.
            width: channels of each output map.
            subsampled_levels: how many coarser levels follow by taking every second pixel; 1 gives P6.
        """
        super().__init__()
        self.names = tuple(channels)
        self.width = width
        self.subsampled_levels = subsampled_levels
        self.lateral = nn.ModuleList(nn.Conv2d(channels[name], width, 1) for name in self.names)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.names)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @property
    def out_names(self) -> tuple[str, ...]:
        """P2, P3, ...: the names of the output maps, finest first."""
        first = int(self.names[0][1:])
        return tuple(f"P{first + k}" for k in range(len(self.names) + self.subsampled_levels))

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"C2": (B, c2, H/4, W/4), ...}`` -> ``{"P2": (B, width, H/4, W/4), ..., "P6": (B, width, H/64, W/64)}``."""
        inner: Tensor | None = None
        levels: list[Tensor] = []
        for name, lateral, output in reversed(list(zip(self.names, self.lateral, self.output, strict=True))):
            here = lateral(maps[name])
            inner = here if inner is None else here + F.interpolate(inner, size=here.shape[-2:], mode="nearest")
            levels.insert(0, output(inner))
        for _ in range(self.subsampled_levels):
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return dict(zip(self.out_names, levels, strict=True))
