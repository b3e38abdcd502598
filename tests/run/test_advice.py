import dataclasses

import pytest

from gesso.models.norm import NormPolicy
from gesso.run.advice import norm_advice
from gesso.run.models import new_model
from gesso.run.train import train
from tests.models.helpers import tiny_detector
from tests.run.helpers import tiny_run, with_training


def config(kind, *, pretraining=False, pretrained=False):
    made = with_training(tiny_run(None), norm=NormPolicy(kind=kind))
    model = dataclasses.replace(made.model, backbone=dataclasses.replace(made.model.backbone, pretrained=pretrained))
    return dataclasses.replace(made, model=model, pretraining=made.training if pretraining else None)


def advice(made, started_from=None):
    return norm_advice(made, new_model(made, 2, pretrained=False), started_from)


@pytest.mark.parametrize("kind", ["train", "sync", "affine"])
def test_after_the_pretraining_of_a_detector(kind):
    for word in (advice(config(kind, pretraining=True)), advice(config(kind), "detection")):
        assert f"norm.kind is {kind}" in word and "40.4" in word and "37.8" in word
    assert advice(config("fixed", pretraining=True)) is None and advice(config("fixed"), "detection") is None


def test_group_norm_was_not_measured():
    assert advice(config("group_norm"), "detection") is None


def test_after_the_pretraining_of_a_classifier():
    for word in (advice(config("fixed", pretrained=True)), advice(config("fixed"), "classification")):
        assert "39.2 AP with affine, 38.7 with fixed" in word
    assert advice(config("affine", pretrained=True)) is None
    assert advice(config("affine"), "classification") is None


def test_nothing_is_said_where_nothing_was_measured():
    assert advice(config("train")) is None and advice(config("fixed")) is None
    without = tiny_detector("vit")
    assert norm_advice(config("train", pretraining=True), without, "detection") is None


def test_a_run_is_told(data, straight, tmp_path, caplog):
    train(tiny_run(data, steps=1, batch_size=4, norm=NormPolicy(kind="affine")), tmp_path / "r", init=straight)
    assert "Table 2 measured 40.4 AP with batch norm fixed" in caplog.text
