"""Boxes and pixels of a placement against torchvision's own transforms and slow obvious versions."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from gesso.data.placement import Placement


@given(
    seed=st.integers(0, 1000),
    flip=st.booleans(),
    top=st.integers(0, 20),
    left=st.integers(0, 30),
    high=st.integers(5, 60),
)
def test_boxes_move_as_in_torchvision(seed, flip, top, left, high):
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (7, 2))
    boxes = np.concatenate([corner, corner + random.uniform(0.5, 60, (7, 2))], 1).astype(np.float32)
    boxes = np.minimum(boxes, np.array([120, 90, 120, 90], np.float32))
    placement = Placement((90, 120), (81, 151), (top, left), (high, 70), (128, 160), flip)
    moved, kept = placement.move(boxes)
    expected = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(90, 120))
    expected = F.resize(expected, [81, 151])
    expected = F.crop(expected, top, left, high, 70)
    if flip:
        expected = F.horizontal_flip(expected)
    want = F.clamp_bounding_boxes(expected).numpy()
    np.testing.assert_allclose(moved[kept], want[kept], atol=2e-4)
    assert np.all((want[~kept, 2:] - want[~kept, :2]).min(1) < 1e-3)


@given(flip=st.booleans(), seed=st.integers(0, 100))
def test_frames_are_the_inverse_of_move(flip, seed):
    random = np.random.default_rng(seed)
    placement = Placement((90, 120), (81, 151), (5, 9), (60, 100), (64, 128), flip)
    corner = random.uniform(12, 40, (5, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 20, (5, 2))], 1).astype(np.float32)
    frames = placement.frames(placement.move(boxes)[0])
    if flip:
        frames[:, [0, 2]] = frames[:, [2, 0]]
    np.testing.assert_allclose(frames, boxes, atol=1e-3)


@given(seed=st.integers(0, 1000), flip=st.booleans())
def test_boxes_of_a_region_move_as_in_torchvision(seed, flip):
    random = np.random.default_rng(seed)
    top, left, high, wide = (int(v) for v in (*random.integers(0, 30, 2), *random.integers(5, 60, 2)))
    corner = random.uniform(0, 70, (7, 2))
    boxes = np.concatenate([corner, corner + random.uniform(0.5, 60, (7, 2))], 1).astype(np.float32)
    boxes = np.minimum(boxes, np.array([120, 90, 120, 90], np.float32))
    placement = Placement((90, 120), (64, 64), (0, 0), (64, 64), (64, 64), flip, (top, left, high, wide))
    assert placement.scale == (64 / high, 64 / wide) and not placement.whole
    moved, kept = placement.move(boxes)
    expected = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(90, 120))
    expected = F.resized_crop(expected, top, left, high, wide, [64, 64])
    if flip:
        expected = F.horizontal_flip(expected)
    want = F.clamp_bounding_boxes(expected).numpy()
    np.testing.assert_allclose(moved[kept], want[kept], atol=1e-3)
    assert np.all((want[~kept, 2:] - want[~kept, :2]).min(1, initial=0) < 2e-3)
    inside = moved[kept]
    frames = placement.frames(inside)
    assert np.allclose(placement.move(np.sort(frames.reshape(-1, 2, 2), 1).reshape(-1, 4))[0], inside, atol=1e-3)


@given(
    height=st.integers(1, 50),
    width=st.integers(1, 50),
    high=st.integers(1, 90),
    wide=st.integers(1, 90),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pixels_are_those_under_the_centres(height, width, high, wide, flip, seed):
    random = np.random.default_rng(seed)
    region = None
    source = (0, 0, height, width)
    if seed % 2:
        rows, columns = np.sort(random.integers(0, (height, width), (2, 2)), 0).T
        source = region = (int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)
    offset = (int(random.integers(0, high)), int(random.integers(0, wide)))
    size = (high - offset[0], wide - offset[1])
    placement = Placement((height, width), (high, wide), offset, size, (96, 96), flip, region)
    rows, columns = placement.pixels()
    assert len(rows) == size[0] and len(columns) == size[1]
    for axis, found in enumerate((rows, columns[::-1] if flip else columns)):
        for at, pixel in enumerate(found.tolist()):
            centre = (at + offset[axis] + 0.5) * source[2 + axis] / (high, wide)[axis]
            assert source[axis] <= pixel < source[axis] + source[2 + axis]
            assert pixel - 1e-9 <= source[axis] + centre <= pixel + 1 + 1e-9
