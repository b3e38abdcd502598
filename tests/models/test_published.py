"""Files of all origins by one door: what is wrong with them is one line, and every tensor is accounted for."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gesso.errors import ConfigError, GessoError, InputError
from gesso.label_space import LabelSpace
from gesso.models.build import build_detector
from gesso.models.published import published_config, read_published
from gesso.models.torchvision_files import COCO
from gesso.models.weights import load_weights
from tests.models import test_detectron2_weights as detectron2
from tests.models import test_mmdetection_weights as mmdetection


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def broken(state: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    assert name in state
    return {**state, name: value}


def test_the_whole_way_into_a_detector_of_other_classes(tmp_path):
    """By names: of COCO's 80 classes two are kept, one is new."""
    path = detectron2.published(detectron2.rcnn(masks=True), tmp_path)
    found = read_published(str(path))
    assert found.classes == COCO
    detector = build_detector(published_config(path), 3)
    report = load_weights(
        detector,
        found.weights,
        source=LabelSpace.from_names(found.classes),
        target=LabelSpace.from_names(["dog", "robot", "person"]),
    )
    assert not (report.missing or report.unexpected or report.wrong_shape or report.left_out or report.unnamed)
    assert report.classes_new == ("robot",) and set(report.classes_kept) == {"dog", "person"}
    theirs = detectron2.rcnn(masks=True)[f"{detectron2.CLS}.weight"].float()
    ours = detector.get_parameter("box_head.classes.weight")
    assert torch.equal(ours[0], theirs[-1])  # the background
    assert torch.equal(ours[1], theirs[COCO.index("dog")]) and torch.equal(ours[3], theirs[COCO.index("person")])


def test_code_in_a_published_file_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": mmdetection.rcnn(masks=False), "meta": Harm()}, path)
    with pytest.raises(InputError, match=r"w\.pth: the file holds code \(posix\.system\), not weights\. "):
        read_published(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone.bottom_up.stem.conv1.weight", torch.ones(3)),
        ("roi_heads.box_head.fc1.weight", torch.ones(0, 4)),
        ("roi_heads.box_head.fc1.weight", torch.ones(64, 100)),
        ("roi_heads.box_predictor.cls_score.bias", torch.tensor(1.0)),
        ("roi_heads.box_predictor.cls_score.bias", torch.ones(1)),
        ("roi_heads.box_predictor.cls_score.bias", torch.ones(0)),
        ("backbone.fpn_lateral2.bias", torch.tensor(1.0)),
        ("backbone.bottom_up.res2.0.conv2.weight", torch.ones(4)),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(name, value, tmp_path):
    path: Path = detectron2.published(broken(detectron2.rcnn(masks=False), name, value), tmp_path)
    with pytest.raises(GessoError) as caught:
        published_config(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_file_without_a_layer_is_one_line(tmp_path):
    for name in ("proposal_generator.rpn_head.conv.bias", "roi_heads.box_head.fc1.bias", "backbone.fpn_output3.weight"):
        state = detectron2.rcnn(masks=False)
        del state[name]
        with pytest.raises(ConfigError, match=r"there is no detector here for these weights: it"):
            published_config(detectron2.published(state, tmp_path))
