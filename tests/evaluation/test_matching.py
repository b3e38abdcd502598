import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.errors import DataError
from gesso.evaluation import matching
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import load_ground_truth
from gesso.evaluation.matching import Boxes, falling, load_pair, overlapping
from tests.evaluation.score_cases import iou, random_boxes, random_case, write


def columns(xywh, groups):
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return Boxes(xyxy=xyxy, areas=xywh[:, 2] * xywh[:, 3], groups=groups)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), at_once=st.sampled_from([1, 7, 1 << 21]))
def test_equal_to_comparing_one_by_one(seed, at_once):
    rng = np.random.default_rng(seed)
    found, truth = (random_boxes(rng, int(rng.integers(0, 25))) for _ in range(2))
    groups, truth_groups = rng.integers(0, 4, len(found)), rng.integers(0, 4, len(truth))
    shares = rng.random(len(truth)) < 0.5
    expected = []
    for i, a in enumerate(found):
        for j, b in enumerate(truth):
            overlap = iou(a, b, of_first=bool(shares[j]))
            if groups[i] == truth_groups[j] and overlap >= 0.25:
                expected.append((i, j, overlap))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_PAIRS_AT_ONCE", at_once)
        pairs = overlapping(columns(found, groups), columns(truth, truth_groups), 0.25, shares=shares)
    assert list(zip(*(column.tolist() for column in pairs), strict=True)) == expected


def test_nothing_is_compared_with_nothing():
    some, none = columns(np.array([[0.0, 0, 2, 2]]), np.array([0])), columns(np.zeros((0, 4)), np.zeros(0, np.int64))
    for found, truth in ((some, none), (none, some), (none, none)):
        assert [len(column) for column in overlapping(found, truth, 0.5)] == [0, 0, 0]


def test_order_by_falling_score_then_image_then_place():
    scores, rows = np.array([0.5, 0.9, 0.5, 0.5, 0.1]), np.array([2, 3, 1, 2, 0])
    assert falling(scores, rows).tolist() == [1, 2, 0, 3, 4]


def test_a_pair_that_does_not_fit_is_refused(tmp_path):
    truth, results = random_case(1)
    gt, dt = write(tmp_path, truth, results)
    pair = load_pair(gt, dt)
    assert len(pair.table) == len(results)
    assert pair.truth.image_ids[pair.rows].tolist() == [row["image_id"] for row in results]
    box = [[0, 0, 9, 9]]
    with pytest.raises(DataError, match="image 1, which is not in"):
        load_pair(gt, DetectionTable(image_id=[1], label=[0], score=[0.5], xyxy=box))
    for label in (3, -1):
        with pytest.raises(DataError, match=r"a detection has the label -?\d, but .* has 3 classes. Map"):
            load_pair(gt, DetectionTable(image_id=[0], label=[label], score=[0.5], xyxy=box))
    with pytest.raises(DataError, match=r"result 0 .* is not finite"):
        load_pair(gt, DetectionTable(image_id=[0], label=[0], score=[np.nan], xyxy=box))
    with pytest.raises(DataError, match="read without details"):
        load_pair(load_ground_truth(gt), dt)
