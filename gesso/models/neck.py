"""The necks: what stands between a backbone and the heads.

A neck maps the backbone's maps by name to maps by name, and says ``names``, ``channels``, ``strides`` (pixels of the
picture per cell), ``rpn_levels`` (which carry anchors) and ``roi_levels`` (which regions are pooled from).
"""

from collections.abc import Mapping
from typing import TypeAlias

from gesso.models.fpn import FeaturePyramid, FPNConfig
from gesso.models.simple_pyramid import SimplePyramid, SimplePyramidConfig
from gesso.models.single_level import SingleLevel, SingleLevelConfig

NeckConfig: TypeAlias = FPNConfig | SimplePyramidConfig | SingleLevelConfig
Neck: TypeAlias = FeaturePyramid | SimplePyramid | SingleLevel


def build_neck(config: NeckConfig, channels: Mapping[str, int], strides: Mapping[str, float]) -> Neck:
    """The neck that a configuration describes, for a backbone of these channels and strides.

    Raises:
        ConfigError: the backbone lacks a map that it needs.
    """
    if isinstance(config, FPNConfig):
        return FeaturePyramid(config, channels, strides)
    if isinstance(config, SimplePyramidConfig):
        return SimplePyramid(config, channels, strides)
    return SingleLevel(config, channels, strides)
