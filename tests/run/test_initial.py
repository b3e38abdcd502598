import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from gesso.data.demo_index import demo_index
from gesso.data.demo_scenes import DemoConfig
from gesso.errors import ConfigError, GessoError, RunError
from gesso.models.fpn import FPNConfig
from gesso.models.norm import NormPolicy
from gesso.models.retinanet import RetinaNetConfig
from gesso.run.initial import read_weights
from gesso.run.train import train
from tests.run.helpers import newest, tiny_run

SHORT = {"steps": 1, "batch_size": 4}


def report(run):
    return json.loads((run / "weights.json").read_text())


def first_weights(run):
    return load_file(newest(run) / "model.safetensors")


@pytest.fixture(scope="module")
def still(data):
    """A run whose one step changes nothing that is compared: the rate is tiny."""
    config = tiny_run(data, **SHORT, norm=NormPolicy(kind="fixed"))
    optimizer = dataclasses.replace(config.training.optimizer, rate=1e-30, weight_decay=0.0)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, optimizer=optimizer))


def test_all_of_a_run_is_loaded_and_reported(straight, still, tmp_path, caplog):
    train(still, tmp_path / "r", init=straight)
    found = report(tmp_path / "r")
    theirs = read_weights(straight)
    assert set(found["loaded"]) == set(theirs.weights) and not found["missing"] and not found["remapped"]
    ours = first_weights(tmp_path / "r")
    assert all(torch.equal(ours[name], value) for name, value in theirs.weights.items() if "tracked" not in name)
    assert f"{len(found['loaded'])} tensors loaded" in caplog.text


def test_a_checkpoint_folder_knows_the_classes_of_its_run(straight):
    found = read_weights(newest(straight))
    assert found.label_space == read_weights(straight).label_space and found.label_space is not None


def test_only_the_parts_that_are_asked_for(straight, still, tmp_path):
    train(dataclasses.replace(still, init_parts=("backbone", "rpn")), tmp_path / "r", init=straight)
    found = report(tmp_path / "r")
    assert {name.split(".")[0] for name in found["loaded"]} == {"backbone", "rpn"}
    assert {name.split(".")[0] for name in found["left_out"]} == {"neck", "box_head"}
    ours, theirs = first_weights(tmp_path / "r"), read_weights(straight).weights
    assert torch.equal(ours["rpn.head.deltas.weight"], theirs["rpn.head.deltas.weight"])
    assert not torch.equal(ours["neck.output.0.0.weight"], theirs["neck.output.0.0.weight"])


def test_other_classes_are_joined_by_name(straight, still, tmp_path):
    """Of a hierarchy the ten digits are known, what is above them is new."""
    config = DemoConfig(images=8, side=64, objects=(1, 3), scale=(0.2, 0.5), hierarchy=True)
    index = demo_index(tmp_path / "data", config)
    train(
        dataclasses.replace(still, data=dataclasses.replace(still.data, train=index.path, val=None)),
        tmp_path / "r",
        init=straight,
    )
    found, theirs = report(tmp_path / "r"), read_weights(straight)
    assert theirs.label_space is not None
    names = index.label_space.names
    assert set(found["classes_kept"]) == set(theirs.label_space.names) and found["remapped"]
    assert set(found["classes_new"]) == {"even", "odd", "digit"}
    ours = first_weights(tmp_path / "r")["box_head.classes.weight"]
    for row, name in enumerate(names, 1):
        if name in found["classes_kept"]:
            there = theirs.weights["box_head.classes.weight"][1 + theirs.label_space.index(name)]
            assert torch.equal(ours[row], there)


def test_a_checkpoint_of_another_detector(straight, still, tmp_path, caplog):
    """What both have is loaded, and what becomes of the rest is said."""
    other = RetinaNetConfig(
        backbone=still.model.backbone,
        neck=FPNConfig(width=16, inputs=("C3", "C4", "C5"), extra_levels=1, extra="conv_c5"),
    )
    anchors = dataclasses.replace(other.anchors, sizes=(16.0, 32.0, 64.0, 128.0))
    train(dataclasses.replace(still, model=dataclasses.replace(other, anchors=anchors)), tmp_path / "r", init=straight)
    found = report(tmp_path / "r")
    assert {name.split(".")[0] for name in found["loaded"]} == {"backbone"}
    assert any(name.startswith("rpn.") for name in found["unexpected"]) and found["missing"]
    assert "nothing of the part box_head is in these weights" in caplog.text


def test_weights_of_which_nothing_fits(straight, still, tmp_path):
    parts = dataclasses.replace(still, init_parts=("neck",))
    wider = dataclasses.replace(parts, model=dataclasses.replace(parts.model, neck=FPNConfig(width=32)))
    with pytest.raises(RunError, match=r"nothing of it fits this FasterRCNN: .*neck"):
        train(wider, tmp_path / "r", init=straight)
    with pytest.raises(ConfigError, match="no part 'mask_head'"):
        train(dataclasses.replace(still, init_parts=("mask_head",)), tmp_path / "r", init=straight)
    assert not (tmp_path / "r").exists()


def test_weights_of_a_run_with_group_norm(data, tmp_path):
    config = tiny_run(data, **SHORT, norm=NormPolicy(kind="group_norm"))
    train(config, tmp_path / "a")
    train(config, tmp_path / "b", init=tmp_path / "a")
    assert first_weights(tmp_path / "b").keys() == first_weights(tmp_path / "a").keys()
    with pytest.raises(ConfigError, match=r"norm.kind fixed uses the running statistics.*have none"):
        train(tiny_run(data, **SHORT, norm=NormPolicy(kind="fixed")), tmp_path / "c", init=tmp_path / "a")
    assert not (tmp_path / "c").exists()


def test_a_published_file_starts_a_run(still, tmp_path, caplog):
    """A classifier's weights as timm saves them: by name, the head apart; what is no plain form is said."""
    torch.manual_seed(5)
    source = timm.create_model("resnet18", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    backbone = dataclasses.replace(still.model.backbone, name="resnet18")
    config = dataclasses.replace(still, model=dataclasses.replace(still.model, backbone=backbone))
    train(config, tmp_path / "r", init=tmp_path / "resnet18.pth")
    ours = first_weights(tmp_path / "r")
    assert torch.equal(ours["backbone.body.layer3.1.conv2.weight"], source.state_dict()["layer3.1.conv2.weight"])
    assert {name.split(".")[0] for name in report(tmp_path / "r")["loaded"]} == {"backbone"}
    assert "weights of timm" in caplog.text
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(GessoError, match=r"text\.pth"):
        train(config, tmp_path / "s", init=tmp_path / "text.pth")
    assert not (tmp_path / "s").exists()
