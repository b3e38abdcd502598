import numpy as np
import pytest

pytest.importorskip("supervision", reason="needs the extra supervision")

from gesso.evaluation.supervision import to_supervision


def test_columns_and_names():
    xyxy = np.array([[1, 2, 3, 4], [5, 6, 9, 9]])
    found = to_supervision(xyxy, np.array([0.9, 0.2]), np.array([1, 0]), ("cat", "dog"))
    assert found.xyxy.tolist() == xyxy.tolist()
    assert found.class_id.tolist() == [1, 0]
    assert found.data["class_name"].tolist() == ["dog", "cat"]
    strong = found[found.confidence > 0.5]
    assert strong.data["class_name"].tolist() == ["dog"]


def test_no_detections():
    found = to_supervision(np.zeros((0, 4)), np.zeros(0), np.zeros(0), ("cat",))
    assert len(found) == 0


def test_masks_go_along():
    masks = np.zeros((2, 6, 8), bool)
    masks[0, 1:4, 2:5] = True
    found = to_supervision(np.zeros((2, 4)), np.array([0.9, 0.2]), np.array([1, 0]), ("cat", "dog"), masks)
    assert np.array_equal(found.mask, masks) and found[1:].mask.shape == (1, 6, 8)
    assert to_supervision(np.zeros((0, 4)), np.zeros(0), np.zeros(0), (), np.zeros((0, 6, 8), bool)).mask.shape[0] == 0
