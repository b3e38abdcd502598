"""From a configuration to a detector."""

from typing import TypeAlias

import torch

from gesso import config as configs
from gesso.errors import ConfigError
from gesso.models.cascade_rcnn import CascadeRCNN, CascadeRCNNConfig
from gesso.models.detector import Detector
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig
from gesso.models.retinanet import RetinaNet, RetinaNetConfig
from gesso.models.rfcn import RFCN, RFCNConfig

DetectorConfig: TypeAlias = FasterRCNNConfig | CascadeRCNNConfig | RetinaNetConfig | RFCNConfig


def build_detector(config: DetectorConfig, num_classes: int) -> Detector:
    """The detector that a configuration describes, on the CPU, in channels_last memory format.

    Its new weights come from torch's global generator: seed it first.

    Raises:
        ConfigError: no class, a configuration of no known detector or with a value that its field may not hold, or a
            backbone that cannot be used.
    """
    config = configs.from_dict(type(config), configs.to_dict(config))  # refuses what no field may hold
    if num_classes < 1:
        raise ConfigError(f"a detector of {num_classes} classes", remedy="The label space needs at least one name.")
    return _new(config, num_classes).to(memory_format=torch.channels_last)


def _new(config: DetectorConfig, num_classes: int) -> Detector:
    if isinstance(config, FasterRCNNConfig):
        return FasterRCNN(config, num_classes)
    if isinstance(config, CascadeRCNNConfig):
        return CascadeRCNN(config, num_classes)
    if isinstance(config, RetinaNetConfig):
        return RetinaNet(config, num_classes)
    if isinstance(config, RFCNConfig):
        return RFCN(config, num_classes)
    raise ConfigError(f"no detector is built from {type(config).__name__}")
