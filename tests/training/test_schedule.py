import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gesso.config import from_dict, to_dict
from gesso.errors import ConfigError
from gesso.training.schedule import ScheduleConfig, describe_rule, rate_factor


def test_warmup_is_the_published_formula():
    config = ScheduleConfig(kind="constant", warmup_steps=500, warmup_ratio=0.01)
    for t in (0, 1, 250, 499):
        assert rate_factor(config, t, 10_000, 16) == pytest.approx(1 - (1 - t / 500) * (1 - 0.01), abs=1e-15)
    assert rate_factor(config, 0, 10_000, 16) == pytest.approx(0.01)
    assert rate_factor(config, 500, 10_000, 16) == 1.0
    assert rate_factor(config, 9_999, 10_000, 16) == 1.0


@pytest.mark.parametrize("total", [12, 1200])
def test_multi_step_equals_torch(total):
    config = ScheduleConfig(warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total * 8 // 12, total * 11 // 12], gamma=0.1)
    for step in range(total):
        if step % (total // 12) in (0, 1, total // 12 - 1):
            assert rate_factor(config, step, total, 16) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_cosine_equals_torch():
    config = ScheduleConfig(kind="cosine", warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for step in range(40):
        assert rate_factor(config, step, 40, 16) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("power", [0.9, 1.0, 2.5])
def test_poly_equals_torch(power):
    config = ScheduleConfig(kind="poly", power=power, warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=40, power=power)
    for step in range(43):
        assert rate_factor(config, step, 40, 16) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()


def test_warmup_multiplies_the_decay():
    config = ScheduleConfig(kind="cosine", warmup_steps=10, warmup_ratio=0.0)
    assert rate_factor(config, 5, 20, 16) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": -1},
        {"warmup_ratio": 1.5},
        {"milestones": (0.9, 0.5)},
        {"milestones": (0.5, 1.0)},
        {"factor": 0.0},
        {"factor": 1.1},
        {"factors": (0.1, 0.0)},
        {"factors": (0.1,)},
        {"base_images": 0},
        {"warmup_ratio": None},
        {"power": 0.0},
    ],
)
def test_ranges(wrong):
    with pytest.raises(ConfigError, match="schedule"):
        ScheduleConfig(**wrong)


def test_configuration_survives_storage():
    config = ScheduleConfig(warmup_ratio=None, base_images=16, milestones=(0.5, 0.7), factors=(0.1, 0.5))
    assert from_dict(ScheduleConfig, to_dict(config)) == config


MEGDET = ScheduleConfig(
    base_images=16, warmup_ratio=None, milestones=(11 / 18, 14 / 18, 17 / 18), factors=(0.1, 0.1, 0.5)
)


@pytest.mark.parametrize(
    ("base_rate", "base_images", "batch_size", "rate"),
    [
        (0.02, 16, 256, 0.32),  # MegDet
        (0.02, 16, 2, 0.0025),
        (0.01, 8, 512, 0.64),  # PFDet
        (0.02, 16, 64, 0.08),  # direct pre-training
    ],
)
def test_linear_scaling_gives_the_published_rates(base_rate, base_images, batch_size, rate):
    config = ScheduleConfig(kind="constant", base_images=base_images)
    assert base_rate * rate_factor(config, 500, 1000, batch_size) == pytest.approx(rate, rel=1e-12)
    unscaled = ScheduleConfig(kind="constant")
    assert rate_factor(unscaled, 500, 1000, batch_size) == 1.0


def test_warmup_without_a_ratio_rises_from_the_base_rate():
    rates = [0.02 * rate_factor(MEGDET, step, 9000, 256) for step in range(501)]
    assert rates[0] == pytest.approx(0.02, rel=1e-12) and rates[500] == pytest.approx(0.32, rel=1e-12)
    steps = [later - earlier for earlier, later in itertools.pairwise(rates)]
    assert steps == pytest.approx([(0.32 - 0.02) / 500] * 500, rel=1e-9)


@pytest.mark.parametrize(("batch_size", "factor"), [(16, 1.0), (8, 0.5), (2, 0.125)])
def test_the_base_batch_and_smaller_ones_have_no_warmup(batch_size, factor):
    assert {rate_factor(MEGDET, step, 9000, batch_size) for step in (0, 1, 499, 500)} == {factor}


def test_factors_of_each_milestone():
    """MegDet's long policy: a tenth after epochs 11 and 14, half after 17 of 18."""
    by_epoch = [rate_factor(MEGDET, 100 * epoch, 1800, 16) for epoch in range(18)]
    assert by_epoch == pytest.approx([1.0] * 11 + [0.1] * 3 + [0.01] * 3 + [0.005])
    assert rate_factor(MEGDET, 1699, 1800, 16) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("changes", "rate", "batch_size", "lines"),
    [
        (
            {"base_images": 16, "warmup_ratio": None, "milestones": (8 / 11, 10 / 11)},
            0.02,
            256,
            [
                "learning rate 0.32 = 0.02 x 256 / 16 (linear scaling)",
                "warm-up over 500 steps from 0.02 to 0.32",
                "times 0.1 after steps 4,000 and 5,000, of 5,500 in all",
            ],
        ),
        (
            {"base_images": 16, "warmup_ratio": None, "milestones": (0.2, 0.4, 0.6), "factors": (0.1, 0.1, 0.5)},
            0.02,
            16,
            [
                "learning rate 0.02 = 0.02 x 16 / 16 (linear scaling)",
                "no warm-up",
                "times 0.1 after steps 1,100 and 2,200, times 0.5 after step 3,300, of 5,500 in all",
            ],
        ),
        (
            {"kind": "cosine", "warmup_steps": 1000},
            1e-4,
            16,
            [
                "learning rate 0.0001",
                "warm-up over 1,000 steps from 1e-07 to 0.0001",
                "down to 0 along half a cosine over 5,500 steps",
            ],
        ),
        (
            {"kind": "poly", "warmup_steps": 0},
            0.01,
            16,
            [
                "learning rate 0.01",
                "no warm-up",
                "down to 0 as the share of 5,500 steps that is left, to the power 0.9",
            ],
        ),
        (
            {"kind": "constant", "warmup_steps": 0},
            0.08,
            64,
            ["learning rate 0.08", "no warm-up", "constant over 5,500 steps"],
        ),
        (
            {"milestones": (), "warmup_steps": 0},
            0.08,
            64,
            ["learning rate 0.08", "no warm-up", "constant over 5,500 steps"],
        ),
    ],
)
def test_the_log_says_what_follows_from_which_rule(changes, rate, batch_size, lines):
    assert describe_rule(ScheduleConfig(**changes), rate, batch_size, 5500) == lines


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    milestones = tuple(sorted(draw(st.lists(st.floats(0.01, 0.99), max_size=4))))
    base_images = draw(st.none() | st.integers(1, 64))
    ratio = st.floats(0, 1)
    return ScheduleConfig(
        kind=draw(st.sampled_from(["constant", "multi_step", "cosine", "poly"])),
        base_images=base_images,
        warmup_steps=draw(st.integers(0, 60)),
        warmup_ratio=draw(ratio if base_images is None else st.none() | ratio),
        milestones=milestones,
        factor=draw(st.floats(0.01, 1)),
        factors=draw(st.just(()) | st.tuples(*[st.floats(0.01, 1)] * len(milestones))),
        power=draw(st.floats(0.1, 4)),
    )


