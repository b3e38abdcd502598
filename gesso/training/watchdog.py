"""Tells when a process waits too long for the others, or has lost one of them, and ends it so that all can start again.

A collective in which one process is missing waits for ever, or until torch's own time-out, which names neither step nor
pictures. The watchdog is a thread that looks at ``distributed.traffic`` about once a second. Where one wait lasts
longer than the limit, it writes what is waited for, the step and the image ids of the batch into the log, the stacks of
all threads to standard error, and ends the process with exit code 75, at which a launcher starts the group again. The
process whose line is missing is the one that hangs.

On a GPU collectives do not block the host: it blocks where it reads the numbers of a step, which is "the device".
"""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from types import TracebackType

import numpy as np
import numpy.typing as npt

from gesso import distributed, log
from gesso.errors import ConfigError, ProcessLost

logger = log.get_logger(__name__)

_SHOWN = 64


class Watchdog:
    """A context manager around the work of one of several processes; with one process it does nothing.

    Inside it an exception of torch that says that another process is gone becomes ``ProcessLost``.

    Args:
        limit_seconds: how long one wait may last. It has to be longer than everything that others wait for: a whole
            backward pass, a checkpoint, the scores of an evaluation.
    """

    def __init__(self, limit_seconds: float) -> None:
        if not limit_seconds > 0:
            raise ConfigError(f"the time-out must be above 0 seconds, found {limit_seconds}")
        self.limit = limit_seconds
        self._look_every = min(1.0, limit_seconds / 4)
        self._at: tuple[int, npt.NDArray[np.int64]] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int, image_ids: npt.NDArray[np.int64]) -> None:
        """Before each step: its number, and the ids of the images in this process's part of its batch."""
        self._at = (step, image_ids)

    def __enter__(self) -> "Watchdog":
        if distributed.world_size() > 1:
            distributed.traffic.failed = ""
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        if error is not None and distributed.lost(error):
            where = f" in '{distributed.traffic.failed}'" if distributed.traffic.failed else ""
            raise ProcessLost(
                f"another process of this run was lost (rank {distributed.rank()} noticed {self._step()}{where})",
                remedy="Start it again with --resume, or let the launcher restart it.",
            ) from error

    def _watch(self) -> None:
        while not self._ended.wait(self._look_every):
            wait = distributed.traffic.current
            if wait is not None and time.monotonic() - wait[1] > self.limit:
                self._end(*wait)

    def _end(self, name: str, since: float) -> None:
        """Reports a wait and ends the process, whatever its other threads are in."""
        waited = f"rank {distributed.rank()} has waited {time.monotonic() - since:.0f} s in '{name}'"
        logger.error(
            "%s %s%s; another process may hang or be lost. Ending with exit code %d, for all to start again",
            *(waited, self._step(), self._images(), ProcessLost.exit_code),
        )
        with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error may be closed, or no file
            faulthandler.dump_traceback(file=sys.stderr)
        for handler in logging.getLogger(log.ROOT).handlers:
            handler.flush()
        time.sleep(2 * self._look_every)  # the others say it too, before they notice that this one is gone
        os._exit(ProcessLost.exit_code)

    def _step(self) -> str:
        return "before its first step" if self._at is None else f"at step {self._at[0]}"

    def _images(self) -> str:
        if self._at is None:
            return ""
        ids = self._at[1].tolist()
        more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
        return f", its batch has the image ids {', '.join(map(str, ids[:_SHOWN]))}{more}"
