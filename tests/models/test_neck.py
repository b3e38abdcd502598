import pytest

from gesso.errors import ConfigError
from gesso.models.fpn import FeaturePyramid, FPNConfig
from gesso.models.neck import build_neck
from gesso.models.simple_pyramid import SimplePyramid, SimplePyramidConfig
from gesso.models.single_level import SingleLevel, SingleLevelConfig

STAGES = {"C2": 4, "C3": 6, "C4": 8, "C5": 10}, {"C2": 4.0, "C3": 8.0, "C4": 16.0, "C5": 32.0}
PLAIN = {"C4": 8}, {"C4": 16.0}


@pytest.mark.parametrize(
    ("config", "backbone", "kind"),
    [
        (FPNConfig(width=12), STAGES, FeaturePyramid),
        (SingleLevelConfig(width=12), STAGES, SingleLevel),
        (SimplePyramidConfig(width=12), PLAIN, SimplePyramid),
    ],
)
def test_every_neck_says_the_same_things(config, backbone, kind):
    neck = build_neck(config, *backbone)
    assert type(neck) is kind
    for name in (*neck.names, *neck.rpn_levels, *neck.roi_levels):
        assert neck.channels[name] >= 1 and neck.strides[name] >= 4
    assert set(neck.roi_levels) <= set(neck.names)
    assert all(neck.channels[name] == 12 for name in neck.names)
    assert len({neck.channels[name] for name in neck.rpn_levels}) == 1  # one head for all
    strides = [neck.strides[name] for name in neck.roi_levels]
    assert strides == [strides[0] * 2**k for k in range(len(strides))]  # as RoIAlign wants them


@pytest.mark.parametrize(
    ("config", "backbone"), [(FPNConfig(), PLAIN), (SingleLevelConfig(), PLAIN), (SimplePyramidConfig(), STAGES)]
)
def test_a_backbone_that_does_not_fit(config, backbone):
    with pytest.raises(ConfigError):
        build_neck(config, *backbone)
