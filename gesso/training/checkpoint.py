"""Checkpoints: folders ``checkpoints/00000012/`` that are whole or not there at all.

    model.safetensors  ema.safetensors  precise_bn.safetensors  optimizer.pt  state.json

The averages are there where a run keeps them, precise statistics of batch norm at the end of a stage that takes them;
the model's own file is what training had. ``state.json`` holds the format version, the step, the stage and its
progress, the world size and threads, the hash of the configuration, and the size and sha256 of each other file.
``latest.json`` and ``best.json`` are hints; the scan of checksums decides what is whole. One process writes at a time:
the run's lock sees to it. Nothing is unpickled: ``optimizer.pt`` is read with ``weights_only=True``.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gesso import files
from gesso.errors import InputError, RunError
from gesso.log import get_logger
from gesso.training.ema import EMA
from gesso.training.optimizer import load_optimizer_state

log = get_logger(__name__)

FORMAT_VERSION = 1
MODEL, AVERAGES, PRECISE, OPTIMIZER = "model.safetensors", "ema.safetensors", "precise_bn.safetensors", "optimizer.pt"
_LEFTOVER = re.compile(r"\.\d{8}\.\d+\.tmp")


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """Where a run stood.

    Attributes:
        step: over all stages.
        stage: the name of the stage; stage_step and sample: its own steps done and its next sample number.
        seconds: of training so far, over all stages, without evaluation.
        world_size, threads: of the process group and of torch.
        config_hash: ``config.digest`` of the run's configuration.
        ema_updates: how often the averages were updated.
        best_score: the best validation AP so far, and best_step, its step; None before the first evaluation.
        meter: what was gathered for the next row, ``timing.RowMeter.kept``.
        cost: what the run took so far, the fields of ``timing.Cost``.
    """

    step: int
    stage: str
    stage_step: int
    sample: int
    seconds: float
    world_size: int
    threads: int
    config_hash: str
    ema_updates: int = 0
    best_score: float | None = None
    best_step: int | None = None
    meter: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: CheckpointState

    def load_model(self, module: nn.Module) -> None:
        """Puts the weights and buffers into ``module``, on its device. RunError where they are another module's."""
        with self._fitting("weights"):
            module.load_state_dict(load_file(self.path / MODEL))

    def load_ema(self, ema: EMA) -> None:
        """Restores the averages. RunError where they are another module's, or the run kept none."""
        with self._fitting("averages"):
            ema.load(load_file(self.path / AVERAGES), self.state.ema_updates)

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Restores momentum and moments. RunError where they are another optimizer's."""
        saved = torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True)
        with self._fitting("optimizer state"):
            load_optimizer_state(optimizer, saved)

    @contextlib.contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, KeyError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"its {what} do not fit: {reason}", where=self.path, remedy="Use the run's own recipe and classes."
            ) from error

    def precise_statistics(self) -> dict[str, Tensor]:
        """Means and variances by name that the end of a stage took anew; {} where it did not. On the CPU."""
        return self._tensors(PRECISE)

    def weights(self) -> dict[str, Tensor]:
        """The weights to predict with, on the CPU: the averages where the run kept them, else the model's own.

        Precise statistics of batch norm stand in the place of the running ones, where there are any.
        """
        return (self._tensors(AVERAGES) or self._tensors(MODEL)) | self.precise_statistics()

    def _tensors(self, name: str) -> dict[str, Tensor]:
        return dict(load_file(self.path / name)) if (self.path / name).exists() else {}


@dataclass(frozen=True)
class Snapshot:
    """A copy on the host of what a checkpoint holds, so that training can go on while it is written.

    Attributes:
        state: where the run stood.
        tensors: by file and name.
        optimizer: its ``state_dict``.
        size: about how many bytes it takes on the disk.
        copied: on a GPU, when all copies will be there; None where they are.
    """

    state: CheckpointState
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    size: int
    copied: torch.cuda.Event | None


