import pytest
import torch
from torch import nn

from gesso.errors import ConfigError
from gesso.models.weights import load_weights


def model():
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 4)})


def test_all_of_it():
    source, target = model(), model().double()
    report = load_weights(target, source.state_dict())
    assert report.complete and len(report.loaded) == 4
    assert target["body"].weight.dtype == torch.float64
    assert torch.equal(target["head"].weight.float(), source["head"].weight)


def test_every_name_is_reported():
    target = model()
    before = target["head"].weight.clone()
    state = {"body.weight": torch.ones(3, 2), "head.weight": torch.ones(9, 3), "neck.weight": torch.ones(1)}
    report = load_weights(target, state)
    assert report.loaded == ("body.weight",)
    assert report.missing == ("body.bias", "head.bias")
    assert report.unexpected == ("neck.weight",)
    assert report.wrong_shape == (("head.weight", (4, 3), (9, 3)),)
    assert torch.equal(target["head"].weight, before) and (target["body"].weight == 1).all()
    text = "\n".join(report.lines())
    assert not report.complete
    assert all(name in text for name in ("body.bias", "neck.weight", "head.weight (4, 3) <- (9, 3)"))


def test_parts():
    source, target = model(), model()
    report = load_weights(target, source.state_dict(), parts=("body",))
    assert report.loaded == ("body.weight", "body.bias") and report.left_out == ("head.weight", "head.bias")
    assert not report.missing and not torch.equal(target["head"].weight, source["head"].weight)
    with pytest.raises(ConfigError, match="'body'"):
        load_weights(target, source.state_dict(), parts=("boddy",))
