import pytest
import torch
import torch.nn.functional as F

from gesso.errors import ConfigError
from gesso.models.losses import BoxLossConfig, LossTerm, box_loss, class_loss, mean_over_batch, objectness_loss


def test_only_valid_samples_count():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 4), torch.randint(0, 4, (2, 6))
    valid = torch.rand(2, 6) > 0.4
    got = mean_over_batch(class_loss(logits, labels, valid))
    torch.testing.assert_close(got, F.cross_entropy(logits[valid], labels[valid]))
    positive = labels > 1
    got = mean_over_batch(objectness_loss(logits[..., 0], positive, valid))
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(logits[..., 0][valid], positive[valid].float()))


@pytest.mark.parametrize("kind", ["smooth_l1", "l1"])
def test_box_loss_sums_positives_and_counts_all(kind):
    torch.manual_seed(0)
    deltas, wanted = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    valid = torch.arange(6).expand(2, 6) < 5
    positive = torch.arange(6).expand(2, 6) < 2
    config = BoxLossConfig(kind=kind, weight=2.0)
    got = mean_over_batch(box_loss(deltas, wanted, positive, valid, config))
    a, b = deltas[:, :2], wanted[:, :2]
    total = F.l1_loss(a, b, reduction="sum") if kind == "l1" else F.smooth_l1_loss(a, b, reduction="sum", beta=1 / 9)
    torch.testing.assert_close(got, 2 * total / 10)


def test_no_sample_gives_zero_and_no_nan_in_the_gradient():
    deltas = torch.randn(1, 3, 4, requires_grad=True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    loss = mean_over_batch(box_loss(deltas, torch.full((1, 3, 4), torch.inf), none, none, BoxLossConfig()))
    loss.backward()
    assert loss == 0 and (deltas.grad == 0).all()
    assert mean_over_batch(LossTerm(torch.tensor(0.0), torch.tensor(0))) == 0


def test_configuration():
    with pytest.raises(ConfigError, match="beta"):
        BoxLossConfig(beta=0)
    with pytest.raises(ConfigError, match="weight"):
        BoxLossConfig(weight=-1)