@given(config=schedules(), total=st.integers(1, 150), batch_size=st.integers(1, 512))
def test_any_schedule_rises_then_falls_within_bounds(config, total, batch_size):
    scale = batch_size / (config.base_images or batch_size)
    rates = [rate_factor(config, step, total, batch_size) / scale for step in range(total)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[config.warmup_steps :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if config.kind == "constant":
        assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(rates))
    if config.kind == "multi_step":
        assert len({round(rate, 9) for rate in after}) <= len(config.milestones) + 1
    if config.kind == "cosine":
        assert all(earlier - later <= math.pi / 2 / total + 1e-12 for earlier, later in itertools.pairwise(after))


@given(config=schedules(), total=st.integers(1, 150), batch_size=st.integers(1, 512))
def test_any_schedule_equals_the_slow_form(config, total, batch_size):
    """Walks the steps one by one, as a stateful scheduler does."""
    base = config.base_images or batch_size
    first = config.warmup_ratio
    if first is None:
        first = 1.0 if batch_size <= base else base / batch_size
    decay, due = 1.0, [round(share * total) for share in config.milestones]
    factors = list(config.factors) or [config.factor] * len(due)
    for step in range(total):
        while config.kind == "multi_step" and due and due[0] <= step:
            due.pop(0)
            decay *= factors.pop(0)
        if config.kind == "cosine":
            decay = math.cos(math.pi * step / (2 * total)) ** 2
        if config.kind == "poly":
            decay = math.exp(config.power * math.log((total - step) / total))
        warm = min(1.0, first + (1 - first) * step / max(config.warmup_steps, 1))
        warm = warm if step < config.warmup_steps else 1.0
        expected = batch_size / base * warm * decay
        assert rate_factor(config, step, total, batch_size) == pytest.approx(expected, rel=1e-9, abs=1e-12)
