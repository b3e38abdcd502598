"""Dropout by key: rates, scale, and what it depends on."""

import pytest
import torch

from gesso.models.dropout import drop_channels
from gesso.random_key import stream, uniform

CHANCE = stream("test.dropout")


@pytest.mark.parametrize("shape", [(3, 40), (3, 40, 5, 7)])
def test_it_is_that_of_the_definition(shape):
    key = torch.tensor([5, 2**40 + 1, 9])
    values = torch.randn(shape, dtype=torch.float64)
    expected = values.clone()
    for b in range(3):
        for c in range(40):
            expected[b, c] = 0 if uniform(int(key[b]), CHANCE, c) < 0.3 else expected[b, c] / 0.7
    torch.testing.assert_close(drop_channels(values, key, 0.3, CHANCE), expected)


def test_share_and_mean_and_streams():
    key, ones = torch.arange(200), torch.ones(200, 500)
    out = drop_channels(ones, key, 0.25, CHANCE)
    assert abs((out == 0).float().mean() - 0.25) < 0.01 and abs(out.mean() - 1) < 0.01
    assert not torch.equal(out, drop_channels(ones, key, 0.25, stream("test.other")))
    assert not torch.equal(out[0], out[1])


def test_a_picture_does_not_depend_on_its_batch_and_no_rate_changes_nothing():
    key, values = torch.tensor([11, 12]), torch.randn(2, 8, 3, 3).to(torch.bfloat16)
    out = drop_channels(values, key, 0.5, CHANCE)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[1:], drop_channels(values[1:], key[1:], 0.5, CHANCE))
    assert drop_channels(values, key, 0.0, CHANCE) is values
