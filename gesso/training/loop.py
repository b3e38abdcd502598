"""The training loop: one stage, any module that returns a dictionary of losses; it knows no task.

A step is: batch to the device, forward, backward, clip, one flag, gated update. The flag says whether every loss and
gradient so far was finite; it stays on the device and gates weights, momentum, averages and running statistics, so
that a step that is not finite (and every later one) changes nothing. The host reads the losses and the flag of a step
while the next one runs.
"""

import functools
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gesso.data.transforms import InputConfig
from gesso.distributed import rank
from gesso.errors import ConfigError, TrainingError
from gesso.models.norm import NormPolicy
from gesso.random_key import fold
from gesso.structures import ImageBatch, Targets, to_device
from gesso.training.ema import EMA
from gesso.training.optimizer import SGD, AdamW, set_rate
from gesso.training.schedule import ScheduleConfig, rate_factor

EARLY = (1, 2, 5, 10)
MOST_GRAPHS = 64
"""Two stages of five padded shapes at five short sides each are 50; torch's own limit is 8."""

Row = dict[str, Any]
Batches = Iterator[tuple[ImageBatch, Targets]]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One stage of training."""

    steps: int = 90_000
    """Optimizer steps of the stage."""
    epochs: float | None = None
    """Passes over the training data instead of ``steps``, which follow from it when the run begins."""
    batch_size: int = 16
    """Pictures of a step, over all processes."""
    accumulate: int = 1
    """Parts that a process does its pictures of a step in, one after the other, to save memory. The gradient is that
    of the whole; batch norm sees one part at a time."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16 is mixed precision; float64 is for tests."""
    input: InputConfig = field(default_factory=InputConfig)
    """How pictures are resized and augmented."""
    optimizer: SGD | AdamW = field(default_factory=SGD)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the steps."""
    norm: NormPolicy = field(default_factory=NormPolicy)
    """What batch norm does."""
    clip_norm: float | None = None
    """The largest norm of all gradients together; None = no clipping."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate it; None = none."""
    precise_bn: int = 0
    """Pictures over which the running statistics are taken anew at the end of the stage; 0 = they stay as they are."""
    memory: str = "none"
    """Activations of backbone and neck that are computed twice to save memory: none, stages, sqrt (Chen et al. 2016),
    or budget=11GB, the cheapest choice that fits."""
    compile: bool | None = None
    """Compile the step as one graph; None = on a GPU, not on a CPU."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl (steps 1, 2, 5 and 10 are always logged)."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step and every evaluation make one too."""
    evaluate_every: int = 5000
    """Steps between evaluations; the last step of the run is always evaluated."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, beside the best one."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "evaluate_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"training: {name} must be at least 1, found {getattr(self, name)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"training: clip_norm must be above 0, found {self.clip_norm}")
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"training: epochs must be above 0, found {self.epochs}")
        if self.precise_bn < 0:
            raise ConfigError(f"training: precise_bn must be at least 0, found {self.precise_bn}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"training: {self.batch_size} pictures do not fall into accumulate = {self.accumulate} parts"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"training: ema_decay must lie in [0, 1), found {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a run does beside training. All are called on the host, between steps."""

    row: Callable[[int, Row], None]
    """(steps done in this stage, a row of numbers), after the logged steps."""
    checkpoint: Callable[["Stage"], None]
    """When a checkpoint is due; the losses so far are known to be finite. What it raises ends training: to go on
    without a checkpoint (a full disk), catch it there."""
    evaluate: Callable[["Stage"], None]
    """When an evaluation is due; comes before the checkpoint of the same step."""
    tick: Callable[[int], None] = lambda step: None
    """After every step."""
    should_stop: Callable[[], bool] = lambda: False
    """Whether to end after this step; a checkpoint is made."""


@dataclass(kw_only=True)
class Stage:
    """A stage in progress: what changes from step to step."""

    config: TrainingConfig
    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    device: torch.device
    seed: int
    step: int = 0
    sample: int = 0
    seconds: float = 0.0
    stopped: bool = False
    alive: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.alive = torch.ones((), device=self.device)

    @property
    def compiles(self) -> bool:
        """Whether the forward pass is compiled."""
        return self.device.type == "cuda" if self.config.compile is None else self.config.compile

    @functools.cached_property
    def forward(self) -> Callable[..., dict[str, Tensor]]:
        """The module, or its compiled form; made once, so that a graph that is there is used again."""
        if not self.compiles:
            return self.module
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
        return torch.compile(self.module, fullgraph=True, dynamic=False)


@dataclass
class _Clock:
    """Seconds and steps since the last row, so that a row's speed is a mean and not the last step's."""

    steps: int = 0
    data: float = 0.0
    total: float = 0.0

    def add(self, data: float, total: float) -> None:
        self.steps, self.data, self.total = self.steps + 1, self.data + data, self.total + total

    def speed(self, batch_size: int) -> Row:
        return {
            "images_per_second": batch_size * self.steps / self.total,
            "data_share": self.data / self.total,
            "step_seconds": self.total / self.steps,
        }


