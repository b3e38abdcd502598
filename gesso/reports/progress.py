"""Progress on standard error: a drawn line in a terminal, a plain log line now and then elsewhere.

A job is a list of stages with the seconds that each is expected to take; a training run is a job of one stage. The time
left is measured as soon as there is something to measure: the stage at hand is extrapolated from its own pace, later
stages by how far the expectation has been off so far.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

_log = logging.getLogger("gesso.progress")  # the handlers of gesso.log stand at "gesso"
ROWS = "gesso.rows"
"""The logger of rows of metrics.jsonl, a line each. Where a line is drawn it says the same, so that standard error does
not get them; elsewhere they stand for the plain lines."""
_PHASES = ("data", "forward", "backward", "communication", "optimizer")
_SHARE, _RATIO = "_share", "_positive_ratio"
_NOT_PARTS = {
    "step",
    "loss",
    "learning_rate",
    "images_per_second",
    "images_per_second_per_gpu",
    "step_seconds",
    "eta_seconds",
    "memory_gib",
    "seconds",
    "samples",
    "stage",
    "images",
    "gradient_norm",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a job and the seconds that it should take; only their ratios count once time has been measured."""

    name: str
    expected_seconds: float = 1.0


class JobProgress:
    """Draws how far a job is. Use as a context manager; ``begin`` a stage, then ``update`` it.

    with JobProgress([Stage(name="data", expected_seconds=10), Stage(name="training", expected_seconds=120)]) as job:
        job.begin("data")
        job.update(done=200, total=1000)
        job.begin("training")
        job.update(done=12, total=600, detail=describe(row))
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        console: Console | None = None,
        plain_every: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``console`` defaults to standard error; without a terminal a line is logged every ``plain_every`` seconds."""
        assert stages and len({s.name for s in stages}) == len(stages), "stages have different names"
        self._stages = tuple(stages)
        self._console = console or Console(stderr=True)
        self._plain_every, self._clock = plain_every, clock
        self._taken: dict[str, float] = {}
        self._at, self._began, self._logged = -1, 0.0, -math.inf
        self._done, self._total, self._detail = 0, 0, ""
        self._drawn = self._draw() if self._console.is_terminal else None
        self._redirected: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def __enter__(self) -> Self:
        if self._drawn is not None:
            before = sys.stderr
            self._drawn.start()
            self._redirect_log(before)
        else:
            logging.getLogger(ROWS).addFilter(self._row_was_logged)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_stage()
        if self._drawn is not None:
            self._drawn.stop()
        logging.getLogger(ROWS).removeFilter(self._row_was_logged)
        for handler, stream in self._redirected:
            handler.setStream(stream)
            handler.removeFilter(_is_no_row)
        self._redirected.clear()

    def begin(self, name: str) -> None:
        """Ends the stage at hand and begins another one; stages in between count as left out."""
        self._close_stage()
        self._at = next(i for i, stage in enumerate(self._stages) if stage.name == name)
        self._began, self._logged = self._clock(), -math.inf
        self.update(done=0, total=0)

    def update(self, *, done: int, total: int, detail: str = "") -> None:
        """``done`` of ``total`` units of the stage at hand; 0 of 0 where that is unknown."""
        assert self._at >= 0, "begin() comes before update()"
        self._done, self._total, self._detail = done, total, detail
        stage = self._stages[self._at]
        if self._drawn is not None:
            self._drawn.update(
                self._drawn.task_ids[0],
                completed=self.share_done(),
                description=stage.name,
                count=f"{done:,}/{total:,}" if total else "",
                detail=detail,
                left=self.seconds_left(),
            )
            return
        now = self._clock()
        if total and now - self._logged >= self._plain_every:
            self._logged = now
            tail = f", {detail}" if detail else ""
            _log.info("%s %d/%d, %s left%s", stage.name, done, total, format_seconds(self.seconds_left()), tail)

    def seconds_left(self) -> float:
        """An estimate of the seconds until the whole job is done."""
        now, later = self._stage_left(), self._stages[self._at + 1 :]
        return now + self._pace() * sum(stage.expected_seconds for stage in later)

    def share_done(self) -> float:
        """The share of the job's time that has passed, 0 to 1."""
        passed = sum(self._taken.values()) + (self._clock() - self._began if self._at >= 0 else 0.0)
        whole = passed + self.seconds_left()
        return passed / whole if whole > 0 else 1.0

    def _share(self) -> float:
        return min(self._done / self._total, 1.0) if self._total else 0.0

    def _stage_left(self) -> float:
        if self._at < 0:
            return 0.0
        elapsed, share = self._clock() - self._began, self._share()
        guess = self._stages[self._at].expected_seconds * self._pace_of_past()
        if share <= 0:
            return max(guess - elapsed, 0.0)
        # The first units are slow (caches, compilation): the expectation is given up as the stage goes on.
        trust = min(share / 0.1, 1.0)
        return (1 - share) * (trust * elapsed / share + (1 - trust) * max(guess, elapsed))

    def _pace_of_past(self) -> float:
        expected = sum(s.expected_seconds for s in self._stages if s.name in self._taken)
        return sum(self._taken.values()) / expected if expected > 0 else 1.0

    def _pace(self) -> float:
        """Real seconds for each expected one, over the stages so far and the one at hand as it is extrapolated."""
        if self._at < 0 or self._share() < 0.1:
            return self._pace_of_past()
        real = sum(self._taken.values()) + self._clock() - self._began + self._stage_left()
        expected = sum(s.expected_seconds for s in self._stages if s.name in self._taken)
        return real / max(expected + self._stages[self._at].expected_seconds, 1e-9)

    def _close_stage(self) -> None:
        if self._at < 0:
            return
        stage = self._stages[self._at]
        self._taken[stage.name] = seconds = self._clock() - self._began
        self._done, self._total = 0, 0
        _log.info("%s done in %s", stage.name, format_seconds(seconds))

    def _draw(self) -> Progress:
        drawn = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            _LeftColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=self._console,
            refresh_per_second=4,
        )
        drawn.add_task(self._stages[0].name, total=1.0, count="", detail="", left=0.0)
        return drawn

    def _redirect_log(self, before: TextIO) -> None:
        """Lets log lines to the terminal pass above the drawn line instead of through it."""
        for handler in logging.getLogger("gesso").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                self._redirected.append((handler, before))
                handler.setStream(sys.stderr)
                handler.addFilter(_is_no_row)

    def _row_was_logged(self, record: logging.LogRecord) -> bool:
        self._logged = self._clock()
        return True


