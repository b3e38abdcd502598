import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from gesso.errors import ConfigError
from gesso.models.backbone import Backbone, BackboneConfig
from gesso.models.simple_pyramid import SimplePyramid, SimplePyramidConfig


def pyramid(channels=64, stride=16.0, **changes):
    return SimplePyramid(SimplePyramidConfig(**{"width": 32, **changes}), {"C4": channels}, {"C4": stride})


def test_levels():
    neck = pyramid(stride=14.0)
    assert neck.names == neck.rpn_levels == ("P2", "P3", "P4", "P5", "P6")
    assert neck.roi_levels == ("P2", "P3", "P4", "P5")
    assert neck.channels == dict.fromkeys(neck.names, 32)
    assert neck.strides == {"P2": 3.5, "P3": 7.0, "P4": 14.0, "P5": 28.0, "P6": 56.0}


@pytest.mark.parametrize(("levels", "subsampled"), [(4, 1), (4, 0), (3, 2), (1, 0)])
@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 7), (1, 1)])
def test_map_sizes_fit_the_strides(levels, subsampled, h, w):
    neck = pyramid(levels=levels, subsampled_levels=subsampled)
    maps = neck({"C4": torch.randn(2, 64, h, w)})
    assert tuple(maps) == neck.names and len(maps) == levels + subsampled
    for name, found in maps.items():
        assert found.shape == (2, 32, *(-int(-side * 16 // neck.strides[name]) for side in (h, w)))
    assert neck.roi_levels == neck.names[:levels]


@pytest.mark.parametrize(("h", "w"), [(6, 8), (7, 9)])
def test_cells_begin_at_multiples_of_the_stride(h, w):
    """Without the 3x3 convolutions a token reaches, in each level, the cells that overlap its patch and no others."""
    neck = pyramid().eval()
    for stage in neck.stages:
        stage[-1], stage[-2] = nn.Identity(), nn.Identity()
    x = torch.randn(1, 64, h, w)
    with torch.no_grad():
        before = neck({"C4": x})
        for row, column in ((0, 0), (3, 5), (h - 1, w - 1)):
            changed = x.clone()
            changed[:, :, row, column] += 5
            after = neck({"C4": changed})
            for name, stride in neck.strides.items():
                moved = (after[name] - before[name]).abs().amax(1)[0] > 0
                rows, columns = moved.any(1).nonzero().flatten(), moved.any(0).nonzero().flatten()
                for cells, token in ((rows, row), (columns, column)):
                    first, last = int(token * 16 // stride), int(((token + 1) * 16 - 1) // stride)
                    expected = list(range(first, last + 1))
                    reads = name != "P6" or (row // 2 % 2 == 0 and column // 2 % 2 == 0)  # P6 takes every second of P5
                    assert cells.tolist() == (expected if reads else [])


def test_layers_are_vitdets():
    neck = pyramid().eval()
    kinds = [[type(part).__name__ for part in stage] for stage in neck.stages]
    tail = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    up = "ConvTranspose2d"
    assert kinds == [[up, "LayerNorm2d", "GELU", up, *tail], [up, *tail], tail, ["MaxPool2d", *tail]]
    x = torch.randn(1, 64, 3, 4)
    with torch.no_grad():
        found = neck({"C4": x})
        first, _, second, norm = neck.stages[2]
        assert isinstance(norm, LayerNorm2d) and norm.weight.shape == (32,)
        mid = F.conv2d(x, first.weight).permute(0, 2, 3, 1)
        mid = F.layer_norm(mid, (32,), eps=1e-6).permute(0, 3, 1, 2)
        out = F.conv2d(mid, second.weight, padding=1).permute(0, 2, 3, 1)
        torch.testing.assert_close(found["P4"], F.layer_norm(out, (32,), eps=1e-6).permute(0, 3, 1, 2))


def test_with_a_transformer():
    net = Backbone(BackboneConfig(name="vit_tiny_patch16_224", pretrained=False))
    neck = SimplePyramid(SimplePyramidConfig(width=16), net.channels, net.strides)
    maps = neck(net(torch.randn(1, 3, 50, 70)))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (16, 16, 20),
        (16, 8, 10),
        (16, 4, 5),
        (16, 2, 3),
        (16, 1, 2),
    ]
    sum(m.square().sum() for m in maps.values()).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_one_graph():
    neck = pyramid(channels=16, width=8)
    maps = torch.compile(neck, fullgraph=True, backend="aot_eager")({"C4": torch.randn(1, 16, 3, 5)})
    sum(m.sum() for m in maps.values()).backward()


def test_a_backbone_of_several_maps_is_refused():
    with pytest.raises(ConfigError, match=r"one map, this one has C2, C3\. Use FPNConfig"):
        SimplePyramid(SimplePyramidConfig(), {"C2": 8, "C3": 16}, {"C2": 4.0, "C3": 8.0})


@pytest.mark.parametrize("changes", [{"width": 0}, {"levels": 0}, {"levels": 5}, {"subsampled_levels": -1}])
def test_values_out_of_range(changes):
    with pytest.raises(ConfigError, match="neck." + next(iter(changes))):
        SimplePyramidConfig(**changes)
