import copy
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

from gesso.errors import ConfigError
from gesso.training.optimizer import SGD, AdamW, build_optimizer, load_optimizer_state, set_rate
from gesso.training.schedule import ScheduleConfig, rate_factor
from tests.training.helpers import Tiny

PLAIN = {"weight_decay": 1e-2, "norm_decay": 1e-2, "bias_decay": 1e-2}


def groups(module: nn.Module, config: SGD | AdamW) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of each parameter by name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(module, config)
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


class Weights(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values], dtype=torch.float64))


def test_momentum_under_a_changing_rate_equals_golden(golden):
    case = json.loads((golden / "sgd" / "momentum_correction.json").read_text())
    module = Weights(case["w0"])
    config = SGD(rate=1.0, momentum=case["momentum"], weight_decay=case["weight_decay"])
    optimizer = build_optimizer(module, config)
    for gradient, rate, expected in zip(case["grads"], case["lr_per_step"], case["expected_torch_sgd"], strict=True):
        module.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        set_rate(optimizer, rate)
        optimizer.step()
        torch.testing.assert_close(module.weight[0].tolist(), expected, rtol=0, atol=1e-12)
    assert case["expected_torch_sgd"][-1] != pytest.approx(case["expected_caffe_uncorrected"][-1], abs=1e-6)


WARM = ScheduleConfig(base_images=16, warmup_ratio=None, warmup_steps=5, milestones=(0.5, 0.8), factors=(0.1, 0.5))


def trained(config: SGD | AdamW, gradients: np.ndarray, batch_size: int) -> tuple[list[np.ndarray], list[float]]:
    """The weights after each step from 0 by ``WARM``, and the rates used."""
    module = Weights([0.0] * gradients.shape[1])
    optimizer = build_optimizer(module, config)
    weights, rates = [], []
    for step, gradient in enumerate(gradients):
        module.weight.grad = torch.from_numpy(gradient)[None].clone()
        set_rate(optimizer, rate_factor(WARM, step, len(gradients), batch_size))
        optimizer.step()
        weights.append(module.weight[0].detach().numpy().copy())
        rates.append(config.rate * rate_factor(WARM, step, len(gradients), batch_size))
    return weights, rates


@pytest.mark.parametrize("batch_size", [16, 256])
def test_momentum_along_a_schedule_is_the_corrected_form(batch_size):
    """Goyal et al., section 3: where the rate stands inside the momentum, a changed rate needs a correction of it."""
    gradients = np.random.default_rng(0).normal(size=(20, 6))
    ours, rates = trained(SGD(rate=0.02, momentum=0.9, weight_decay=1e-2), gradients, batch_size)
    assert len({round(rate, 9) for rate in rates}) >= 3
    corrected, uncorrected = ([np.zeros(6), np.zeros(6)] for _ in range(2))
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        before = rates[max(step - 1, 0)]
        for state, factor in ((corrected, rate / before), (uncorrected, 1.0)):
            weights, velocity = state
            velocity = 0.9 * factor * velocity + rate * (gradient + 1e-2 * weights)
            state[:] = weights - velocity, velocity
        np.testing.assert_allclose(ours[step], corrected[0], rtol=0, atol=1e-12)
    assert np.abs(ours[-1] - uncorrected[0]).max() > 1e-3


