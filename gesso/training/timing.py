"""Where the time of training goes: marks at the borders of a step's phases, and what is gathered between two rows.

On a CPU a mark is the host's clock. On a GPU it is an event among the step's kernels, which is read when the numbers of
the step are read, so that nothing waits for the device.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gesso import distributed

PHASES = ("data", "forward", "backward", "communication", "optimizer")
RATIO = "_positive_ratio"
"""How the names of ratios of samples end (``losses.over_global_batch``)."""


class _Border(NamedTuple):
    """The end of a phase: by ``time.perf_counter``, the seconds in collectives so far, and on a GPU an event."""

    phase: str
    host: float
    waited: float
    event: Any


class Marks:
    """The borders of one step's phases; the first one begins when this is made.

    - data: the wait for the batch, and its way to the device.
    - forward, backward: the two passes, added up over the parts of a step.
    - communication: the wait for other processes. On a CPU that is every collective of the step, and the time between
      the last bucket of gradients and the end of their sum. On a GPU collectives of batch norm and of the counts of
      samples lie within the passes; what is left is the same part of the gradients' sum, and the numbers' sum.
    - optimizer: clipping, the gated update, the averages, and the copies of running statistics that the gate needs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._borders: list[_Border] = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """Ends ``phase``, one of ``PHASES`` or "" for none of them, which began at the mark before."""
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        traffic = distributed.traffic
        here = _Border(phase, time.perf_counter(), traffic.seconds, event)
        if phase == "backward" and traffic.last_bucket > self._borders[-1].host:
            self._borders.append(_Border(phase, traffic.last_bucket, traffic.seconds, traffic.last_event))
            here = here._replace(phase="communication")
        self._borders.append(here)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase; on a GPU only once the numbers of the step are there."""
        found = dict.fromkeys(PHASES, 0.0)
        for before, here in itertools.pairwise(self._borders):
            if self._cuda:
                spent, waited = before.event.elapsed_time(here.event) / 1000, 0.0
            else:
                waited = here.waited - before.waited
                spent = max(here.host - before.host - waited, 0.0)
            if here.phase:
                found[here.phase] += spent
            found["communication"] += waited
        return found


@dataclass
class RowMeter:
    """Times and ratios of samples since the last row, so that a row says means and not the last step's values.

    Attributes:
        steps: since the last row, or since the resume; seconds: of these on the host; phases: of these.
        ratios: sums over all steps since the last row, and ratio_steps, their number.
    """

    steps: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    ratios: dict[str, float] = field(default_factory=dict)
    ratio_steps: int = 0

    def add(self, numbers: Mapping[str, float], seconds: float, phases: Mapping[str, float]) -> None:
        """Takes in a step: its numbers, its seconds on the host, and those of its phases."""
        self.steps, self.seconds, self.ratio_steps = self.steps + 1, self.seconds + seconds, self.ratio_steps + 1
        for name, spent in phases.items():
            self.phases[name] += spent
        for name, value in numbers.items():
            if name.endswith(RATIO):
                self.ratios[name] = self.ratios.get(name, 0.0) + value

    def take(self, batch_size: int, steps_left: int) -> dict[str, float]:
        """The numbers of a row, and begins anew.

        The shares are those of process 0. All processes meet in every step, so its speed is that of the slowest.

        Args:
            batch_size: of the global batch.
            steps_left: in the stage.
        """
        step_seconds = self.seconds / self.steps
        rate = batch_size / step_seconds
        whole = max(self.seconds, sum(self.phases.values()))  # a GPU is up to a step behind the host
        row = {
            **{name: total / self.ratio_steps for name, total in self.ratios.items()},
            "images_per_second": rate,
            "images_per_second_per_gpu": rate / distributed.world_size(),
            **{f"{phase}_share": spent / whole for phase, spent in self.phases.items()},
            "step_seconds": step_seconds,
            "eta_seconds": steps_left * step_seconds,
        }
        vars(self).update(vars(RowMeter()))
        return row

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next row's ratios do not depend on an interruption."""
        return {"steps": self.ratio_steps, "ratios": dict(self.ratios)}

    @classmethod
    def resumed(cls, kept: Mapping[str, Any]) -> "RowMeter":
        """One that goes on where ``kept`` was made; empty where that is."""
        return cls(ratios=dict(kept.get("ratios", {})), ratio_steps=kept.get("steps", 0))


@dataclass
class Cost:
    """What a run took so far beside ``Stage.seconds``, over all its stages and starts.

    Attributes:
        data_seconds: of training, in which process 0 waited for data.
        evaluation_seconds: which are no part of training.
        device_seconds: seconds of training times the devices (GPUs; processes on a CPU) that it ran on.
        processor_seconds: of training, that process 0 had the processors with all its threads; they do not depend on
            what else the machine does.
    """

    data_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    device_seconds: float = 0.0
    processor_seconds: float = 0.0
