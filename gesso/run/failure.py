"""What is kept of a step that was not finite: ``RUN/failures/STEP.pt``, which ``gesso debug replay`` repeats.

The file holds the global batch, and the weights and running statistics from before the step. Optimizer state is not
needed for the losses and gradients, and chance is not either: all but dropout hashes the keys in the batch.
"""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gesso import distributed, files, log
from gesso.errors import GessoError, InputError
from gesso.run.config import read_run_config
from gesso.run.folder import RunFolder
from gesso.structures import ImageBatch, Targets, map_tensors
from gesso.training.stage import Stage

FORMAT_VERSION = 1

T = TypeVar("T", ImageBatch, Targets)

logger = log.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """A step that was not finite, and what repeats it.

    Attributes:
        stage: the name of its stage.
        step: its number over all stages, from 1.
        stage_step: its number in its stage, from 1.
        world_size: how many processes made it, each with an equal run of the pictures.
        seed: of the stage.
        device: the kind of device that made it, "cpu" or "cuda".
        weights: parameters and buffers from before the step by name, on the CPU; where each process has running
            statistics of its own, those of process 0.
        batch: the global batch, on the CPU.
        targets: its ground truth.
    """

    stage: str
    step: int
    stage_step: int
    world_size: int
    seed: int
    device: str
    weights: dict[str, Tensor]
    batch: ImageBatch
    targets: Targets


def save_failure(folder: RunFolder, name: str, stage: Stage, step: int, batch: ImageBatch, targets: Targets) -> str:
    """Keeps a step that was not finite, in the place of an earlier one; all processes call it together.

    Args:
        folder: of the run.
        name: of the stage.
        stage: whose weights and running statistics are those from before the step.
        step: the number of the step in the stage, from 1.
        batch: this process's part of the global batch, on any device.
        targets: its ground truth.

    Returns:
        How to repeat it, for the end of the error's message, in all processes; "" where it could not be written, which
        is logged: it must not hide the error itself.
    """
    whole, truth = _gathered(batch), _gathered(targets)

    def write() -> str:
        try:
            failure = Failure(
                stage=name,
                step=_steps_before(folder, name) + step,
                stage_step=step,
                world_size=world,
                seed=stage.seed,
                device=stage.device.type,
                weights={key: value.detach().cpu() for key, value in stage.module.state_dict().items()},
                batch=whole,
                targets=truth,
            )
            path = _write(folder.path / "failures", failure)
        except (GessoError, OSError, RuntimeError) as error:  # what torch.save says of a full disk is a RuntimeError
            logger.error("the step that failed could not be kept: %s", error)
            return ""
        return f"It is kept: repeat it with gesso debug replay {shlex.quote(str(path))}"

    world = distributed.world_size()
    return distributed.from_main(write)


def read_failure(path: Path) -> Failure:
    """What ``save_failure`` has kept.

    Raises:
        InputError: there is no such file, or it is broken, or another one, or of another version of Gesso.
    """
    foreign = InputError(
        "this is not the file of a failed step, or it is broken",
        where=path,
        remedy="Name a file that gesso train wrote to RUN/failures.",
    )
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=path, remedy="Check the path.") from error
    try:
        with file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is cut off, torch raises OSErrors too
        raise foreign from error
    if not isinstance(found, dict) or "format_version" not in found:
        raise foreign
    if (version := found.pop("format_version")) != FORMAT_VERSION:
        what = f"this file has version {version} of its format, and this Gesso reads version {FORMAT_VERSION}"
        raise InputError(what, where=path, remedy="Replay it with the Gesso that wrote it.")
    try:
        found |= {"batch": ImageBatch(**found["batch"]), "targets": Targets(**found["targets"])}
        return Failure(**found)
    except (TypeError, KeyError) as error:
        raise foreign from error


def _gathered(part: T) -> T:
    """The parts of all processes in the order of their ranks, on the CPU, in process 0; elsewhere the own part."""
    return map_tensors(part, _rows_of_all)


def _rows_of_all(own: Tensor) -> Tensor:
    """(world * b, ...) of (b, ...). It goes picture by picture, so that the batch is in memory once."""
    array, found = own.cpu().numpy(), []
    for k in range(len(array)):
        rows = distributed.gather_array(array[k : k + 1])
        if distributed.is_main():
            found.append(rows)
    return torch.from_numpy(np.stack(found, 1).reshape(-1, *array.shape[1:])) if found else own


def _steps_before(folder: RunFolder, name: str) -> int:
    """The steps of the stages before the one of this name."""
    stages = read_run_config(folder).stages()
    number = [stage for stage, _ in stages].index(name)
    return sum(config.steps for _, config in stages[:number])


def _write(folder: Path, failure: Failure) -> Path:
    path = folder / f"{failure.step:08d}.pt"
    head = {field.name: getattr(failure, field.name) for field in dataclasses.fields(failure)}
    parts = {key: _plain(head.pop(key)) for key in ("batch", "targets")}
    with files.atomic_file(path) as temporary:
        torch.save({"format_version": FORMAT_VERSION, **head, **parts}, temporary)
    for other in folder.glob("*.pt"):
        if other != path:
            other.unlink()
    return path


def _plain(value: ImageBatch | Targets) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
