"""The folder of a run: what lies where, the lock, and the rows of metrics.jsonl.

    config.json  label_space.json  lock  metrics.jsonl  log.txt  checkpoints/  detections/  report.html

The folder is valid at every instant: whole files are written atomically, and metrics.jsonl is cut after the step of
the checkpoint from which a run goes on (a torn last line included).
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from gesso import files
from gesso.errors import DataError, InputError, RunError
from gesso.label_space import LabelSpace

ROW_KEYS = frozenset(("step", "stage", "seconds"))
"""What every row of metrics.jsonl has; an evaluation has its scores beside them."""
_HELD: set[TextIO] = set()
"""The locks of this process."""
_UNBORN = re.compile(r"\.config\.json\.\d+\.tmp")


class RunFolder:
    """One run's folder. Build it with ``create`` or ``open``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.detections = path / "detections"
        self.report = path / "report.html"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """Makes the folder with its configuration.

        Raises:
            RunError: the folder exists and is not empty.
        """
        cls.check_free(path)
        folder = cls(path)
        folder.write_config(config)
        return folder

    @staticmethod
    def check_free(path: Path) -> None:
        """RunError where ``path`` exists and is not empty; what a process left that died in ``create`` is nothing."""
        if path.exists() and (not path.is_dir() or any(not _UNBORN.fullmatch(entry.name) for entry in path.iterdir())):
            raise RunError(
                "this folder exists already",
                where=path,
                remedy="Go on with its run by --resume, or name another folder with --out.",
            )

    def write_label_space(self, label_space: LabelSpace) -> None:
        """Keeps the categories that the run's detector predicts."""
        files.write_json(self.path / "label_space.json", label_space.to_dict())

    def keep_label_space(self, label_space: LabelSpace) -> None:
        """Keeps the categories at the first start. DataError where a resume brings others: the data was changed."""
        if not (self.path / "label_space.json").exists():
            self.write_label_space(label_space)
        elif self.read_label_space() != label_space:
            raise DataError(
                "the training data has other categories, or in another order, than when this run began",
                where=self.path,
                remedy="Resume with the data that it began with.",
            )

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Opens the folder of an existing run. RunError where there is none."""
        if not (path / "config.json").is_file():
            what = "this is no run folder: it has no config.json" if path.is_dir() else "there is no such run folder"
            raise RunError(what, where=path, remedy="Name the folder that gesso train wrote with --out.")
        return cls(path)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Stores the configuration with what stands beside it; see ``read_config``."""
        files.write_json(self.path / "config.json", dict(config))

    def read_config(self) -> dict[str, Any]:
        """The stored configuration, as plain data, and what stands beside it.

        ``recipe``, ``init``, ``environment``, ``launch`` (which torchrun began the run, None without one) and
        ``changed`` (what was changed at a resume, a list of ``step``, ``key``, ``old`` and ``new``).
        """
        value = files.read_json(self.path / "config.json")
        if not isinstance(value, dict) or "config" not in value:
            raise RunError("this is no run's configuration", where=self.path / "config.json")
        return value

    def first_weights(self) -> Path | None:
        """The run or checkpoint that the run started from; None where it began with new weights."""
        stored = self.read_config().get("init")
        return None if stored is None else Path(stored)

    def read_label_space(self) -> LabelSpace:
        """The categories that the run's detector predicts."""
        return LabelSpace.from_dict(files.read_json(self.path / "label_space.json"))

    def began(self) -> bool:
        """Whether anything was learnt that could be lost with the folder."""
        return self.metrics.exists() or self.checkpoints.exists() or (self.path / "failures").exists()

    @contextlib.contextmanager
    def locked(self, *, patience: float = 0.0) -> Iterator[None]:
        """Holds the run for one process. RunError where another one holds it for longer than ``patience`` seconds."""
        end = time.monotonic() + patience
        with (self.path / "lock").open("a+", encoding="utf-8") as lock:
            while not _taken(lock):
                if time.monotonic() >= end:
                    lock.seek(0)
                    holder = lock.read().strip() or "unknown"
                    raise RunError(
                        f"this run is being written by another process ({holder})",
                        where=self.path,
                        remedy="Wait for it or stop it.",
                    )
                time.sleep(0.1)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
            _HELD.add(lock)
            try:
                yield
            finally:
                _HELD.discard(lock)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one row to metrics.jsonl. A full disk is an InputError; the rows before stay as they are."""
        line = json.dumps(row) + "\n"
        before = self.metrics.stat().st_size if self.metrics.exists() else 0
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # a torn line would swallow the next one
                os.truncate(self.metrics, before)
            raise InputError(
                f"cannot be written: {error.strerror}", where=self.metrics, remedy="Free some space."
            ) from error

    def flush(self) -> None:
        """Brings the rows to the disk itself, so that no checkpoint is ahead of them. InputError where that fails."""
        if not self.metrics.exists():
            return
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", where=self.metrics) from error

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of metrics.jsonl; a torn last line is left out."""
        if not self.metrics.exists():
            return []
        found = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                found.append(row)
        return found

    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations: those with scores."""
        return [row for row in self.rows() if "loss" not in row and row.keys() - ROW_KEYS]

    def rewind(self, step: int) -> None:
        """Takes the folder back to the instant of a checkpoint: later rows go, later detections become ``.stale``."""
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        if self.metrics.exists():
            files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for entry in sorted(self.detections.glob("*")) if self.detections.exists() else []:
            if entry.suffix != ".stale" and entry.stem.isdigit() and int(entry.stem) > step:
                entry.replace(_free_name(entry))


def _let_go() -> None:
    """Closes the locks in a forked process, so that no loader holds one longer than the process that trains."""
    for lock in _HELD:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def _taken(lock: TextIO) -> bool:
    """Takes the lock, where nobody holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _free_name(entry: Path) -> Path:
    """``00000012.stale``, or ``00000012.2.stale`` where an earlier resume took that name."""
    names = itertools.chain([f"{entry.name}.stale"], (f"{entry.name}.{n}.stale" for n in itertools.count(2)))
    return next(path for path in map(entry.with_name, names) if not path.exists())
