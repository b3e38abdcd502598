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


def test_a_mask_is_filled_in_the_colour_of_its_class_and_lets_the_picture_through():
    image = grey()
    image[:, 250:] = 60
    mask = np.zeros((1, 400, 500), bool)
    mask[0, 150:250, 150:350] = True
    box = np.array([[100, 120, 400, 300]])
    plain = draw_detections(image, box, ["b"], [0.9], classes=["a", "b"])
    drawn = draw_detections(image, box, ["b"], [0.9], classes=["a", "b"], masks=mask)
    changed = (plain != drawn).any(-1)
    assert (changed == mask[0]).all()
    for column, ground in ((200, 128), (300, 60)):
        expected = 0.45 * np.array(PALETTE[1]) + 0.55 * ground
        assert np.abs(drawn[200, column] - expected).max() < 1.5
    assert np.abs(drawn[150, 200].astype(float) - PALETTE[1]).max() < 12, "its border is nearly its colour"


def test_masks_of_better_detections_lie_on_top_and_all_boxes_above():
    masks = np.ones((2, 400, 500), bool)
    boxes = np.array([[100, 120, 300, 260], [50, 50, 450, 350]])
    names, scores = ["a", "b"], [0.9, 0.2]
    drawn = draw_detections(grey(), boxes, names, scores, classes=names, masks=masks)
    alone = draw_detections(grey(), boxes, names, scores, classes=names)
    for colour in PALETTE[:2]:
        assert has(drawn, colour).sum() == has(alone, colour).sum()
    expected = 0.45 * np.array(PALETTE[0]) + 0.55 * (0.45 * np.array(PALETTE[1]) + 0.55 * 128)
    assert np.abs(drawn[200, 200] - expected).max() < 2
    ignored = draw_detections(grey(), boxes, names, classes=names, masks=masks, ignored=[True, True])
    assert (ignored[200, 200] == ignored[200, 200, 0]).all()


def test_masks_of_small_pictures_are_enlarged_and_empty_ones_are_nothing():
    mask = np.zeros((2, 64, 100), bool)
    mask[0, 16:32, 50:75] = True
    drawn = draw_detections(grey(64, 100), np.zeros((2, 4)), ["a", "a"], classes=["a"], masks=mask)
    plain = draw_detections(grey(64, 100), np.zeros((2, 4)), ["a", "a"], classes=["a"])
    rows, columns = np.nonzero((drawn != plain).any(-1))
    assert drawn.shape == (320, 500, 3)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (80, 160, 250, 375)
    assert (draw_detections(grey(), np.zeros((0, 4)), [], masks=np.zeros((0, 400, 500), bool)) == 128).all()


def test_names_that_are_larger_than_their_box_are_left_out_of_a_crowd():
    image = np.zeros((400, 400, 3), np.uint8)
    corner = np.stack(np.meshgrid(np.arange(8), np.arange(5)), axis=-1).reshape(-1, 2) * 48.0 + 10
    boxes = np.concatenate([corner, corner + 8], axis=1)
    few = draw_detections(image, boxes[:5], ["nucleus"] * 5, min_side=0)
    many = draw_detections(image, boxes, ["nucleus"] * len(boxes), min_side=0)
    assert (few[:60] > 0).sum() > 3 * (many[:60, :250] > 0).sum()
    large = boxes.copy()
    large[0] = (200, 250, 390, 390)
    named = draw_detections(image, large, ["nucleus"] * len(boxes), min_side=0)
    assert (named > 0).sum() > (many > 0).sum() + 1000
