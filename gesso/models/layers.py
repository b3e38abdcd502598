"""The layers that necks and heads are made of: a convolution with what stands behind it, and a layer on whole regions.

Shape letters: B images, K regions, C channels, S cells a side of a region.
"""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from gesso.models.ops.linear import linear

Norm: TypeAlias = Literal["none", "batch", "group"]


def conv_block(
    inputs: int, outputs: int, kernel: int, *, norm: Norm = "none", relu: bool = False, stride: int = 1
) -> nn.Sequential:
    """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride): convolution, norm, ReLU; padded by kernel // 2.

    With a norm the convolution has no bias. Group norm has 32 groups, or as many as 32 and ``outputs`` have in common.
    The convolution is part 0 of the block, the norm part 1; weights start as He et al. 2015 (fan out), as detectron2's
    heads do.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    block: list[nn.Module] = [conv]
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if norm == "batch":
        block.append(nn.BatchNorm2d(outputs))
    elif norm == "group":
        block.append(nn.GroupNorm(math.gcd(32, outputs), outputs))
    if relu:
        block.append(nn.ReLU(inplace=True))
    return nn.Sequential(*block)


class RegionLinear(nn.Module):
    """A fully connected layer on the features of a region: (K, C, S, S) -> (K, outputs).

    Its weight is (outputs, C, S, S); in channels_last memory it is read in the order in which channels_last features
    lie, and neither is copied.
    """

    def __init__(self, channels: int, size: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, channels, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, pooled: Tensor) -> Tensor:
        """(K, outputs) of features (K, C, S, S)."""
        rows = pooled.permute(0, 2, 3, 1).flatten(1)
        return linear(rows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
