"""Residual networks are told apart by their weights."""

import pytest
import torch
import torchvision

from gesso.models.resnets import LAYER, RESNETS, resnet_of


@pytest.mark.parametrize("name", RESNETS.values())
def test_every_network_is_recognised(name):
    with torch.device("meta"):
        module = getattr(torchvision.models, name)(weights=None)
    state = module.state_dict()
    assert resnet_of(state) == name
    assert resnet_of({f"a.b.{key}": value for key, value in state.items()}, "a.b.") == name
    assert {key for key in state if not LAYER.fullmatch(key)} == {"fc.weight", "fc.bias"}


def test_others_are_not():
    with torch.device("meta"):
        state = torchvision.models.resnet50(weights=None).state_dict()
        assert resnet_of(torchvision.models.mobilenet_v3_small(weights=None).state_dict()) is None
    assert resnet_of({key: value for key, value in state.items() if not key.startswith("layer4.2")}) is None
    assert resnet_of({key: value for key, value in state.items() if key != "conv1.weight"}) is None
    assert resnet_of({}) is None
