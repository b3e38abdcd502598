"""A matrix in rows: mean and spread over the seeds, the gain over the baseline, and what it cost."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gesso.run.cost import RunCost, read_cost
from gesso.run.folder import RunFolder
from gesso.transfer.matrix import Entry


@dataclass(frozen=True, kw_only=True)
class Row:
    """One target, pre-training and choice of parts, over all seeds.

    Attributes:
        target, pretraining, parts, primary: as in ``Entry``.
        runs: how many succeeded, and ``failed``, how many did not.
        mean, spread: of the primary score, the spread as the standard deviation of a sample; None where no run, or
            only one, tells it.
        scores: means of all scores by name.
        gain: of the mean over the target's baseline, the first pre-training; None for the baseline itself.
        seconds, device_days, images: of training, means over the runs.
        work: of training, ``RunCost.work``, the mean over the runs.
        cost: the work as a share of the baseline's, less 1: -0.87 is a cost that is lower by 87%. What the weights took
            that it starts from is not in it.
        pretraining_days: device days that the weights it starts from took; None where that is not known or nothing.
        curve: (step, mean primary score) at the steps that all runs were evaluated at.
        errors: of the runs that failed.
    """

    target: str
    pretraining: str
    parts: str
    primary: str
    runs: int
    failed: int
    mean: float | None
    spread: float | None
    scores: dict[str, float]
    gain: float | None
    seconds: float | None
    device_days: float | None
    images: float | None
    work: float | None
    cost: float | None
    pretraining_days: float | None
    curve: tuple[tuple[int, float], ...]
    errors: tuple[str, ...]

    @property
    def label(self) -> str:
        """The pre-training with its parts, where there are any."""
        return f"{self.pretraining}, {self.parts}" if self.parts else self.pretraining


def summarise(entries: Sequence[Entry]) -> list[Row]:
    """The rows of a matrix, in its order; a score of -1 does not exist and counts for nothing."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.target, entry.pretraining, entry.parts), []).append(entry)
    rows = [_row(group) for group in groups.values()]
    baselines: dict[str, Row] = {}
    for row in rows:
        baselines.setdefault(row.target, row)
    return [_compared(row, baselines[row.target]) for row in rows]


def _row(entries: Sequence[Entry]) -> Row:
    first, good = entries[0], [entry for entry in entries if not entry.error]
    values = [entry.scores[entry.primary] for entry in good if entry.scores[entry.primary] >= 0]
    costs = [entry.cost for entry in good if entry.cost is not None]
    known = good[0].scores if good else {}
    names = [name for name in known if all(entry.scores.get(name, -1.0) >= 0 for entry in good)]
    return Row(
        target=first.target,
        pretraining=first.pretraining,
        parts=first.parts,
        primary=first.primary,
        runs=len(good),
        failed=len(entries) - len(good),
        mean=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        scores={name: statistics.fmean(entry.scores[name] for entry in good) for name in names},
        gain=None,
        seconds=_mean([cost.seconds for cost in costs]),
        device_days=_mean([cost.device_days for cost in costs]),
        images=_mean([float(cost.images) for cost in costs]),
        work=_mean([cost.work for cost in costs]),
        cost=None,
        pretraining_days=_pretraining_days(first),
        curve=_mean_curve(good),
        errors=tuple(entry.error for entry in entries if entry.error),
    )


def _compared(row: Row, baseline: Row) -> Row:
    if row is baseline:
        return row
    known = row.mean is not None and baseline.mean is not None
    gain = row.mean - baseline.mean if known else None  # type: ignore[operator]
    cost = None
    if row.work is not None and baseline.work:
        cost = row.work / baseline.work - 1
    return Row(**{**vars(row), "gain": gain, "cost": cost})


def _pretraining_days(entry: Entry) -> float | None:
    init = entry.job.init
    if init is None:
        return None
    cost: RunCost | None = read_cost(RunFolder(init)) or read_cost(RunFolder(init.parent.parent))
    return None if cost is None else cost.device_days


def _mean_curve(entries: Sequence[Entry]) -> tuple[tuple[int, float], ...]:
    curves = [{step: value for step, value in entry.curve if value >= 0} for entry in entries]
    if not curves:
        return ()
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return tuple((step, statistics.fmean(curve[step] for curve in curves)) for step in steps)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