def test_adamw_along_a_schedule_equals_its_formula():
    """Loshchilov and Hutter, algorithm 2: the decay is not in the moments, and follows the rate."""
    gradients = np.random.default_rng(1).normal(size=(20, 6))
    ours, rates = trained(AdamW(rate=0.01, betas=(0.8, 0.95), weight_decay=0.1), gradients, 256)
    weights, first, second = np.zeros(6), np.zeros(6), np.zeros(6)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        update = (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        weights = weights - rate * (update + 0.1 * weights)
        np.testing.assert_allclose(ours[step - 1], weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [SGD(rate=0.1, **PLAIN), AdamW(rate=0.1, **PLAIN)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_equals_the_plain_form(config, layout):
    torch.manual_seed(0)
    ours, theirs = nn.Conv2d(3, 4, 3).to(memory_format=layout), nn.Conv2d(3, 4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config)
    if isinstance(config, SGD):
        plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, foreach=False)
    else:
        plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=1e-2, foreach=False)
    for _ in range(4):
        x = torch.randn(2, 3, 6, 6)
        for module, step in ((ours, optimizer), (theirs, plain)):
            step.zero_grad()
            module(x).square().mean().backward()
            step.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [SGD(), SGD(momentum=0.0), AdamW()], ids=["sgd", "no momentum", "adamw"])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_found_inf_skips_a_step_entirely(config, good_steps):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = build_optimizer(module, config)

    def step(found_inf: float, gradient: float) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

    def state():
        values = [p.detach().clone() for p in module.parameters()]
        moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return values, [v.clone() for v in moments]

    for _ in range(good_steps):
        step(0.0, 1.0)
    weights, moments = state()
    step(1.0, float("nan"))
    after, moments_after = state()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    if moments:  # AdamW makes its moments at the first step, as zeros
        assert all(torch.equal(a, b) for a, b in zip(moments, moments_after, strict=True))
    assert all(bool((m == 0).all()) for m in moments_after) or good_steps
    step(0.0, 1.0)
    assert not torch.equal(state()[0][0], weights[0])
    assert torch.isfinite(state()[0][0]).all()


def test_groups():
    config = SGD(rate=0.1, weight_decay=1e-4, norm_decay=2e-4, bias_decay=3e-4, backbone_factor=0.5)
    found = groups(Tiny(), config)
    assert found == {
        "backbone.0.weight": (0.05, 1e-4),
        "backbone.0.bias": (0.05, 3e-4),
        "backbone.1.weight": (0.05, 2e-4),
        "backbone.1.bias": (0.05, 2e-4),
        "head.weight": (0.1, 1e-4),
        "head.bias": (0.1, 3e-4),
        "unused.weight": (0.1, 1e-4),
        "unused.bias": (0.1, 3e-4),
    }


def test_position_tables_and_norms_of_a_swin_do_not_decay():
    module = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, depths=(1, 1, 1, 1), num_classes=2)
    decays = {name: decay for name, (_, decay) in groups(module, AdamW(weight_decay=0.05)).items()}
    assert {decay for name, decay in decays.items() if "relative_position_bias_table" in name} == {0.0}
    assert {decay for name, decay in decays.items() if "norm" in name} == {0.0}
    assert {decay for name, decay in decays.items() if name.endswith("qkv.weight")} == {0.05}
    assert len(decays) == len(list(module.parameters()))


def test_a_tied_parameter_is_trained_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert sum(len(group["params"]) for group in build_optimizer(module, SGD()).param_groups) == 3


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), SGD())


@pytest.mark.parametrize("config", [SGD(rate=0.1), AdamW(rate=0.1)], ids=["sgd", "adamw"])
def test_state_is_loaded_in_the_layout_of_the_parameters(config):
    """A state saved from contiguous weights goes on rightly with channels_last weights."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)

    def step(module, optimizer):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    a = nn.Conv2d(3, 4, 3)
    first = build_optimizer(a, config)
    step(a, first)
    b = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    b.load_state_dict(a.state_dict())
    second = build_optimizer(b, config)
    load_optimizer_state(second, copy.deepcopy(first.state_dict()))
    step(a, first)
    step(b, second)
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(rate=0.0),
        lambda: SGD(momentum=1.0),
        lambda: SGD(weight_decay=-1.0),
        lambda: AdamW(rate=float("nan")),
        lambda: AdamW(betas=(0.9, 1.0)),
        lambda: AdamW(backbone_factor=-0.1),
    ],
)
def test_ranges(make):
    with pytest.raises(ConfigError, match="optimizer"):
        make()
