"""The checkpoints of a run: written while training goes on, and which of them is the best."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gesso import distributed, log
from gesso.errors import InputError, RunError
from gesso.run.folder import RunFolder
from gesso.training.checkpoint import CheckpointState, take_snapshot
from gesso.training.checkpoint_writer import CheckpointWriter
from gesso.training.stage import Stage

logger = log.get_logger(__name__)

Best = tuple[float, int] | None
"""AP and step."""


class Saver:
    """Saves what a run has learnt. All processes hold one; that of process 0 writes.

    A write that fails costs itself: it is told loudly, training goes on, and the next one tries again.

    Args:
        folder: of the run.
        config_hash: of its configuration.

    Attributes:
        best: the best evaluation so far; where its checkpoint could not be written, the best one that can be loaded.
    """

    def __init__(self, folder: RunFolder, config_hash: str) -> None:
        self.best: Best = None
        self._saved_best: Best = None
        self._folder, self._config_hash = folder, config_hash
        self._writer = CheckpointWriter(folder.checkpoints, first=folder.flush)  # no checkpoint is ahead of its rows
        self._step = 0

    def resume(self, state: CheckpointState) -> None:
        """Goes on from a checkpoint."""
        self.best = self._saved_best = _best(state)

    def scored(self, AP: float, step: int) -> None:
        """Takes in an evaluation, before which ``settle`` was called."""
        if self.best is None or self.best[0] < AP:
            self.best = (AP, step)

    def save(
        self,
        stage: Stage,
        *,
        name: str,
        step: int,
        meter: Mapping[str, Any],
        precise: Mapping[str, Tensor],
        required: bool,
    ) -> None:
        """Copies the stage and writes the copy while training goes on; waits for it at the end of the stage.

        Args:
            stage: what is saved.
            name: of the stage.
            step: over all stages.
            meter: ``RowMeter.kept``.
            precise: ``precise_statistics`` of the stage, {} where there are none.
            required: wait, and raise what goes wrong, in all processes.

        Raises:
            RunError, InputError: it is required and cannot be written.
        """
        state = CheckpointState(
            step=step,
            stage=name,
            stage_step=stage.step,
            sample=stage.sample,
            seconds=stage.seconds,
            world_size=distributed.world_size(),
            threads=torch.get_num_threads(),
            config_hash=self._config_hash,
            ema_updates=0 if stage.ema is None else stage.ema.updates,
            meter=dict(meter),
            cost=dataclasses.asdict(stage.cost),
        )
        if required:
            distributed.from_main(lambda: self._save_now(stage, state, precise))
        elif distributed.is_main():
            self._save_meanwhile(stage, state, precise)

    def settle(self) -> None:
        """Waits for the write in progress, where there is one, and tells whether it failed."""
        try:
            written = self._writer.result()
        except (RunError, InputError) as error:
            self._failed(error)
        else:
            self._saved_best = self._saved_best if written is None else _best(written.state)

    def poll(self) -> None:
        """Tells of a write that failed meanwhile; does not wait."""
        if not self._writer.busy:
            self.settle()

    def close(self) -> None:
        """Waits for the write in progress, also where training ends by an error."""
        self.settle()
        self._writer.close()

    def _save_now(self, stage: Stage, state: CheckpointState, precise: Mapping[str, Tensor]) -> None:
        self._begin(stage, state, precise)
        self._writer.result()
        self._saved_best = self.best

    def _save_meanwhile(self, stage: Stage, state: CheckpointState, precise: Mapping[str, Tensor]) -> None:
        if self._writer.busy:
            logger.warning(
                "the checkpoint of step %d is still being written: the disk is slower than checkpoint_every = %d steps",
                self._step,
                stage.config.checkpoint_every,
            )
        try:
            self._begin(stage, state, precise)
        except RunError as error:
            self._failed(error)
        if stage.step == stage.config.steps:
            self.settle()  # the next stage starts loaders, which must not be forked beside a thread at work

    def _begin(self, stage: Stage, state: CheckpointState, precise: Mapping[str, Tensor]) -> None:
        """Begins to write, with the best as it is known once the write before is settled."""
        self.settle()
        self._step = state.step
        score, step = (None, None) if self.best is None else self.best
        state = dataclasses.replace(state, best_score=score, best_step=step)
        copy = take_snapshot(self._folder.checkpoints, state, stage.module, stage.optimizer, stage.ema, precise)
        self._writer.begin(copy, keep=stage.config.keep_checkpoints)

    def _failed(self, error: Exception) -> None:
        logger.error("no checkpoint at step %d: %s", self._step, error)
        self.best = self._saved_best  # what cannot be loaded is not the best


def _best(state: CheckpointState) -> Best:
    return None if state.best_score is None or state.best_step is None else (state.best_score, state.best_step)
