"""The same task trained in several ways, side by side, and a report: the demo."""

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from gesso import files
from gesso.distributed import choose_device
from gesso.errors import Interrupted, RunError
from gesso.recipes import demo
from gesso.run.config import RunConfig
from gesso.run.data import Progress, open_data
from gesso.run.folder import RunFolder
from gesso.run.observer import Observer
from gesso.run.report import write_comparison
from gesso.run.session import RunResult
from gesso.run.train import train

SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_POLL_SECONDS = 0.5
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training: ``name`` is its key and folder, ``title`` stands in tables, ``phrase`` within sentences."""

    name: str
    title: str
    phrase: str
    recipe: str
    config: RunConfig


def demo_arms(seed: int) -> tuple[Arm, Arm]:
    """The two arms of the demo."""
    return (
        Arm(
            name="scratch",
            title="From scratch",
            phrase="training from scratch",
            recipe="demo:scratch",
            config=dataclasses.replace(demo.scratch(), seed=seed),
        ),
        Arm(
            name="direct",
            title="Direct pre-training",
            phrase="direct pre-training",
            recipe="demo:direct",
            config=dataclasses.replace(demo.direct(), seed=seed),
        ),
    )


def compare(
    arms: Sequence[Arm],
    out: Path,
    *,
    title: str,
    task: str,
    commands: Sequence[tuple[str, str]] = (),
    resume: bool = False,
    prepare: Progress = lambda what, done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    how_to_resume: str = "",
) -> dict[str, dict[str, Any]]:
    """Trains every arm in ``out/NAME`` on the same data and writes ``out/report.html``.

    On a CPU with at least two cores the arms train at the same time, each with its share of the cores: that takes less
    time in all than one after the other on all cores, and neither arm has an advantage. Otherwise one after the other.

    Args:
        arms: at least two; the first is the baseline. Their data is that of the first.
        out: a new folder, or with ``resume`` one in which a comparison was interrupted: finished arms are kept.
        title, task, commands: of the report.
        resume: go on.
        prepare: told how far the embedded data is, which is made once, in ``out/data``.
        progress: (steps done, steps in all), over all arms.
        should_stop: asked twice a second; the arms then save and stop.
        how_to_resume: the command that goes on, for the message of an interruption.

    Returns:
        By arm: AP, AP50, AP75, APs, APm, APl, seconds of training, and images seen in training.

    Raises:
        RunError: ``out`` is not empty (without ``resume``). Otherwise as ``train``.
    """
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            "this folder is not empty", where=out, remedy="Go on with --resume, or name another folder with --out."
        )
    if resume and not (out / "data").is_dir():
        raise RunError("no comparison was begun here", where=out, remedy="Begin one without --resume.")
    out.mkdir(parents=True, exist_ok=True)
    index, val = open_data(arms[0].config.data, out, prepare)
    assert val is not None, "a comparison needs validation data"
    data = dataclasses.replace(arms[0].config.data, train=index.path, val=val.path, embedded=None)
    arms = [dataclasses.replace(arm, config=dataclasses.replace(arm.config, data=data)) for arm in arms]
    done = _train_all(arms, out, progress, should_stop, how_to_resume)
    results = {
        name: {key: (one.scores or {})[key] for key in SCORES} | {"seconds": one.seconds, "images": one.images}
        for name, one in done.items()
    }
    runs = [(arm.title, arm.phrase, RunFolder.open(out / arm.name)) for arm in arms]
    write_comparison(out / "report.html", runs, val, title=title, task=task, commands=commands)
    files.write_json(out / "results.json", results)
    return results


def difference(results: Mapping[str, Mapping[str, Any]], base: str, other: str) -> dict[str, float | None]:
    """What ``other`` gains over ``base`` in each score; None where a score does not exist."""
    return {key: results[other][key] - results[base][key] if results[base][key] >= 0 else None for key in SCORES}


def _train_all(
    arms: Sequence[Arm],
    out: Path,
    progress: Callable[[int, int], None],
    should_stop: Callable[[], bool],
    how_to_resume: str,
) -> dict[str, RunResult]:
    cores = len(os.sched_getaffinity(0))
    on_cpu = choose_device(arms[0].config.device).type == "cpu"
    at_once = min(len(arms), cores) if on_cpu else 1
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    total = sum(stage.steps for arm in arms for _, stage in arm.config.stages())
    threads = max(cores // at_once, 1)
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=_begin, initargs=(threads, stop)) as pool:
        # The processes inherit the mask: no signal reaches them before, in ``_begin``, they ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            futures: dict[str, Future[RunResult]] = {
                arm.name: pool.submit(_train_one, arm, out / arm.name, how_to_resume) for arm in arms
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            while wait(futures.values(), timeout=_POLL_SECONDS).not_done:
                progress(sum(_steps_done(out / arm.name) for arm in arms), total)
                if should_stop() or any(f.done() and f.exception() for f in futures.values()):
                    stop.set()
        except BaseException:  # a second Ctrl-C: the arms save and end too
            stop.set()
            raise
    failures = [error for future in futures.values() if (error := future.exception()) is not None]
    # An arm that failed made the others stop: theirs is no reason.
    for error in sorted(failures, key=lambda error: isinstance(error, Interrupted)):
        raise error
    return {name: future.result() for name, future in futures.items()}


_stop: Event | None = None


def _begin(threads: int, stop: Event) -> None:
    """Readies a process: its threads; Ctrl-C and SIGTERM reach the parent alone, which sets ``stop``."""
    global _stop
    _stop = stop
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    torch.set_num_threads(threads)


def _train_one(arm: Arm, path: Path, how_to_resume: str) -> RunResult:
    observer = Observer()
    stop, parent = _stop, multiprocessing.parent_process()
    assert stop is not None and parent is not None, "_begin comes first"
    observer.should_stop = lambda: stop.is_set() or not parent.is_alive()
    return train(
        arm.config,
        path,
        recipe=arm.recipe,
        resume=(path / "config.json").exists(),
        observer=observer,
        how_to_resume=how_to_resume,
    )


def _steps_done(path: Path) -> int:
    return max((int(row.get("step", 0)) for row in RunFolder(path).rows()), default=0)
