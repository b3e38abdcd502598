"""The training loop: one stage, any module that returns a dictionary of losses; it knows no task.

The host reads the losses and the flag of a step (``step.py``) while the next one runs.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gesso import distributed
from gesso.errors import TrainingError
from gesso.structures import ImageBatch, Targets, to_device
from gesso.training.schedule import rate_factor
from gesso.training.stage import Stage, TrainingConfig, peak_memory
from gesso.training.step import Numbers, Row, train_step
from gesso.training.timing import Marks, RowMeter

EARLY = (1, 2, 5, 10)

Batches = Iterator[tuple[ImageBatch, Targets]]


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
    failed: Callable[["Stage", int, ImageBatch, Targets], str] = lambda stage, step, batch, targets: ""
    """When a step of this stage (counted from 1) was not finite, with this process's part of its batch, on the device;
    weights and running statistics are those from before it. Gives the end of the error's message."""
    meter: RowMeter = field(default_factory=RowMeter)
    """Gathers times and ratios between two rows. What it has ``kept`` belongs into a checkpoint."""


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers the host has not read yet; the seconds are those of the step, and of the run so far."""

    step: int
    numbers: Numbers
    marks: Marks
    spent: float
    seconds: float
    batch: ImageBatch
    targets: Targets


def run_stage(stage: Stage, batches: Batches, callbacks: Callbacks) -> None:
    """Trains from ``stage.step`` to ``config.steps``, or until asked to stop.

    Raises:
        TrainingError: a loss or gradient is not finite; weights, momentum, averages and running statistics are those
            before that step, and the stage cannot go on.
    """
    config, pending = stage.config, None
    while stage.step < config.steps and not stage.stopped:
        began, worked, marks = time.perf_counter(), time.process_time(), Marks(stage.device)
        batch, targets = next(batches)
        there = to_device(batch, stage.device), to_device(targets, stage.device)
        marks.mark("data")
        numbers = train_step(stage, *there, stopping=callbacks.should_stop(), marks=marks)
        if pending is not None:
            _read(stage, pending, callbacks)
        stage.step += 1
        stage.sample += config.batch_size
        spent = time.perf_counter() - began
        stage.seconds += spent
        stage.cost.device_seconds += spent * distributed.world_size()
        stage.cost.processor_seconds += time.process_time() - worked
        pending = _Pending(stage.step, numbers, marks, spent, stage.seconds, *there)
        callbacks.tick(stage.step)
        if distributed.world_size() == 1:
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
        began = time.perf_counter()
        callbacks.evaluate(stage)
        stage.cost.evaluation_seconds += time.perf_counter() - began
    callbacks.checkpoint(stage)
    return None


def _read(stage: Stage, pending: _Pending, callbacks: Callbacks) -> None:
    """Reads the numbers of a step on the host: raises where they are not finite, hands on the row where one is due."""
    numbers, finite = pending.numbers.read()
    if distributed.world_size() > 1:
        stage.stopped = stage.stopped or pending.numbers.stopping()
    if not finite:
        more = callbacks.failed(stage, pending.step, pending.batch, pending.targets)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        raise distributed.told_by_main(
            TrainingError(
                f"step {pending.step}: a loss or gradient is not finite ({shown}); the weights were left as before",
                remedy=f"Lower the learning rate, lengthen the warm-up, or clip gradients (clip_norm). {more}".strip(),
            )
        )
    phases = pending.marks.seconds()
    stage.cost.data_seconds += phases["data"]
    callbacks.meter.add(numbers, pending.spent, phases)
    if _row_is_due(stage.config, pending.step):
        callbacks.row(pending.step, numbers | _row(stage, pending, callbacks.meter))


def _row_is_due(config: TrainingConfig, step: int) -> bool:
    return step % config.log_every == 0 or step in EARLY or step == config.steps


def _row(stage: Stage, pending: _Pending, meter: RowMeter) -> Row:
    """What a row says beside the losses, and instead of the last step's ratios of samples."""
    config, step = stage.config, pending.step
    return {
        "learning_rate": config.optimizer.rate
        * rate_factor(config.schedule, step - 1, config.steps, config.batch_size),
        **meter.take(config.batch_size, config.steps - step),
        "seconds": pending.seconds,
        "images": step * config.batch_size,
        "memory_gib": peak_memory(stage.device),
    }
