import pytest
import torch
from torch import nn

from gesso.models.layers import conv_block


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_convolution_norm_and_relu(norm, relu, kernel, stride):
    torch.manual_seed(0)
    block = conv_block(6, 64, kernel, norm=norm, relu=relu, stride=stride)
    x = torch.randn(3, 6, 9, 12)
    conv = block[0]
    assert (conv.bias is None) == (norm != "none") and len(block) == 1 + (norm != "none") + relu
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, stride=stride, padding=kernel // 2)
    if norm == "batch":
        expected = nn.functional.batch_norm(expected, None, None, training=True)
    elif norm == "group":
        expected = nn.functional.group_norm(expected, 32)
    if relu:
        expected = expected.clamp(min=0)
    assert expected.shape == (3, 64, -(-9 // stride), -(-12 // stride))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("outputs", "groups"), [(256, 32), (64, 32), (48, 16), (40, 8), (17, 1), (37, 1), (8, 8)])
def test_groups_are_as_many_as_both_have_in_common(outputs, groups):
    assert conv_block(3, outputs, 1, norm="group")[1].num_groups == groups


def test_start():
    torch.manual_seed(0)
    block = conv_block(50, 100, 3)
    assert (block[0].bias == 0).all()
    assert abs(block[0].weight.std() - (2 / (100 * 9)) ** 0.5) < 0.02 * (2 / (100 * 9)) ** 0.5