@dataclass(frozen=True)
class Numbers:
    """The losses, the gradient norm and the flag (K + 1,) of a step, on their way to the host."""

    names: tuple[str, ...]
    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> tuple[Row, bool]:
        """The numbers by name, and whether all was finite; waits for this step alone, not for later ones."""
        if self.copied is not None:
            self.copied.synchronize()
        *values, alive = self.values.tolist()
        return dict(zip(self.names, values, strict=True)), bool(alive)


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers the host has not read yet, and the rest of its row where one is due."""

    step: int
    numbers: Numbers
    row: Row | None


def run_stage(stage: Stage, batches: Batches, callbacks: Callbacks) -> None:
    """Trains from ``stage.step`` to ``config.steps``, or until asked to stop.

    Raises:
        TrainingError: a loss or gradient is not finite; weights, momentum, averages and running statistics are those
            before that step, and the stage cannot go on.
    """
    config, pending, clock = stage.config, None, _Clock()
    while stage.step < config.steps and not stage.stopped:
        began = time.perf_counter()
        batch, targets = next(batches)
        loaded = time.perf_counter()
        numbers = train_step(stage, to_device(batch, stage.device), to_device(targets, stage.device))
        if pending is not None:
            _read(stage, pending, callbacks)
        stage.step += 1
        stage.sample += config.batch_size
        spent = time.perf_counter() - began
        stage.seconds += spent
        clock.add(loaded - began, spent)
        pending = _Pending(stage.step, numbers, None)
        if _row_is_due(stage):
            pending, clock = _Pending(stage.step, numbers, _row(stage, clock)), _Clock()
        callbacks.tick(stage.step)
        stage.stopped = callbacks.should_stop()
        pending = _pause(stage, pending, callbacks)
    if pending is not None:
        _read(stage, pending, callbacks)


def _pause(stage: Stage, pending: _Pending, callbacks: Callbacks) -> _Pending | None:
    """Evaluates and saves where that is due; the pending numbers are read first, so that nothing bad is saved."""
    config, last = stage.config, stage.step == stage.config.steps
    evaluate = last or stage.step % config.evaluate_every == 0
    save = evaluate or stage.stopped or stage.step % config.checkpoint_every == 0  # the best one must be on disk
    if not save:
        return pending
    _read(stage, pending, callbacks)
    if evaluate:
        callbacks.evaluate(stage)
    callbacks.checkpoint(stage)
    return None


def train_step(stage: Stage, batch: ImageBatch, targets: Targets) -> Numbers:
    """One update, of a batch that is on the device. Nothing here waits for the device.

    Where ``stage.alive`` is 0, weights, moments, averages and running statistics stay what they are, and the same work
    is done.
    """
    config = stage.config
    # For dropout and drop path of libraries; everything else hashes the samples' keys.
    torch.manual_seed(fold(stage.seed, stage.step, rank()))
    set_rate(stage.optimizer, rate_factor(config.schedule, stage.step, config.steps))
    stage.module.train()
    stage.optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose activations need the room
    buffers = _by_dtype(stage.module.buffers())
    before = [_joined(group) for group in buffers]
    with torch.autocast(stage.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        losses = stage.forward(batch, targets)
    total = torch.stack(list(losses.values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    norm = _clip(stage.optimizer, config.clip_norm)
    stage.alive = stage.alive * (torch.isfinite(total) & torch.isfinite(norm))
    stage.optimizer.found_inf = 1.0 - stage.alive  # type: ignore[attr-defined]
    stage.optimizer.step()
    for group, old in zip(buffers, before, strict=True):
        _write(group, torch.where(stage.alive > 0, _joined(group), old))
    if stage.ema is not None:
        stage.ema.update(stage.module, stage.alive)
    return _send(("loss", *losses, "gradient_norm"), torch.stack([total, *losses.values(), norm, stage.alive]))


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


def _read(stage: Stage, pending: _Pending, callbacks: Callbacks) -> None:
    """Reads the numbers of a step on the host: raises where they are not finite, hands on the row where one is due."""
    numbers, finite = pending.numbers.read()
    if not finite:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        raise TrainingError(
            f"step {pending.step}: a loss or gradient is not finite ({shown}); the weights were left as before",
            remedy="Lower the learning rate, lengthen the warm-up, or clip gradients (clip_norm).",
        )
    if pending.row is not None:
        callbacks.row(pending.step, numbers | pending.row)


def _row_is_due(stage: Stage) -> bool:
    return stage.step % stage.config.log_every == 0 or stage.step in EARLY or stage.step == stage.config.steps


def _row(stage: Stage, clock: _Clock) -> Row:
    """What a row says beside the losses."""
    config = stage.config
    return {
        "learning_rate": config.optimizer.rate * rate_factor(config.schedule, stage.step - 1, config.steps),
        **clock.speed(config.batch_size),
        "seconds": stage.seconds,
        "images": stage.step * config.batch_size,
        "memory_gib": peak_memory(stage.device),
    }


def peak_memory(device: torch.device) -> float:
    """GiB: on a GPU the most that tensors held, on a CPU the largest resident set of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
