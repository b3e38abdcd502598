"""Masks on the grid against pycocotools and a slow even-odd rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from gesso.data.mask_grid import rasterise
from gesso.data.records import Polygons, Rle


def slow_even_odd(ring, x, y):
    inside = False
    for (xa, ya), (xb, yb) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if (ya <= y) != (yb <= y) and xa + (y - ya) * (xb - xa) / (yb - ya) <= x:
            inside = not inside
    return inside


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), points=st.integers(3, 15), mirrored=st.booleans())
def test_polygons_fill_by_the_even_odd_rule(seed, points, mirrored):
    random = np.random.default_rng(seed)
    rings = [random.uniform(-5, 45, (points, 2)).astype(np.float32) for _ in range(2)]
    frame = np.array([3, 4, 31, 38], np.float32)
    xs = frame[0] + (np.arange(14) + 0.5) * 2
    ys = frame[1] + (np.arange(14) + 0.5) / 14 * 34
    expected = np.array([[any(slow_even_odd(r.astype(float), x, y) for r in rings) for x in xs] for y in ys])
    if mirrored:
        frame, expected = frame[[2, 1, 0, 3]], expected[:, ::-1]
    assert (rasterise(Polygons(tuple(rings)), frame, 14) != expected).sum() <= 1  # rounding on an edge


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_run_lengths_are_the_cocotools_ones(height, width, share, seed):
    picture = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    mask = Rle((height, width), coco.encode(np.asfortranarray(picture))["counts"])
    side = max(height, width)
    frame = np.array([0, 0, side, side], np.float32)
    assert np.array_equal(rasterise(mask, frame, side)[:height, :width], picture)
    mirrored = np.array([width, 0, width - side, side], np.float32)
    assert np.array_equal(rasterise(mask, mirrored, side)[:height, :width], picture[:, ::-1])


@pytest.mark.parametrize("kind", ["polygons", "rle"])
def test_a_disc_agrees_with_its_picture(kind):
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    ring = np.stack([50 + 30 * np.cos(angles), 40 + 20 * np.sin(angles)], 1).astype(np.float32)
    full = coco.merge(coco.frPyObjects([ring.ravel().tolist()], 80, 100))
    mask = Polygons((ring,)) if kind == "polygons" else Rle((80, 100), full["counts"])
    grid = rasterise(mask, np.array([20, 20, 80, 60], np.float32), 28)
    centres = (np.arange(28) + 0.5) / 14 - 1
    disc = centres[:, None] ** 2 + centres[None, :] ** 2 <= 1
    assert (grid != disc).mean() < 0.03
    assert abs(grid.mean() - np.pi / 4) < 0.02


def test_no_mask_gives_zeros():
    assert not rasterise(None, np.array([0, 0, 9, 9], np.float32), 7).any()
