"""Placements against torchvision's own transforms and slow obvious versions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

import gesso.config as config
from gesso.data.transforms import (
    Direct,
    InputConfig,
    KeepRatio,
    Placement,
    colour_factors,
    inference_placement,
    training_placement,
)
from gesso.errors import ConfigError

NO_BOXES = np.zeros((0, 4), np.float32)
sides = st.integers(1, 3000)


@given(height=sides, width=sides, shorts=st.sampled_from([(800,), (480, 640, 800), (192,), (100, 101), (333,)]))
def test_keep_ratio_fits_one_of_five_shapes_at_every_scale(height, width, shorts):
    resize = KeepRatio(short_sides=shorts, long_side=1333)
    shape = int(resize.assign(height, width)[0])
    for scale, short in enumerate(shorts):
        assert len(set(resize.shapes(scale))) <= 5
        placement = resize.place(height, width, shape=shape, scale=scale, key=None)
        factor = min(short / min(height, width), 1333 / max(height, width))
        expected = [max(int(side * factor + 0.5), 1) for side in (height, width)]
        assert list(placement.resized) == expected == list(placement.size)
        assert placement.offset == (0, 0)
        assert placement.canvas in resize.shapes(scale)
        assert placement.size[0] <= placement.canvas[0] and placement.size[1] <= placement.canvas[1]
        assert placement.canvas[0] % 32 == placement.canvas[1] % 32 == 0


def test_shapes_are_tight_for_common_pictures():
    resize = KeepRatio(short_sides=(192,), long_side=320)
    assert inference_placement(InputConfig(resize=resize), 192, 192)[1] == Placement(
        (192, 192), (192, 192), (0, 0), (192, 192), (192, 192)
    )
    shapes = KeepRatio().shapes(0)
    assert shapes == ((800, 800), (800, 1088), (1088, 800), (800, 1344), (1344, 800))
    heights, widths = [480, 640, 500, 300, 1000, 1], [640, 480, 500, 1000, 300, 1]
    assert KeepRatio().assign(heights, widths).tolist() == [1, 2, 0, 3, 4, 0]


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), key=st.integers(0, 2**32 - 1))
def test_direct_keep_is_the_reference_pipeline(height, width, key):
    resize = Direct(side=448)
    placement = resize.place(height, width, shape=0, scale=0, key=key)
    long = max(placement.resized)
    assert int(448 * 0.8) <= long <= int(448 * 1.2)
    assert [max(int(side * (long / max(height, width)) + 0.5), 1) for side in (height, width)] == list(
        placement.resized
    )
    for at, size, side in zip(placement.offset, placement.size, placement.resized, strict=True):
        assert size == min(side, 448)
        assert 0 <= at <= side - size
    assert placement.canvas == (448, 448)


def test_direct_draws_scales_and_offsets_uniformly():
    resize = Direct(side=448)
    placements = [resize.place(448, 448, shape=0, scale=0, key=key) for key in range(4000)]
    long = np.array([placement.resized[0] for placement in placements])
    assert abs(long.mean() - 448) < 3 and long.min() <= 360 and long.max() >= 535
    large = [p for p in placements if p.resized[0] == 500]
    offsets = {p.offset[0] for p in placements if p.resized[0] > 500}
    assert large and {0} < offsets
    share = [p.offset[0] / (p.resized[0] - 448) for p in placements if p.resized[0] > 480]
    assert abs(np.mean(share) - 0.5) < 0.03


def test_direct_square_stretches():
    resize = Direct(side=64, mode="square", low=1.0, high=1.0)
    assert resize.place(10, 40, shape=0, scale=0, key=3).resized == (64, 64)
    assert inference_placement(InputConfig(resize=resize), 10, 40)[1].scale == (6.4, 1.6)


def test_inference_with_direct_puts_the_long_side_on_the_canvas():
    _, placement = inference_placement(InputConfig(resize=Direct(side=96)), 480, 640)
    assert placement == Placement((480, 640), (72, 96), (0, 0), (72, 96), (96, 96))


@pytest.mark.parametrize("shorts", [(64, 96, 80), (96, 64)])
def test_inference_takes_the_largest_short_side(shorts):
    options = InputConfig(resize=KeepRatio(short_sides=shorts, long_side=160))
    assert inference_placement(options, 50, 75)[1] == Placement((50, 75), (96, 144), (0, 0), (96, 144), (96, 160))


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


def test_a_crop_that_loses_all_boxes_is_drawn_anew():
    options = InputConfig(resize=Direct(side=64, low=4.0, high=4.0), flip=0.0)
    box = np.array([[0, 0, 20, 20]], np.float32)
    first = [options.resize.place(64, 64, shape=0, scale=0, key=key) for key in range(300)]
    lost = [key for key in range(300) if not first[key].move(box)[1].any()]
    drawn = [training_placement(options, 64, 64, box, shape=0, scale=0, key=key) for key in lost]
    saved = sum(bool(placement.move(box)[1].any()) for placement in drawn)
    share = 1 - len(lost) / 300
    assert abs(saved / len(lost) - (1 - (1 - share) ** 9)) < 0.12  # ten attempts, the first of which was lost
    assert all(training_placement(options, 64, 64, NO_BOXES, shape=0, scale=0, key=key) == first[key] for key in lost)


def test_flip_has_its_probability_and_depends_on_the_key_alone():
    options = InputConfig(resize=KeepRatio(), flip=0.3)
    flips = [training_placement(options, 9, 9, NO_BOXES, shape=0, scale=0, key=key).flip for key in range(3000)]
    assert abs(np.mean(flips) - 0.3) < 0.03
    again = [training_placement(options, 40, 9, NO_BOXES, shape=2, scale=0, key=key).flip for key in range(3000)]
    assert flips == again


def test_colour_factors_cover_their_ranges():
    factors = np.array([colour_factors(InputConfig(brightness=0.4, contrast=0.2), key) for key in range(2000)])
    assert 0.6 <= factors[:, 0].min() < 0.61 and 1.39 < factors[:, 0].max() <= 1.4
    assert 0.8 <= factors[:, 1].min() < 0.81 and 1.19 < factors[:, 1].max() <= 1.2
    assert (factors[:, 2] == 1).all()
    assert abs(np.corrcoef(factors[:, 0], factors[:, 1])[0, 1]) < 0.06


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepRatio(short_sides=()),
        lambda: KeepRatio(short_sides=(1, 2, 3, 4, 5, 6)),
        lambda: KeepRatio(short_sides=(64, 64)),
        lambda: KeepRatio(short_sides=(900,), long_side=800),
        lambda: KeepRatio(stride=0),
        lambda: KeepRatio(stride=16),
        lambda: KeepRatio(stride=48),
        lambda: Direct(side=100),
        lambda: Direct(low=0.0),
        lambda: Direct(low=1.3),
        lambda: InputConfig(flip=1.5),
        lambda: InputConfig(brightness=-0.1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("resize", [KeepRatio(short_sides=(480, 512)), Direct(side=96, mode="square")])
def test_configuration_survives_storing(resize):
    options = InputConfig(resize=resize, flip=0.25)
    assert config.from_dict(InputConfig, config.to_dict(options)) == options
