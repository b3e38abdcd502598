"""The line that step times are extrapolated on, and what is measured for it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gesso.planning import pace
from gesso.planning.pace import STEPS, Pace, Timed, fit_pace, measure_pace, memory_at_hand
from gesso.recipes.debug import tiny

CPU = torch.device("cpu")
SETTINGS = [((s, s), n) for s in (96, 64, 128) for n in (4, 2, 8)]
TERMS = st.floats(0.001, 10)


def timed(terms, *settings):
    rows = [(1.0, n, n * math.prod(shape) / 1e6) for shape, n in settings]
    seconds = [sum(t * x for t, x in zip(terms, row, strict=True)) for row in rows]
    return [Timed(shape=s, pictures=n, seconds=t) for (s, n), t in zip(settings, seconds, strict=True)]


@given(TERMS, TERMS, TERMS)
def test_three_measurements_give_all_terms_back(a, b, c):
    found = fit_pace(timed((a, b, c), ((64, 64), 2), ((640, 480), 2), ((64, 64), 16)))
    assert found == pytest.approx((a, b, c), rel=1e-3, abs=1e-6)


def test_fewer_measurements_give_fewer_terms():
    assert fit_pace(timed((0, 0, 3), ((64, 64), 2))) == pytest.approx((0, 0, 3))
    assert fit_pace(timed((0, 2, 3), ((64, 64), 2), ((96, 96), 2))) == pytest.approx((0, 2, 3))
    assert fit_pace(timed((2, 0, 3), ((64, 64), 2), ((64, 64), 4))) == pytest.approx((2, 0, 3))


def test_no_term_is_below_zero():
    falling = [
        Timed(shape=(64, 64), pictures=2, seconds=4),
        Timed(shape=(96, 96), pictures=2, seconds=3),
        Timed(shape=(96, 96), pictures=4, seconds=2),
    ]
    assert min(fit_pace(falling)) >= 0 < max(fit_pace(falling))


def test_what_was_measured_stays_and_the_rest_is_on_the_line():
    found = Pace(a=1.0, b=0.5, c=2.0, measured=(Timed(shape=(500, 1000), pictures=2, seconds=9.0),))
    assert found.seconds((500, 1000), 2) == 9
    assert found.seconds((500, 1000), 4) == pytest.approx(1 + 4 * 0.5 + 4 * 0.5 * 2)
    assert "500 x 1000 x 2 in 9 s" in found.describe() and "in proportion" in found.describe()
    more = dataclasses.replace(found, b=0.0, measured=(*found.measured, *found.measured))
    assert more.describe().endswith("all others: 1 s + 2 s a picture's megapixel")


def config():
    recipe = tiny()
    backbone = dataclasses.replace(recipe.model.backbone, name="test_resnet")
    return dataclasses.replace(recipe, device="cpu", model=dataclasses.replace(recipe.model, backbone=backbone))


class Clock:
    """Time that only steps take: a second a picture."""

    def __init__(self, monkeypatch):
        self.now, self.steps = 0.0, []
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(pace, "train_step", self.step)

    def step(self, stage, batch, targets):
        self.steps.append((tuple(batch.images.shape[2:]), len(batch.images)))
        self.now += len(batch.images) * (1 + math.prod(batch.images.shape[2:]) / 1e6)
        return self

    def read(self):
        return None


def test_the_smallest_then_larger_pictures_then_more_and_the_largest_that_there_is_time_for(monkeypatch):
    clock = Clock(monkeypatch)
    found = measure_pace(config(), "training", SETTINGS, device=CPU, limit=1000)
    assert clock.steps == [
        (shape, n) for shape, n in (((64, 64), 2), ((96, 96), 2), ((64, 64), 4), ((128, 128), 8)) for _ in range(STEPS)
    ]
    assert (found.a, found.b, found.c) == pytest.approx((0, 1, 1))


def test_time_that_is_short_leaves_the_first_step(monkeypatch):
    clock = Clock(monkeypatch)
    found = measure_pace(config(), "training", SETTINGS, device=CPU, limit=0)
    assert clock.steps == [((64, 64), 2)] and len(found.measured) == 1
    assert found.seconds((128, 128), 2) == pytest.approx(4 * found.measured[0].seconds)


def test_real_steps_tell_shares_and_units():
    recipe = config()
    stage = dataclasses.replace(recipe.training, memory="sqrt")
    found = measure_pace(dataclasses.replace(recipe, training=stage), "training", SETTINGS[:1], device=CPU, limit=0)
    assert found.measured[0].seconds > 0
    assert found.shares and all(0 <= share <= 1 for share in found.shares)
    assert all(seconds >= 0 for seconds in found.units.values()) and "neck" in found.units


def test_memory_at_hand():
    assert 2**28 < memory_at_hand(CPU) < 2**50
