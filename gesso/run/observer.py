"""Whoever wants to know how a run goes."""

from collections.abc import Callable, Mapping
from typing import Any


class Observer:
    """Is told how a run goes; the command line draws a progress line with it. All methods may be left as they are."""

    should_stop: Callable[[], bool] = staticmethod(lambda: False)

    def plan(self, stages: list[tuple[str, int]], evaluations: int) -> None:
        """The stages with their steps, and how many evaluations there will be."""

    def prepare(self, what: str, done: int, total: int) -> None:
        """Progress of making the embedded data set."""

    def step(self, stage: str, step: int) -> None:
        """A step of a stage is done."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row was written to metrics.jsonl."""

    def evaluating(self, done: int, total: int) -> None:
        """Progress of an evaluation."""
