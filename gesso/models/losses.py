"""Losses as a sum and a count, so that the mean is taken over the global batch.

Shape letters: B images, N anchors, K samples an image, C classes (without background).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import boxes as geometry
from gesso.distributed import global_sum
from gesso.errors import ConfigError

_EPS = 1e-7
_THIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class BoxLossConfig:
    """The loss of boxes: of their deltas, or of their overlap with the object."""

    kind: Literal["smooth_l1", "l1", "iou", "giou", "diou", "ciou"] = "smooth_l1"
    """Smooth L1 of the deltas (Fast R-CNN, equation 3), or its limit L1; or 1 - IoU of the boxes, generalised
    (Rezatofighi et al. 2019), with the distance of the centres, or with that and the aspect ratio (DIoU and CIoU, Zheng
    et al. 2020). They are small beside sums over four deltas; mmdetection gives them a ``weight`` of 10."""
    beta: float = 1.0 / 9
    """Where smooth L1 turns from a square into a line; the other kinds do not look at it."""
    weight: float = 1.0
    """Factor on this loss."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"box_loss.beta is {self.beta}", remedy="Give a number above 0, or choose the kind l1.")
        if self.weight < 0:
            raise ConfigError(f"box_loss.weight is {self.weight}", remedy="Give a number from 0.")


class LossTerm(NamedTuple):
    """A loss before it is normalised.

    Attributes:
        total: 0-dim, the sum over this process's samples.
        samples: 0-dim int64, how many it is divided by, summed over the global batch first.
        balance: (2,) int64, how many positive and negative samples it is of, for the log; None = not of interest.
    """

    total: Tensor
    samples: Tensor
    balance: Tensor | None = None


class BatchLosses(NamedTuple):
    """The losses of one process's part of the global batch.

    Attributes:
        losses: 0-dim by name; summed over all processes (and over all parts that a process does one after the other)
            they are the means over the global batch.
        counts: (K,) int64 over the global batch: the samples of each loss, then each balance.
        ratios: 0-dim by name, positive to negative samples of the global batch (MegDet, Table 1).
    """

    losses: dict[str, Tensor]
    counts: Tensor
    ratios: dict[str, Tensor]


def mean_over_batch(term: LossTerm, samples: Tensor | None = None) -> Tensor:
    """The total over ``samples`` of the global batch, or over the term's own; 0 where there is none."""
    return term.total / (term.samples if samples is None else samples).clamp(min=1)


def over_global_batch(terms: Mapping[str, LossTerm], counts: Tensor | None = None) -> BatchLosses:
    """Normalises by the samples of all processes, never as a mean of means; one collective.

    Args:
        terms: of this process, by name.
        counts: ``BatchLosses.counts`` where they are known already; None asks all processes.
    """
    balances = {name: term.balance for name, term in terms.items() if term.balance is not None}
    if counts is None:
        own = [term.samples.reshape(1) for term in terms.values()] + list(balances.values())
        counts = global_sum(torch.cat([count.to(torch.int64) for count in own]))
    first = len(terms)
    means = {name: mean_over_batch(term, counts[k]) for k, (name, term) in enumerate(terms.items())}
    ratios = {
        f"{name}_positive_ratio": counts[first + 2 * k] / counts[first + 2 * k + 1].clamp(min=1)
        for k, name in enumerate(balances)
    }
    return BatchLosses(means, counts, ratios)


def balance(positive: Tensor, valid: Tensor) -> Tensor:
    """(2,) int64, how many samples are positive, and how many valid ones are not."""
    return torch.stack([positive.sum(), (valid & ~positive).sum()])


def objectness_loss(logits: Tensor, positive: Tensor, valid: Tensor) -> LossTerm:
    """Binary cross-entropy over the valid samples; all arguments (B, K)."""
    each = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return LossTerm(torch.where(valid, each, 0).sum(), valid.sum(), balance(positive & valid, valid))


