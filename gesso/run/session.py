"""One process's work on a run: stage after stage, from the newest checkpoint to the end."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gesso import config as configs
from gesso import distributed, log
from gesso.data.index import Index
from gesso.data.loading import TrainingBatches, training_batches
from gesso.data.transforms import Shape
from gesso.errors import InputError, Interrupted, RunError
from gesso.models.detector import Detector
from gesso.models.model import Model
from gesso.random_key import fold, stream
from gesso.reports.progress import ROWS, describe, row_line
from gesso.run.advice import norm_advice
from gesso.run.config import RunConfig, Task
from gesso.run.cost import cost_of, keep_cost
from gesso.run.data import open_data
from gesso.run.failure import save_failure
from gesso.run.folder import ROW_KEYS, RunFolder
from gesso.run.initial import InitialWeights, keep_report, read_weights, start_from
from gesso.run.models import follow_stage, new_model, trained
from gesso.run.observer import Observer
from gesso.run.report import write_run_report
from gesso.run.saving import Saver
from gesso.structures import to_device
from gesso.training import checkpoint as checkpoints
from gesso.training.checkpoint import Checkpoint
from gesso.training.ema import EMA, swapped
from gesso.training.loop import Batches, Callbacks, run_stage
from gesso.training.memory import Plan, apply_memory, held_bytes, parse_memory, save_memory
from gesso.training.optimizer import build_optimizer
from gesso.training.precise_bn import precise_statistics
from gesso.training.schedule import describe_rule
from gesso.training.stage import Stage, TrainingConfig
from gesso.training.step import Row, mixed_precision
from gesso.training.timing import Cost, RowMeter
from gesso.training.watchdog import Watchdog
from gesso.training.worst_case import Pair, largest_shape, rehearse, worst_batch

logger, row_logger = log.get_logger(__name__), log.get_logger(ROWS)

INIT = stream("init")
STAGES = {name: stream(name) for name in ("pretraining", "training")}


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run came to.

    Attributes:
        path: its folder.
        scores: the last evaluation; None where there is no validation data.
        seconds: of training, without evaluation.
        images: seen in training, repeats included.
    """

    path: Path
    scores: dict[str, Any] | None
    seconds: float
    images: int


