import pytest
import torch
import torch.nn.functional as F

from gesso.models.ops import linear as ops
from gesso.models.ops.linear import Linear, linear


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_forward_and_backward(shape, bias):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(*shape, generator=g), torch.randn(4, 7, generator=g)
    b = torch.randn(4, generator=g) if bias else None
    x = x[None] if len(shape) == 1 else x
    mine = [t.clone().requires_grad_() if t is not None else None for t in (x, w, b)]
    theirs = [t.clone().requires_grad_() if t is not None else None for t in (x, w, b)]
    found, wanted = linear(*mine), F.linear(*theirs)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(found.shape, generator=g)
    found.backward(upstream), wanted.backward(upstream)
    for a, c in zip(mine, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, c.grad)


def test_a_large_product_goes_to_onednn_and_is_right():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 12544, generator=g), torch.randn(128, 12544, generator=g)
    exact = (x.double() @ w.double().t()).float()
    torch.testing.assert_close(linear(x, w, None), exact, rtol=1e-4, atol=1e-3)
    if ops._AVAILABLE:
        with torch.profiler.profile() as record:
            linear(x, w, None)
        assert any("mkldnn" in event.key for event in record.key_averages())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    layer = Linear(6, 3).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_autocast_and_graph():
    layer, x = Linear(6, 3), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_frozen_weights_get_no_gradient():
    layer = Linear(6, 3).requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None
