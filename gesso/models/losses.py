"""Losses as a sum and a count, so that the mean is taken over the global batch.

Shape letters: B images, K samples an image, C classes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BoxLossConfig:
    """The loss of box deltas."""

    kind: Literal["smooth_l1", "l1"] = "smooth_l1"
    """Smooth L1 (Fast R-CNN, equation 3), or its limit L1."""
    beta: float = 1.0 / 9
    """Where smooth L1 turns from a square into a line."""
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
        samples: 0-dim, how many it is divided by, summed over the global batch first.
    """

    total: Tensor
    samples: Tensor


def mean_over_batch(term: LossTerm) -> Tensor:
    """The mean over the global batch; 0 where there is no sample."""
    return term.total / term.samples.clamp(min=1)


def objectness_loss(logits: Tensor, positive: Tensor, valid: Tensor) -> LossTerm:
    """Binary cross-entropy over the valid samples; all arguments (B, K)."""
    each = F.binary_cross_entropy_with_logits(logits, positive.to(logits.dtype), reduction="none")
    return LossTerm(torch.where(valid, each, 0).sum(), valid.sum())


def class_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> LossTerm:
    """Softmax cross-entropy of logits (B, K, C + 1) and labels (B, K), 0 = background, over the valid samples."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return LossTerm(torch.where(valid, each, 0).sum(), valid.sum())


def box_loss(deltas: Tensor, wanted: Tensor, positive: Tensor, valid: Tensor, config: BoxLossConfig) -> LossTerm:
    """Loss of deltas (B, K, 4) summed over the positive samples; counted by all valid ones, as Fast R-CNN does."""
    if config.kind == "l1":
        each = (deltas - wanted).abs()
    else:
        each = F.smooth_l1_loss(deltas, wanted, reduction="none", beta=config.beta)
    return LossTerm(config.weight * torch.where(positive[..., None], each, 0).sum(), valid.sum())
