"""From a configuration to a model."""

from typing import TypeAlias, TypeVar

import torch

from gesso import config as configs
from gesso.errors import ConfigError
from gesso.models.cascade_rcnn import CascadeRCNN, CascadeRCNNConfig
from gesso.models.classifier import Classifier, ClassifierConfig
from gesso.models.detector import Detector
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig
from gesso.models.model import Model
from gesso.models.retinanet import RetinaNet, RetinaNetConfig
from gesso.models.rfcn import RFCN, RFCNConfig
from gesso.models.segmenter import Segmenter, SegmenterConfig

DetectorConfig: TypeAlias = FasterRCNNConfig | CascadeRCNNConfig | RetinaNetConfig | RFCNConfig
ModelConfig: TypeAlias = DetectorConfig | SegmenterConfig | ClassifierConfig

T = TypeVar("T", bound=ModelConfig)


def build_model(config: ModelConfig, num_classes: int) -> Model:
    """The model that a configuration describes, on the CPU, in channels_last memory format.

    Its new weights come from torch's global generator: seed it first.

    Raises:
        ConfigError: no class, a configuration of no known model or with a value that its field may not hold, or a
            backbone that cannot be used.
    """
    if isinstance(config, SegmenterConfig):
        made: Model = Segmenter(_checked(config, num_classes, "segmenter"), num_classes)
    elif isinstance(config, ClassifierConfig):
        made = Classifier(_checked(config, num_classes, "classifier"), num_classes)
    else:
        return build_detector(config, num_classes)
    return made.to(memory_format=torch.channels_last)


def build_detector(config: DetectorConfig, num_classes: int) -> Detector:
    """The same of a detector.

    Raises:
        ConfigError: as ``build_model``.
    """
    return _detector(_checked(config, num_classes, "detector"), num_classes).to(memory_format=torch.channels_last)


def _checked(config: T, num_classes: int, what: str) -> T:
    config = configs.from_dict(type(config), configs.to_dict(config))  # refuses what no field may hold
    if num_classes < 1:
        raise ConfigError(f"a {what} of {num_classes} classes", remedy="The label space needs at least one name.")
    return config


def _detector(config: DetectorConfig, num_classes: int) -> Detector:
    if isinstance(config, FasterRCNNConfig):
        return FasterRCNN(config, num_classes)
    if isinstance(config, CascadeRCNNConfig):
        return CascadeRCNN(config, num_classes)
    if isinstance(config, RetinaNetConfig):
        return RetinaNet(config, num_classes)
    if isinstance(config, RFCNConfig):
        return RFCN(config, num_classes)
    raise ConfigError(f"no detector is built from {type(config).__name__}")
