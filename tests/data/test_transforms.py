"""Choices of placements against torchvision's own transforms and slow obvious versions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import gesso.config as config
from gesso.data.transforms import (
    CROP,
    MULTI_SCALE,
    PART,
    PFDET_SCALES,
    SCALE,
    Direct,
    ImageNetCrop,
    InputConfig,
    KeepRatio,
    Placement,
    colour_factors,
    inference_placement,
    training_placement,
)
from gesso.errors import ConfigError
from gesso.random_key import uniform

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
@pytest.mark.parametrize("mode", ["keep", "square"])
def test_direct_is_the_reference_pipeline(mode, height, width, key):
    """Its steps one after the other, with the numbers drawn from the key, and its boxes one by one."""
    long = int(448 * (0.8 + 0.4 * uniform(key, SCALE)))
    assert 358 <= long <= 537
    if mode == "keep":  # mmcv's rescale_size: both sides by one factor, rounded half up
        high, wide = (max(int(side * (long / max(height, width)) + 0.5), 1) for side in (height, width))
    else:
        high, wide = long, long
    top = math.floor(uniform(key, CROP, 0) * (max(high - 448, 0) + 1))  # inclusive integers
    left = math.floor(uniform(key, CROP, 1) * (max(wide - 448, 0) + 1))
    placement = Direct(side=448, mode=mode).place(height, width, shape=0, scale=0, key=key)
    size = (min(high, 448), min(wide, 448))
    assert placement == Placement((height, width), (high, wide), (top, left), size, (448, 448))
    random = np.random.default_rng(key)
    corner = random.uniform(0, 0.9, (9, 2))
    shares = np.concatenate([corner, corner + random.uniform(0.001, 1, (9, 2)) * (1 - corner)], 1)
    boxes = (shares * np.array([width, height, width, height])).astype(np.float32)
    moved, kept = placement.move(boxes)
    for (x1, y1, x2, y2), found, stays in zip(boxes.tolist(), moved.tolist(), kept.tolist(), strict=True):
        x1, x2 = (min(max(x * wide / width - left, 0), size[1]) for x in (x1, x2))
        y1, y2 = (min(max(y * high / height - top, 0), size[0]) for y in (y1, y2))
        assert found == pytest.approx([x1, y1, x2, y2], abs=1e-3)
        if min(abs(x2 - x1), abs(y2 - y1)) > 1e-3 or x2 == x1 or y2 == y1:
            assert stays == (x2 - x1 > 0 and y2 - y1 > 0)


def test_direct_draws_what_it_always_drew():
    """Runs that were begun with an earlier version go on with the same pictures."""
    found = [
        training_placement(InputConfig(resize=Direct()), 480, 640, NO_BOXES, shape=0, scale=0, key=k) for k in (0, 2)
    ]
    assert found == [
        Placement((480, 640), (399, 532), (0, 78), (399, 448), (448, 448), True),
        Placement((480, 640), (382, 509), (0, 29), (382, 448), (448, 448), True),
    ]


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


@given(height=sides, width=sides, divide=st.integers(1, 4))
def test_a_divided_picture_is_the_usual_one_divided(height, width, divide):
    usual = KeepRatio(short_sides=(333, 800), long_side=1333)
    resize = dataclasses.replace(usual, divide=divide)
    shape = int(resize.assign(height, width)[0])
    for scale in (0, 1):
        whole = usual.place(height, width, shape=0, scale=scale, key=None).resized
        placement = resize.place(height, width, shape=shape, scale=scale, key=None)
        assert placement.resized == placement.size == (max(whole[0] // divide, 1), max(whole[1] // divide, 1))
        assert placement.size[0] <= placement.canvas[0] and placement.size[1] <= placement.canvas[1]
        assert placement.canvas[0] % 32 == placement.canvas[1] % 32 == 0
    assert KeepRatio(divide=2).shapes(0) == ((416, 416), (416, 544), (544, 416), (416, 672), (672, 416))


@pytest.mark.parametrize(("sides", "low", "high"), [(MULTI_SCALE, 640, 800), (PFDET_SCALES, 640, 1056)])
def test_listed_short_sides_are_spread_evenly_over_their_range(sides, low, high):
    assert len(sides) == 5 and sides[0] == low and sides[-1] == high and len(set(np.diff(sides))) == 1
    assert KeepRatio(short_sides=sides).num_scales == 5


def torchvisions_part(height, width, numbers, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """What ``RandomResizedCrop`` does, step by step, with ``numbers`` from [0, 1) as its chance; top, left, h, w."""
    for _ in range(10):
        target = height * width * (scale[0] + (scale[1] - scale[0]) * next(numbers))
        log_ratio = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * next(numbers))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        down, right = next(numbers), next(numbers)
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@given(height=st.integers(1, 900), width=st.integers(1, 900), key=st.integers(0, 2**32 - 1), attempt=st.integers(0, 2))
def test_parts_are_drawn_by_torchvisions_steps(height, width, key, attempt):
    resize = ImageNetCrop(side=96)
    placement = resize.place(height, width, shape=0, scale=0, key=key, attempt=attempt)
    numbers = (uniform(key, PART, 40 * attempt + i) for i in range(40))
    square = (96, 96)
    region = torchvisions_part(height, width, numbers)
    assert placement == Placement((height, width), square, (0, 0), square, square, region=region)
    top, left, high, wide = region
    assert 0 <= top <= top + high <= height and 0 <= left <= left + wide <= width and high > 0 < wide


@pytest.mark.parametrize(("height", "width"), [(480, 640), (300, 300), (60, 600)])
def test_parts_have_torchvisions_distribution(height, width):
    """Quantiles of area, ratio and centre over 4,000 keys beside as many draws of torchvision's own."""
    torch.manual_seed(0)
    transform, picture = v2.RandomResizedCrop(96), torch.zeros(3, height, width, dtype=torch.uint8)
    drawn = [transform.make_params([picture]) for _ in range(4000)]
    theirs = [[part[name] for name in ("top", "left", "height", "width")] for part in drawn]
    resize = ImageNetCrop(side=96)
    ours = [resize.place(height, width, shape=0, scale=0, key=key).region for key in range(4000)]

    def features(parts):
        top, left, high, wide = np.array(parts, float).T
        return (
            high * wide / (height * width),
            np.log(wide / high),
            (top + high / 2) / height,
            (left + wide / 2) / width,
        )

    for a, b in zip(features(ours), features(theirs), strict=True):
        grid = np.union1d(a, b)
        steps = [np.searchsorted(np.sort(values), grid, side="right") / 4000 for values in (a, b)]
        assert np.abs(steps[0] - steps[1]).max() < 0.045  # Kolmogorov and Smirnov: 0.0364 at one in a hundred


