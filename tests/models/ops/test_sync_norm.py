"""The operators in one process, where they are plain batch norm; several: tests/distributed/test_sync_norm.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.distributed import EVERY
from gesso.models.ops.sync_norm import batch_statistics, merge, normalise_batch

FORMATS = [torch.channels_last, torch.contiguous_format]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    centre=st.sampled_from([0.0, 3.0, -1e6]),
)
def test_merged_statistics_are_those_of_all_values(seed, sizes, centre):
    rng = np.random.default_rng(seed)
    sets = [rng.normal(centre, 1 + rng.random(), (size, 3)) for size in sizes]
    means = [s.mean(0) if len(s) else rng.normal(size=3) for s in sets]  # of an empty set anything
    deviations = [((s - s.mean(0)) ** 2).sum(0) if len(s) else np.zeros(3) for s in sets]
    counts = torch.tensor(sizes, dtype=torch.float64)[:, None]
    found = merge(counts, torch.tensor(np.array(means)), torch.tensor(np.array(deviations)))
    values = np.concatenate(sets)
    wanted = (values.mean(0), values.var(0) * len(values)) if len(values) else (np.zeros(3), np.zeros(3))
    assert found[0] == len(values)
    np.testing.assert_allclose(found[1], wanted[0], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found[2], wanted[1], rtol=1e-9, atol=1e-9)


def normalised(input, weight, bias, eps=1e-5):
    """Batch norm by the operators."""
    return normalise_batch(input, weight, bias, *batch_statistics(input.detach(), EVERY), EVERY, eps)


def results(function, input, weight, bias, gradient):
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias)]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, gradient)


def torchs(input, weight, bias):
    return F.batch_norm(input, None, None, weight, bias, True)


def example(dtype, memory_format, shape=(3, 5, 8, 6), device="cpu"):
    torch.manual_seed(0)
    input = (torch.randn(shape, device=device) * 2 + 1).to(dtype).contiguous(memory_format=memory_format)
    gradient = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
    of_weights = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(2, shape[1], dtype=of_weights, device=device)
    return input, weight, bias, gradient


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check_against_torch(dtype, memory_format, device):
    arguments = example(dtype, memory_format, device=device)
    found = results(normalised, *arguments)
    wanted = results(torchs, *(t.double() for t in arguments))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert [t.dtype for t in found] == [dtype, dtype, arguments[1].dtype, arguments[1].dtype]
    assert all(t.is_contiguous(memory_format=memory_format) for t in found[:2])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_torchs_batch_norm(dtype, memory_format):
    check_against_torch(dtype, memory_format, "cpu")


def test_weights_of_half_precision_and_strides_of_any_kind():
    input, weight, bias, gradient = example(torch.bfloat16, torch.channels_last, shape=(3, 4, 8, 6))
    found = results(normalised, input, weight.bfloat16(), bias.bfloat16(), gradient)
    assert all(t.dtype == torch.bfloat16 for t in found)
    input, weight, bias, gradient = example(torch.float32, torch.contiguous_format)
    found = results(normalised, input[:, :, ::2].transpose(2, 3), weight, bias, gradient[:, :, 1:5].transpose(2, 3))
    wanted = results(torchs, input[:, :, ::2].transpose(2, 3), weight, bias, gradient[:, :, 1:5].transpose(2, 3))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    input, weight, bias, _ = example(torch.float64, torch.channels_last, shape=(2, 2, 3, 2))
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    assert torch.autograd.gradcheck(normalised, leaves)


def check_large_mean(memory_format, device, tolerance):
    """Mean 1e4 and deviation 1e-2: in float32, E[x^2] - mean^2 has no digit left."""
    torch.manual_seed(0)
    values = (torch.randn(8, 4, 64, 64, dtype=torch.float64) * 1e-2 + 1e4).float()
    values = values.to(device).contiguous(memory_format=memory_format)
    mean, var, count = batch_statistics(values, EVERY)
    exact = values.double()
    wanted = exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=tolerance * 1e-5, atol=0)
    torch.testing.assert_close(var.double(), wanted, rtol=tolerance, atol=0)
    assert count == 8 * 64 * 64
    naive = values.square().mean((0, 2, 3)) - values.mean((0, 2, 3)).square()
    assert ((naive - wanted).abs() > wanted / 2).all(), "the case would not find cancellation"


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_large_mean_does_not_cancel(memory_format):
    check_large_mean(memory_format, "cpu", 1e-2)


def test_long_sums_keep_their_digits():
    """Torch's kernel for channels_last is 1e-4 off here."""
    torch.manual_seed(0)
    values = (torch.randn(8, 3, 200, 200) + 5).contiguous(memory_format=torch.channels_last)
    mean, var, _ = batch_statistics(values, EVERY)
    torch.testing.assert_close(mean.double(), values.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), values.double().var((0, 2, 3), correction=0), rtol=3e-6, atol=0)


@pytest.mark.parametrize("B", [0, 2])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_are_well_formed_operators(dtype, memory_format, B):
    input, weight, bias, gradient = example(dtype, memory_format, shape=(B, 3, 4, 5))
    found = batch_statistics(input, EVERY)
    assert all(value.isfinite().all() for value in found)
    torch.library.opcheck(torch.ops.gesso.batch_statistics.default, (input, EVERY))
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    torch.library.opcheck(torch.ops.gesso.normalise_batch.default, (*leaves, *found, EVERY, 1e-5))
    arguments = (gradient, input.detach(), weight.detach(), *found, EVERY, 1e-5)
    torch.library.opcheck(torch.ops.gesso.normalise_batch_backward.default, arguments)


def test_autocast_keeps_the_dtype():
    input, weight, bias, gradient = example(torch.bfloat16, torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(normalised, input, weight, bias, gradient)
        assert normalised(input.float(), weight, bias).dtype == torch.float32
    for a, b in zip(found, results(normalised, input, weight, bias, gradient), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_torchs_batch_norm_on_a_gpu(dtype, memory_format):
    check_against_torch(dtype, memory_format, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_large_mean_does_not_cancel_on_a_gpu(memory_format):
    check_large_mean(memory_format, "cuda", 0.2)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu():
    arguments = example(torch.float32, torch.channels_last, device="cuda")
    results(normalised, *arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(normalised, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.isfinite().all() for t in found)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [(4, 0, 3), (0, 5, 0), (0, 0, 0)])
def test_processes_without_pictures_have_no_weight_on_a_gpu(counts, monkeypatch):
    """What the others would send is put in the place of the collective."""
    torch.manual_seed(0)
    sets = [torch.randn(count, 5, 4, 6, device="cuda") * 2 + 1 for count in counts]
    sent = []
    monkeypatch.setattr("gesso.distributed.all_gather", lambda value, *_, **__: sent.append(value) or value[None])
    for values in sets:
        batch_statistics(values, EVERY)
    monkeypatch.setattr("gesso.distributed.all_gather", lambda *_, **__: torch.stack(sent))
    mean, var, count = batch_statistics(sets[0], EVERY)
    values = torch.cat(sets).double()
    assert count == sum(counts) * 24
    wanted = (values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)) if len(values) else (0 * mean, 0 * var)
    torch.testing.assert_close(mean.double(), wanted[0].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), wanted[1].double(), rtol=1e-5, atol=1e-5)
