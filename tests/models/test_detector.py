"""What stands before the heads: pictures as the backbone expects them, and maps by name."""

import dataclasses

import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from gesso.errors import ConfigError
from gesso.models.model import image_shape
from gesso.models.semantic import SegmentationConfig
from tests.models.helpers import random_batch, tiny_detector


def test_normalisation():
    detector, (batch, _) = tiny_detector(), random_batch()
    expected = normalize(batch.images / 255, detector.backbone.mean, detector.backbone.std)
    expected[1, :, 50:], expected[0, :, :, 33:] = 0, 0
    values = detector.normalise(dataclasses.replace(batch, sizes=torch.tensor([[64, 33], [50, 64]])))
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    assert values.is_contiguous(memory_format=torch.channels_last)


def test_pictures_in_floating_point():
    """A picture that was resized without rounding is not rounded here."""
    detector, (batch, _) = tiny_detector().eval(), random_batch()
    floats = dataclasses.replace(batch, images=batch.images.float())
    assert torch.equal(detector.normalise(floats), detector.normalise(batch))
    half = detector.normalise(dataclasses.replace(batch, images=batch.images + 0.5))
    torch.testing.assert_close(
        half - detector.normalise(batch), (0.5 / 255 / detector.std * 255).expand_as(half), atol=1e-5, rtol=1e-4
    )
    assert detector.double().normalise(floats).dtype == torch.float64


def test_maps_of_backbone_and_neck_by_name():
    detector, (batch, _) = tiny_detector().eval(), random_batch()
    maps = detector.maps(batch)
    assert tuple(maps) == ("C2", "C3", "C4", "C5", "P2", "P3", "P4", "P5", "P6") == tuple(detector.channels)
    assert detector.channels.keys() == detector.strides.keys()
    assert image_shape(batch) == (64, 64)
    assert not {"mean", "std"} & detector.state_dict().keys()


def test_errors_of_features():
    detector, (batch, targets) = tiny_detector(), random_batch()
    with pytest.raises(ConfigError, match="'fc1' needs boxes"):
        detector.features(batch, ["P2", "roi", "fc1"])
    with pytest.raises(ConfigError, match="no feature 'P9'") as error:
        detector.features(batch, ["P9"], boxes=targets.boxes)
    assert "P" in error.value.remedy
    with pytest.raises(ConfigError, match="no feature 'roi'"):
        tiny_detector("retinanet").features(batch, ["roi"], boxes=targets.boxes)
    with pytest.raises(ConfigError, match="no feature 'fc1'"):
        tiny_detector("rfcn").features(batch, ["fc1"], boxes=targets.boxes)


def test_errors_of_training_and_of_levels():
    batch, targets = random_batch()
    with pytest.raises(AssertionError, match="targets"):
        tiny_detector()(batch)
    with pytest.raises(ConfigError, match=r"segmentation\.level is P7"):
        tiny_detector(segmentation=SegmentationConfig(level="P7"))
    with pytest.raises(ConfigError, match="the ground truth has none"):
        tiny_detector("mask_rcnn")(batch, targets)
