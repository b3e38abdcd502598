"""What the weights of other toolkits have in common: names, heads, anchors and colours."""

import pytest
import torch

from gesso.models.translation import Pictures, complete_norms, ratios_first, rename, turn_heads, turn_pictures

RGB, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
STEM = "backbone.body.conv1.weight"


def test_names_that_no_rule_fits_or_that_are_taken():
    state = {name: torch.tensor(k) for k, name in enumerate(("a.1.w", "b.1.w", "a.1.w.x", "c"))}
    ours, strange = rename(state, [(r"a\.(\d)\.w", r"n\1"), (r"b\.(\d)\.w", r"n\1")])
    assert ours == {"n1": torch.tensor(0)} and strange == ["b.1.w", "a.1.w.x", "c"]


def test_anchors_are_ordered_by_ratio_and_then_by_size():
    order = [(size, ratio, value) for size in range(3) for ratio in range(2) for value in range(4)]
    rows = torch.arange(len(order))
    turned = [order[row] for row in ratios_first(rows, sizes=3, ratios=2)]
    assert turned == [(size, ratio, value) for ratio in range(2) for size in range(3) for value in range(4)]
    deep = torch.randn(24, 5, 3, 3)
    assert torch.equal(ratios_first(deep, 3, 2), deep[ratios_first(rows, 3, 2)])
    assert torch.equal(ratios_first(deep[:7], 3, 2), deep[:7])


def test_the_background_comes_first():
    weights = {
        "box_head.classes.bias": torch.tensor([1.0, 2.0, 0.0]),
        "box_head.fcs.0.weight": torch.arange(2 * 3 * 4).view(2, 12),
        "neck.lateral.0.0.bias": torch.zeros(3),
    }
    turn_heads(weights)
    assert weights["box_head.classes.bias"].tolist() == [0.0, 1.0, 2.0]
    assert weights["box_head.fcs.0.weight"][1, 2].tolist() == [[20, 21], [22, 23]]


@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), STD, (2.0, 3.0, 4.0)])
def test_the_first_convolution_takes_our_pictures(bgr, std):
    weight, picture = torch.randn(4, 3, 7, 7), torch.rand(3, 7, 7) * 255
    mean = torch.tensor(RGB)[:, None, None]
    theirs_picture = picture.flip(0) if bgr else picture
    theirs_mean = mean.flip(0) if bgr else mean
    theirs = (weight * ((theirs_picture - theirs_mean) / torch.tensor(std)[:, None, None])).sum(dim=(1, 2, 3))
    weights = {STEM: weight}
    given_mean = RGB[::-1] if bgr else RGB
    assert turn_pictures(weights, Pictures(mean=given_mean, std=std, bgr=bgr)) is None
    ours = (weights[STEM] * ((picture - mean) / torch.tensor(STD)[:, None, None])).sum(dim=(1, 2, 3))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "std", "what"),
    [
        ((0.0, 0.0, 0.0), STD, "mean"),
        (RGB[::-1], STD, "mean"),
        (RGB[:2], STD, "mean"),
        (RGB, (1.0, 0.0, 1.0), "deviation"),
        (RGB, STD[:1], "deviation"),
    ],
)
def test_other_pictures_are_refused(mean, std, what):
    weights = {STEM: torch.ones(4, 3, 7, 7)}
    problem = turn_pictures(weights, Pictures(mean=mean, std=std, bgr=False))
    assert problem is not None and what in problem
    assert torch.equal(weights[STEM], torch.ones(4, 3, 7, 7))


def test_frozen_norms_are_completed():
    weights = {"backbone.body.bn1.weight": torch.ones(2), "backbone.body.layer1.0.downsample.1.weight": torch.ones(3)}
    weights["backbone.body.bn1.running_mean"] = torch.tensor([5.0, 6.0])
    complete_norms(weights)
    assert weights["backbone.body.bn1.running_mean"].tolist() == [5.0, 6.0]
    assert weights["backbone.body.layer1.0.downsample.1.running_var"].tolist() == [1.0, 1.0, 1.0]
    assert sum(name.endswith("num_batches_tracked") for name in weights) == 2
