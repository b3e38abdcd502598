"""Deformable convolution as a module that takes the place of a plain one.

Shape letters: B images, H x W pixels of a map, h x w pixels of the output, K cells of the kernel, G deformable groups.

Sources: Deformable Convolutional Networks (Dai et al. 2017), section 2.1; Deformable ConvNets v2 (Zhu et al. 2018),
section 3.2, of which the modulation is here twice the sigmoid, so that a new layer is the plain convolution.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from gesso.errors import ConfigError


class DeformableConv2d(nn.Module):
    """(B, C, H, W) -> (B, outputs, h, w), each kernel cell read where ``offset``, a convolution of the input, says.

    ``weight`` and ``bias`` are those of the convolution that it replaces, under the same names, so its weights load;
    ``offset.weight`` and ``offset.bias`` start at 0, and then it computes what the plain convolution does. It samples
    in float32, in float64 for float64 inputs, and gives the dtype that a convolution would give. On a GPU torchvision
    sums the gradient in no fixed order.
    """

    def __init__(self, source: nn.Conv2d, *, version: Literal[1, 2] = 1, groups: int = 1) -> None:
        """Takes the place of ``source``, with its stride, padding, dilation and groups.

        Args:
            source: the plain convolution; its weight is shared, not copied.
            version: 1 moves the cells, 2 also weighs them.
            groups: G, how many parts of the input channels have offsets of their own.

        Raises:
            ConfigError: the input channels do not fall into as many groups, or the padding is not one of zeros that
                is given in numbers.
        """
        super().__init__()
        if source.in_channels % groups:
            raise ConfigError(
                f"a convolution of {source.in_channels} channels has no {groups} deformable groups",
                remedy="Choose a divisor of it.",
            )
        if isinstance(source.padding, str) or source.padding_mode != "zeros":
            raise ConfigError("a convolution with padding by name or other than zeros cannot be deformable")
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size = _pair(source.kernel_size)
        self.stride, self.padding, self.dilation = map(_pair, (source.stride, source.padding, source.dilation))
        self.groups, self.deformable_groups, self.version = source.groups, groups, version
        self.weight, self.bias = source.weight, source.bias
        cells = groups * self.kernel_size[0] * self.kernel_size[1]
        self.offset: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # draws no chance
            nn.Conv2d,
            source.in_channels,
            (2 if version == 1 else 3) * cells,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            device=source.weight.device,
            dtype=source.weight.dtype,
        )
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
        self.train(source.training)

    def forward(self, input: Tensor) -> Tensor:
        """Samples (B, C, H, W); the memory format stays.

        Of the maps of ``offset`` (B, 2 G K or 3 G K, h, w) the first 2 G K are the shifts (down, right) of the cells in
        pixels of the input, group by group and row by row, the others the logits of the cells' weights.
        """
        moved = self.offset(input)
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        with torch.autocast(input.device.type, enabled=False):
            maps, mask = _within_reach(moved.to(dtype)), None
            if self.version == 2:
                shifts = 2 * maps.shape[1] // 3
                maps, mask = maps[:, :shifts], 2 * maps[:, shifts:].sigmoid()
            out: Tensor = deform_conv2d(
                input.to(dtype).contiguous(),
                maps.contiguous(),
                self.weight.to(dtype),
                None if self.bias is None else self.bias.to(dtype),
                self.stride,
                self.padding,
                self.dilation,
                None if mask is None else mask.contiguous(),
            )
        channels_last = input.is_contiguous(memory_format=torch.channels_last)
        return out.to(moved.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def extra_repr(self) -> str:
        """The options of the layer, as ``nn.Conv2d`` prints its own."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, version={self.version}, "
            f"deformable_groups={self.deformable_groups}"
        )


def _within_reach(moved: Tensor) -> Tensor:
    """The same, but finite and no farther than where every sample is outside: torchvision reads there, and crashes."""
    far = 4.0 * max(moved.shape[2:]) + 64
    return moved.nan_to_num(nan=far, posinf=far, neginf=-far).clamp(-far, far)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    """Height and width; torch types both as tuples of any length."""
    height, width = values
    return int(height), int(width)
