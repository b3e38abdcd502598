"""Draws a run's progress on standard error."""

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gesso import launch
from gesso.commands.interruption import StopRequest
from gesso.reports.progress import JobProgress, Stage, describe
from gesso.run.observer import Observer

PREPARING = "making the embedded data"


class ProgressObserver(Observer):
    """An observer of one run, or of one run of several, that moves a ``JobProgress``.

    Args:
        job: the line that is drawn.
        steps: of each stage of the run.
        stop: whether a stop was asked for.
        prefix: stands before the names of this run's stages in the job.
    """

    def __init__(self, job: JobProgress, steps: Mapping[str, int], stop: StopRequest, *, prefix: str = "") -> None:
        self._job, self._steps, self._prefix = job, steps, prefix
        self._at, self._detail = "", ""
        self._done, self._total = 0, 0
        self.should_stop = stop

    def _begin(self, name: str) -> None:
        if name != self._at:
            self._at = name
            self._job.begin(name)

    def prepare(self, what: str, done: int, total: int) -> None:
        """Scenes of the embedded data set."""
        self._begin(PREPARING)
        self._job.update(done=done, total=total, detail=what)

    def step(self, stage: str, step: int) -> None:
        """A step of a stage."""
        self._begin(self._prefix + stage)
        self._done, self._total = step, self._steps[stage]
        self._job.update(done=step, total=self._total, detail=self._detail)

    def row(self, row: Mapping[str, Any]) -> None:
        """The numbers that stand behind the line from now on."""
        self._detail = describe(row)

    def evaluating(self, done: int, total: int) -> None:
        """Pictures of an evaluation, shown within the stage at hand."""
        if self._at:
            self._job.update(done=self._done, total=self._total, detail=f"evaluating {done:,}/{total:,}")


def run_stages(config_stages: list[tuple[str, int]], *, embedded: bool, prefix: str = "") -> list[Stage]:
    """The stages of a job of one run; steps stand for seconds until time has been measured."""
    first = [Stage(name=PREPARING, expected_seconds=1.0)] if embedded else []
    longest = max(steps for _, steps in config_stages)
    return [
        *first,
        *(Stage(name=prefix + name, expected_seconds=10 * steps / longest) for name, steps in config_stages),
    ]


def job_progress(stages: list[Stage]) -> JobProgress:
    """The line of a job; of several processes only the first draws or logs it."""
    return JobProgress(stages, console=Console(file=io.StringIO()) if launch.rank() else None)


class PictureCounter:
    """Adds up the pictures of each batch and moves the line."""

    def __init__(self, job: JobProgress, name: str, total: int) -> None:
        self._job, self._total, self._done = job, total, 0
        job.begin(name)

    def __call__(self, count: int) -> None:
        """So many more pictures are done."""
        self._done += count
        self._job.update(done=self._done, total=self._total)