def save_checkpoint(
    folder: Path,
    state: CheckpointState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    *,
    keep: int,
    precise: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Writes a checkpoint at once: ``take_snapshot`` and ``write_snapshot``."""
    return write_snapshot(folder, take_snapshot(folder, state, module, optimizer, ema, precise), keep=keep)


def take_snapshot(
    folder: Path,
    state: CheckpointState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    precise: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copies what a checkpoint holds; on a GPU nothing waits for the device.

    Args:
        folder: where it will be written.
        state: where the run stands.
        module: its weights and buffers.
        optimizer: its momentum and moments.
        ema: the averages, where the run keeps them.
        precise: statistics of batch norm, where the stage took them anew.

    Raises:
        RunError: the disk has too little space.
    """
    _remove_leftovers(folder)
    tensors = {MODEL: module.state_dict()}
    if ema is not None:
        tensors[AVERAGES] = ema.average
    if precise:
        tensors[PRECISE] = dict(precise)
    moments: dict[int, dict[str, Any]] = (saved := optimizer.state_dict())["state"]
    size = 2**20 + sum(_bytes(state) for state in (*tensors.values(), *moments.values()))
    _check_space(folder, size)
    copies = {file: _copied(state) for file, state in tensors.items()}
    moments = {number: _copied(state) for number, state in moments.items()}
    copied = None
    if any(tensor.is_cuda for tensor in tensors[MODEL].values()):
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
    return Snapshot(state, copies, saved | {"state": moments}, size, copied)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors copied to the host in their own layout; from a GPU into pinned memory, without waiting."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", non_blocking=True) if tensor.is_cuda else tensor.detach().clone()

    return {name: copy(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def _bytes(state: Mapping[str, Any]) -> int:
    return sum(int(value.nbytes) for value in state.values() if isinstance(value, Tensor))


def write_snapshot(folder: Path, snapshot: Snapshot, *, keep: int) -> Checkpoint:
    """Writes a checkpoint and then removes the oldest whole ones beyond ``keep``, never the best.

    Raises:
        RunError: it cannot be written, for example because the disk is full; the checkpoints before stay as they are.
            The caller decides whether training goes on.
    """
    state = snapshot.state
    target = folder / f"{state.step:08d}"
    try:
        with files.atomic_folder(target, overwrite=True) as temporary:
            _write(temporary, snapshot)
        files.write_json(folder / "latest.json", {"step": state.step})
        if state.best_step is not None:
            files.write_json(folder / "best.json", {"step": state.best_step, "AP": state.best_score})
    except (InputError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        reason = error.what if isinstance(error, InputError) else " ".join(str(error).split())[:200]
        raise RunError(
            f"a checkpoint of {snapshot.size / 2**20:.0f} MiB cannot be written: {reason}",
            where=target,
            remedy="Free some space, or check the folder's rights.",
        ) from error
    _remove_old(folder, state.step, keep=keep, best=state.best_step)
    return Checkpoint(target, state)


def _write(folder: Path, snapshot: Snapshot) -> None:
    if snapshot.copied is not None:
        snapshot.copied.synchronize()
    for name, tensors in snapshot.tensors.items():
        save_file(_plain(tensors), folder / name)
    torch.save(snapshot.optimizer, folder / OPTIMIZER)
    written = sorted(folder.iterdir())
    head = {
        "format_version": FORMAT_VERSION,
        **asdict(snapshot.state),
        "bytes": {file.name: file.stat().st_size for file in written},
        "sha256": {file.name: _sha256(file) for file in written},
    }
    (folder / "state.json").write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint below ``folder``; broken ones are passed over with a warning, never deleted."""
    for path in sorted(_candidates(folder), reverse=True):
        found = read_checkpoint(path)
        if found is not None:
            return found
    return None


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that the newest whole one knows as the best, where that is whole; else the newest itself.

    ``best.json`` is for people: a kill between a checkpoint and its hint leaves that of the evaluation before.
    """
    newest = newest_checkpoint(folder)
    if newest is None or newest.state.best_step in (None, newest.state.step):
        return newest
    return read_checkpoint(folder / f"{newest.state.best_step:08d}") or newest


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path`` where it is whole and of this version; else a warning says what is wrong, and None."""
    try:
        head = _read_head(path)
        sums: dict[str, str] = head.pop("sha256")
        head.pop("bytes")
        broken = [name for name, digest in sums.items() if _sha256(path / name) != digest]
        if broken:
            raise ValueError(f"{', '.join(broken)} does not match its checksum")
        return Checkpoint(path, CheckpointState(**head))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s: not a whole checkpoint of this version (%s); passed over", path, error)
        return None


def _read_head(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose files are there in full length (their content is not looked at)."""
    head: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    version = head.pop("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version}, not {FORMAT_VERSION}")
    missing = {MODEL, OPTIMIZER} - head["sha256"].keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} is missing")
    short = [name for name, size in head["bytes"].items() if (path / name).stat().st_size != size]
    if short:
        raise ValueError(f"{', '.join(short)} was cut off")
    return head


def _looks_whole(path: Path) -> bool:
    try:
        _read_head(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _candidates(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]


def _remove_old(folder: Path, step: int, *, keep: int, best: int | None) -> None:
    """Keeps the checkpoint of ``step``, the ``keep`` - 1 newest whole ones before it, the best, and all broken ones."""
    older = sorted((path for path in _candidates(folder) if int(path.name) < step and _looks_whole(path)), reverse=True)
    for path in older[max(keep, 1) - 1 :]:
        if int(path.name) != best:
            try:
                shutil.rmtree(path)
            except OSError as error:  # costs room, but no checkpoint
                log.warning("%s: an old checkpoint cannot be removed: %s", path, error)


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written: ``.00000012.4711.tmp``, never a checkpoint."""
    for path in folder.glob(".*.tmp"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    """RunError where the disk has less than the bytes needed."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"the disk has {free / 2**20:.0f} MiB free, a checkpoint needs {needed / 2**20:.0f} MiB",
            where=folder,
            remedy="Free some space.",
        )


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the standard layout; channels_last is a matter of the device."""
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
