"""Blocks that let every cell of a map see far: pyramid pooling, and large separable kernels.

Both turn (B, channels, H, W) into (B, outputs, H, W), whatever H and W. Shape letters: B images, H x W cells.

Sources: Pyramid Scene Parsing Network, Zhao et al. 2017, section 3.2; Large Kernel Matters, Peng et al. 2017, section
3.1 (the global convolutional network, as MegDet's challenge entry used it).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.layers import Norm, conv_block


class PyramidPooling(nn.Module):
    """The means over 1 x 1, 2 x 2, 3 x 3 and 6 x 6 parts of a map, laid over it and joined with it.

    Each mean goes through a 1x1 convolution to a quarter of the channels, a norm and a ReLU; it is brought back to the
    map's size bilinearly, and a 3x3 convolution, norm and ReLU follow the concatenation. A map of fewer cells than
    parts is pooled with parts that overlap.

    The single part (a bin of 1) has no norm, against the paper: there are only B values of a channel, too few for
    statistics at a detector's batch sizes, and none at all for one image. (Batch norm cannot train on one image whose
    whole map is one cell: no block can.)
    """

    def __init__(self, channels: int, outputs: int, bins: Sequence[int] = (1, 2, 3, 6), norm: Norm = "batch") -> None:
        super().__init__()
        if not bins or min(bins) < 1:
            raise ConfigError(f"pyramid pooling over {tuple(bins)} parts", remedy="Give one or more numbers above 0.")
        self.bins = tuple(bins)
        width = max(channels // 4, 1)
        self.parts = nn.ModuleList(
            conv_block(channels, width, 1, norm="none" if count == 1 else norm, relu=True) for count in self.bins
        )
        self.join = conv_block(channels + len(self.bins) * width, outputs, 3, norm=norm, relu=True)

    def forward(self, values: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, outputs, H, W)."""
        layers = [values]
        for count, part in zip(self.bins, self.parts, strict=True):
            pooled = part(F.adaptive_avg_pool2d(values, count))
            layers.append(F.interpolate(pooled, size=values.shape[-2:], mode="bilinear", align_corners=False))
        joined: Tensor = self.join(torch.cat(layers, dim=1))
        return joined


class LargeKernel(nn.Module):
    """A dense connection to size x size cells from two pairs of lines: (k x 1, 1 x k) plus (1 x k, k x 1).

    It is linear, as in the paper: what calls it decides on a norm or a ReLU.
    """

    def __init__(self, channels: int, outputs: int, size: int = 15) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ConfigError(f"a large kernel of size {size}", remedy="Choose an odd number above 0.")
        column, row = (size, 1), (1, size)
        self.down = nn.Sequential(_line(channels, outputs, column), _line(outputs, outputs, row))
        self.across = nn.Sequential(_line(channels, outputs, row), _line(outputs, outputs, column))

    def forward(self, values: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, outputs, H, W)."""
        total: Tensor = self.down(values) + self.across(values)
        return total


def _line(inputs: int, outputs: int, size: tuple[int, int]) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, padding=(size[0] // 2, size[1] // 2))
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