def class_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> LossTerm:
    """Softmax cross-entropy of logits (B, K, C + 1) and labels (B, K), 0 = background, over the valid samples."""
    return LossTerm(each_class_loss(logits, labels, valid).sum(), valid.sum())


def each_class_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The same of every sample by itself: (B, K), 0 where it is not valid."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return torch.where(valid, each, 0)


def sigmoid_class_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> LossTerm:
    """Binary cross-entropy of each class, summed over the classes and the valid samples, counted by these.

    Args:
        logits: (B, K, C), class c in column c; there is no column for the background.
        labels: (B, K) int64, 0 = background, class c = c + 1.
        valid: (B, K) bool.
    """
    return LossTerm(each_sigmoid_class_loss(logits, labels, valid).sum(), valid.sum())


def each_sigmoid_class_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The same of every sample by itself: (B, K), 0 where it is not valid."""
    columns = torch.arange(1, logits.shape[-1] + 1, device=labels.device)
    wanted = (labels[..., None] == columns).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1)
    return torch.where(valid, each, 0)


def box_loss(
    deltas: Tensor,
    reference: Tensor,
    truth: Tensor,
    positive: Tensor,
    valid: Tensor,
    config: BoxLossConfig,
    weights: tuple[float, float, float, float],
) -> LossTerm:
    """Loss of boxes summed over the positive samples; counted by all valid ones (B, K), as Fast R-CNN does.

    The other arguments are those of ``each_box_loss``.
    """
    return LossTerm(each_box_loss(deltas, reference, truth, positive, config, weights).sum(), valid.sum())


def each_box_loss(
    deltas: Tensor,
    reference: Tensor,
    truth: Tensor,
    positive: Tensor,
    config: BoxLossConfig,
    weights: tuple[float, float, float, float],
) -> Tensor:
    """The loss (B, K) of the box of every sample, 0 where it is not positive.

    What the samples hold that are not positive has no influence, not even where it is no box or no number.

    Args:
        deltas: (B, K, 4) predicted, relative to ``reference``.
        reference: (B, K, 4) xyxy, anchors or regions.
        truth: (B, K, 4) xyxy, the object each sample stands for.
        positive: (B, K) bool.
        config: the kind and its weight.
        weights: factors on dx, dy, dw, dh, of ``boxes.encode``.
    """
    inside = positive[..., None]
    unit = (torch.arange(4, device=deltas.device) > 1).to(deltas.dtype)
    deltas = torch.where(inside, deltas, 0)
    reference, truth = (torch.where(inside, boxes, unit) for boxes in (reference, truth))
    if config.kind == "smooth_l1" or config.kind == "l1":
        wanted = geometry.encode(reference, truth, weights)
        beta = config.beta if config.kind == "smooth_l1" else 0.0
        each = F.smooth_l1_loss(deltas, wanted, reduction="none", beta=beta).sum(-1)
    else:
        each = _overlap_loss(geometry.decode(reference, deltas, weights), truth, config.kind)
    return config.weight * torch.where(positive, each, 0)


def _overlap_loss(boxes: Tensor, truth: Tensor, kind: Literal["iou", "giou", "diou", "ciou"]) -> Tensor:
    """One minus the IoU (...,) of boxes (..., 4) and truth (..., 4), of the given kind.

    The formulas are those of torchvision.ops, whose functions select by masks and so cannot stand in a static graph.
    Sides below a thousandth of a pixel count as that long: neither an area nor an aspect ratio vanishes.
    """
    low, high, truth_low, truth_high = boxes[..., :2], boxes[..., 2:], truth[..., :2], truth[..., 2:]
    size, truth_size = (high - low).clamp(min=_THIN), (truth_high - truth_low).clamp(min=_THIN)
    common = _product((torch.minimum(high, truth_high) - torch.maximum(low, truth_low)).clamp(min=0))
    union = _product(size) + _product(truth_size) - common
    iou = common / (union + _EPS)
    if kind == "iou":
        return 1 - iou
    around = torch.maximum(high, truth_high) - torch.minimum(low, truth_low)
    if kind == "giou":
        hull = _product(around)
        return 1 - iou + (hull - union) / (hull + _EPS)
    between = ((low + high - truth_low - truth_high) / 2).square().sum(-1)
    loss = 1 - iou + between / (around.square().sum(-1) + _EPS)
    if kind == "diou":
        return loss
    turn = torch.atan(truth_size[..., 0] / truth_size[..., 1]) - torch.atan(size[..., 0] / size[..., 1])
    shape = 4 / math.pi**2 * turn.square()
    trade = (shape / (1 - iou + shape + _EPS)).detach()
    return loss + trade * shape


def _product(pair: Tensor) -> Tensor:
    return pair[..., 0] * pair[..., 1]


def focal_loss(
    logits: Tensor, labels: Tensor, positive: Tensor, valid: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss (B,) summed over the classes and valid anchors of each image; float32, or float64 if given so.

    A valid anchor that is not positive is a negative of every class. One pass over the logits gives loss and gradient;
    for the backward only the gradient is kept, in the logits' dtype. It can be differentiated once.

    Source: Focal Loss for Dense Object Detection, Lin et al. 2017, equation 5.

    Args:
        logits: (B, N, C).
        labels: (B, N) int64, 0 to C - 1; looked at where ``positive``, but always within this range.
        positive: (B, N) bool.
        valid: (B, N) bool; other anchors count for nothing, whatever they hold.
        alpha: weight of the positives; 1 - alpha is that of the negatives.
        gamma: from 0; how much well-classified samples are damped.
    """
    B, N, C = logits.shape
    trained = torch.is_grad_enabled() and logits.requires_grad
    rows: Tensor = _FocalLoss.apply(
        logits.reshape(B * N, C), labels.flatten(), positive.flatten(), valid.flatten(), alpha, gamma, trained
    )
    return rows.view(B, N).sum(1)


