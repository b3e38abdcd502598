"""``train``: makes or resumes a run folder and works on it."""

import contextlib
import dataclasses
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gesso
from gesso import config as configs
from gesso import distributed, log
from gesso.errors import ConfigError, Interrupted
from gesso.launch import is_restart, launch_id
from gesso.run.config import Changes, RunConfig, check_processes, check_same, read_run_config, with_absolute_paths
from gesso.run.data import check_data
from gesso.run.epochs import training_images, with_steps
from gesso.run.folder import RunFolder
from gesso.run.observer import Observer
from gesso.run.session import RunResult, Session
from gesso.training.checkpoint import newest_checkpoint
from gesso.training.watchdog import Watchdog

logger = log.get_logger(__name__)

PATIENCE = 60.0
"""Seconds that a group which torchrun started again waits for the lock: the process before may still be dying."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Begun:
    """A run at its start.

    Attributes:
        config: with absolute paths and resolved steps.
        goes_on: the folder was there before.
        restarted: because torchrun started the processes again.
        changes: what differs from the stored configuration, and was allowed to.
        step: of the checkpoint to go on from, where there are changes.
    """

    config: RunConfig
    folder: RunFolder
    goes_on: bool = False
    restarted: bool = False
    changes: Changes = dataclasses.field(default_factory=dict)
    step: int = 0


def train(
    config: RunConfig,
    out: Path,
    *,
    recipe: str = "",
    resume: bool = False,
    init: Path | None = None,
    allow_changed: Sequence[str] = (),
    observer: Observer | None = None,
    how_to_resume: str = "",
) -> RunResult:
    """Trains a detector in the run folder ``out``; with several processes, all of them call it.

    A group of processes that torchrun started again goes on with the run that it began, without ``resume``.

    Args:
        config: the whole configuration.
        out: a new folder, or with ``resume`` that of an interrupted run.
        recipe: the recipe's name, kept in config.json.
        resume: go on from the newest whole checkpoint. The configuration may differ in ``FREE_KEYS`` only.
        init: a run folder or checkpoint folder whose weights to start from (same detector and classes); a resume
            knows it.
        allow_changed: keys in which it may differ as well; see ``check_same``. What changes the shape of weights, the
            optimizer's state or the stages that are over cannot be allowed: the checkpoint would not fit.
        observer: is told how it goes.
        how_to_resume: the command that goes on, for the message of an interruption.

    Raises:
        RunError: the folder exists (without ``resume``), or is no run, or another process holds it.
        ConfigError: a resume with another configuration, or other weights to start from; a batch that cannot be
            divided among the processes.
        DataError: there is no data, or no box to learn from. A run that fails before its first step leaves no folder.
        TrainingError: a loss is not finite, or too many pictures cannot be read.
        ProcessLost: another process is gone.
        Interrupted: the observer of a process asked to stop; a checkpoint was saved.
    """
    init = None if init is None else init.absolute()
    device = distributed.choose_device(config.device)
    began = distributed.initialise(device, timeout_seconds=config.timeout_seconds)
    try:
        with Watchdog(config.timeout_seconds) as watchdog:
            processes = distributed.world_size()
            run = distributed.from_main(
                lambda: _begin(config, out, processes, recipe=recipe, resume=resume, init=init, allowed=allow_changed)
            )
            return _hold(run, observer or Observer(), how_to_resume, watchdog)
    except Interrupted:
        raise
    except BaseException:
        began = began and not distributed.is_left_to_end()
        raise
    finally:
        if began:
            distributed.shutdown()


def prepared(config: RunConfig) -> RunConfig:
    """The configuration as a run stores it: paths absolute, epochs as steps; its data can be used (``check_data``)."""
    config = with_absolute_paths(config)
    check_data(config.data, config.model, config.metrics)
    return with_steps(config, training_images(config.data))


def check(
    config: RunConfig,
    out: Path,
    processes: int,
    *,
    resume: bool = False,
    init: Path | None = None,
    allow_changed: Sequence[str] = (),
) -> None:
    """Raises what ``train`` in so many processes would raise before it writes anything; writes nothing."""
    _checked(prepared(config), out, processes, resume=resume, init=init, allowed=allow_changed)


def _checked(
    config: RunConfig, out: Path, processes: int, *, resume: bool, init: Path | None, allowed: Sequence[str]
) -> _Begun:
    """Finds what is wrong with a prepared configuration, the folder, and both together."""
    check_processes(config, processes)
    if not resume:
        RunFolder.check_free(out)
        if allowed:
            raise ConfigError("--allow-changed is for a run that goes on", remedy="Add --resume.")
        return _Begun(config=config, folder=RunFolder(out))
    folder = RunFolder.open(out)
    changes = check_same(folder, config, allowed)
    _check_first_weights(folder, None if init is None else init.absolute())
    step = _check_stages(folder, config) if changes else 0
    return _Begun(config=config, folder=folder, goes_on=True, changes=changes, step=step)


def _begin(
    config: RunConfig,
    out: Path,
    processes: int,
    *,
    recipe: str,
    resume: bool,
    init: Path | None,
    allowed: Sequence[str],
) -> _Begun:
    """The folder of the run, made anew, or that of the same run."""
    begun = launch_id() is not None and (out / "config.json").is_file()
    restarted = begun and is_restart(RunFolder.open(out).read_config().get("launch"))
    run = _checked(prepared(config), out, processes, resume=resume or restarted, init=init, allowed=allowed)
    if run.goes_on:
        return dataclasses.replace(run, restarted=restarted)
    head = {"recipe": recipe, "init": None if init is None else str(init), "launch": launch_id()}
    RunFolder.create(out, head | {"config": configs.to_dict(run.config), "environment": _environment()})
    return run


def _hold(run: _Begun, observer: Observer, how_to_resume: str, watchdog: Watchdog) -> RunResult:
    """Works on the run while process 0 holds its lock and keeps its log."""
    folder = run.folder
    with contextlib.ExitStack() as stack:
        patience = PATIENCE if run.restarted else 0.0
        distributed.from_main(lambda: stack.enter_context(folder.locked(patience=patience)))
        if distributed.is_main():
            stack.enter_context(_logging_to(folder))
            if run.goes_on:
                _warn_of_changes(run)
                _keep_launch(folder)
            if run.changes:
                observer = _AfterFirstStep(observer, lambda: _keep_changes(run))
        return _work(run, observer, how_to_resume, watchdog)


def _work(run: _Begun, observer: Observer, how_to_resume: str, watchdog: Watchdog) -> RunResult:
    """Trains; a run that fails before its first step leaves no folder, unless it was resumed."""
    folder = run.folder
    try:
        with contextlib.closing(Session(run.config, folder, observer, how_to_resume, watchdog)) as session:
            return session.run(folder.first_weights())
    except Exception:
        if (run.restarted or not run.goes_on) and distributed.is_main() and not folder.began():
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


@contextlib.contextmanager
def _logging_to(folder: RunFolder) -> Iterator[None]:
    handler = log.to_file(folder.log)
    try:
        yield
    finally:
        log.detach(handler)


def _check_first_weights(folder: RunFolder, given: Path | None) -> None:
    """ConfigError where other weights are named than those that the run started from."""
    first = folder.first_weights()
    if given is not None and given != first:
        raise ConfigError(
            f"this run did not start from {given} but from {first or 'new weights'}",
            where=folder.path,
            remedy="Resume without --init.",
        )


def _check_stages(folder: RunFolder, config: RunConfig) -> int:
    """Refuses changes of what is over, which no checkpoint can follow; gives the step of the newest one, or 0."""
    newest = newest_checkpoint(folder.checkpoints)
    if newest is None:
        return 0
    at, before, now = newest.state, dict(read_run_config(folder).stages()), dict(config.stages())
    names = list(now)
    what = ""
    if names != list(before):
        what = "its stages cannot be others"
    elif over := [name for name in names[: names.index(at.stage)] if now[name].steps != before[name].steps]:
        what = f"the stage {over[0]} is over, and its steps stay"
    elif now[at.stage].steps < at.stage_step:
        what = f"{at.stage}.steps is {now[at.stage].steps}, and {at.stage_step} are done"
    if what:
        remedy = "Train into another folder, with --init to start from these weights."
        raise ConfigError(f"this cannot be changed: {what}", where=folder.path, remedy=remedy)
    return at.step


def _keep_changes(run: _Begun) -> None:
    """Stores the new configuration and what differs in it; comes after a step, so that it is known to work."""
    stored = run.folder.read_config()
    new = [{"step": run.step, "key": key, "old": old, "new": now} for key, (old, now) in run.changes.items()]
    kept = {"config": configs.to_dict(run.config), "changed": [*stored.get("changed", []), *new]}
    run.folder.write_config(stored | kept)


class _AfterFirstStep(Observer):
    """Hands everything on to another observer, and does ``work`` once, after the first step."""

    def __init__(self, observer: Observer, work: Callable[[], None]) -> None:
        self._observer, self._work = observer, [work]
        self.should_stop = observer.should_stop

    def plan(self, stages: list[tuple[str, int]], evaluations: int) -> None:
        self._observer.plan(stages, evaluations)

    def prepare(self, what: str, done: int, total: int) -> None:
        self._observer.prepare(what, done, total)

    def step(self, stage: str, step: int) -> None:
        if self._work:
            self._work.pop()()
        self._observer.step(stage, step)

    def row(self, row: Mapping[str, Any]) -> None:
        self._observer.row(row)

    def evaluating(self, done: int, total: int) -> None:
        self._observer.evaluating(done, total)


def _warn_of_changes(run: _Begun) -> None:
    if run.restarted:
        logger.info("torchrun started the processes again: going on with this run")
    for key, (old, new) in run.changes.items():
        logger.warning("from step %d on %s is %s; it was %s", run.step, key, new, old)
    now, then = _environment(), run.folder.read_config().get("environment", {})
    kinds = ("torch", "threads", "machine", "gpu", "world_size")
    changed = [f"{kind} was {then.get(kind)}, is {now[kind]}" for kind in kinds if then.get(kind) != now[kind]]
    if changed:
        logger.warning("the result may differ in its last digits from an uninterrupted run: %s", "; ".join(changed))


def _keep_launch(folder: RunFolder) -> None:
    """Remembers the torchrun that goes on with the run, which may start its processes again."""
    stored = folder.read_config()
    if stored.get("launch") != launch_id():
        folder.write_config(stored | {"launch": launch_id()})


def _environment() -> dict[str, Any]:
    return {
        "gesso": gesso.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": distributed.announced_world_size(),
    }
