import pytest

from gesso.config import from_dict, to_dict
from gesso.errors import ConfigError
from gesso.models.build import build_detector
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig
from tests.models.helpers import tiny_config


def test_builds_what_the_configuration_says():
    detector = build_detector(tiny_config(fpn_width=24), 7)
    assert isinstance(detector, FasterRCNN)
    assert detector.box_head.classes.out_features == 8 and detector.fpn.width == 24


def test_configurations_can_be_stored():
    for config in (FasterRCNNConfig(), tiny_config()):
        assert from_dict(FasterRCNNConfig, to_dict(config)) == config


def test_no_class_and_no_detector():
    with pytest.raises(ConfigError, match="0 classes"):
        build_detector(tiny_config(), 0)
    with pytest.raises(ConfigError, match="no detector is built from str"):
        build_detector("faster", 3)
    with pytest.raises(ConfigError, match="levels"):
        tiny_config(anchors=type(tiny_config().anchors)(sizes=(8.0,)))
