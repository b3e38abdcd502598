import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as Reference
from torchvision.models.detection.image_list import ImageList

from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig, AnchorGenerator, centres_inside

STRIDES = (4.0, 8.0, 16.0, 32.0, 64.0)


def torchvisions(sizes, ratios, shapes, side):
    reference = Reference(sizes, (ratios,) * len(sizes))
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    return reference(ImageList(torch.zeros(1, 3, *side), [side]), maps)[0]


def halved(side, levels=5):
    """Shapes of the maps as convolutions make them: each side half of the one before, rounded up."""
    return [(-(-side[0] // s), -(-side[1] // s)) for s in (4, 8, 16, 32, 64, 128)[:levels]]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("side", [(128, 192), (64, 64)])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))])
def test_equals_torchvision(side, scales, fitted):
    config = AnchorConfig(scales=scales, fitted=fitted)
    sizes = tuple(tuple(size * s for s in scales) for size in config.sizes)
    expected = torchvisions(sizes, config.ratios, halved(side), side)
    assert config.per_cell == 3 * len(scales)
    assert torch.equal(AnchorGenerator(config, STRIDES)(halved(side), side), expected)


@pytest.mark.parametrize("side", [(96, 160), (800, 1088), (75, 130)])
def test_fitted_equals_torchvision_where_sides_are_no_multiples(side):
    shapes = halved(side)
    assert any(side[0] % rows or side[0] // rows != s for (rows, _), s in zip(shapes, STRIDES, strict=True))
    config = AnchorConfig(fitted=True)
    expected = torchvisions(tuple((size,) for size in config.sizes), config.ratios, shapes, side)
    assert torch.equal(AnchorGenerator(config, STRIDES)(shapes, side), expected)
    assert not torch.equal(AnchorGenerator(AnchorConfig(), STRIDES)(shapes, side), expected)


def test_sizes_per_level_equal_those_of_torchvisions_retinanet():
    from torchvision.models.detection.retinanet import _default_anchorgen

    sizes = tuple(int(x * factor) for x in (32, 64, 128, 256, 512) for factor in (1, 2 ** (1 / 3), 2 ** (2 / 3)))
    config = AnchorConfig(sizes=sizes, sizes_per_level=3)
    assert config.per_cell == 9 and tuple(config.levels()) == _default_anchorgen().sizes
    side, shapes = (128, 256), halved((128, 256), 6)[1:]
    expected = _default_anchorgen()(
        ImageList(torch.zeros(1, 3, *side), [side]), [torch.zeros(1, 1, *s) for s in shapes]
    )
    assert torch.equal(AnchorGenerator(config, (8, 16, 32, 64, 128))(shapes, side), expected[0])


def test_sizes_and_scales_of_a_level():
    config = AnchorConfig(sizes=(1.0, 2.0, 10.0, 20.0), sizes_per_level=2, scales=(1.0, 3.0), ratios=(1.0,))
    assert config.levels() == [(1.0, 3.0, 2.0, 6.0), (10.0, 30.0, 20.0, 60.0)] and config.per_cell == 4


def test_strides_that_are_no_powers_of_two():
    """Centres stand at multiples of the stride, whatever the map's side."""
    config = AnchorConfig(sizes=(8.0, 16.0), ratios=(1.0, 4.0))
    found = AnchorGenerator(config, (3.5, 7.0))([(3, 4), (2, 1)], (12, 14)).tolist()
    expected = [
        [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
        for stride, size, rows, columns in ((3.5, 8, 3, 4), (7.0, 16, 2, 1))
        for y in range(rows)
        for x in range(columns)
        for w, h in ((size, size), (size / 2, size * 2))
    ]
    assert found == expected


def test_one_stride_for_each_level():
    with pytest.raises(ConfigError, match="5 levels, the neck 4"):
        AnchorGenerator(AnchorConfig(), (4, 8, 16, 32))
    with pytest.raises(ConfigError, match="5 sizes, 2 for each level"):
        AnchorConfig(sizes_per_level=2)


def test_nothing_goes_into_the_state_and_float64_is_kept():
    anchors = AnchorGenerator(AnchorConfig(), STRIDES).double()
    assert not anchors.state_dict()
    assert anchors([(2, 2)] * 5, (128, 128)).dtype == torch.float64


def test_centres_inside():
    boxes = torch.tensor([[-4.0, -4, 4, 4], [8, 8, 12, 12], [4, 8, 8, 16]])
    inside = centres_inside(boxes, torch.tensor([[12, 10], [16, 16]]))
    assert inside.tolist() == [[True, False, False], [True, True, True]]


@pytest.mark.parametrize("change", [{"sizes": ()}, {"sizes": (0.0,)}, {"ratios": (-1.0,)}, {"scales": ()}])
def test_refuses_what_is_no_anchor(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        AnchorConfig(**change)


def test_anchors_that_are_not_rounded_have_their_area_and_ratio():
    config = AnchorConfig(rounded=False, scales=(1.0, 2 ** (1 / 3)))
    found = AnchorGenerator(config, STRIDES).double()(halved((64, 64)), (64, 64))
    width, height = (found[:, 2:] - found[:, :2]).unbind(dim=1)
    first = config.per_cell  # of the first cell, ratios outermost
    torch.testing.assert_close((height / width)[:first].tolist(), [0.5, 0.5, 1.0, 1.0, 2.0, 2.0])
    torch.testing.assert_close((height * width).sqrt()[:first].tolist(), [32.0, 32.0 * 2 ** (1 / 3)] * 3)
    rounded = AnchorGenerator(AnchorConfig(scales=config.scales), STRIDES).double()(halved((64, 64)), (64, 64))
    torch.testing.assert_close(found[:, 2:] + found[:, :2], rounded[:, 2:] + rounded[:, :2])
