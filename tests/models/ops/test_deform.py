import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gesso.errors import ConfigError
from gesso.models.ops.deform import DeformableConv2d

SHAPES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
    {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1), "groups": 2},
]


def layers(version=1, deformable_groups=1, dtype=torch.float32, **options):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, **options).to(dtype)
    return plain, DeformableConv2d(plain, version=version, groups=deformable_groups)


def moving(layer, scale=2.0):
    """The layer with offsets of some pixels, also out of the map."""
    for parameter in layer.offset.parameters():
        nn.init.normal_(parameter, std=scale / parameter[0].numel() ** 0.5)
    return layer


def slow(layer, x):
    """The sampling of the papers, one kernel cell of one group after another."""
    kh, kw = layer.kernel_size
    maps = layer.offset(x)
    B, _, h, w = maps.shape
    cells, G = kh * kw, layer.deformable_groups
    H, W = x.shape[2:]
    shifts = maps[:, : 2 * G * cells].view(B, G, cells, 2, h, w)
    weights = torch.ones_like(shifts[:, :, :, 0])
    if layer.version == 2:
        weights = 2 * maps[:, 2 * G * cells :].view(B, G, cells, h, w).sigmoid()
    ys = torch.arange(h, dtype=x.dtype)[:, None] * layer.stride[0] - layer.padding[0]
    xs = torch.arange(w, dtype=x.dtype)[None, :] * layer.stride[1] - layer.padding[1]
    columns = torch.zeros(B, x.shape[1], cells, h, w, dtype=x.dtype)
    for g in range(G):
        part = slice(g * x.shape[1] // G, (g + 1) * x.shape[1] // G)
        for k in range(cells):
            y = ys + k // kw * layer.dilation[0] + shifts[:, g, k, 0]
            at = xs + k % kw * layer.dilation[1] + shifts[:, g, k, 1]
            grid = torch.stack([2 * at / (W - 1) - 1, 2 * y / (H - 1) - 1], -1)
            read = F.grid_sample(x[:, part], grid, padding_mode="zeros", align_corners=True)
            columns[:, part, k] = read * weights[:, g, k, None]
    groups = columns.view(B, layer.groups, -1, cells, h, w)
    kernel = layer.weight.view(layer.groups, -1, groups.shape[2], cells)
    out = torch.einsum("bgckhw,gock->bgohw", groups, kernel).flatten(1, 2)
    return out if layer.bias is None else out + layer.bias[:, None, None]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("options", SHAPES)
def test_new_it_is_the_plain_convolution(version, options):
    plain, layer = layers(version, 2, **options)
    x = torch.randn(2, 8, 13, 9)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert layer.state_dict().keys() == plain.state_dict().keys() | {"offset.weight", "offset.bias"}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("options", SHAPES)
def test_it_samples_as_the_papers_say(version, groups, options):
    layer = moving(layers(version, groups, torch.float64, **options)[1])
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), slow(layer, x)
    torch.testing.assert_close(found, expected)
    inputs = [x, *layer.parameters()]
    down = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, down), torch.autograd.grad(expected, inputs, down), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("version", [1, 2])
def test_gradients(version):
    torch.manual_seed(0)
    layer = moving(DeformableConv2d(nn.Conv2d(2, 2, 3, padding=1).double(), version=version))
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("version", [1, 2])
def test_a_new_layer_learns_where_to_look(version):
    layer = layers(version, **SHAPES[0])[1]
    layer(torch.randn(1, 8, 9, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("version", [1, 2])
def test_half_precision_is_sampled_in_float32(version):
    layer = moving(layers(version, **SHAPES[1])[1])
    x = torch.randn(1, 8, 13, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(found.float(), layer(x), atol=0.1, rtol=0.1)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("version", [1, 2])
def test_channels_last_stays(version):
    layer = moving(layers(version, 2, **SHAPES[0])[1])
    x = torch.randn(2, 8, 7, 9)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    found = other(x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_one_graph(version, half):
    """Forward and backward: torchvision has fakes for both of its operators."""
    layer = moving(layers(version, 2, **SHAPES[2])[1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 8, 7, 9).to(memory_format=torch.channels_last).requires_grad_()
    inputs = [x, *layer.parameters()]
    results = []
    for run in (layer, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = run(x)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.stride() == theirs.stride() and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_making_one_draws_no_chance_and_keeps_the_mode():
    plain = nn.Conv2d(8, 8, 3, padding=1).eval()
    state = torch.get_rng_state()
    layer = DeformableConv2d(plain)
    assert torch.equal(state, torch.get_rng_state())
    assert not layer.training and not layer.offset.training
    assert "deformable_groups=1" in repr(layer)


def test_what_cannot_be_deformable():
    with pytest.raises(ConfigError, match="8 channels has no 3 deformable groups"):
        layers(deformable_groups=3, **SHAPES[0])
    with pytest.raises(ConfigError, match="cannot be deformable"):
        layers(kernel_size=3, padding="same")
    with pytest.raises(ConfigError, match="cannot be deformable"):
        layers(kernel_size=3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_offsets_that_are_no_numbers_do_not_crash(value):
    layer = DeformableConv2d(torch.nn.Conv2d(3, 4, 3, padding=1))
    torch.nn.init.constant_(layer.offset.bias, value)
    assert layer(torch.rand(1, 3, 8, 8)).shape == (1, 4, 8, 8)
