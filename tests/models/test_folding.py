import dataclasses

import pytest
import torch
from torch import nn

from gesso.models.folding import fold_batch_norm
from gesso.models.norm import NormPolicy, apply_norm_policy
from tests.models.helpers import KINDS, random_batch, tiny_detector


def trained(kind: str) -> nn.Module:
    """A detector whose batch norms do something."""
    detector = tiny_detector(kind).double()
    g = torch.Generator().manual_seed(0)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                value.data.copy_(low + (high - low) * torch.rand(value.shape, generator=g))
    return detector


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


@pytest.mark.parametrize("kind", list(KINDS))
def test_finds_the_same(kind):
    detector, (batch, _) = trained(kind), random_batch(masks=True)
    folded = fold_batch_norm(detector)
    assert detector.training and not folded.training
    found, expected = folded(batch), detector.eval()(batch)
    for field in dataclasses.fields(found):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=field.name)


@pytest.mark.parametrize("policy", ["train", "affine", "fixed"])
def test_no_norm_is_left_of_a_residual_network_and_the_original_stays(policy):
    detector = trained("faster_rcnn")
    apply_norm_policy(detector, NormPolicy(kind=policy))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    folded = fold_batch_norm(detector)
    assert norms(detector) > 0 and norms(folded) == 0
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_activations_inside_norms_stay():
    """timm's norms carry the activation: without it the maps would be negative too."""
    detector, (batch, _) = trained("faster_rcnn"), random_batch()
    maps = fold_batch_norm(detector).maps(batch)
    assert all((maps[name] >= 0).all() for name in ("C2", "C3", "C4", "C5"))


class _ReadTwice(nn.Module):
    """A convolution whose output goes on past its norm: folding would change what goes on."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, images):
        once = self.conv(images)
        return self.body(once + self.norm(once))


def test_what_cannot_be_folded_is_left_as_it_is():
    detector, (batch, _) = trained("faster_rcnn"), random_batch()
    detector.backbone.body = _ReadTwice(detector.backbone.body).double()
    kept = fold_batch_norm(detector)
    assert norms(kept) == norms(detector)
    torch.testing.assert_close(kept(batch).boxes, detector.eval()(batch).boxes)
