"""From a configuration to a detector."""

from typing import TypeAlias

import torch
from torch import nn

from gesso.errors import ConfigError
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig

DetectorConfig: TypeAlias = FasterRCNNConfig


def build_detector(config: DetectorConfig, num_classes: int) -> nn.Module:
    """The detector that a configuration describes, on the CPU, in channels_last memory format.

    Its new weights come from torch's global generator: seed it first.

    Raises:
        ConfigError: no class, or a configuration of no known detector, or a backbone that cannot be used.
    """
    if num_classes < 1:
        raise ConfigError(f"a detector of {num_classes} classes", remedy="The label space needs at least one name.")
    if isinstance(config, FasterRCNNConfig):
        return FasterRCNN(config, num_classes).to(memory_format=torch.channels_last)
    raise ConfigError(f"no detector is built from {type(config).__name__}")