@pytest.mark.parametrize(("height", "width"), [(1000, 10), (10, 1000), (1, 1), (1, 2000)])
def test_where_no_part_fits_it_is_the_central_one(height, width):
    wide = round(height * 4 / 3)
    expected = {10: (493, 0, 13, 10), 1000: (0, 493, 10, 13), 1: (0, 0, 1, 1), 2000: (0, 999, 1, wide)}[width]
    found = {ImageNetCrop(side=32).place(height, width, shape=0, scale=0, key=key).region for key in range(50)}
    assert expected in found


@given(height=st.integers(1, 900), width=st.integers(1, 900))
def test_inference_after_image_net_crops(height, width):
    _, whole = inference_placement(InputConfig(resize=ImageNetCrop(side=96)), height, width)
    assert whole == inference_placement(InputConfig(resize=Direct(side=96)), height, width)[1]
    assert max(whole.size) == 96 and whole.whole


@pytest.mark.parametrize("side", [224, 448, 96])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (333, 251), (224, 224), (100, 999)])
def test_the_centre_is_that_of_torchvision(side, height, width):
    resize = ImageNetCrop(side=side, inference="centre")
    _, placement = inference_placement(InputConfig(resize=resize), height, width)
    short = int(side * 256 / 224)
    resized = F.resize(torch.zeros(1, height, width), short).shape[1:]
    places = torch.arange(resized[0] * resized[1]).reshape(1, *resized)
    centre = F.center_crop(places, side)
    assert placement.resized == tuple(resized) and placement.size == placement.canvas == (side, side)
    assert placement.offset == divmod(int(centre[0, 0, 0]), resized[1])


def test_a_part_that_loses_all_boxes_is_drawn_anew():
    options = InputConfig(resize=ImageNetCrop(side=64), flip=0.0)
    box = np.array([[0, 0, 30, 30]], np.float32)
    first = [options.resize.place(200, 300, shape=0, scale=0, key=key) for key in range(300)]
    drawn = [training_placement(options, 200, 300, box, shape=0, scale=0, key=key) for key in range(300)]
    free = [training_placement(options, 200, 300, NO_BOXES, shape=0, scale=0, key=key) for key in range(300)]
    assert free == first
    shown = [bool(placement.move(box)[1].any()) for placement in first]
    assert 0.1 < np.mean(shown) < 0.9
    assert all(a == b for a, b, kept in zip(first, drawn, shown, strict=True) if kept)
    share = np.mean(shown)
    saved = np.mean([placement.move(box)[1].any() for placement in drawn])
    assert abs(saved - (1 - (1 - share) ** 10)) < 0.1


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
        lambda: KeepRatio(divide=0),
        lambda: KeepRatio(divide=801),
        lambda: ImageNetCrop(side=100),
        lambda: ImageNetCrop(area=(0.0, 1.0)),
        lambda: ImageNetCrop(area=(0.5, 0.4)),
        lambda: ImageNetCrop(area=(0.5, 1.1)),
        lambda: ImageNetCrop(ratio=(0.0, 1.0)),
        lambda: ImageNetCrop(ratio=(1.5, 1.0)),
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


@pytest.mark.parametrize(
    "resize",
    [
        KeepRatio(short_sides=(480, 512)),
        KeepRatio(short_sides=MULTI_SCALE, divide=2),
        Direct(side=96, mode="square"),
        ImageNetCrop(side=96, area=(0.25, 0.5), inference="centre"),
    ],
)
def test_configuration_survives_storing(resize):
    options = InputConfig(resize=resize, flip=0.25)
    assert config.from_dict(InputConfig, config.to_dict(options)) == options