class Session:
    """One process's work on a run, from its newest checkpoint to its end."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, observer: Observer, how_to_resume: str, watchdog: Watchdog
    ) -> None:
        self.config, self.folder, self.observer, self.how_to_resume = config, folder, observer, how_to_resume
        self.device = distributed.choose_device(config.device)
        distributed.from_main(lambda: self._open_data() and None)  # which makes the embedded data set, once
        self.train_index, self.val_index = self._open_data()
        self.space = self.train_index.label_space
        distributed.from_main(lambda: folder.keep_label_space(self.space))
        self.watchdog = watchdog
        self.base = 0  # steps of the stages before the one at hand
        self.saver = Saver(folder, configs.digest(config))
        self.meter = RowMeter()  # of the stage at hand, and so are
        self.precise: dict[str, Tensor] = {}  # statistics of batch norm, once they are taken anew
        self.tensorboard: Any = None

    def _open_data(self) -> tuple[Index, Index | None]:
        return open_data(self.config.data, self.folder.path, self.observer.prepare)

    def run(self, init: Path | None) -> RunResult:
        """Works through the stages that are left. See ``train``."""
        torch.manual_seed(fold(self.config.seed, INIT))
        newest = distributed.from_main(self._newest)
        parts = self.config.init_parts
        replaced = newest is not None or (init is not None and (parts is None or "backbone" in parts))
        fresh, task = False if replaced else None, None
        model = new_model(self.config, len(self.space), pretrained=fresh)
        if init is not None and newest is None:
            task = self._start_from(model, read_weights(init))
        if newest is None:
            distributed.same_everywhere(model.state_dict().values())
            if (word := norm_advice(self.config, model, task)) is not None:
                logger.warning("%s", word)
        self._rewind(newest)
        model.to(self.device)
        stages = self.config.stages()
        self.observer.plan([(name, stage.steps) for name, stage in stages], self._evaluations())
        seconds, cost = 0.0, Cost()
        names = [name for name, _ in stages]
        for name, stage_config in stages:
            if newest is not None and names.index(newest.state.stage) > names.index(name):
                follow_stage(model, stage_config)  # may have made other layers
                self.base += stage_config.steps
                continue
            stage = self._prepare(name, stage_config, model, newest)
            if newest is None:
                stage.seconds, stage.cost = seconds, cost
            newest = None
            self._train(name, stage)
            seconds, cost = stage.seconds, stage.cost
            model.load_state_dict(self._result(stage), strict=False)
            self.base += stage_config.steps
        distributed.from_main(lambda: write_run_report(self.folder, self.val_index) and None)
        evaluations = self.folder.evaluations()
        last = evaluations[-1] if evaluations else None
        scores = None if last is None else {key: last[key] for key in last if key not in ROW_KEYS}
        images = self._images(len(stages))
        return RunResult(path=self.folder.path, scores=scores, seconds=seconds, images=images)

    def _start_from(self, model: Model, initial: InitialWeights) -> Task | None:
        """Loads weights into the new model; gives the task that they were trained for."""
        first = self.config.stages()[0][1].norm
        backbone = self.config.model.backbone
        report = start_from(model, initial, self.space, first, self.config.init_parts, backbone)
        distributed.from_main(lambda: keep_report(self.folder, report))
        return initial.task

    def _newest(self) -> Checkpoint | None:
        """The checkpoint to go on from. RunError where there are some and none is whole."""
        newest = checkpoints.newest_checkpoint(self.folder.checkpoints)
        if newest is None and any(self.folder.checkpoints.glob("[0-9]*/state.json")):
            raise RunError(
                "none of its checkpoints is whole, so there is nothing to go on from",
                where=self.folder.checkpoints,
                remedy="Bring one back, or train into another folder.",
            )
        return newest

    def close(self) -> None:
        """Brings what is still in memory to the disk."""
        self.saver.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _evaluations(self) -> int:
        """How many evaluations the whole run makes."""
        if self.val_index is None:
            return 0
        stages = [stage for _, stage in self.config.stages()]
        return sum(stage.steps // stage.evaluate_every for stage in stages) + bool(
            stages[-1].steps % stages[-1].evaluate_every
        )

    def _rewind(self, newest: Checkpoint | None) -> None:
        """Takes the folder back to the checkpoint that the run goes on from (or to its beginning)."""
        step = 0 if newest is None else newest.state.step
        distributed.from_main(lambda: self.folder.rewind(step))
        if newest is not None:
            self.saver.resume(newest.state)
            logger.info("going on from step %d", step)
        if self.config.tensorboard and distributed.is_main():
            module = importlib.import_module("gesso.reports.tensorboard")
            self.tensorboard = module.TensorBoardWriter(self.folder.path / "tensorboard", resumed_step=step + 1)

    def _images(self, stages: int) -> int:
        """The pictures seen in so many stages."""
        return sum(stage.steps * stage.batch_size for _, stage in self.config.stages()[:stages])

    def _prepare(self, name: str, config: TrainingConfig, model: Model, newest: Checkpoint | None) -> Stage:
        """A stage at its beginning, or where the checkpoint left it."""
        pictures = config.batch_size // (distributed.world_size() * config.accumulate)
        follow_stage(model, config, pictures=pictures)
        model.to(torch.float64 if config.precision == "float64" else torch.float32)
        if newest is not None:
            newest.load_model(model)
        ema = None if config.ema_decay is None else EMA(model, config.ema_decay)
        stage = Stage(
            config=config,
            module=model,
            optimizer=build_optimizer(model, config.optimizer),
            ema=ema,
            device=self.device,
            seed=fold(self.config.seed, STAGES[name]),
        )
        self.meter, self.precise = RowMeter(), {}
        if newest is not None:
            newest.load_optimizer(stage.optimizer)
            if ema is not None:
                newest.load_ema(ema)
            stage.step, stage.sample, stage.seconds = newest.state.stage_step, newest.state.sample, newest.state.seconds
            stage.cost = Cost(**newest.state.cost)
            self.meter, self.precise = RowMeter.resumed(newest.state.meter), newest.precise_statistics()
        return stage

    def _train(self, name: str, stage: Stage) -> None:
        if stage.step >= stage.config.steps:
            return
        data = self.config.data
        logger.info(
            "%s: %d steps of %d pictures from step %d, on %d images with %d boxes",
            name,
            stage.config.steps,
            stage.config.batch_size,
            stage.step,
            len(self.train_index),
            self.train_index.num_boxes,
        )
        config = stage.config
        for line in describe_rule(config.schedule, config.optimizer.rate, config.batch_size, config.steps):
            logger.info("%s: %s", name, line)
        batches = training_batches(
            self.train_index,
            stage.config.input,
            seed=stage.seed,
            batch_size=stage.config.batch_size,
            first_sample=stage.sample,
            workers=data.workers,
            rank=distributed.rank(),
            world=distributed.world_size(),
            max_boxes=data.max_boxes,
            mask_side=_model(stage).mask_side,
            semantic=_model(stage).semantic,
        )
        last = name == self.config.stages()[-1][0]
        callbacks = Callbacks(
            row=lambda step, row: self._row(name, self.base + step, row),
            checkpoint=lambda at: self._save(name, at),
            evaluate=lambda at: self._evaluate(name, at, batches, final=last),
            tick=lambda step: self.observer.step(name, step),
            should_stop=self.observer.should_stop,
            failed=lambda at, step, *part: save_failure(self.folder, name, at, step, *part),
            meter=self.meter,
        )
        try:
            run_stage(stage, self._rehearsed(name, stage, batches), callbacks)
        finally:
            batches.close()
        if stage.stopped and not (last and stage.step == stage.config.steps):
            raise distributed.told_by_main(
                Interrupted(
                    f"interrupted at step {self.base + stage.step}; everything up to it is saved",
                    where=self.folder.path,
                    remedy=f"Go on with: {self.how_to_resume}" if self.how_to_resume else "Go on with resume=True.",
                )
            )

    def _rehearsed(self, name: str, stage: Stage, batches: TrainingBatches) -> Batches:
        """The same batches, after the largest step of the stage was tried while loaders make them: ``rehearse``."""
        first, index = next(batches), self.train_index
        shape = largest_shape(stage.config.input, index.heights, index.widths)
        self._save_memory(stage, first, shape)
        rehearse(stage, first, shape, name=name, begun=self.base + stage.step > 0)
        return self._watched(stage, itertools.chain([first], batches))

    def _watched(self, stage: Stage, batches: Batches) -> Batches:
        """The same batches; of each, before its step, the watchdog hears the number and the images."""
        for batch, targets in batches:
            rows = batch.image_index.numpy()
            self.watchdog.beat(self.base + stage.step + 1, np.asarray(self.train_index.image_ids)[rows])
            yield batch, targets

    def _save_memory(self, stage: Stage, example: Pair, shape: Shape) -> None:
        """Chooses what is computed twice, by a measured forward pass of the largest part of a step."""
        memory = parse_memory(stage.config.memory)
        if not isinstance(stage.module, Detector):
            return
        if memory.kind == "none":
            apply_memory(stage.module, Plan(memory=memory))
            return
        part = worst_batch(example, shape, example[0].images.shape[0] // stage.config.accumulate)
        there = to_device(part[0], self.device), to_device(part[1], self.device)
        held = held_bytes(stage.module, stage.optimizer, stage.ema)
        with mixed_precision(stage):
            plan = save_memory(stage.module, memory, *there, fixed_bytes=held)
        logger.info(plan.describe())

    def _row(self, name: str, step: int, row: Row) -> None:
        if not distributed.is_main():
            return
        row = {"step": step, "stage": name, **row, "images": self._images(self._number(name)) + row["images"]}
        with self._full_disk_is_survived(step):
            self.folder.append(row)
        row_logger.info(row_line(row, step - self.base, self.config.stages()[self._number(name)][1].steps))
        self.observer.row(row)
        self.saver.poll()
        if self.tensorboard is not None:
            self.tensorboard.add_row(step, row, group="train")

    def _number(self, name: str) -> int:
        return [stage for stage, _ in self.config.stages()].index(name)

    def _take_statistics(self, stage: Stage, batches: TrainingBatches) -> None:
        """Takes the statistics of batch norm anew, over the samples that would come next."""
        logger.info("taking the statistics of batch norm anew over %d pictures", stage.config.precise_bn)
        self.precise = precise_statistics(stage, batches)
        if not self.precise and distributed.is_main():
            kind = stage.config.norm.kind
            logger.warning("precise_bn changes nothing: no batch norm takes statistics with norm.kind %s", kind)

    def _result(self, stage: Stage) -> dict[str, Tensor]:
        """What the module has to take over to be evaluated, and to start the next stage: averages, statistics."""
        return ({} if stage.ema is None else stage.ema.average) | self.precise

    def _evaluate(self, name: str, stage: Stage, batches: TrainingBatches, *, final: bool) -> None:
        at_end = stage.step == stage.config.steps
        # Running statistics of single processes, or of groups of them: those of process 0 are saved, so they count.
        averages = {} if stage.ema is None else stage.ema.average
        distributed.same_everywhere([*stage.module.buffers(), *averages.values()])
        if at_end and stage.config.precise_bn:
            self._take_statistics(stage, batches)
        if self.val_index is None or (at_end and not final and stage.step % stage.config.evaluate_every):
            return
        self.saver.settle()  # loaders must not be forked beside a thread at work
        ready = trained(self.config, stage.config, _model(stage), self.space, self.device)
        done, total, index = [0], len(self.val_index), self.val_index

        def progress(count: int) -> None:
            done[0] += count * distributed.world_size()
            self.observer.evaluating(min(done[0], total), total)

        with swapped(stage.module, self._result(stage)):
            scores, found = ready.evaluate(index, workers=self.config.data.workers, progress=progress)
        distributed.from_main(lambda: self._keep_scores(name, stage, scores, lambda to: ready.keep(found, to, index)))
        self.saver.scored(scores[ready.primary], self.base + stage.step)

    def _keep_scores(self, name: str, stage: Stage, scores: dict[str, Any], keep: Callable[[Path], None]) -> None:
        """Writes what an evaluation came to."""
        step = self.base + stage.step
        row = {"step": step, "stage": name, "seconds": stage.seconds, **scores}
        final = name == self.config.stages()[-1][0] and stage.step == stage.config.steps
        with self._full_disk_is_survived(step, unless=final):
            keep(self.folder.detections / f"{step:08d}")
            self.folder.append(row)
        logger.info("step %d: %s", step, describe(row))
        self.observer.row(row)
        if self.tensorboard is not None:
            self.tensorboard.add_row(step, row, group="val")

    @contextmanager
    def _full_disk_is_survived(self, step: int, *, unless: bool = False) -> Iterator[None]:
        """What cannot be written costs itself and not the run, but for the last evaluation, which is the result."""
        try:
            yield
        except InputError as error:
            if unless:
                raise
            logger.error("step %d: %s", step, error)

    def _save(self, name: str, stage: Stage) -> None:
        last = name == self.config.stages()[-1][0] and stage.step == stage.config.steps
        self.saver.save(
            stage,
            name=name,
            step=self.base + stage.step,
            meter=self.meter.kept(),
            precise=self.precise,
            required=stage.stopped or last,
        )
        if distributed.is_main():
            images = self._images(self._number(name)) + stage.step * stage.config.batch_size
            with self._full_disk_is_survived(self.base + stage.step):
                keep_cost(self.folder, cost_of(stage, images))


def _model(stage: Stage) -> Model:
    assert isinstance(stage.module, Model)
    return stage.module
