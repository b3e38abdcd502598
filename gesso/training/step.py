"""One training step, for any number of processes.

A step is: forward, backward, clip, one flag, gated update. The flag says whether every loss and gradient so far was
finite, in all processes; it stays on the device and gates weights, momentum, averages and running statistics, so that a
step that is not finite (and every later one) changes nothing. With several processes the same numbers carry the wish to
stop, so that all end after the same step.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gesso import distributed
from gesso.models.norm import statistics_held
from gesso.random_key import fold
from gesso.structures import ImageBatch, Targets, map_tensors
from gesso.training.optimizer import set_rate
from gesso.training.schedule import rate_factor
from gesso.training.stage import Stage
from gesso.training.timing import Marks

Row = dict[str, Any]
Part = tuple[ImageBatch, Targets]


@dataclass(frozen=True)
class Numbers:
    """The losses, the gradient norm and the flag (K + 1,) of a step, on their way to the host."""

    names: tuple[str, ...]
    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> tuple[Row, bool]:
        """The numbers by name, and whether all was finite; waits for this step alone, not for later ones."""
        if self.copied is not None:
            with distributed.waiting("the device"):
                self.copied.synchronize()
        *values, _, alive = self.values.tolist()
        return dict(zip(self.names, values, strict=True)), bool(alive)

    def stopping(self) -> bool:
        """Whether a process wished to stop when the step was done; after ``read``."""
        return bool(self.values[-2] > 0)


def train_step(
    stage: Stage, batch: ImageBatch, targets: Targets, *, stopping: bool = False, marks: Marks | None = None
) -> Numbers:
    """One update, of a batch that is on the device. Nothing here waits for the device.

    Where ``stage.alive`` is 0, weights, moments, averages and running statistics stay what they are, and the same work
    is done.

    Args:
        stage: what is trained.
        batch: this process's part of the global batch.
        targets: its ground truth.
        stopping: this process wishes to stop; all are told with the numbers of the step.
        marks: gets the borders of the step's phases.
    """
    config, marks = stage.config, marks or Marks(stage.device)
    _seed(stage)
    set_rate(stage.optimizer, rate_factor(config.schedule, stage.step, config.steps, config.batch_size))
    stage.module.train()
    stage.optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations need the room
    buffers = _by_dtype(stage.module.buffers())
    before = [_joined(group) for group in buffers]
    marks.mark("optimizer")
    names, values, finite = _gradients(stage, batch, targets, marks)
    norm = _clip(stage.optimizer, config.clip_norm)
    told = torch.stack([*values, values.new_full((), float(stopping)), finite & torch.isfinite(norm)])
    marks.mark("optimizer")
    told = distributed.all_reduce_sum(told.detach(), name="numbers of the step")
    marks.mark("communication")
    stage.alive = stage.alive * (told[-1] == distributed.world_size())
    stage.optimizer.found_inf = 1.0 - stage.alive  # type: ignore[attr-defined]
    stage.optimizer.step()
    for group, old in zip(buffers, before, strict=True):
        _write(group, torch.where(stage.alive > 0, _joined(group), old))
    if stage.ema is not None:
        stage.ema.update(stage.module, stage.alive)
    marks.mark("optimizer")
    return _send((*names, "gradient_norm"), torch.cat([told[:-2], torch.stack([norm, told[-2], stage.alive])]))


def _gradients(
    stage: Stage, batch: ImageBatch, targets: Targets, marks: Marks
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Adds up the gradients of a batch, over its parts and over all processes.

    Returns:
        The names and the values (K,) of this process's share of the loss, its parts, and the ratios of samples; and
        whether the loss is finite, a 0-dim bool.
    """
    parts = parts_of((batch, targets), stage.config.accumulate)
    counts = None
    if len(parts) > 1:
        counts = _counts(stage, parts)
        _seed(stage)  # what is dropped in the count is dropped in the passes
    world = distributed.world_size()
    shares: list[Tensor] = []
    for number, part in enumerate(parts, 1):
        # Alone, stage.parallel must not be made: it would stay without others.
        held = world > 1 and number < len(parts)
        with distributed.gradients_held(stage.parallel) if held else contextlib.nullcontext():
            with mixed_precision(stage):
                found = stage.losses(*part, counts)
            total = torch.stack(list(found.losses.values())).sum()
            marks.mark("forward")
            with distributed.waiting("sum of gradients", counted=False):
                total.backward()  # type: ignore[no-untyped-call]
            marks.mark("backward")
        ratios = [ratio.to(total.dtype) / (world * len(parts)) for ratio in found.ratios.values()]
        shares.append(torch.stack([total, *found.losses.values(), *ratios]).detach())
    values = torch.stack(shares).sum(0)
    return ("loss", *found.losses, *found.ratios), values, torch.isfinite(values[0])


def _seed(stage: Stage) -> None:
    """For dropout and drop path of libraries; everything else hashes the samples' keys."""
    torch.manual_seed(fold(stage.seed, stage.step, distributed.rank()))


def parts_of(whole: Part, count: int) -> list[Part]:
    """A process's pictures of a step as ``count`` equal runs, which it does one after the other."""

    def piece(k: int) -> Part:
        def cut(tensor: Tensor) -> Tensor:
            return tensor.tensor_split(count)[k]

        return map_tensors(whole[0], cut), map_tensors(whole[1], cut)

    return [piece(k) for k in range(count)] if count > 1 else [whole]


def _counts(stage: Stage, parts: list[Part]) -> Tensor:
    """The samples of the whole global batch, by a forward pass of every part, so that no mean is one of means.

    The running statistics are left as they are.
    """
    with torch.no_grad(), statistics_held(), mixed_precision(stage):
        return torch.stack([stage.losses(*part).counts for part in parts]).sum(0)


def mixed_precision(stage: Stage) -> torch.autocast:
    """Within the block forward passes are those of the stage's ``precision``."""
    return torch.autocast(stage.device.type, torch.bfloat16, enabled=stage.config.precision == "bfloat16")


def _clip(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """The norm of all gradients together, which are scaled down to ``limit`` where it is larger."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
    return norm


def _by_dtype(buffers: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        groups.setdefault(buffer.dtype, []).append(buffer)
    return list(groups.values())


def _joined(tensors: list[Tensor]) -> Tensor:
    """A copy of all values in one row: three kernels for a detector's hundreds of running statistics."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _write(tensors: list[Tensor], values: Tensor) -> None:
    pieces = torch.split(values, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)])


def _send(names: tuple[str, ...], values: Tensor) -> Numbers:
    """Starts the copy of a step's numbers to the host (pinned memory) without waiting for it."""
    if not values.is_cuda:
        return Numbers(names, values.detach(), None)
    values = values.detach().to("cpu", non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return Numbers(names, values, copied)
