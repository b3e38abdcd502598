"""Launches as a user calls them, torchrun and ``--gpus``: real processes, which end with the test at the latest."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

GESSO = ("-m", "gesso")
TORCHRUN = ("-m", "torch.distributed.run")
PATIENCE = 600.0
"""Seconds that anything may take; a hundred times as long as on an idle machine."""


class Launched:
    """A call of ``python WORDS`` with all that it started; its two outputs go to files in ``folder``."""

    def __init__(self, folder: Path, *words: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self._files = [folder / f"{number}.{name}" for name in ("out", "err")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "GLOO_SOCKET_IFNAME": "lo"}
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            call = [sys.executable, *map(str, words)]
            self.process = subprocess.Popen(call, env=environment, stdout=out, stderr=err, start_new_session=True)

    @property
    def out(self) -> str:
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def workers(self) -> dict[int, int]:
        """The processes that it started and that train: process number by rank."""
        return {int(found["RANK"]): pid for pid, found in self._started() if "RANK" in found}

    def world_size(self) -> int:
        """How many processes its processes know of; 0 before there are any."""
        return max((int(found["WORLD_SIZE"]) for _, found in self._started() if "WORLD_SIZE" in found), default=0)

    def _started(self) -> list[tuple[int, dict[str, str]]]:
        found = []
        for pid in _children(self.process.pid):
            try:
                text = Path(f"/proc/{pid}/environ").read_text()
            except OSError:  # it has just ended
                continue
            found.append((pid, dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)))
        return found

    def wait(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end:\n{self.err}")

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits for something that has to come to pass while it runs."""
        end = time.monotonic() + PATIENCE
        while not holds():
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                pytest.fail(f"this did not come to pass (exit code {self.process.poll()}):\n{self.out}\n{self.err}")
            time.sleep(0.02)

    def kill(self) -> None:
        """The end of all of it at once, as when a machine fails."""
        pids = [self.process.pid, *_children(self.process.pid)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return found


@contextmanager
def launching(folder: Path) -> Iterator[Callable[..., Launched]]:
    """``begin(*words)`` starts one; all are ended with the block."""
    begun: list[Launched] = []

    def begin(*words: object) -> Launched:
        begun.append(Launched(folder, *words))
        return begun[-1]

    try:
        yield begin
    finally:
        for each in begun:
            each.kill()


def steps_of(run: Path) -> list[int]:
    """The steps whose rows stand in metrics.jsonl, a torn last line left out."""
    return [row["step"] for row in training_rows(run)]


def training_rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row]


def weights(run: Path, step: int = 12) -> bytes:
    return (run / "checkpoints" / f"{step:08d}" / "model.safetensors").read_bytes()
