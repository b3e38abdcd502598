"""Batch norm over several processes beside torch's own over the concatenated batch."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gesso import distributed
from gesso.errors import ConfigError
from gesso.models.norm import NormPolicy, apply_norm_policy, statistics_held
from gesso.models.ops.sync_norm import batch_statistics
from tests.distributed.processes import run

C = 6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}
SUMS = TOLERANCE | {torch.bfloat16: 1e-4}
"""Of statistics and gradients of parameters, which are float32 for bfloat16."""
CASES = {
    "float32": ([2, 2, 2, 2], torch.float32, torch.channels_last),
    "float32, NCHW": ([2, 2, 2, 2], torch.float32, torch.contiguous_format),
    "float64": ([2, 2, 2, 2], torch.float64, torch.channels_last),
    "bfloat16": ([2, 2, 2, 2], torch.bfloat16, torch.channels_last),
    "bfloat16, NCHW": ([2, 2, 2, 2], torch.bfloat16, torch.contiguous_format),
    "unequal": ([3, 1, 2, 5], torch.float64, torch.channels_last),
    "unequal, float32": ([3, 1, 2, 5], torch.float32, torch.channels_last),
    "the last without pictures": ([2, 0, 1, 0], torch.float64, torch.channels_last),
    "the first without pictures": ([0, 3, 0, 1], torch.float32, torch.channels_last),
    "the first without pictures, NCHW, bfloat16": ([0, 3, 0, 1], torch.bfloat16, torch.contiguous_format),
    "one pixel": ([1, 1, 1, 1], torch.float64, torch.contiguous_format),
}


def example(name, world):
    """Values and gradients (B, C, H, W), float64 but of the case's digits, split by rank."""
    sizes, dtype, _ = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    shape = (sum(sizes[:world]), C, *((1, 1) if name == "one pixel" else (7, 5)))
    spread = 0.5 + torch.rand(C, 1, 1, generator=g, dtype=torch.float64) * 3
    values = torch.randn(shape, generator=g, dtype=torch.float64) * spread + torch.arange(C).view(C, 1, 1) - 2
    gradient = torch.randn(shape, generator=g, dtype=torch.float64) + 0.3
    return [list(torch.split(t.to(dtype).double(), sizes[:world])) for t in (values, gradient)]


def layer(dtype):
    g = torch.Generator().manual_seed(0)
    made = nn.BatchNorm2d(C)
    with torch.no_grad():
        made.weight.copy_(torch.rand(C, generator=g) + 0.5)
        made.bias.copy_(torch.randn(C, generator=g))
        made.running_mean.copy_(torch.randn(C, generator=g))
    return made.double() if dtype == torch.float64 else made


def _one(name, images):
    """The case's part of this process, through a layer of batch norm."""
    _, dtype, memory_format = CASES[name]
    values, gradient = (parts[distributed.rank()] for parts in example(name, distributed.world_size()))
    module = nn.Sequential(layer(dtype))
    apply_norm_policy(module, NormPolicy(kind="sync", images=images), pictures=2)
    input = values.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    before = distributed.traffic.count
    out = module(input)
    forward = distributed.traffic.count - before
    out.backward(gradient.to(dtype))
    norm = module[0]
    found = {
        "out": out.detach(),
        "input": input.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    formats = [t.is_contiguous(memory_format=memory_format) or len(t) == 0 for t in (out, input.grad)]
    collectives = (forward, distributed.traffic.count - before - forward)
    return {key: value.double().numpy() for key, value in found.items()}, formats, out.dtype, collectives


def _all(images):
    return {name: _one(name, images) for name in CASES}


@functools.cache
def results(world, images=None):
    return run(_all, world, images)


def expected(values, gradient, dtype):
    """Torch's batch norm over the concatenated batch, in float64."""
    norm = layer(dtype).double()
    input = torch.cat(values).requires_grad_()
    out = norm(input)
    out.backward(torch.cat(gradient))
    sizes = [len(part) for part in values]
    return [torch.split(t, sizes) for t in (out.detach(), input.grad)], norm


def check(found, values, gradient, dtype):
    """``found`` of the processes of one group."""
    (out, d_input), norm = expected(values, gradient, dtype)

    def close(a, b, tolerance):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    for (one, formats, kind, _), a, b in zip(found, out, d_input, strict=True):
        close(one["out"], a, TOLERANCE[dtype])
        close(one["input"], b, TOLERANCE[dtype])
        assert all(formats) and kind == dtype
        for name in ("running_mean", "running_var"):
            np.testing.assert_array_equal(one[name], found[0][0][name])  # bit for bit
    for name, wanted in (("weight", norm.weight.grad), ("bias", norm.bias.grad)):
        close(sum(one[name] for one, *_ in found), wanted, SUMS[dtype])
    for name in ("running_mean", "running_var"):
        close(found[0][0][name], getattr(norm, name), SUMS[dtype])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_equals_batch_norm_over_the_concatenated_batch(world, name):
    found = [of_rank[name] for of_rank in results(world)]
    check(found, *example(name, world), CASES[name][1])
    assert all(collectives == (1, 1) for *_, collectives in found)


@pytest.mark.parametrize("name", CASES)
def test_groups_of_two_among_four(name):
    found = [of_rank[name] for of_rank in results(4, 4)]
    values, gradient = example(name, 4)
    for pair in (slice(0, 2), slice(2, 4)):
        check(found[pair], values[pair], gradient[pair], CASES[name][1])
    assert all(collectives == (1, 1) for *_, collectives in found)


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, C, 3), layer(None), nn.ReLU(), nn.Conv2d(C, C, 3), layer(None), nn.ReLU())
    apply_norm_policy(module, NormPolicy(kind="sync"))
    return module