class _FocalLoss(torch.autograd.Function):
    """Logits (R, C), labels, positive, valid (R,) -> loss (R,) of each row; the gradient is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        positive: Tensor,
        valid: Tensor,
        alpha: float,
        gamma: float,
        trained: bool,
    ) -> Tensor:
        R = logits.shape[0]
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        losses = torch.empty(R, dtype=dtype, device=logits.device)
        slopes = torch.empty_like(logits) if trained else logits.new_empty(0)
        step = _rows_at_once(logits)
        for first in range(0, R, step):
            rows = slice(first, min(first + step, R))
            x, label, kept = logits[rows].to(dtype), labels[rows, None], valid[rows, None]
            own = positive[rows, None]
            loss, slope = _focal_negative(x, 1 - alpha, gamma, trained)
            turned, lean = _focal_negative(-x.gather(1, label), alpha, gamma, trained)
            loss.scatter_(1, label, torch.where(own, turned, loss.gather(1, label)))
            losses[rows] = torch.where(kept[:, 0], loss.sum(1), 0)
            if slope is not None and lean is not None:
                slope.scatter_(1, label, torch.where(own, -lean, slope.gather(1, label)))
                slopes[rows] = slope.masked_fill_(~kept, 0)
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradient[:, None]).to(slopes.dtype), None, None, None, None, None, None


def _focal_negative(x: Tensor, share: float, gamma: float, trained: bool) -> tuple[Tensor, Tensor | None]:
    """Loss share * p^gamma * softplus(x) of negatives, p = sigmoid(x), and its slope; of -x it is that of positives."""
    p, cost = torch.sigmoid(x), F.softplus(x)
    weight = (p * p if gamma == 2 else p.pow(gamma)).mul_(share)
    loss = weight * cost
    if not trained:
        return loss, None
    # d/dx = weight * (p + gamma * (1 - p) * cost)
    return loss, cost.addcmul_(p, cost, value=-1).mul_(gamma).add_(p).mul_(weight)


def _rows_at_once(logits: Tensor) -> int:
    """How many of R rows are worked on together: on a CPU what its cache holds, in a graph or on a GPU all of them."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, logits.shape[0])
    return max(1, (1 << 18) // logits.shape[1])
