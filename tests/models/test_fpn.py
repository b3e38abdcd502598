import itertools

import pytest
import torch
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from gesso.errors import ConfigError
from gesso.models.fpn import FeaturePyramid, FPNConfig

CHANNELS = {"C2": 4, "C3": 6, "C4": 8, "C5": 10}
STRIDES = {"C2": 4.0, "C3": 8.0, "C4": 16.0, "C5": 32.0}


def pyramid(**changes):
    torch.manual_seed(0)
    return FeaturePyramid(FPNConfig(width=5, **changes), CHANNELS, STRIDES)


def maps(batch=2):
    """Sides that do not halve evenly: the top-down path goes by size, not by a factor."""
    g = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(batch, c, -(-20 >> k), -(-27 >> k), generator=g)
        for k, (name, c) in enumerate(CHANNELS.items())
    }


def torchvisions(ours, extra, norm=None):
    """Its pyramid with the weights of ours."""
    inputs = [CHANNELS[name] for name in ours.inputs]
    reference = FeaturePyramidNetwork(inputs, 5, extra, norm)
    names = [f"{part}_blocks.{k}." for part in ("inner", "layer") for k in range(len(inputs))]
    blocks = [f"{part}.{k}." for part in ("lateral", "output") for k in range(len(inputs))]
    state = ours.state_dict()
    theirs = {
        name + key[len(block) :]: state[key]
        for name, block in zip(names, blocks, strict=True)
        for key in state
        if key.startswith(block)
    }
    theirs |= {
        f"extra_blocks.p{6 + k}.{p}": state[f"extra.{k}.{p}"]
        for k in range(len(ours.extra))
        for p in ("weight", "bias")
    }
    reference.load_state_dict(theirs)
    return reference


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_equals_torchvision(norm):
    ours = pyramid(norm=norm)
    reference = torchvisions(ours, LastLevelMaxPool(), torch.nn.BatchNorm2d if norm == "batch" else None)
    found = ours(maps())
    assert tuple(found) == ours.names == ours.rpn_levels == ("P2", "P3", "P4", "P5", "P6")
    assert ours.roi_levels == ("P2", "P3", "P4", "P5")
    assert ours.strides == {"P2": 4, "P3": 8, "P4": 16, "P5": 32, "P6": 64}
    assert ours.channels == dict.fromkeys(ours.names, 5)
    for a, b in zip(found.values(), reference(maps()).values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("extra", "channels"), [("conv_c5", 10), ("conv_p5", 5)])
def test_extra_levels_by_convolution_equal_torchvision(extra, channels):
    ours = pyramid(inputs=("C3", "C4", "C5"), extra_levels=2, extra=extra)
    torch.nn.init.normal_(ours.extra[0].bias)
    reference = torchvisions(ours, LastLevelP6P7(channels, 5))
    used = {name: value for name, value in maps().items() if name != "C2"}
    found = ours(maps())
    assert tuple(found) == ours.names == ("P3", "P4", "P5", "P6", "P7") and ours.roi_levels == ("P3", "P4", "P5")
    assert ours.strides["P7"] == 128 and (found["P6"] < 0).any()
    for a, b in zip(found.values(), reference(used).values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("extra_levels", [0, 1, 2, 3])
def test_every_second_pixel(extra_levels):
    ours = pyramid(extra_levels=extra_levels)
    found = list(ours(maps()).values())
    assert len(found) == 4 + extra_levels == len(ours.strides)
    for finer, coarser in itertools.pairwise(found[3:]):
        assert torch.equal(coarser, finer[:, :, ::2, ::2])


def test_group_norm_and_context():
    """The context stands on the coarsest input alone, and gives the width of the pyramid."""
    ours = pyramid(norm="group")
    assert all(block[1].num_channels == 5 and block[0].bias is None for block in (*ours.lateral, *ours.output))
    for context in ("psp", "large_kernel"):
        ours = pyramid(context=context).eval()
        assert [block[0].in_channels for block in ours.lateral] == [4, 6, 8, 5]
        found, given = ours(maps()), maps()
        expected = torchvisions_with(ours, {**given, "C5": ours.context(given["C5"])})
        for a, b in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(a, b)


def torchvisions_with(ours, given):
    reference = FeaturePyramidNetwork([given[name].shape[1] for name in ours.inputs], 5, LastLevelMaxPool())
    for theirs, blocks in ((reference.inner_blocks, ours.lateral), (reference.layer_blocks, ours.output)):
        for their, our in zip(theirs, blocks, strict=True):
            their[0].load_state_dict(our[0].state_dict())
    return reference(given)


def test_context_does_not_reach_the_extra_level_on_c5():
    ours = pyramid(context="psp", extra="conv_c5").eval()
    given = maps()
    torch.testing.assert_close(ours(given)["P6"], ours.extra[0](given["C5"]))


def test_start():
    fpn = FeaturePyramid(FPNConfig(width=8, inputs=("C2", "C3"), extra_levels=0), CHANNELS, STRIDES)
    assert fpn.names == fpn.roi_levels == ("P2", "P3")
    assert all((p == 0).all() for name, p in fpn.named_parameters() if name.endswith("bias"))
    bound = (3 / 4) ** 0.5  # uniform as torchvision and detectron2 have it: of variance one over the fan in
    assert 0.8 * bound < fpn.lateral[0][0].weight.abs().max() <= bound


def test_strides_of_the_backbone():
    """A backbone that is dilated or has odd strides says so, and the extra levels go on from there."""
    fpn = FeaturePyramid(FPNConfig(width=8, extra_levels=2), CHANNELS, {**STRIDES, "C5": 16.0})
    assert list(fpn.strides.values()) == [4, 8, 16, 16, 32, 64]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 0}, "width"),
        ({"inputs": ("C3", "C2")}, "inputs"),
        ({"inputs": ()}, "inputs"),
        ({"extra_levels": -1}, "ext"),
    ],
)
def test_configuration(change, said):
    with pytest.raises(ConfigError, match=said):
        FPNConfig(**change)


def test_a_backbone_without_its_maps():
    with pytest.raises(ConfigError, match="not C2"):
        FeaturePyramid(FPNConfig(), {"C4": 8}, {"C4": 16.0})


def test_extra_levels_without_a_relu_between():
    ours = pyramid(inputs=("C3", "C4", "C5"), extra_levels=2, extra="conv_c5", extra_relu=False)
    found = ours(maps())
    assert bool((found["P6"] < 0).any())
    torch.testing.assert_close(found["P7"], ours.extra[1](found["P6"]))
