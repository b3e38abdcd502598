import pytest

from gesso.config import from_dict, to_dict
from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig
from gesso.models.build import build_detector
from gesso.models.cascade_rcnn import CascadeRCNN
from gesso.models.faster_rcnn import FasterRCNN
from gesso.models.fpn import FPNConfig
from gesso.models.retinanet import RetinaNet
from gesso.models.rfcn import RFCN
from tests.models.helpers import KINDS, tiny_config

CLASSES = {
    "cascade_rcnn": CascadeRCNN,
    "cascade_masks": CascadeRCNN,
    "retinanet": RetinaNet,
    "rfcn": RFCN,
    "rfcn_3000": RFCN,
}


@pytest.mark.parametrize("kind", KINDS)
def test_builds_what_the_configuration_says(kind):
    detector = build_detector(tiny_config(kind), 7)
    assert type(detector) is CLASSES.get(kind, FasterRCNN)
    assert detector.num_classes == 7 and detector.config == tiny_config(kind)


def test_channels_last_weights_and_sizes():
    import torch

    detector = build_detector(tiny_config(neck=FPNConfig(width=24)), 7)
    assert detector.box_head.classes.out_features == 8 and detector.neck.channels["P2"] == 24
    assert detector.neck.output[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_configurations_can_be_stored(kind):
    for config in (tiny_config(kind), type(tiny_config(kind))()):
        assert from_dict(type(config), to_dict(config)) == config


def test_no_class_and_no_detector():
    with pytest.raises(ConfigError, match="0 classes"):
        build_detector(tiny_config(), 0)
    with pytest.raises(ConfigError, match="no detector is built from str"):
        build_detector("faster", 3)
    with pytest.raises(ConfigError, match="1 levels, the neck 5"):
        build_detector(tiny_config(anchors=AnchorConfig(sizes=(8.0,))), 3)
