import numpy as np
import pytest

from gesso.reports.drawing import PALETTE, colour_of, draw_comparison, draw_detections


def grey(height=400, width=500):
    return np.full((height, width, 3), 128, np.uint8)


def has(picture, colour):
    return (picture == np.array(colour, np.uint8)).all(-1)


def test_a_box_is_drawn_on_its_border_and_nowhere_else():
    image = grey()
    drawn = draw_detections(image, np.array([[100, 120, 300, 260]]), ["cat"], [0.9], classes=["dog", "cat"])
    assert (image == 128).all(), "the picture given was changed"
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    border = has(drawn, PALETTE[1])
    assert border[190, 99:102].any() and border[190, 299:302].any()
    assert border[259:262, 200].any()
    assert (drawn[140:240, 120:280] == 128).all()
    assert (drawn[270:] == 128).all() and (drawn[:, 310:] == 128).all()


def test_the_text_says_name_and_score():
    box = np.array([[100, 120, 300, 260]])
    pictures = [draw_detections(grey(), box, [name], [score]) for name, score in (("a", 0.9), ("a", 0.1), ("b", 0.9))]
    plain = draw_detections(grey(), box, ["a"])
    for i, one in enumerate([*pictures, plain]):
        for other in pictures[i + 1 :]:
            assert (one != other).any()


def test_classes_keep_their_colours():
    classes = [f"class {i}" for i in range(7)]
    assert len({colour_of(name, classes) for name in classes}) == 7
    assert colour_of("elsewhere") == colour_of("elsewhere", classes)


@pytest.mark.parametrize(("side", "factor"), [(128, 3), (319, 2), (320, 1), (1, 320)])
def test_small_pictures_are_enlarged_by_a_whole_factor(side, factor):
    drawn = draw_detections(grey(side, 2 * side), np.array([[0, 0, side, side]]), ["a"])
    assert drawn.shape == (side * factor, 2 * side * factor, 3)
    kept = draw_detections(grey(side, 2 * side), np.array([[0, 0, side, side]]), ["a"], min_side=0)
    assert kept.shape == (side, 2 * side, 3)


def test_ground_truth_is_dashed_and_ignored_objects_are_grey():
    box = np.array([[100, 120, 300, 260]])
    full = has(draw_detections(grey(), box, ["a"], classes=["a"]), PALETTE[0])[:, 299:303].any(1)[125:255]
    dashed = has(draw_detections(grey(), box, ["a"], classes=["a"], dashed=True), PALETTE[0])[:, 299:303].any(1)[
        125:255
    ]
    assert full.all()
    assert 0.3 < dashed.mean() < 0.7
    ignored = draw_detections(grey(), box, ["a"], classes=["a"], ignored=[True])
    assert not has(ignored, PALETTE[0]).any() and has(ignored, (160, 160, 160)).any()


def test_no_boxes_leave_the_picture():
    assert (draw_detections(grey(), np.zeros((0, 4)), [], []) == 128).all()


@pytest.mark.parametrize("box", [[-50, -50, 900, 900], [499, 399, 500, 400], [700, 700, 800, 800], [10, 10, 10, 10]])
def test_boxes_beyond_the_picture_are_no_error(box):
    assert draw_detections(grey(), np.array([box]), ["a long name of a class"], [0.5]).shape == (400, 500, 3)


def test_crowded_names_are_left_out_best_first():
    boxes = np.tile([[200, 200, 203, 203]], (40, 1))
    drawn = draw_detections(grey(), boxes, ["name"] * 40, np.linspace(0.1, 0.9, 40), classes=["name"])
    assert has(drawn, PALETTE[0]).mean() < 0.05


def test_comparison_stands_side_by_side():
    box = np.array([[100, 120, 300, 260]])
    picture = draw_comparison(grey(), (box, ["a"]), (box, ["a"], [0.5]), classes=["a"])
    height, width = picture.shape[:2]
    assert height > 400 and width > 1000
    colour = has(picture, PALETTE[0])
    assert 0 < colour[:, : width // 2].sum() < colour[:, width // 2 :].sum()
    nothing = draw_comparison(grey(), (np.zeros((0, 4)), []), (np.zeros((0, 4)), [], []))
    assert nothing.shape == picture.shape
