import numpy as np
import pytest
import torch
from torch import nn

from gesso import distributed
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.training.ema import EMA, swapped
from gesso.training.loop import run_stage
from tests.distributed.processes import run
from tests.training.helpers import Recorder, batches, new_stage, tiny_config


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_average_equals_the_slow_form():
    module = small()
    ema = EMA(module, 0.95)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    for update in range(200):
        with torch.no_grad():
            for value in module.state_dict().values():
                value.add_(torch.randn(value.shape).double() if value.is_floating_point() else 1)
        ema.update(module, torch.ones(()))
        decay = min(0.95, (1 + update) / (10 + update))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    for name, value in ema.average.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    assert ema.updates == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_update_changes_no_bit(dtype):
    module = small().to(dtype)
    ema = EMA(module, 0.9)
    before = {name: value.clone() for name, value in ema.average.items()}
    with torch.no_grad():
        module[0].weight.add_(1)
    ema.update(module, torch.zeros(()))
    assert all(torch.equal(ema.average[name], value) for name, value in before.items())
    ema.update(module, torch.ones(()))
    assert not torch.equal(ema.average["0.weight"], before["0.weight"])


def test_swap_gives_the_averages_and_takes_them_back_exactly():
    module = small()
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module[0].weight.mul_(1.7)
    ema.update(module, torch.ones(()))
    own = {name: value.clone() for name, value in module.state_dict().items()}
    parameter = module[0].weight
    with pytest.raises(RuntimeError, match="within"), ema.swapped_in(module):
        assert torch.equal(module[0].weight, ema.average["0.weight"])
        assert not torch.equal(module[0].weight, own["0.weight"])
        raise RuntimeError("within")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in own.items())
    assert module[0].weight is parameter


def test_averages_do_not_share_memory_with_the_module():
    module = small()
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module[0].weight.zero_()
    assert not torch.equal(ema.average["0.weight"], module[0].weight)


def test_other_values_are_swapped_in_and_out_exactly():
    """Only those that are named; the others stay as they are."""
    module = small()
    own = {name: value.clone() for name, value in module.state_dict().items()}
    with swapped(module, {"1.running_mean": torch.full((4,), 3.0)}):
        assert (module[1].running_mean == 3).all() and module[1].running_mean.dtype == torch.float64
        assert torch.equal(module[0].weight, own["0.weight"])
    assert all(torch.equal(module.state_dict()[name], value) for name, value in own.items())


def _averages():
    """Of one of several processes after some steps on its own part of each batch, with shared batch norm."""
    stage = new_stage(tiny_config(batch_size=8, precision="float64"))
    stage.module.unused.requires_grad_(False)
    apply_norm_policy(stage.module, NormPolicy(kind="sync"))
    run_stage(stage, batches(4 * distributed.rank()), Recorder().callbacks())
    assert stage.ema is not None
    return stage.ema.updates, {name: value.numpy() for name, value in stage.ema.average.items()}


def test_averages_are_the_same_in_all_processes():
    (updates, one), (_, two) = run(_averages, 2)
    assert updates == 8
    assert all(np.array_equal(one[name], two[name]) for name in one)
