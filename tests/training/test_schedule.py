import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gesso.config import from_dict, to_dict
from gesso.errors import ConfigError
from gesso.training.schedule import ScheduleConfig, rate_factor


def test_warmup_is_the_published_formula():
    config = ScheduleConfig(kind="constant", warmup_steps=500, warmup_ratio=0.01)
    for t in (0, 1, 250, 499):
        assert rate_factor(config, t, 10_000) == pytest.approx(1 - (1 - t / 500) * (1 - 0.01), abs=1e-15)
    assert rate_factor(config, 0, 10_000) == pytest.approx(0.01)
    assert rate_factor(config, 500, 10_000) == 1.0
    assert rate_factor(config, 9_999, 10_000) == 1.0


@pytest.mark.parametrize("total", [12, 1200])
def test_multi_step_equals_torch(total):
    config = ScheduleConfig(warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total * 8 // 12, total * 11 // 12], gamma=0.1)
    for step in range(total):
        if step % (total // 12) in (0, 1, total // 12 - 1):
            assert rate_factor(config, step, total) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_cosine_equals_torch():
    config = ScheduleConfig(kind="cosine", warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for step in range(40):
        assert rate_factor(config, step, 40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()


def test_warmup_multiplies_the_decay():
    config = ScheduleConfig(kind="cosine", warmup_steps=10, warmup_ratio=0.0)
    assert rate_factor(config, 5, 20) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": -1},
        {"warmup_ratio": 1.5},
        {"milestones": (0.9, 0.5)},
        {"milestones": (0.5, 1.0)},
        {"factor": 0.0},
    ],
)
def test_ranges(wrong):
    with pytest.raises(ConfigError, match="schedule"):
        ScheduleConfig(**wrong)


def test_configuration_survives_storage():
    config = ScheduleConfig(kind="cosine", warmup_steps=7)
    assert from_dict(ScheduleConfig, to_dict(config)) == config


SCHEDULES = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["constant", "multi_step", "cosine"]),
    warmup_steps=st.integers(0, 60),
    warmup_ratio=st.floats(0, 1),
    milestones=st.lists(st.floats(0.01, 0.99), max_size=4).map(lambda values: tuple(sorted(values))),
    factor=st.floats(0.01, 1),
)


@given(config=SCHEDULES, total=st.integers(1, 150))
def test_any_schedule_rises_then_falls_within_bounds(config, total):
    rates = [rate_factor(config, step, total) for step in range(total)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[config.warmup_steps :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    if config.kind == "constant":
        assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(rates))
    if config.kind == "multi_step":
        assert len({round(rate, 9) for rate in after}) <= len(config.milestones) + 1
    if config.kind == "cosine":
        assert all(earlier - later <= math.pi / 2 / total + 1e-12 for earlier, later in itertools.pairwise(after))


@given(config=SCHEDULES, total=st.integers(1, 150))
def test_any_schedule_equals_the_slow_form(config, total):
    """Walks the steps one by one, as a stateful scheduler does."""
    decay, due = 1.0, sorted(round(share * total) for share in config.milestones)
    for step in range(total):
        while config.kind == "multi_step" and due and due[0] <= step:
            due.pop(0)
            decay *= config.factor
        if config.kind == "cosine":
            decay = math.cos(math.pi * step / (2 * total)) ** 2
        warm = min(1.0, config.warmup_ratio + (1 - config.warmup_ratio) * step / max(config.warmup_steps, 1))
        warm = warm if step < config.warmup_steps else 1.0
        assert rate_factor(config, step, total) == pytest.approx(warm * decay, abs=1e-12)
