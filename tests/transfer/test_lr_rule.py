import dataclasses
import math

import pytest
import torch
from torch import nn

from gesso.errors import ConfigError
from gesso.training.optimizer import SGD
from gesso.training.schedule import ScheduleConfig, rate_factor
from gesso.training.stage import TrainingConfig
from gesso.transfer.lr_rule import weight_norm_rule, with_rule


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.LayerNorm(5))


def test_the_figures_of_the_paper():
    """5.67e3 and 0.85e3 give 0.15, so 0.02 becomes 0.003, then 0.0006 and 0.00012 (Table 5)."""
    reference = {"conv.weight": torch.full((1, 1), math.sqrt(5670.0), dtype=torch.float64)}
    pretrained = {"conv.weight": torch.full((1, 1), math.sqrt(850.0), dtype=torch.float64)}
    rule = weight_norm_rule(pretrained, reference, 0.02)
    assert rule.ratio == pytest.approx(0.15, abs=1e-3) and rule.rate == pytest.approx(0.003, abs=1e-5)
    stage = TrainingConfig(steps=120, optimizer=SGD(rate=0.02), schedule=ScheduleConfig(warmup_steps=0))
    tuned = with_rule(stage, rule)
    rates = [tuned.optimizer.rate * rate_factor(tuned.schedule, step, 120, 16) for step in (0, 79, 80, 109, 110, 119)]
    assert rates == pytest.approx([0.003, 0.003, 0.0006, 0.0006, 0.00012, 0.00012], abs=2e-6)
    assert weight_norm_rule(pretrained, reference, 0.02, power=1).ratio == pytest.approx(math.sqrt(0.15), abs=1e-3)


def test_only_weights_of_convolutions_and_linear_layers_count():
    one, two = network(0), network(1)
    rule = weight_norm_rule(one.state_dict(), two.state_dict(), 1.0)
    slow = [sum(float((p.detach() ** 2).sum()) for p in (net[0].weight, net[2].weight)) for net in (one, two)]
    assert rule.tensors == 2 and [rule.pretrained, rule.reference] == pytest.approx(slow)
    assert rule.ratio == pytest.approx(min(slow[0] / slow[1], 1))


def test_only_what_both_have_counts():
    one, two = network(0).state_dict(), network(1).state_dict()
    two["2.weight"] = torch.ones(9, 4)
    one["extra.weight"] = torch.ones(100, 100)
    rule = weight_norm_rule(one, two, 1.0)
    assert rule.tensors == 1 and rule.pretrained == pytest.approx(float(one["0.weight"].square().sum()))


def test_larger_weights_do_not_raise_the_rate():
    state = network().state_dict()
    rule = weight_norm_rule({name: 3 * value for name, value in state.items()}, state, 0.5)
    assert rule.ratio == 1 and rule.rate == 0.5 and "clipped to 1" in rule.lines()[1]
    assert all(word in " ".join(rule.lines()) for word in ("sum of squares", "2 weights", "0.5 x", "Table 5"))


def test_what_is_refused():
    state = network().state_dict()
    with pytest.raises(ConfigError, match="in common"):
        weight_norm_rule(state, {"other.weight": torch.ones(2, 2)}, 0.02)
    with pytest.raises(ConfigError, match="zero"):
        weight_norm_rule(state, {name: torch.zeros_like(value) for name, value in state.items()}, 0.02)


def test_a_cosine_stays_one():
    stage = TrainingConfig(schedule=ScheduleConfig(kind="cosine"))
    state = network().state_dict()
    tuned = with_rule(stage, weight_norm_rule(state, state, 0.1))
    assert tuned == dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, rate=0.1))
