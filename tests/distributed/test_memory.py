"""Activations computed twice in several processes: the same step, no collective more, and one choice for all."""

import copy

import numpy as np
import pytest
import torch

from gesso import distributed
from gesso.errors import ConfigError
from gesso.models import segments
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.training.memory import Memory, apply_memory, save_memory
from tests.distributed.processes import run
from tests.models.helpers import random_batch, tiny_detector


def _detector(images):
    detector = tiny_detector().double().train()
    apply_norm_policy(detector, NormPolicy(kind="sync", images=images), pictures=2)
    return detector


def _step(detector, compile=False):
    """Losses, gradients and buffers of a step of this process's own batch, and the collectives of its two passes."""
    batch, targets = random_batch(seed=distributed.rank())
    torch.manual_seed(distributed.rank())
    run = torch.compile(detector, fullgraph=True, dynamic=False, backend="aot_eager") if compile else detector
    module = distributed.data_parallel(run)
    before = distributed.traffic.count
    losses = module(batch, targets)
    forward = distributed.traffic.count - before
    sum(losses.values()).backward()
    numbers = losses | {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    numbers |= dict(detector.named_buffers())
    counts = (forward, distributed.traffic.count - before - forward)
    return {name: value.detach().double().numpy() for name, value in numbers.items()}, counts


def _both(images, compile):
    plain = _detector(images)
    other = copy.deepcopy(plain)
    before = distributed.traffic.count
    plan = save_memory(other, Memory("sqrt"), *random_batch(seed=distributed.rank()), fixed_bytes=0)
    choosing = distributed.traffic.count - before
    return _step(plain, compile), _step(other, compile), plan, choosing


def assert_the_same(found, collectives=10):
    for (wanted, counts), (numbers, other_counts), plan, choosing in found:
        assert plan.units == plan.all_units > 4
        assert numbers.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(numbers[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
        assert other_counts == counts
        assert counts[1] >= collectives  # batch norm's backward passes
        assert choosing == 1  # process 0 tells the others


@pytest.mark.parametrize("images", [None, 4, 1])
def test_a_step_with_synchronised_batch_norm_is_the_same_and_repeats_no_collective(images):
    assert_the_same(run(_both, 2, images, False), 0 if images == 1 else 10)  # groups within a process need none


@pytest.mark.slow
def test_a_compiled_step_is_the_same_and_repeats_no_collective():
    assert_the_same(run(_both, 2, None, True, seconds=600))


def _repeating():
    """As ``_both``, where everything is computed again, what the collectives gave too."""
    detector = _detector(None)
    save_memory(detector, Memory("sqrt"), *random_batch(), fixed_bytes=0)
    kept = _step(detector)[1]
    for module in detector.modules():
        if segments._MARK in vars(module):
            setattr(module, segments._MARK, module._segments._replace(shared=False))
    return kept, _step(detector)[1]


def test_without_their_results_the_collectives_would_be_repeated():
    """What the tests above count can be seen by them."""
    for kept, repeated in run(_repeating, 2):
        assert repeated[1] > kept[1]


def _choices():
    """The segments that a budget gives, with clocks of the processes that disagree."""
    detector = _detector(None)
    apply_memory(detector, least := save_memory(detector, Memory("sqrt"), *random_batch(), fixed_bytes=0))
    budget = Memory("budget", round(least.peak_bytes * 1.1))
    return save_memory(detector, budget, *random_batch(), fixed_bytes=0).segments


def test_all_processes_choose_alike():
    first, second = run(_choices, 2)
    assert first == second
    assert first


def _refused():
    try:
        save_memory(_detector(None), Memory("budget", 1000), *random_batch(), fixed_bytes=0)
    except ConfigError as error:
        return str(error), error.told
    return None


def test_a_budget_that_is_too_small_is_refused_in_all_and_told_once():
    (line, told), (other, other_told) = run(_refused, 2)
    assert line == other
    assert "does not fit into the memory budget" in line
    assert (told, other_told) == (False, True)
