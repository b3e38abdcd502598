"""Batch-norm policies: how a detector's batch norm behaves in a stage of training.

A policy is applied to a module that is already built. Its batch norms (also timm's, which carry the activation) become
``PolicyBatchNorm2d``, which holds the same parameters under the same names, so checkpoints do not change and one
policy can follow another. Layer norms and other norms are left alone.

Sources: the low-cost pre-training recipe fixes all of batch norm in its second stage; MegDet, section 3.2, takes
statistics over groups of images; GroupNorm, Wu and He 2018.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn

from gesso.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NormPolicy:
    """What batch norm does during training. In evaluation it always uses the running statistics."""

    kind: Literal["train", "sync", "affine", "fixed", "group_norm"] = "train"
    """train: statistics of this process's pictures. sync: statistics of the whole global batch. affine: running
    statistics, weight and bias trained. fixed: running statistics, nothing trained. group_norm: group norm instead."""
    images: int | None = None
    """Take the statistics over groups of this many pictures (kinds train and sync); None = over all of them."""

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise ConfigError(f"norm.images is {self.images}", remedy="Give a number of pictures above 0, or none.")
        if self.images is not None and self.kind not in ("train", "sync"):
            raise ConfigError(
                f"norm.images has no effect with norm.kind {self.kind}",
                remedy="Leave it out, or choose the kind train or sync.",
            )


class PolicyBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over (B, C, H, W) under a ``NormPolicy``, with the drop and activation of the layer it replaces.

    With the kinds affine and fixed it stays in evaluation mode whatever ``train()`` says.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, source: nn.BatchNorm2d, policy: NormPolicy) -> None:
        super().__init__(source.num_features, eps=source.eps, momentum=source.momentum)
        self.weight, self.bias = source.weight, source.bias
        for name, buffer in source.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.trained = source.weight.requires_grad
        self.set_policy(policy)

    def set_policy(self, policy: NormPolicy) -> None:
        """Follows ``policy`` from now on. Weights that were frozen before any policy stay frozen."""
        self.policy = policy
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(self.trained and policy.kind != "fixed")

    def train(self, mode: bool = True) -> "PolicyBatchNorm2d":
        """Sets the mode as ``nn.Module.train`` does, but stays in evaluation mode where the statistics are fixed."""
        super().train(mode and self.policy.kind not in ("affine", "fixed"))
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, H, W); the dtype and the shape stay."""
        images = self.policy.images
        grouped = self.training and images is not None and images != input.shape[0]
        out = self._forward_grouped(input, images or 0) if grouped else super().forward(input)
        return self.act(self.drop(out))  # type: ignore[no-any-return]

    def _forward_grouped(self, input: Tensor, images: int) -> Tensor:
        """Statistics over each run of ``images`` pictures; the running statistics move by the groups' mean."""
        B, C, H, W = input.shape
        if B % images:
            raise ConfigError(
                f"batches of {B} pictures do not fall into groups of norm.images = {images}",
                remedy="Choose a batch size that is a multiple of it.",
            )
        assert self.momentum is not None
        groups = B // images
        spread = input.view(groups, images, C, H, W).transpose(0, 1).reshape(images, groups * C, H, W)
        mean, var = self.running_mean.repeat(groups), self.running_var.repeat(groups)
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        out = F.batch_norm(spread, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(groups, C).mean(0))
        self.running_var.copy_(var.view(groups, C).mean(0))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return out.view(images, groups, C, H, W).transpose(0, 1).reshape(B, C, H, W)


def apply_norm_policy(module: nn.Module, policy: NormPolicy, *, world_size: int = 1) -> int:
    """Makes every batch norm in ``module`` follow ``policy``, in place; survives ``module.train()``.

    Call it before the optimizer is made: fixed takes weights out of training.

    Returns:
        How many layers follow it.

    Raises:
        ConfigError: sync over several processes, which is not built yet; or statistics that train with an epsilon of 0.
    """
    if policy.kind == "sync" and world_size > 1:
        raise ConfigError(
            f"batch norm over {world_size} processes is not built yet",
            remedy="Train with one process, or set the norm kind to train.",
        )
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm2d) and child.affine and child.track_running_stats
    ]
    if policy.kind in ("train", "sync") and any(
        child.eps == 0 and getattr(child, "trained", child.weight.requires_grad) for _, _, child in found
    ):
        raise ConfigError(
            "batch norm with an epsilon of 0 cannot be trained",
            remedy="Choose the norm kind affine or fixed, or leave backbone.norm_eps out.",
        )
    for parent, name, child in found:
        setattr(parent, name, _follow(child, policy).train(parent.training))
    return len(found)


def _follow(norm: nn.BatchNorm2d, policy: NormPolicy) -> nn.Module:
    if policy.kind == "group_norm":
        return _group_norm(norm)
    if not isinstance(norm, PolicyBatchNorm2d):
        return PolicyBatchNorm2d(norm, policy)
    norm.set_policy(policy)
    return norm


def _group_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """Group norm with at most 32 groups that starts with the batch norm's weight and bias."""
    made: Any = GroupNormAct(norm.num_features, math.gcd(32, norm.num_features), eps=norm.eps, apply_act=False)
    made.weight, made.bias = norm.weight, norm.bias
    if isinstance(norm, BatchNormAct2d | PolicyBatchNorm2d):
        made.drop, made.act = norm.drop, norm.act
    if isinstance(norm, PolicyBatchNorm2d):
        made.weight.requires_grad_(norm.trained)
        made.bias.requires_grad_(norm.trained)
    return made  # type: ignore[no-any-return]
