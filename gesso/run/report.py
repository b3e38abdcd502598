"""``report.html`` of one run, and of several runs beside each other."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gesso
from gesso.config import flatten
from gesso.data.index import Index
from gesso.evaluation.coco import MASK_KEYS
from gesso.evaluation.detection_files import read_detections
from gesso.evaluation.detections import DetectionTable
from gesso.reports.comparison import Arm, Point, comparison_report
from gesso.reports.html import Gallery, Plot, Plots, Report, Section, Table, write_report
from gesso.reports.plots import Series, line_plot
from gesso.run.config import read_run_config
from gesso.run.cost import read_cost
from gesso.run.folder import RunFolder
from gesso.run.gallery import exhibits
from gesso.run.models import trained_kind
from gesso.run.predictor import DETECTIONS, TrainedDetector

SHOWN_SCORE = 0.4


def write_run_report(folder: RunFolder, val: Index | None) -> Path:
    """Writes the report of a finished run into its folder: scores, curves, pictures and settings."""
    rows = folder.rows()
    evaluations = folder.evaluations()
    losses = [row for row in rows if "loss" in row]
    kind = trained_kind(read_run_config(folder).model)
    sections: list[Section] = []
    if evaluations:
        sections.append(_score_table("Scores on the validation data", kind.shown, evaluations))
        if masked := [row for row in evaluations if MASK_KEYS[0] in row]:
            sections.append(_score_table("Scores of the masks", MASK_KEYS, masked))
    sections.append(_curves(losses, evaluations, kind.primary))
    if val is not None and evaluations and kind is TrainedDetector:
        found = last_detections(folder, val)
        pictures = exhibits(val, [found], count=6, min_score=SHOWN_SCORE)
        sections.append(
            Gallery(title="Validation pictures", columns=("Ground truth", "Detections"), exhibits=tuple(pictures))
        )
    if evaluations:
        of_class = kind.primary.removeprefix("m")
        classes = sorted(evaluations[-1]["by_class"].items(), key=lambda item: -item[1])
        sections.append(
            Table(
                title=f"{of_class} by class",
                columns=("class", of_class),
                rows=tuple((n, _known(v)) for n, v in classes),
                folded=True,
            )
        )
    last = losses[-1] if losses else {"seconds": 0.0, "images": 0}
    summary = f"Trained for {last['seconds']:.0f} seconds on {last['images']:,} images"
    summary += _verdict(evaluations, kind.primary)
    stored = folder.read_config()
    report = Report(
        title=f"{stored.get('recipe') or 'Run'} in {folder.path.name}",
        summary=summary,
        hedge=_cost(folder),
        sections=tuple(sections),
        settings=_settings(folder),
        footer=footer(stored["environment"]),
    )
    return write_report(folder.report, report)


def write_comparison(
    path: Path,
    runs: Sequence[tuple[str, str, RunFolder]],
    val: Index,
    *,
    title: str,
    task: str,
    commands: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes one report of two to four runs that were trained for the same task; the first is the baseline.

    Args:
        path: the HTML file.
        runs: (name as in a table, phrase as within a sentence, folder).
        val: the data that all were evaluated on.
        title, task, commands: see ``comparison_report``.
    """
    arms = [_arm(name, phrase, folder) for name, phrase, folder in runs]
    pictures = exhibits(val, [last_detections(folder, val) for _, _, folder in runs], count=6, min_score=SHOWN_SCORE)
    settings = {f"{name}: {key}": value for name, _, folder in runs for key, value in _settings(folder).items()}
    report = comparison_report(
        arms,
        title=title,
        task=task,
        exhibits=pictures,
        commands=commands,
        settings=settings,
        footer=footer(runs[0][2].read_config()["environment"]),
    )
    return write_report(path, report)


def last_detections(folder: RunFolder, val: Index) -> DetectionTable:
    """The detections of the run's last evaluation, in the label space of the validation data; with scored masks."""
    last = folder.evaluations()[-1]
    path = folder.detections / f"{last['step']:08d}" / DETECTIONS
    return read_detections(path, val.label_space.ids, masks=MASK_KEYS[0] in last)


