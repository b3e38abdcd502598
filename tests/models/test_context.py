"""Context blocks against the operations written out, on maps of any size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gesso.errors import ConfigError
from gesso.models.context import LargeKernel, PyramidPooling
from gesso.models.norm import NormPolicy, PolicyBatchNorm2d, apply_norm_policy


def by_hand(module, values):
    """The paper's section 3.2, cell by cell where it pools."""
    H, W = values.shape[2:]
    layers = [values]
    for bins, part in zip(module.bins, module.parts, strict=True):
        pooled = torch.zeros(*values.shape[:2], bins, bins)
        for i in range(bins):
            for j in range(bins):
                rows = slice(i * H // bins, -(-(i + 1) * H // bins))
                columns = slice(j * W // bins, -(-(j + 1) * W // bins))
                pooled[:, :, i, j] = values[:, :, rows, columns].mean((2, 3))
        layers.append(F.interpolate(part(pooled), size=(H, W), mode="bilinear"))
    return module.join(torch.cat(layers, 1))


@pytest.mark.parametrize("shape", [(12, 18), (7, 5), (3, 2), (1, 1)])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_pyramid_pooling(norm, shape):
    torch.manual_seed(0)
    module = PyramidPooling(16, 10, norm=norm).eval()
    values = torch.randn(2, 16, *shape)
    out = module(values)
    assert out.shape == (2, 10, *shape) and (out >= 0).all()
    torch.testing.assert_close(out, by_hand(module, values))


def test_pyramid_pooling_has_quarters_of_the_channels():
    module = PyramidPooling(32, 8, bins=(1, 4))
    assert [part[0].out_channels for part in module.parts] == [8, 8]
    assert module.join[0].in_channels == 32 + 2 * 8
    assert [len([m for m in part if isinstance(m, nn.BatchNorm2d)]) for part in module.parts] == [0, 1]


@pytest.mark.parametrize("kind", [None, "train", "affine", "fixed", "group_norm"])
def test_one_image_trains_under_every_norm_policy(kind):
    torch.manual_seed(0)
    module = PyramidPooling(16, 8)
    if kind:
        assert apply_norm_policy(module, NormPolicy(kind=kind)) == 4  # bins 2, 3, 6 and the join
        assert kind == "group_norm" or isinstance(module.join[1], PolicyBatchNorm2d)
    values = torch.randn(1, 16, 2, 2, requires_grad=True)
    module.train()(values).sum().backward()
    assert values.grad.isfinite().all() and module.parts[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("shape", "size"), [((9, 12), 15), ((20, 17), 5), ((1, 1), 3)])
def test_large_kernel_is_the_sum_of_two_pairs_of_lines(shape, size):
    torch.manual_seed(0)
    module = LargeKernel(6, 4, size=size)
    assert [tuple(c.kernel_size) for c in module.down] == [(size, 1), (1, size)]
    assert [tuple(c.kernel_size) for c in module.across] == [(1, size), (size, 1)]
    values = torch.randn(2, 6, *shape)
    column, row = module.down[0].weight[..., 0], module.down[1].weight[:, :, 0]
    kernel = torch.einsum("omb,mia->oiab", row, column)
    row, column = module.across[0].weight[:, :, 0], module.across[1].weight[..., 0]
    kernel = kernel + torch.einsum("oma,mib->oiab", column, row)
    total = F.conv2d(values, kernel, padding=size // 2)
    torch.testing.assert_close(module(values), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: PyramidPooling(16, 8), lambda: LargeKernel(16, 8)])
def test_channels_last_and_a_graph_and_the_same_gradient_twice(make):
    torch.manual_seed(0)
    module = make().to(memory_format=torch.channels_last)
    values = torch.randn(2, 16, 10, 14).to(memory_format=torch.channels_last)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    runs = []
    for function in (module, module, compiled):
        module.zero_grad()
        x = values.clone().requires_grad_()
        out = function(x)
        out.square().sum().backward()
        runs.append([out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())])
    assert runs[0][0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-4, atol=1e-4)


def test_impossible_sizes_are_refused():
    for bins in ((), (0, 2)):
        with pytest.raises(ConfigError, match="pyramid pooling"):
            PyramidPooling(16, 8, bins=bins)
    for size in (0, 4):
        with pytest.raises(ConfigError, match="large kernel"):
            LargeKernel(16, 8, size=size)
