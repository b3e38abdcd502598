import numpy as np
import pytest

from gesso.data import rle
from gesso.data.records import Polygons, Rle
from gesso.evaluation.masks import as_json, outline, pack, paste


@pytest.mark.parametrize("seed", range(40))
def test_the_run_lengths_of_a_pasted_part_are_those_of_the_whole_picture(seed):
    """Whole columns, empty parts and single pixels included."""
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 8, 2))
    y1, x1 = int(rng.integers(0, height + 1)), int(rng.integers(0, width + 1))
    y2, x2 = int(rng.integers(y1, height + 1)), int(rng.integers(x1, width + 1))
    share = (0.0, 0.4, 0.8, 1.0)[seed % 4]
    picture = np.zeros((height, width), bool)
    picture[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < share
    side = max(y2 - y1, x2 - x1, 1)
    # a grid whose cells are pixels: what is pasted are the picture's own values
    grid = np.zeros((side, side))
    part = picture[y1 : y1 + side, x1 : x1 + side]
    grid[: part.shape[0], : part.shape[1]] = part
    pasted = paste(grid, np.array([x1, y1, x1 + side, y1 + side], float), (height, width))
    assert pasted == rle.encode(picture)


def test_a_mask_in_json_and_back():
    mask = rle.encode(np.eye(5, 7))
    stored = as_json(mask)
    assert stored["size"] == [5, 7] and isinstance(stored["counts"], str) and pack(stored) == mask
    ring = np.array([[1, 2], [3, 2], [3, 5]], np.float32)
    assert as_json(Polygons((ring,))) == [[1, 2, 3, 2, 3, 5]] and as_json(None) == []


def test_an_outline_goes_around_parts_and_holes():
    picture = np.zeros((40, 60), bool)
    picture[5:30, 5:30] = True
    picture[12:20, 12:20] = False
    picture[2:38, 40:58] = True
    rings = outline(rle.encode(picture))
    assert sorted(len(ring) for ring in rings)[:2] == [4, 4] and len(rings) == 3
    low, high = np.concatenate(rings).min(0), np.concatenate(rings).max(0)
    assert low == pytest.approx([5, 2], abs=1) and high == pytest.approx([58, 38], abs=1)
    ring = np.array([[1, 2], [3, 2], [3, 5]], np.float32)
    (same,) = outline(Polygons((ring,)))
    assert np.array_equal(same, ring)
    assert outline(None) == [] and outline(Rle((4, 4), rle.encode(np.zeros((4, 4))).counts)) == []
