import json

import pytest
import torch

from gesso.errors import ConfigError
from gesso.label_space import LabelSpace
from gesso.models.weights import PARTS, find_class_rows, load_weights, part_names
from tests.models.helpers import KINDS, tiny_detector

SPACE = LabelSpace(names=("cat", "dog", "cow", "hen", "fox"))
OTHER = LabelSpace(names=("Hen", "bee", "cat", "emu", "kitty"), synonyms={"fox": "bee"})
"""Of as many classes: shapes alone would fit."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_detector_and_classes(kind):
    source, model = tiny_detector(kind, seed=0), tiny_detector(kind, seed=1).double()
    report = load_weights(model, source.state_dict(), source=SPACE, target=SPACE)
    assert report.complete and set(report.loaded) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value.to(source.state_dict()[name].dtype), source.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_belongs_to_one_part(kind):
    model = tiny_detector(kind)
    children = [child for part in model.parts.values() for child in part]
    assert len(children) == len(set(children)) and set(model.parts) <= set(PARTS)
    for name in model.state_dict():
        assert name.split(".")[0] in children, name


@pytest.mark.parametrize("kind", KINDS)
def test_class_rows_are_all_that_depends_on_the_classes(kind):
    """The shapes of a detector of five classes and of one of seven differ in these tensors alone, and by the layout."""
    from gesso.models.build import build_detector
    from tests.models.helpers import tiny_config

    five, seven = build_detector(tiny_config(kind), 5), build_detector(tiny_config(kind), 7)
    rows = find_class_rows(five)
    others = {n: v.shape for n, v in seven.state_dict().items()}
    assert {n for n, v in five.state_dict().items() if v.shape != others[n]} == set(rows)
    for name, layout in rows.items():
        assert (layout.length(5), layout.length(7)) == (five.state_dict()[name].shape[0], others[name][0]), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_with_the_names_of_the_classes(kind):
    """Against the slow way: each row is asked for its class."""
    source, model = tiny_detector(kind, seed=0), tiny_detector(kind, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, source.state_dict(), source=SPACE, target=OTHER)
    rows = find_class_rows(model)
    assert set(report.remapped) == set(rows) and not report.missing and not report.wrong_shape
    assert report.classes_kept == ("Hen", "bee", "cat") and report.classes_new == ("emu", "kitty")
    assert report.classes_unused == ("dog", "cow") and not report.complete
    from_there = {0: 3, 1: 4, 2: 0}
    for name, layout in rows.items():
        new, old, theirs = model.state_dict()[name], before[name], source.state_dict()[name]
        width = layout.background + 5
        for row in range(len(new)):
            block, rest = divmod(row, width * layout.after)
            column, inner = divmod(rest, layout.after)
            label = column - layout.background
            if label < 0:
                assert torch.equal(new[row], theirs[row])
            elif label in from_there:
                there = (block * width + layout.background + from_there[label]) * layout.after + inner
                assert torch.equal(new[row], theirs[there])
            else:
                assert torch.equal(new[row], old[row])


def test_another_number_of_classes():
    from gesso.models.build import build_detector
    from tests.models.helpers import tiny_config

    source = tiny_detector("mask_rcnn")
    model = build_detector(tiny_config("mask_rcnn"), 2)
    two = LabelSpace(names=("cow", "yak"))
    report = load_weights(model, source.state_dict(), source=SPACE, target=two)
    assert not report.wrong_shape and report.classes_kept == ("cow",)
    assert torch.equal(model.box_head.boxes.weight[:4], source.box_head.boxes.weight[8:12])
    assert torch.equal(model.box_head.classes.weight[:2], source.box_head.classes.weight[[0, 3]])


def test_classes_that_are_not_named_are_not_guessed():
    source, model = tiny_detector(seed=0), tiny_detector(seed=1)
    before = model.box_head.classes.weight.clone()
    report = load_weights(model, source.state_dict(), target=SPACE)
    assert set(report.unnamed) == set(find_class_rows(model))
    assert torch.equal(model.box_head.classes.weight, before)
    assert torch.equal(model.box_head.fcs[0].weight, source.box_head.fcs[0].weight)


def test_every_name_is_reported():
    model = tiny_detector()
    state = {
        "backbone.body.conv1.0.weight": torch.ones(1),
        "neck.nothing": torch.ones(1),
        "teacher.weight": torch.ones(1),
        "rpn.head.deltas.bias": torch.ones_like(model.rpn.head.deltas.bias),
    }
    report = load_weights(model, state, source=SPACE, target=SPACE)
    assert report.loaded == ("rpn.head.deltas.bias",) and (model.rpn.head.deltas.bias == 1).all()
    assert report.unexpected == ("neck.nothing", "teacher.weight")
    assert [name for name, _, _ in report.wrong_shape] == ["backbone.body.conv1.0.weight"]
    names = {*report.loaded, *report.missing, *report.unexpected, *(name for name, _, _ in report.wrong_shape)}
    assert names == {*model.state_dict(), *state}
    text = "\n".join(report.lines())
    assert "1 tensors loaded" in text and "not in this model: neck.nothing, teacher.weight" in text
    assert json.loads(json.dumps(report.to_dict()))["unexpected"] == list(report.unexpected)


@pytest.mark.parametrize("parts", [("backbone",), ("backbone", "neck"), ("rpn", "box_head"), ("mask_head",)])
def test_parts(parts):
    source, model = tiny_detector("mask_rcnn", seed=0), tiny_detector("mask_rcnn", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_weights(model, source.state_dict(), parts=parts, source=SPACE, target=SPACE)
    children = [child for part in parts for child in model.parts[part]]
    assert report.loaded and not report.missing
    for name, value in model.state_dict().items():
        chosen = name.split(".")[0] in children
        assert (name in report.loaded) == chosen and (name in report.left_out) == (not chosen)
        assert torch.equal(value, source.state_dict()[name] if chosen else before[name])


def test_a_part_that_is_not_there():
    assert part_names(tiny_detector("retinanet")) == ("backbone", "neck", "box_head")
    with pytest.raises(ConfigError, match=r"no part 'mask_head'.*box_head"):
        load_weights(tiny_detector(), {}, parts=("backbone", "mask_head"))
