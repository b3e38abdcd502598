"""``train``: makes or resumes a run folder and works on it."""

import contextlib
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

import gesso
from gesso import config as configs
from gesso import distributed, log
from gesso.errors import ConfigError
from gesso.run.config import RunConfig, check_same, with_absolute_paths
from gesso.run.data import check_data
from gesso.run.folder import RunFolder
from gesso.run.session import Observer, RunResult, Session

logger = log.get_logger(__name__)


def train(
    config: RunConfig,
    out: Path,
    *,
    recipe: str = "",
    resume: bool = False,
    init: Path | None = None,
    observer: Observer | None = None,
    how_to_resume: str = "",
) -> RunResult:
    """Trains a detector in the run folder ``out``.

    Args:
        config: the whole configuration.
        out: a new folder, or with ``resume`` that of an interrupted run.
        recipe: the recipe's name, kept in config.json.
        resume: go on from the newest whole checkpoint. The configuration may differ in ``FREE_KEYS`` only.
        init: a run folder or checkpoint folder whose weights to start from (same detector and classes); a resume
            knows it.
        observer: is told how it goes.
        how_to_resume: the command that goes on, for the message of an interruption.

    Raises:
        RunError: the folder exists (without ``resume``), or is no run, or another process holds it.
        ConfigError: a resume with another configuration, or other weights to start from.
        DataError: there is no data, or no box to learn from. A run that fails before its first step leaves no folder.
        TrainingError: a loss is not finite, or too many pictures cannot be read.
        Interrupted: the observer asked to stop; a checkpoint was saved.
    """
    observer = observer or Observer()
    if distributed.announced_world_size() > 1:
        raise ConfigError(
            "training with several processes is not built yet", remedy="Start one process, without torchrun."
        )
    config = with_absolute_paths(config)
    check_data(config.data, config.model)
    if resume:
        folder = RunFolder.open(out)
        check_same(folder, config)
        init = _first_weights(folder, init)
    else:
        init = None if init is None else init.absolute()
        head = {"recipe": recipe, "init": None if init is None else str(init)}
        folder = RunFolder.create(out, head | {"config": configs.to_dict(config), "environment": _environment()})
    with folder.locked():
        handler = log.to_file(folder.log)
        try:
            if resume:
                _warn_of_changes(folder)
            with contextlib.closing(Session(config, folder, observer, how_to_resume)) as session:
                return session.run(init)
        except Exception:
            if not resume and not folder.began():
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        finally:
            log.detach(handler)


def _first_weights(folder: RunFolder, given: Path | None) -> Path | None:
    """The weights that the run started from. ConfigError where others are named."""
    stored = folder.read_config().get("init")
    first = None if stored is None else Path(stored)
    if given is not None and given.absolute() != first:
        raise ConfigError(
            f"this run did not start from {given} but from {first or 'new weights'}",
            where=folder.path,
            remedy="Resume without --init.",
        )
    return first


def _warn_of_changes(folder: RunFolder) -> None:
    now, then = _environment(), folder.read_config().get("environment", {})
    kinds = ("torch", "threads", "machine", "gpu", "world_size")
    changed = [f"{kind} was {then.get(kind)}, is {now[kind]}" for kind in kinds if then.get(kind) != now[kind]]
    if changed:
        logger.warning("the result may differ in its last digits from an uninterrupted run: %s", "; ".join(changed))


def _environment() -> dict[str, Any]:
    return {
        "gesso": gesso.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": distributed.world_size(),
    }
