import pytest
import torch

from gesso.errors import ConfigError
from gesso.models.single_level import SingleLevel, SingleLevelConfig

CHANNELS = {"C2": 4, "C3": 6, "C4": 8, "C5": 10}
STRIDES = {"C2": 4.0, "C3": 8.0, "C4": 16.0, "C5": 16.0}


def test_a_projection_and_a_relu():
    torch.manual_seed(0)
    neck = SingleLevel(SingleLevelConfig(width=5), CHANNELS, STRIDES)
    torch.nn.init.normal_(neck.proj[0].bias)
    maps = {name: torch.randn(2, c, 6, 7) for name, c in CHANNELS.items()}
    found = neck(maps)
    assert tuple(found) == neck.names == neck.roi_levels == ("conv_proj",)
    conv = neck.proj[0]
    expected = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], maps["C5"]) + conv.bias[:, None, None]
    assert (expected < 0).any()
    torch.testing.assert_close(found["conv_proj"], expected.clamp(min=0))


@pytest.mark.parametrize("level", ["C4", "C5", "conv_proj"])
def test_channels_and_strides(level):
    neck = SingleLevel(SingleLevelConfig(width=5, rpn_level=level), CHANNELS, {**STRIDES, "C5": 32.0})
    assert neck.rpn_levels == (level,)
    assert neck.channels[level] == {"C4": 8, "C5": 10, "conv_proj": 5}[level]
    assert neck.strides[level] == (16 if level == "C4" else 32) and neck.strides["conv_proj"] == 32


def test_errors():
    with pytest.raises(ConfigError, match="no C5"):
        SingleLevel(SingleLevelConfig(), {"C4": 8}, {"C4": 16.0})
    with pytest.raises(ConfigError, match="width"):
        SingleLevelConfig(width=0)
