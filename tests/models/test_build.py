import dataclasses

import pytest
import torch

from gesso.config import from_dict, to_dict
from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.build import build_detector, build_model
from gesso.models.cascade_rcnn import CascadeRCNN, CascadeRCNNConfig
from gesso.models.classifier import Classifier, ClassifierConfig
from gesso.models.faster_rcnn import FasterRCNN, FasterRCNNConfig
from gesso.models.fpn import FPNConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.retinanet import RetinaNet, RetinaNetConfig
from gesso.models.rfcn import RFCN, RFCNConfig
from gesso.models.segmenter import Segmenter, SegmenterConfig
from gesso.models.semantic import SegmentationConfig
from gesso.models.single_level import SingleLevelConfig
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


@pytest.mark.parametrize(("kind", "model"), [(SegmenterConfig, Segmenter), (ClassifierConfig, Classifier)])
def test_builds_models_of_every_task(kind, model):
    config = kind(backbone=BackboneConfig(name="test_resnet", pretrained=False))
    made = build_model(config, 7)
    assert type(made) is model and made.num_classes == 7 and made.config == config
    weight = next(value for value in made.parameters() if value.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match="0 classes"):
        build_model(config, 0)
    assert type(build_model(tiny_config(), 7)) is FasterRCNN


def test_a_value_that_no_field_may_hold_is_refused():
    with pytest.raises(ConfigError, match="background: expected bool"):
        build_model(SegmenterConfig(background="yes"), 3)
    with pytest.raises(ConfigError, match="dropout: expected float"):
        build_model(dataclasses.replace(ClassifierConfig(), dropout=False), 3)


def test_channels_last_weights_and_sizes():
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: FasterRCNNConfig(neck=FPNConfig(extra="bogus")), "neck.extra"),
        (lambda: FasterRCNNConfig(box_head=BoxHeadConfig(classifier="huber")), "box_head.classifier"),
        (lambda: FasterRCNNConfig(anchors=AnchorConfig(sizes=(float("nan"),) * 5)), "anchors.sizes"),
        (lambda: FPNConfig(inputs=("C2", "C4")), "neck.inputs is C2 C4"),
        (lambda: RFCNConfig(neck=FPNConfig()), "one level"),
        (lambda: RFCNConfig(segmentation=SegmentationConfig()), "no pyramid"),
        (lambda: SingleLevelConfig(rpn_level="P4"), "rpn_level is P4"),
        (lambda: CascadeRCNNConfig(stage_weights=(-1.0, 1.0, 1.0)), "stage_weights"),
        (lambda: RetinaNetConfig(neck=SingleLevelConfig(width=8)), "anchors.sizes has 5 levels, the neck 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config, message):
    with pytest.raises(ConfigError, match=message):
        build_detector(config(), 3)


def test_an_epsilon_of_zero_is_refused_where_statistics_train():
    backbone = BackboneConfig(name="test_resnet", pretrained=False, norm_eps=0.0)
    detector = build_detector(tiny_config(backbone=backbone), 3)
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    with pytest.raises(ConfigError, match="epsilon of 0"):
        apply_norm_policy(detector, NormPolicy(kind="train"))
