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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gesso import files
from gesso.errors import DataError, InputError, RunError
from gesso.label_space import LabelSpace


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
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                "this folder exists already",
                where=path,
                remedy="Go on with its run by --resume, or name another folder with --out.",
            )
        folder = cls(path)
        files.write_json(path / "config.json", dict(config))
        return folder

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

    def read_config(self) -> dict[str, Any]:
        """The stored configuration with its ``recipe`` and ``environment``, as plain data."""
        value = files.read_json(self.path / "config.json")
        if not isinstance(value, dict) or "config" not in value:
            raise RunError("this is no run's configuration", where=self.path / "config.json")
        return value

    def read_label_space(self) -> LabelSpace:
        """The categories that the run's detector predicts."""
        return LabelSpace.from_dict(files.read_json(self.path / "label_space.json"))

    def began(self) -> bool:
        """Whether anything was learnt that could be lost with the folder."""
        return self.metrics.exists() or self.checkpoints.exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for one process. RunError where another one holds it."""
        with (self.path / "lock").open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise RunError(
                    f"this run is being written by another process ({holder})",
                    where=self.path,
                    remedy="Wait for it or stop it.",
                ) from error
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
            yield

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
        return [row for row in self.rows() if "AP" in row]

    def rewind(self, step: int) -> None:
        """Takes the folder back to the instant of a checkpoint: later rows go, later detections become ``.stale``."""
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        if self.metrics.exists():
            files.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for entry in sorted(self.detections.glob("*")) if self.detections.exists() else []:
            if entry.suffix != ".stale" and entry.stem.isdigit() and int(entry.stem) > step:
                entry.replace(_free_name(entry))


def _free_name(entry: Path) -> Path:
    """``00000012.stale``, or ``00000012.2.stale`` where an earlier resume took that name."""
    names = itertools.chain([f"{entry.name}.stale"], (f"{entry.name}.{n}.stale" for n in itertools.count(2)))
    return next(path for path in map(entry.with_name, names) if not path.exists())
