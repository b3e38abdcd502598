"""Worker processes that build whole batches, in order. They ignore Ctrl-C: the main process ends them."""

import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from gesso.data.samples import Built
from gesso.errors import ConfigError, TrainingError

PREFETCH = 2
_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Results(Iterator[Built]):
    """``dataset[plan]`` for each plan, in order, by worker processes or here."""

    def __init__(self, dataset: Dataset[Built], plans: Iterable[Any], workers: int) -> None:
        if workers < 0:
            raise ConfigError(f"the number of workers must be at least 0, found {workers}")
        # Workers inherit the mask, so that no signal to the whole group reaches them before they ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                self._iterator: Iterator[Built] | None = iter(_loader(dataset, plans, workers))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __next__(self) -> Built:
        if self._iterator is None:
            raise StopIteration
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                "a loader process was ended from outside, most often for lack of memory",
                remedy="Use fewer workers, or give more (shared) memory.",
            ) from error

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None


def _loader(dataset: Dataset[Built], plans: Iterable[Any], workers: int) -> DataLoader[Built]:
    return DataLoader(
        dataset,
        sampler=plans,
        batch_size=None,
        collate_fn=_same,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=("fork" if sys.platform == "linux" else "spawn") if workers else None,
        generator=torch.Generator(),
    )


def _same(built: Any) -> Any:
    return built


def _start_worker(_: int) -> None:
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _quiet
    cv2.setNumThreads(0)


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A main process that leaves while a batch is handed over is no error of the worker's."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
