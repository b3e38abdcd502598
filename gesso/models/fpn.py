"""The feature pyramid: C2 to C5 -> P2 to P7.

Sources: Feature Pyramid Networks for Object Detection, section 3, and section 4.1 for P6 by subsampling; RetinaNet
(Focal Loss for Dense Object Detection), section 4, for P6 and P7 by convolution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.context import LargeKernel, PyramidPooling
from gesso.models.layers import Norm, conv_block


@dataclass(frozen=True, kw_only=True)
class FPNConfig:
    """A feature pyramid on the maps of a backbone with several strides."""

    width: int = 256
    """Channels of every level."""
    inputs: tuple[str, ...] = ("C2", "C3", "C4", "C5")
    """The maps that it is built on, finest first; each gives a level of the same number."""
    extra_levels: int = 1
    """Coarser levels beyond them: 1 gives P6, 2 also P7."""
    extra: Literal["subsample", "conv_c5", "conv_p5"] = "subsample"
    """Where these come from: every second pixel of P5, or 3x3 convolutions of stride 2 on C5 or on P5."""
    extra_relu: bool = True
    """A ReLU between the extra levels that convolutions make, as RetinaNet has it; mmdetection has none."""
    norm: Norm = "none"
    """The norm behind every convolution."""
    context: Literal["none", "psp", "large_kernel"] = "none"
    """What stands on the coarsest map before the pyramid: PSPNet's pooling module, or large separable kernels."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"neck.width is {self.width}", remedy="Choose a number above 0.")
        every = ("C2", "C3", "C4", "C5")
        if self.inputs not in {every[a:b] for a in range(4) for b in range(a + 1, 5)}:
            raise ConfigError(
                f"neck.inputs is {' '.join(self.inputs)}", remedy="Name maps in a row such as C3 C4 C5, finest first."
            )
        if self.extra_levels < 0:
            raise ConfigError(f"neck.extra_levels is {self.extra_levels}", remedy="Choose 0 or above.")


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions, a top-down path by nearest neighbour, and a 3x3 convolution on each level.

    Attributes:
        names: of the levels, finest first: P2, P3, ...
        channels: of each level, by its name.
        strides: pixels of the picture per cell of each level.
        rpn_levels: the levels that carry anchors: all.
        roi_levels: the levels that regions are pooled from: those with an input of their own.
    """

    def __init__(self, config: FPNConfig, channels: Mapping[str, int], strides: Mapping[str, float]) -> None:
        """Takes the backbone's channels and strides by the names of its maps.

        Raises:
            ConfigError: the backbone has no such maps.
        """
        super().__init__()
        missing = [name for name in config.inputs if name not in channels]
        if missing:
            raise ConfigError(
                f"the backbone has the maps {', '.join(channels)}, but not {missing[0]} for a feature pyramid",
                remedy="Choose another backbone, or SimplePyramidConfig for a plain vision transformer.",
            )
        self.config, self.inputs = config, config.inputs
        width, top = config.width, config.inputs[-1]
        self.context = _context(config, channels[top])
        self.lateral = nn.ModuleList(
            conv_block(width if name == top and self.context else channels[name], width, 1, norm=config.norm)
            for name in config.inputs
        )
        self.output = nn.ModuleList(conv_block(width, width, 3, norm=config.norm) for _ in config.inputs)
        self.extra = nn.ModuleList()
        if config.extra != "subsample":
            first = channels[top] if config.extra == "conv_c5" else width
            for k in range(config.extra_levels):
                self.extra.append(nn.Conv2d(width if k else first, width, 3, stride=2, padding=1))
        for module in (m for part in (self.lateral, self.output, self.extra) for m in part.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._name_levels(strides)

    def _name_levels(self, strides: Mapping[str, float]) -> None:
        self.strides = {f"P{name[1:]}": strides[name] for name in self.inputs}
        self.roi_levels = tuple(self.strides)
        last, stride = int(self.inputs[-1][1:]), strides[self.inputs[-1]]
        for k in range(1, self.config.extra_levels + 1):
            self.strides[f"P{last + k}"] = stride * 2**k
        self.names = self.rpn_levels = tuple(self.strides)
        self.channels = dict.fromkeys(self.names, self.config.width)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"C2": (B, c2, H/4, W/4), ...}`` -> ``{"P2": (B, width, H/4, W/4), ..., "P6": (B, width, H/64, W/64)}``."""
        inner: Tensor | None = None
        levels: list[Tensor] = []
        for name, lateral, output in reversed(list(zip(self.inputs, self.lateral, self.output, strict=True))):
            found = maps[name]
            if inner is None:
                inner = lateral(found if self.context is None else self.context(found))
            else:
                here = lateral(found)
                inner = here + F.interpolate(inner, size=here.shape[-2:], mode="nearest")
            levels.insert(0, output(inner))
        below = maps[self.inputs[-1]] if self.config.extra == "conv_c5" else levels[-1]
        for k in range(self.config.extra_levels):
            if self.config.extra == "subsample":
                below = F.max_pool2d(below, kernel_size=1, stride=2)
            else:
                below = self.extra[k](F.relu(below) if k and self.config.extra_relu else below)
            levels.append(below)
        return dict(zip(self.names, levels, strict=True))


def _context(config: FPNConfig, channels: int) -> nn.Module | None:
    if config.context == "psp":
        return PyramidPooling(channels, config.width)
    if config.context == "large_kernel":
        return LargeKernel(channels, config.width)
    return None
