"""Writes checkpoints while training goes on: files, checksums, flushing and renaming are the work of one thread."""

from collections.abc import Callable
from concurrent import futures
from pathlib import Path

from gesso.training.checkpoint import Checkpoint, Snapshot, write_snapshot


class CheckpointWriter:
    """One thread that writes one checkpoint at a time below a folder. The end of the process waits for it.

    Args:
        folder: of all checkpoints.
        first: is called in the thread before each one; what it raises counts as a failed write.
    """

    def __init__(self, folder: Path, first: Callable[[], None] = lambda: None) -> None:
        self._folder, self._first = folder, first
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: futures.Future[Checkpoint] | None = None

    @property
    def open(self) -> bool:
        """Whether a write was begun whose result nobody asked for yet."""
        return self._write is not None

    @property
    def busy(self) -> bool:
        """Whether a write is in progress."""
        return self._write is not None and not self._write.done()

    def begin(self, snapshot: Snapshot, *, keep: int) -> None:
        """Begins to write; the result of the one before has to be known (``result``). See ``write_snapshot``."""
        assert self._write is None, "the checkpoint before is not settled"
        self._write = self._thread.submit(self._work, snapshot, keep)

    def result(self) -> Checkpoint | None:
        """Waits for the write that was begun last and forgets it; None where there is none.

        Raises:
            RunError: it failed; the checkpoints before stay as they are.
            InputError: of ``first``.
        """
        if self._write is None:
            return None
        futures.wait([self._write])  # Ctrl-C may end this wait, and the result is not lost
        write, self._write = self._write, None
        return write.result()

    def close(self) -> None:
        """Waits for the thread and ends it."""
        self._thread.shutdown(wait=True)

    def _work(self, snapshot: Snapshot, keep: int) -> Checkpoint:
        self._first()
        return write_snapshot(self._folder, snapshot, keep=keep)
