import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.demo_paint import _LUMA, _colour, background_crop, card_figure, digit_figure, paste
from gesso.data.demo_sources import load_glyphs


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


@given(st.integers(0, 9), st.integers(0, 30), st.floats(8, 90), st.floats(-0.3, 0.3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_digit_has_the_size_asked_for(digit, sample, size, angle, seed):
    figure = digit_figure(load_glyphs("train")[digit][sample], size, angle, rng(seed))
    height, width = figure.mask.shape
    assert abs(max(height, width) - size) <= max(2, 0.06 * size)
    assert figure.mask[0].any() and figure.mask[-1].any() and figure.mask[:, 0].any() and figure.mask[:, -1].any()
    assert np.array_equal(figure.mask, figure.alpha >= 0.5)


def test_a_card_holds_its_digit():
    for seed in range(20):
        angle = rng(seed).uniform(-0.3, 0.3)
        digit = digit_figure(load_glyphs("train")[seed % 10][seed], 30, angle, rng(seed))
        card = card_figure(digit, angle, rng(seed))
        (h, w), (H, W) = digit.mask.shape, card.mask.shape
        y, x = (H - h) // 2, (W - w) // 2
        covered = card.mask[y : y + h, x : x + w] & digit.mask
        assert covered.sum() >= 0.98 * digit.mask.sum()


def test_the_colour_stands_out():
    seen = []
    for level in (10, 70, 128, 190, 250):
        canvas = np.full((64, 64, 3), level, np.uint8)
        for seed in range(20):
            figure = digit_figure(load_glyphs("train")[seed % 10][0], 30, 0.0, rng(seed)).moved(4, 5)
            painted = paste(canvas, figure.coloured(canvas, rng(seed)))
            inside = painted[figure.mask_on(64)].astype(np.float32) @ _LUMA
            seen.append(abs(float(inside.mean()) - level))
    assert min(seen) > 30
    assert np.mean(seen) > 70


def test_paste_leaves_the_rest_and_its_argument_alone():
    canvas = rng().integers(0, 256, (64, 64, 3), np.uint8)
    before = canvas.copy()
    figure = digit_figure(load_glyphs("train")[0][0], 16, 0.0, rng()).moved(0, 0).coloured(canvas, rng())
    painted = paste(canvas, figure)
    assert np.array_equal(canvas, before)
    assert np.array_equal(painted[30:, 30:], before[30:, 30:])
    height, width = figure.mask.shape
    solid = np.zeros((64, 64), bool)
    solid[:height, :width] = figure.alpha == 1
    assert np.abs(painted[solid].astype(float) - figure.fill[figure.alpha == 1]).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("luma", [10, 80, 150, 240])
def test_colour_has_the_luma_asked_for(luma):
    for hue in np.linspace(0, 1, 7):
        assert abs(float(_colour(hue, 0.9, luma) @ _LUMA) - luma) < 0.5


def test_background_takes_small_and_large_photographs():
    for shape in ((60, 90, 3), (500, 300, 3)):
        photo = rng().integers(0, 256, shape, np.uint8)
        assert background_crop(photo, 96, rng(1)).shape == (96, 96, 3)
        assert np.array_equal(background_crop(photo, 96, rng(1)), background_crop(photo, 96, rng(1)))
        assert not np.array_equal(background_crop(photo, 96, rng(1)), background_crop(photo, 96, rng(2)))