def _is_no_row(record: logging.LogRecord) -> bool:
    return record.name != ROWS


class _LeftColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{format_seconds(float(task.fields['left']))} left", style="cyan")


_SCORES = (("AP", "AP"), ("mask_AP", "mask AP"), ("mIoU", "mIoU"), ("top1", "top1"))
"""The scores that a line shows, and their names there."""


def describe(row: Mapping[str, object]) -> str:
    """A row of ``metrics.jsonl`` in a few words: the loss and its parts, images/s, data wait, memory.

    Of an evaluation: AP, and that of the masks where there is one; mIoU; or top1. ``data_share`` is the wait for data
    as share of the step; ``memory_gib`` the peak. Keys that are missing are left out.
    """
    scores = [(name, _number(row, key)) for key, name in _SCORES]
    words = [f"{name} {value:.3f}" for name, value in scores if value is not None]
    words += _loss(row)
    rate, share = _number(row, "images_per_second"), _number(row, "data_share")
    words += [] if rate is None else [f"{rate:.1f} img/s"]
    words += [] if share is None else [f"data wait {100 * share:.0f}%"]
    return ", ".join(words + _memory(row))


def row_line(row: Mapping[str, object], done: int, total: int) -> str:
    """A row of ``metrics.jsonl`` of training as one line: everything that it says, after ``done`` of ``total`` steps.

    Keys that are missing are left out.
    """
    words = _loss(row)
    for key, form in (("gradient_norm", "gradient {:.3g}"), ("learning_rate", "rate {:.3g}")):
        value = _number(row, key)
        words += [] if value is None else [form.format(value)]
    rate, each = _number(row, "images_per_second"), _number(row, "images_per_second_per_gpu")
    if rate is not None:
        words.append(f"{rate:.1f} img/s" + ("" if each in (None, rate) else f" ({each:.1f} each)"))
    shares = [(phase, _number(row, phase + _SHARE)) for phase in _PHASES]
    shown = [f"{phase} {100 * share:.0f}%" for phase, share in shares if share is not None]
    words += [" ".join(shown)] if shown else []
    ratios = [f"{name.removesuffix(_RATIO)} {_number(row, name):.3g}" for name in row if name.endswith(_RATIO)]
    words += [f"positive/negative {' '.join(ratios)}"] if ratios else []
    words += _memory(row)
    left = _number(row, "eta_seconds")
    words += [] if left is None else [f"{format_seconds(left)} left"]
    return f"{row.get('stage', 'training')} {done}/{total}: {', '.join(words)}"


def _loss(row: Mapping[str, object]) -> list[str]:
    loss = _number(row, "loss")
    if loss is None:
        return []
    names = [name for name in row if name not in _NOT_PARTS and not name.endswith((_SHARE, _RATIO))]
    values = [(name.removesuffix("_loss").removeprefix("loss_"), _number(row, name)) for name in names]
    parts = " ".join(f"{name} {value:.3f}" for name, value in values if value is not None)
    return [f"loss {loss:.3f}" + (f" ({parts})" if parts else "")]


def _memory(row: Mapping[str, object]) -> list[str]:
    memory = _number(row, "memory_gib")
    return [] if memory is None else [f"{memory:.2f} GiB"]


def format_seconds(seconds: float) -> str:
    """9 s, 4:05 min, 2:10 h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _number(row: Mapping[str, object], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
