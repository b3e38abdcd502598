"""One level instead of a pyramid: the neck of the detectors before it, on a stage 5 at stride 16.

Sources: R-FCN (Dai et al. 2016), section 3; An Analysis of Pre-Training on Object Detection, section 3 (ConvProj).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import ConfigError
from gesso.models.layers import conv_block


@dataclass(frozen=True, kw_only=True)
class SingleLevelConfig:
    """One map: C5, projected to fewer channels. Best with ``backbone.output_stride`` 16."""

    width: int = 256
    """Channels of the projection: 256 in the Analysis paper, 1024 in R-FCN."""
    rpn_level: Literal["C4", "C5", "conv_proj"] = "C4"
    """The map that carries the anchors; R-FCN's is C4."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"neck.width is {self.width}", remedy="Choose a number above 0.")
        if self.rpn_level not in ("C4", "C5", "conv_proj"):
            raise ConfigError(f"neck.rpn_level is {self.rpn_level}", remedy="Choose C4, C5 or conv_proj.")


class SingleLevel(nn.Module):
    """C5 -> ``conv_proj``, a 1x1 convolution and a ReLU; regions are pooled from it.

    Attributes: as of ``FeaturePyramid``; ``channels`` and ``strides`` also hold the level of the anchors.
    """

    def __init__(self, config: SingleLevelConfig, channels: Mapping[str, int], strides: Mapping[str, float]) -> None:
        """Takes the backbone's channels and strides by the names of its maps.

        Raises:
            ConfigError: the backbone has no C5.
        """
        super().__init__()
        if "C5" not in channels:
            raise ConfigError(
                f"the backbone has the map {', '.join(channels)} and no C5", remedy="Choose a backbone with stages."
            )
        self.names = self.roi_levels = ("conv_proj",)
        self.rpn_levels = (config.rpn_level,)
        self.channels = {**channels, "conv_proj": config.width}
        self.strides = {**strides, "conv_proj": strides["C5"]}
        self.proj = conv_block(channels["C5"], config.width, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"C5": (B, c5, h, w), ...}`` -> ``{"conv_proj": (B, width, h, w)}``."""
        return {"conv_proj": F.relu(self.proj(maps["C5"]))}