def footer(environment: Mapping[str, Any]) -> str:
    """Version, machine and date in a line."""
    place = environment["gpu"] or f"{environment['threads']} CPU threads"
    return f"Gesso {gesso.__version__}, torch {environment['torch']}, {place}, {time.strftime('%Y-%m-%d')}"


def _score_table(title: str, keys: Sequence[str], evaluations: Sequence[Mapping[str, Any]]) -> Table:
    rows = [(f"step {row['step']:,}", *(_known(row[key]) for key in keys)) for row in evaluations]
    return Table(title=title, columns=("after", *(key.removeprefix("mask_") for key in keys)), rows=tuple(rows))


def _arm(name: str, phrase: str, folder: RunFolder) -> Arm:
    rows = folder.rows()
    losses = [row for row in rows if "loss" in row]
    evaluations = folder.evaluations()
    first = [row["seconds"] for row in losses if row["stage"] == "pretraining"]
    return Arm(
        name=name,
        phrase=phrase,
        scores=evaluations[-1],
        seconds=losses[-1]["seconds"],
        images=losses[-1]["images"],
        losses=[Point(seconds=row["seconds"], step=row["step"], value=row["loss"]) for row in losses],
        scores_over_time=[Point(seconds=row["seconds"], step=row["step"], value=row["AP"]) for row in evaluations],
        breaks=(max(first),) if first else (),
    )


def _curves(losses: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]], primary: str) -> Plots:
    plots = []
    if losses:
        line = Series(name="loss", x=[row["step"] for row in losses], y=[row["loss"] for row in losses])
        svg = line_plot([line], x_label="step", y_label="loss", smoothing=0.03)
        plots.append(Plot(svg=svg, caption="Training loss", alt=f"The loss falls to {losses[-1]['loss']:.2f}."))
    evaluations = [row for row in evaluations if _known(row[primary]) is not None]
    if len(evaluations) > 1:
        plots.append(_score_plot(evaluations, primary))
    return Plots(title="Curves", plots=tuple(plots))


def _score_plot(evaluations: Sequence[Mapping[str, Any]], primary: str) -> Plot:
    """The primary score over the steps, that of the masks beside that of the boxes where there is one."""
    lines, ends = [], []
    for key, name in ((primary, primary), (MASK_KEYS[0], "AP of the masks")):
        known = [row for row in evaluations if key in row and _known(row[key]) is not None]
        if known:
            lines.append(Series(name=name, x=[row["step"] for row in known], y=[row[key] for row in known]))
            ends.append(f"{name} ends at {known[-1][key]:.3f}.")
    svg = line_plot(lines, x_label="step", y_label=primary, y_zero=True, dots=True)
    return Plot(svg=svg, caption=f"{primary} on the validation data", alt=" ".join(ends))


def _settings(folder: RunFolder) -> dict[str, Any]:
    return {key: value for key, value in flatten(read_run_config(folder)).items() if not key.endswith("type")}


def _verdict(evaluations: Sequence[Mapping[str, Any]], primary: str) -> str:
    if not evaluations:
        return ". Nothing was evaluated."
    score = _known(evaluations[-1][primary])
    if score is None:
        return "; the validation data has no object to measure on."
    of_masks = _known(evaluations[-1].get(MASK_KEYS[0], -1.0))
    return f"; {primary} {score:.3f}" + ("." if of_masks is None else f", of the masks {of_masks:.3f}.")


def _known(value: float) -> float | None:
    return None if value < 0 else value


def _cost(folder: RunFolder) -> str:
    cost = read_cost(folder)
    if cost is None:
        return ""
    waited = 100 * cost.data_seconds / cost.seconds
    return (
        f"It cost {cost.device_days:.2g} {cost.unit}; {waited:.0f}% of the time was the wait for data. Evaluation took "
        f"{cost.evaluation_seconds:.0f} seconds beside it."
    )
