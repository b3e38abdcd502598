"""Several runs, one after the other or at the same time, each in a process of its own."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from gesso.distributed import choose_device
from gesso.errors import Interrupted
from gesso.run.config import RunConfig
from gesso.run.folder import RunFolder
from gesso.run.observer import Observer
from gesso.run.session import RunResult
from gesso.run.train import train

_POLL_SECONDS = 0.5
_STOPPING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to make, or to go on with.

    Attributes:
        path: its folder.
        config: its configuration.
        recipe: the recipe's name, kept in config.json.
        init: a run or checkpoint whose weights it starts from.
    """

    path: Path
    config: RunConfig
    recipe: str = ""
    init: Path | None = None

    @property
    def steps(self) -> int:
        """Of all its stages."""
        return sum(stage.steps for _, stage in self.config.stages())


def train_all(
    jobs: Mapping[str, Job],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    how_to_resume: str = "",
    at_once: int | None = None,
    keep_going: bool = False,
) -> dict[str, RunResult | Exception]:
    """Trains every job; one whose folder holds a run already goes on with it, and a finished one only gives its result.

    On a CPU with at least two cores jobs train at the same time, each with its share of the cores: that takes less
    time in all than one after the other on all cores, and no job has an advantage. On a GPU one after the other.

    Args:
        jobs: by name.
        progress: (steps done, steps in all).
        should_stop: asked twice a second; the runs then save and stop.
        how_to_resume: the command that goes on, for the message of an interruption.
        at_once: how many at the same time; None = as said above.
        keep_going: a job that fails does not stop the others; its error stands in its place.

    Raises:
        Interrupted: it was asked to stop. Without ``keep_going`` also what a job raises, once the others have saved.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    total = sum(job.steps for job in jobs.values())
    at_once = _fitting(jobs) if at_once is None else min(at_once, len(jobs))
    threads = max(len(os.sched_getaffinity(0)) // at_once, 1)
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=_begin, initargs=(threads, stop)) as pool:
        # The processes inherit the mask: no signal reaches them before, in ``_begin``, they ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            futures: dict[str, Future[RunResult]] = {
                name: pool.submit(_train_one, job, how_to_resume) for name, job in jobs.items()
            }
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            while wait(futures.values(), timeout=_POLL_SECONDS).not_done:
                progress(sum(_steps_done(job.path) for job in jobs.values()), total)
                failed = any(f.done() and not f.cancelled() and f.exception() for f in futures.values())
                if should_stop() or (failed and not keep_going):
                    stop.set()
                    for future in futures.values():
                        future.cancel()
        except BaseException:  # a second Ctrl-C: the runs save and end too
            stop.set()
            raise
    if should_stop() and any(future.cancelled() for future in futures.values()):
        raise Interrupted("interrupted; what was trained is saved", remedy=f"Go on with: {how_to_resume}")
    errors = {n: e for n, f in futures.items() if not f.cancelled() and (e := f.exception()) is not None}
    # A job that failed made the others stop: theirs is no reason.
    for error in sorted(errors.values(), key=lambda error: isinstance(error, Interrupted)):
        if not keep_going or not isinstance(error, Exception) or isinstance(error, Interrupted):
            raise error
    found: dict[str, RunResult | Exception] = {n: f.result() for n, f in futures.items() if n not in errors}
    return {name: found[name] if name in found else _as_exception(errors[name]) for name in jobs}


def _as_exception(error: BaseException) -> Exception:
    assert isinstance(error, Exception)
    return error


def _fitting(jobs: Mapping[str, Job]) -> int:
    """How many at the same time: on a CPU as many as there are cores, on a GPU one."""
    on_cpu = all(choose_device(job.config.device).type == "cpu" for job in jobs.values())
    return min(len(jobs), len(os.sched_getaffinity(0))) if on_cpu else 1


_stop: Event | None = None


def _begin(threads: int, stop: Event) -> None:
    """Readies a process: its threads; Ctrl-C and SIGTERM reach the parent alone, which sets ``stop``."""
    global _stop
    _stop = stop
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    torch.set_num_threads(threads)


def _train_one(job: Job, how_to_resume: str) -> RunResult:
    observer = Observer()
    stop, parent = _stop, multiprocessing.parent_process()
    assert stop is not None and parent is not None, "_begin comes first"
    observer.should_stop = lambda: stop.is_set() or not parent.is_alive()
    if stop.is_set():
        raise Interrupted(
            "interrupted before it began; what was trained is saved",
            where=job.path,
            remedy=f"Go on with: {how_to_resume}",
        )
    resume = (job.path / "config.json").exists()
    return train(
        job.config,
        job.path,
        recipe=job.recipe,
        resume=resume,
        init=None if resume else job.init,
        observer=observer,
        how_to_resume=how_to_resume,
    )


def _steps_done(path: Path) -> int:
    return max((int(row.get("step", 0)) for row in RunFolder(path).rows()), default=0)
