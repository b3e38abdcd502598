"""Batch-norm policies: how a detector's batch norm behaves in a stage of training.

A policy is applied to a module that is already built. Its batch norms (also timm's, which carry the activation) become
``PolicyBatchNorm2d``, which holds the same parameters under the same names, so checkpoints do not change and one
policy can follow another. Layer norms and other norms are left alone.

Sources: the low-cost pre-training recipe fixes all of batch norm in its second stage; MegDet, section 3.2, takes
statistics over groups of images, over several processes where need be; GroupNorm, Wu and He 2018.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn

from gesso import distributed
from gesso.errors import ConfigError, nearest
from gesso.models.ops.sync_norm import batch_statistics, normalise_batch


@dataclass(frozen=True, kw_only=True)
class NormPolicy:
    """What batch norm does during training. In evaluation it always uses the running statistics."""

    kind: Literal["train", "sync", "affine", "fixed", "group_norm"] = "train"
    """train: statistics of this process's pictures. sync: statistics over processes. affine: running statistics,
    weight and bias trained. fixed: running statistics, nothing trained. group_norm: group norm instead."""
    images: int | None = None
    """Take the statistics over groups of this many pictures (kinds train and sync); None = over all pictures of this
    process (train) or of the whole global batch (sync)."""
    parts: tuple[str, ...] = ()
    """Only the batch norms below these children, such as backbone or neck; empty = all of them."""

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise ConfigError(f"norm.images is {self.images}", remedy="Give a number of pictures above 0, or none.")
        if self.images is not None and self.kind not in ("train", "sync"):
            raise ConfigError(
                f"norm.images has no effect with norm.kind {self.kind}",
                remedy="Leave it out, or choose the kind train or sync.",
            )


@dataclass
class _Running:
    """Whether the running statistics stay as they are at the moment."""

    held: bool = False


_running = _Running()


@contextlib.contextmanager
def statistics_held() -> Iterator[None]:
    """Within the block batch norm in training uses the same statistics as always, but moves no running ones.

    For a forward pass that does the work of another one again, or that only counts.
    """
    before, _running.held = _running.held, True
    try:
        yield
    finally:
        _running.held = before


class PolicyBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over (B, C, H, W) under a ``NormPolicy``, with the drop and activation of the layer it replaces.

    With the kinds affine and fixed it stays in evaluation mode whatever ``train()`` says.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, source: nn.BatchNorm2d, policy: NormPolicy, group: int | None = None, pictures: int | None = None
    ) -> None:
        super().__init__(source.num_features, eps=source.eps, momentum=source.momentum)
        self.weight, self.bias = source.weight, source.bias
        for name, buffer in source.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.trained = source.weight.requires_grad
        self.set_policy(policy, group, pictures)

    def set_policy(self, policy: NormPolicy, group: int | None = None, pictures: int | None = None) -> None:
        """Follows ``policy`` from now on. Weights that were frozen before any policy stay frozen.

        Args:
            policy: what to do.
            group: the handle of the processes (``distributed.group``) whose pictures together make a group of the
                policy; None = each process has its own groups.
            pictures: of this process in one forward pass; an input that has several rows a picture, as in a head on
                regions, is grouped by pictures. None = a row is a picture.
        """
        self.policy, self.group = policy, group
        self.groups = None if pictures is None or policy.images is None else max(pictures // policy.images, 1)
        self.set_trained(self.trained)

    def set_trained(self, trained: bool) -> None:
        """Whether weight and bias may be trained, where the policy lets them."""
        self.trained = trained
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(trained and self.policy.kind != "fixed")

    def train(self, mode: bool = True) -> "PolicyBatchNorm2d":
        """Sets the mode as ``nn.Module.train`` does, but stays in evaluation mode where the statistics are fixed."""
        super().train(mode and self.policy.kind not in ("affine", "fixed"))
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, H, W); the dtype and the shape stay."""
        images, B = self.policy.images, input.shape[0]
        if images is not None and self.groups is not None and B % self.groups == 0:
            images = B // self.groups
        if self.training and self.group is not None:
            out = self._forward_synced(input, self.group)
        elif self.training and images is not None and images != B:
            out = self._forward_grouped(input, images)
        elif self.training and _running.held:
            out = F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:
            out = super().forward(input)
        return self.act(self.drop(out))  # type: ignore[no-any-return]

    def _forward_synced(self, input: Tensor, group: int) -> Tensor:
        """Statistics over all pictures of a group of processes."""
        mean, var, count = batch_statistics(input.detach(), group)
        if not _running.held:
            assert self.momentum is not None
            moves = self.momentum * count.clamp(max=1)  # a group without a picture moves nothing
            unbiased = var * (count / (count - 1).clamp(min=1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.lerp_(new.to(running.dtype), moves.to(running.dtype))
            self._count_batch()
        return normalise_batch(  # type: ignore[no-any-return]
            input, self.weight, self.bias, mean, var, count, group, self.eps
        )

    def _forward_grouped(self, input: Tensor, images: int) -> Tensor:
        """Statistics over each run of ``images`` rows; the running statistics move by the groups' mean."""
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
        if not _running.held:
            self.running_mean.copy_(mean.view(groups, C).mean(0))
            self.running_var.copy_(var.view(groups, C).mean(0))
            self._count_batch()
        return out.view(images, groups, C, H, W).transpose(0, 1).reshape(B, C, H, W)

    def _count_batch(self) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def apply_norm_policy(module: nn.Module, policy: NormPolicy, *, pictures: int | None = None) -> int:
    """Makes every batch norm in ``module``, or in parts of it, follow ``policy``, in place; survives ``train()``.

    Call it before the optimizer is made: fixed takes weights out of training. All processes call it together.

    Args:
        module: a detector or a part of one.
        policy: what its batch norms do.
        pictures: that a process has in one forward pass of training; None where no training follows, so that groups
            of several processes need not be formed.

    Returns:
        How many layers follow it.

    Raises:
        ConfigError: ``policy.images`` that cannot be formed by the processes there are; a part that does not exist or
            holds no batch norm; or statistics that train with an epsilon of 0.
    """
    _check_parts(module, policy.parts)
    found = [
        (parent, name, child)
        for path, parent in module.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm2d) and child.affine and child.track_running_stats
        if not policy.parts or (path or name).split(".")[0] in policy.parts
    ]
    if policy.kind in ("train", "sync") and any(
        child.eps == 0 and getattr(child, "trained", child.weight.requires_grad) for _, _, child in found
    ):
        raise ConfigError(
            "batch norm with an epsilon of 0 cannot be trained",
            remedy="Choose the norm kind affine or fixed, or leave backbone.norm_eps out.",
        )
    group = _group(policy, pictures)
    for parent, name, child in found:
        setattr(parent, name, _follow(child, policy, group, pictures).train(parent.training))
    return len(found)


def _check_parts(module: nn.Module, parts: tuple[str, ...]) -> None:
    """Refuses names that are no children with batch norm, or with the group norm that took its place."""
    children = dict(module.named_children())
    kinds = (nn.BatchNorm2d, GroupNormAct)
    normed = [name for name, child in children.items() if any(isinstance(inner, kinds) for inner in child.modules())]
    for part in parts:
        if part not in normed:
            what = "holds no batch norm" if part in children else "does not exist"
            raise ConfigError(f"norm.parts: '{part}' {what}", remedy=nearest(part, normed))


def check_images(policy: NormPolicy, *, pictures: int, processes: int) -> None:
    """ConfigError where so many processes with so many pictures each, in one forward pass, cannot form the groups."""
    world = processes if policy.kind == "sync" else 1
    sizes = {n for n in range(1, pictures + 1) if pictures % n == 0}
    sizes |= {pictures * k for k in range(1, world + 1) if world % k == 0}
    if policy.images is None or policy.images in sizes:
        return
    *most, last = (str(size) for size in sorted(sizes))
    whose = f"{world} processes with {pictures} pictures each" if world > 1 else f"a process with {pictures} pictures"
    raise ConfigError(
        f"norm.images = {policy.images} cannot be formed by {whose}",
        remedy=f"Choose {', '.join(most)} or {last}." if most else f"Choose {last}.",
    )


def _group(policy: NormPolicy, pictures: int | None) -> int | None:
    """The processes whose pictures make a group of the policy; None = each process has its own groups."""
    world = distributed.world_size() if policy.kind == "sync" else 1
    if policy.images is None:
        return distributed.EVERY if world > 1 else None
    if pictures is None:
        return None
    check_images(policy, pictures=pictures, processes=world)
    return distributed.group(policy.images // pictures) if policy.images > pictures else None


def _follow(norm: nn.BatchNorm2d, policy: NormPolicy, group: int | None, pictures: int | None) -> nn.Module:
    if policy.kind == "group_norm":
        return _group_norm(norm)
    if not isinstance(norm, PolicyBatchNorm2d):
        return PolicyBatchNorm2d(norm, policy, group, pictures)
    norm.set_policy(policy, group, pictures)
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