def picture(rank):
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(rank))


def _step(module, forward):
    """Gradients, running statistics and collectives of a step."""
    before = distributed.traffic.count
    forward(picture(distributed.rank())).square().mean().backward()
    count = distributed.traffic.count - before
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    return [t.double().numpy() for t in (*gradients, *module.buffers())], count


def _compiled():
    eager, steps = network(), []
    wanted = [_step(eager, eager) for _ in range(2)]
    for backend in ("aot_eager", "aot_eager_decomp_partition"):
        torch._dynamo.reset()
        module = network()
        forward = torch.compile(module, fullgraph=True, backend=backend)
        steps.append([_step(module, forward) for _ in range(2)])
        module = network()
        forward = torch.compile(module, fullgraph=True, backend=backend)
        with distributed.alone():
            rehearsed = _step(module, forward)[1]
        module.load_state_dict(network().state_dict())
        steps.append([_step(module, forward) for _ in range(2)])
        assert rehearsed == 0
    return wanted, steps


@pytest.mark.slow
def test_compiled_graphs_are_whole_and_do_the_same():
    for wanted, steps in run(_compiled, 2):
        assert [count for _, count in wanted] == [4, 4]
        for found in steps:
            for (values, count), (others, other_count) in zip(found, wanted, strict=True):
                assert count == other_count
                for a, b in zip(values, others, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def _recomputed():
    """A step whose activations are computed twice, but for the statistics."""

    def policy(ctx, op, *args, **kwargs):
        kept = op is torch.ops.gesso.batch_statistics.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        first, second = create_selective_checkpoint_contexts(policy)
        return first, _Both(second, statistics_held())

    plain, module = network(), network()
    wanted = _step(plain, plain)
    return wanted, _step(module, lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts))


class _Both:
    def __init__(self, *contexts):
        self.contexts = contexts

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


def test_recomputed_activations_repeat_no_collective():
    for (wanted, count), (found, repeated) in run(_recomputed, 2):
        assert count == repeated == 4
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(a, b)


def _data_parallel():
    module = network()
    parallel = distributed.data_parallel(module)
    (parallel(picture(distributed.rank())).square().mean() / 2).backward()  # its part of the mean over both
    return [p.grad.numpy() for p in module.parameters()]


def test_added_gradients_are_those_of_the_whole_batch():
    plain = network()
    plain(torch.cat([picture(0), picture(1)])).square().mean().backward()
    for found in run(_data_parallel, 2):
        for a, b in zip(found, plain.parameters(), strict=True):
            np.testing.assert_allclose(a, b.grad, rtol=1e-4, atol=1e-6)


def _large_mean():
    values = torch.randn(4, C, 32, 32, generator=torch.Generator().manual_seed(distributed.rank())) * 1e-2 + 1e4
    var = batch_statistics(values, distributed.EVERY)[1]
    return values.double().numpy(), var.numpy()


def test_a_large_mean_does_not_cancel():
    found = run(_large_mean, 2)
    values = np.concatenate([values for values, _ in found])
    for _, var in found:
        np.testing.assert_allclose(var, values.var((0, 2, 3)), rtol=1e-2)
    single = values.astype(np.float32)
    naive = np.square(single).mean((0, 2, 3)) - np.square(single.mean((0, 2, 3)))
    assert (abs(naive / values.var((0, 2, 3)) - 1) > 0.5).all(), "the case would not find cancellation"


def _nobody():
    module = nn.Sequential(layer(None))
    apply_norm_policy(module, NormPolicy(kind="sync"))
    before = [b.clone() for b in (module[0].running_mean, module[0].running_var)]
    input = torch.zeros(0, C, 4, 4, requires_grad=True)
    out = module(input)
    out.sum().backward()
    after = [module[0].running_mean, module[0].running_var]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return same, out.shape, input.grad.shape, module[0].weight.grad.abs().sum().item()


def test_where_no_process_has_a_picture_nothing_moves():
    assert run(_nobody, 2) == [(True, (0, C, 4, 4), (0, C, 4, 4), 0.0)] * 2


def _alone():
    module = nn.Sequential(layer(None))
    apply_norm_policy(module, NormPolicy(kind="sync"))
    values = torch.randn(2 + distributed.rank(), C, 4, 4)
    before = distributed.traffic.count
    with distributed.alone(), statistics_held():
        out = module(values)
    wanted = F.batch_norm(values, None, None, module[0].weight, module[0].bias, True)
    torch.testing.assert_close(out, wanted)
    assert module[0].num_batches_tracked == 0
    return distributed.traffic.count - before


def test_alone_it_is_batch_norm_of_this_process():
    assert run(_alone, 2) == [0, 0]


def _sizes(images, pictures, kind):
    module = nn.Sequential(layer(None))
    try:
        apply_norm_policy(module, NormPolicy(kind=kind, images=images), pictures=pictures)
    except ConfigError as error:
        return str(error)
    group = module[0].group
    return None if group is None else distributed.group_size(group)


def _table():
    local = [_sizes(n, 4, "sync") for n in (1, 2, 4)]
    return local, [_sizes(n, 4, "sync") for n in (8, 16)], _sizes(12, 4, "sync"), _sizes(8, 4, "train")


def test_groups_are_formed_or_refused_with_the_sizes_that_can_be():
    for local, several, refused, train in run(_table, 4):
        assert local == [None, None, None]
        assert several == [2, 4]
        assert refused == (
            "norm.images = 12 cannot be formed by 4 processes with 4 pictures each. Choose 1, 2, 4, 8 or 16."
        )
        assert train == "norm.images = 8 cannot be formed by a process with 4 pictures. Choose 1, 2 or 4."
