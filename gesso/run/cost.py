"""What a run cost: seconds of training, of waiting for data and of evaluation, and GPU (or CPU) days."""

from dataclasses import asdict, dataclass

import torch

from gesso import files
from gesso.run.folder import RunFolder
from gesso.training.stage import Stage

FILE = "cost.json"
_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a run cost, over all its stages and starts.

    Attributes:
        device: the kind of device: a GPU's name, or "CPU" with the threads of a process.
        seconds: of training, evaluation excluded.
        data_seconds: of these, the wait for data in process 0.
        evaluation_seconds: of evaluation.
        device_days: days of training times the number of GPUs (of processes, on a CPU).
        images: seen in training, repeats included.
        processor_seconds: of training, see ``timing.Cost``.
    """

    device: str
    seconds: float
    data_seconds: float
    evaluation_seconds: float
    device_days: float
    images: int
    processor_seconds: float = 0.0

    @property
    def work(self) -> float:
        """Seconds by which runs are compared: of the clock on a GPU, of the processors on a CPU, which runs share."""
        return self.processor_seconds if self.device.startswith("CPU") else self.seconds

    @property
    def unit(self) -> str:
        """What the days are of."""
        return "CPU days" if self.device.startswith("CPU") else "GPU days"


def cost_of(stage: Stage, images: int) -> RunCost:
    """The cost of a run whose newest stage this is; ``images`` were seen so far."""
    gpu = stage.device.type == "cuda"
    return RunCost(
        device=torch.cuda.get_device_name(stage.device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        seconds=stage.seconds,
        data_seconds=stage.cost.data_seconds,
        evaluation_seconds=stage.cost.evaluation_seconds,
        device_days=stage.cost.device_seconds / _DAY,
        images=images,
        processor_seconds=stage.cost.processor_seconds,
    )


def keep_cost(folder: RunFolder, cost: RunCost) -> None:
    """Writes ``cost.json``."""
    files.write_json(folder.path / FILE, asdict(cost))


def read_cost(folder: RunFolder) -> RunCost | None:
    """What ``keep_cost`` wrote; None where the run saved nothing yet, or is older than this file."""
    path = folder.path / FILE
    return RunCost(**files.read_json(path)) if path.is_file() else None
