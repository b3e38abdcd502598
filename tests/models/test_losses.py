"""Losses against torch's and torchvision's own, and that what does not count has no influence."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
    sigmoid_focal_loss,
)

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models import losses
from gesso.models.losses import (
    BoxLossConfig,
    LossTerm,
    box_loss,
    class_loss,
    each_box_loss,
    each_class_loss,
    each_sigmoid_class_loss,
    focal_loss,
    mean_over_batch,
    objectness_loss,
    sigmoid_class_loss,
)

KINDS = ["smooth_l1", "l1", "iou", "giou", "diou", "ciou"]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
OVERLAP = {
    "iou": lambda a, b: 1 - geometry.iou(a[:, None], b[:, None])[:, 0, 0],
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}


def random_boxes(*shape, dtype=torch.float32):
    low = torch.rand(*shape, 2, dtype=dtype) * 40
    return torch.cat([low, low + 5 + torch.rand(*shape, 2, dtype=dtype) * 40], dim=-1)


def test_only_valid_samples_count():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 4), torch.randint(0, 4, (2, 6))
    valid = torch.rand(2, 6) > 0.4
    got = mean_over_batch(class_loss(logits, labels, valid))
    torch.testing.assert_close(got, F.cross_entropy(logits[valid], labels[valid]))
    positive = labels > 1
    got = mean_over_batch(objectness_loss(logits[..., 0], positive, valid))
    torch.testing.assert_close(got, F.binary_cross_entropy_with_logits(logits[..., 0][valid], positive[valid].float()))
    wanted = F.one_hot(labels[valid], 5)[:, 1:].float()
    each = F.binary_cross_entropy_with_logits(logits[valid], wanted, reduction="none").sum(-1)
    torch.testing.assert_close(mean_over_batch(sigmoid_class_loss(logits, labels, valid)), each.mean())
    apart = each_sigmoid_class_loss(logits, labels, valid)
    torch.testing.assert_close(apart[valid], each)
    softmax = each_class_loss(logits, labels, valid)
    torch.testing.assert_close(softmax[valid], F.cross_entropy(logits[valid], labels[valid], reduction="none"))
    assert not apart[~valid].any() and not softmax[~valid].any()


@pytest.mark.parametrize("kind", KINDS)
def test_box_loss_sums_positives_and_counts_all(kind):
    torch.manual_seed(0)
    deltas, reference, truth = torch.randn(2, 6, 4) * 2, random_boxes(2, 6), random_boxes(2, 6)
    valid = torch.arange(6).expand(2, 6) < 5
    positive = torch.arange(6).expand(2, 6) < 2
    config = BoxLossConfig(kind=kind, weight=2.0)
    term = box_loss(deltas, reference, truth, positive, valid, config, WEIGHTS)
    a, r, b = (values[:, :2].flatten(0, 1) for values in (deltas, reference, truth))
    wanted = geometry.encode(r, b, WEIGHTS)
    if kind == "l1":
        total = F.l1_loss(a, wanted, reduction="sum")
    elif kind == "smooth_l1":
        total = F.smooth_l1_loss(a, wanted, reduction="sum", beta=1 / 9)
    else:
        total = OVERLAP[kind](geometry.decode(r, a, WEIGHTS), b).sum()
    torch.testing.assert_close(mean_over_batch(term), 2 * total / 10)
    each = each_box_loss(deltas, reference, truth, positive, config, WEIGHTS)
    assert each.shape == (2, 6) and not each[~positive].any()
    torch.testing.assert_close(each.sum(), term.total)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_overlap_losses_have_torchvisions_gradient(kind):
    torch.manual_seed(1)
    truth, found = random_boxes(50, dtype=torch.float64), random_boxes(50, dtype=torch.float64)
    found[:10] = truth[:10] + torch.rand(10, 4) * 0.1
    found[10:20] += 200  # apart
    found.requires_grad_()
    mine, theirs = losses._overlap_loss(found, truth, kind), OVERLAP[kind](found, truth)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), found)[0] for loss in (mine, theirs)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_positive_has_no_influence(kind):
    """Neither boxes without extent nor infinities nor NaN reach the loss or a gradient."""
    torch.manual_seed(0)
    positive = torch.tensor([[True] + [False] * 5])
    valid = torch.ones_like(positive)
    config = BoxLossConfig(kind=kind)
    clean = [torch.randn(1, 6, 4), random_boxes(1, 6), random_boxes(1, 6)]
    dirty = [values.clone() for values in clean]
    for values in dirty:
        values[0, 1:] = torch.tensor([0.0, torch.inf, torch.nan, -1e30, 7.0])[:, None]
    found = []
    for deltas, reference, truth in (clean, dirty):
        deltas.requires_grad_()
        term = box_loss(deltas, reference, truth, positive, valid, config, WEIGHTS)
        term.total.backward()
        found.append((term.total.detach(), deltas.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][1][0, 1:] == 0).all() and (found[0][1][0, 0] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_positives_of_no_extent_give_finite_gradients(kind):
    deltas = torch.tensor([[[0.0] * 4, [0.0] * 4, [9e5, 0, -50, -50], [0.0, 0, 500, 500]]], requires_grad=True)
    reference = torch.tensor([[[900, 900, 900.001, 900.001], [5.0, 5, 9, 9], [5, 5, 9, 9], [5, 5, 9, 9]]])
    truth = torch.tensor([[[0.0, 0, 80, 80], [7, 7, 7, 7], [3, 3, 8, 8], [3, 3, 8, 8]]])
    every = torch.ones(1, 4, dtype=torch.bool)
    term = box_loss(deltas, reference, truth, every, every, BoxLossConfig(kind=kind), WEIGHTS)
    term.total.backward()
    assert term.total.isfinite() and deltas.grad.isfinite().all()


def test_no_sample_gives_zero_and_no_nan_in_the_gradient():
    deltas = torch.randn(1, 3, 4, requires_grad=True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    infinite = torch.full((1, 3, 4), torch.inf)
    loss = mean_over_batch(box_loss(deltas, infinite, infinite, none, none, BoxLossConfig(), WEIGHTS))
    loss.backward()
    assert loss == 0 and (deltas.grad == 0).all()
    assert mean_over_batch(LossTerm(torch.tensor(0.0), torch.tensor(0))) == 0


def focal_case(B=2, N=40, C=7, dtype=torch.float32, spread=3.0):
    torch.manual_seed(0)
    logits = (torch.randn(B, N, C) * spread).to(dtype)
    labels, valid = torch.randint(0, C, (B, N)), torch.rand(B, N) > 0.2
    return logits, labels, (torch.rand(B, N) > 0.7) & valid, valid


def slow_focal(logits, labels, positive, valid, alpha=0.25, gamma=2.0):
    wanted = torch.zeros_like(logits)
    for b in range(logits.shape[0]):
        for n in range(logits.shape[1]):
            wanted[b, n, labels[b, n]] = float(positive[b, n])
    each = sigmoid_focal_loss(logits, wanted, alpha=alpha, gamma=gamma, reduction="none").sum(-1)
    return (each * valid).sum(1)


@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.6, 1.0), (0.25, 0.5), (0.9, 3.7)])
def test_focal_loss_is_torchvisions(alpha, gamma, rows, monkeypatch):
    if rows:  # the pieces of a large tensor
        monkeypatch.setattr(losses, "_rows_at_once", lambda logits: rows)
    logits, labels, positive, valid = focal_case(dtype=torch.float64)
    pull = torch.tensor([1.5, -0.5], dtype=torch.float64)
    exact = logits.clone().requires_grad_()
    wanted = slow_focal(exact, labels, positive, valid, alpha, gamma)
    (wanted * pull).sum().backward()
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-6)):
        own = logits.to(dtype).detach().clone().requires_grad_()
        got = focal_loss(own, labels, positive, valid, alpha=alpha, gamma=gamma)
        (got * pull).sum().backward()
        assert got.dtype == own.grad.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=0)
        torch.testing.assert_close(own.grad.double(), exact.grad, rtol=4 * tolerance, atol=tolerance)
        with torch.no_grad():
            assert torch.equal(focal_loss(own, labels, positive, valid, alpha=alpha, gamma=gamma), got)


def test_focal_loss_passes_gradcheck():
    logits, labels, positive, valid = focal_case(N=5, C=3, dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, positive, valid, gamma=1.5), (logits,))


def test_focal_loss_of_half_precision_is_computed_in_float32():
    logits, labels, positive, valid = focal_case(dtype=torch.bfloat16)
    own, exact = logits.clone().requires_grad_(), logits.float().requires_grad_()
    got, wanted = (focal_loss(x, labels, positive, valid) for x in (own, exact))
    assert got.dtype == torch.float32 and torch.equal(got, wanted)
    got.sum().backward()
    wanted.sum().backward()
    assert own.grad.dtype == torch.bfloat16
    torch.testing.assert_close(own.grad.float(), exact.grad, rtol=0.01, atol=1e-6)


def test_focal_loss_of_extreme_logits():
    logits = torch.tensor([[[100.0, -100.0], [-100.0, 100.0], [torch.nan, torch.inf]]], requires_grad=True)
    labels = torch.tensor([[0, 0, 1]])
    positive, valid = torch.tensor([[True, True, False]]), torch.tensor([[True, True, False]])
    got = focal_loss(logits, labels, positive, valid)
    got.sum().backward()
    torch.testing.assert_close(got, torch.tensor([0.25 * 100 + 0.75 * 100]))
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.0, 0], [-0.25, 0.75], [0, 0]]]))


def test_focal_loss_keeps_one_tensor_for_the_backward():
    logits, labels, positive, valid = focal_case(N=500)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        focal_loss(logits.requires_grad_(), labels, positive, valid).sum()
    assert sum(kept) == logits.numel()


def test_losses_stand_in_one_static_graph():
    logits, labels, positive, valid = focal_case(C=4)

    def total(x):
        found = [focal_loss(x, labels, positive, valid).sum(), sigmoid_class_loss(x, labels, valid).total]
        boxes = x.sigmoid() * 50 + torch.tensor([0, 0, 60, 60])
        for kind in KINDS:
            found.append(box_loss(x, boxes.detach(), truth, positive, valid, BoxLossConfig(kind=kind), WEIGHTS).total)
        return torch.stack(found)

    truth = random_boxes(2, 40)
    runs = []
    for function in (total, torch.compile(total, fullgraph=True, dynamic=False, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        values = function(x)
        values.sum().backward()
        runs.append((values.detach(), x.grad))
    torch.testing.assert_close(runs[0], runs[1])


def test_configuration():
    with pytest.raises(ConfigError, match="beta"):
        BoxLossConfig(beta=0)
    with pytest.raises(ConfigError, match="weight"):
        BoxLossConfig(weight=-1)
