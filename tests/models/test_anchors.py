import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as Reference
from torchvision.models.detection.image_list import ImageList

from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig, AnchorGenerator, centres_inside


@pytest.mark.parametrize("side", [(96, 160), (64, 64)])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2 ** (1 / 3), 2 ** (2 / 3))])
def test_equals_torchvision(side, scales):
    config = AnchorConfig(scales=scales)
    shapes = [(-(-side[0] // s), -(-side[1] // s)) for s in (4, 8, 16, 32, 64)]
    reference = Reference(tuple(tuple(size * s for s in scales) for size in config.sizes), (config.ratios,) * 5)
    maps = [torch.zeros(1, 1, *shape) for shape in shapes]
    expected = reference(ImageList(torch.zeros(1, 3, *side), [side]), maps)[0]
    assert config.per_cell == 3 * len(scales)
    torch.testing.assert_close(AnchorGenerator(config)(shapes, side), expected)


def test_nothing_goes_into_the_state_and_float64_is_kept():
    anchors = AnchorGenerator(AnchorConfig()).double()
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
