"""The report that compares ways of training on one task: who won, by how much, at what price, and how it looks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gesso.reports.html import Cell, Exhibit, Figure, Gallery, Plot, Plots, Report, Section, Table, Text, format_cell
from gesso.reports.plots import Series, bar_plot, line_plot

_SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_TIE = 0.01


@dataclass(frozen=True, kw_only=True)
class Point:
    """One moment of a run: seconds of training so far, its step, and a value (a loss or a score)."""

    seconds: float
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training and what came of it.

    Attributes:
        name: as in the table ("Direct pre-training"); ``phrase`` as within a sentence ("direct pre-training").
        scores: AP, AP50, ... and ``by_class``: AP by class name (or a mapping that holds it under "AP"); a score that
            does not exist (no object of that size) is None, -1 or not finite.
        seconds: of training, without evaluation.
        images: seen in training, repeats included.
        losses, scores_over_time: as they came, the latter AP on held-out data.
        breaks: the seconds at which a stage ended.
    """

    name: str
    phrase: str
    scores: Mapping[str, Any]
    seconds: float
    images: int
    losses: Sequence[Point] = ()
    scores_over_time: Sequence[Point] = ()
    breaks: tuple[float, ...] = ()


def comparison_report(
    arms: Sequence[Arm],
    *,
    title: str,
    task: str,
    seeds: int = 1,
    exhibits: Sequence[Exhibit] = (),
    commands: Sequence[tuple[str, str]] = (),
    settings: Mapping[str, Any] | None = None,
    footer: str = "",
) -> Report:
    """Puts the page together.

    Args:
        arms: at least two, at most four; the first is the baseline.
        title: of the page.
        task: what was learned and tested on, a sentence.
        seeds: how many seeds each arm's scores are the mean of.
        exhibits: held-out pictures; their marks are the ground truth and then each arm's detections.
        commands: how to go on, (what it does, command line).
        settings: dotted keys and values.
        footer: version, machine, date.
    """
    assert 2 <= len(arms) <= 4, "two to four arms"
    summary, hedge = verdict(arms, seeds=seeds)
    sections: list[Section] = [_score_table(arms)]
    if any(arm.losses or arm.scores_over_time for arm in arms):
        sections.append(_curves(arms))
    if exhibits:
        sections.append(
            Gallery(
                title="On pictures that no run has trained on",
                columns=("Ground truth", *(arm.name for arm in arms)),
                exhibits=tuple(exhibits),
            )
        )
    classes = _class_names(arms)
    if classes:
        sections += [_class_plot(arms, classes), _class_table(arms, classes)]
    if commands:
        sections.append(Text(title="Go on with your own pictures", commands=tuple(commands)))
    return Report(
        title=title,
        summary=summary,
        hedge=f"{task} {hedge}",
        figures=_figures(arms),
        sections=tuple(sections),
        settings=settings or {},
        footer=footer,
    )


def verdict(arms: Sequence[Arm], *, seeds: int) -> tuple[str, str]:
    """Which arm won, by how much and at what cost, in words; and how far that may be trusted."""
    base = arms[0]
    ranked = sorted(arms, key=lambda arm: -(_score(arm.scores, "AP") or 0.0))
    best, second = ranked[0], ranked[1]
    first_ap, second_ap = (_score(arm.scores, "AP") or 0.0 for arm in (best, second))
    gap = first_ap - second_ap
    if gap < _TIE:
        summary = f"No winner: {best.phrase} reached an AP of {first_ap:.3f}, {second.phrase} {second_ap:.3f}."
    else:
        summary = f"{_capital(best.phrase)} won by {100 * gap:.1f} points of AP: {first_ap:.3f} against {second_ap:.3f}"
        summary += "." if second is base or len(arms) == 2 else f" for {second.phrase}."
    longest, shortest = max(arm.seconds for arm in arms), max(min(arm.seconds for arm in arms), 1e-9)
    if longest / shortest < 1.1:
        summary += f" Each trained for {_duration(longest)}."
    else:
        summary += " Training took " + ", ".join(f"{_duration(arm.seconds)} {arm.phrase}" for arm in arms) + "."
    if seeds == 1:
        hedge = (
            "This is one seed: a direction, no proof. Runs that differ in nothing but their seed can differ by a few "
            "points of AP on a task as small as this."
        )
    else:
        hedge = f"Scores are means over {seeds} seeds."
    return summary, hedge


def _score(scores: Mapping[str, Any], key: str) -> float | None:
    value = scores.get(key)
    return float(value) if value is not None and math.isfinite(value) and value >= 0 else None


def _figures(arms: Sequence[Arm]) -> tuple[Figure, ...]:
    found = []
    for arm in arms:
        note = f"AP50 {format_cell(_score(arm.scores, 'AP50'))}, {_duration(arm.seconds)}, {arm.images:,} images seen"
        found.append(Figure(label=f"AP, {arm.phrase}", value=format_cell(_score(arm.scores, "AP")), note=note))
    return tuple(found)


def _score_table(arms: Sequence[Arm]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (arm.name, *(_score(arm.scores, key) for key in _SCORES), _duration(arm.seconds), arm.images) for arm in arms
    ]
    return Table(
        title="Scores",
        columns=("", *_SCORES, "training", "images seen"),
        rows=tuple(rows),
        note="COCO's average precision on held-out pictures: over IoU 0.50 to 0.95, at 0.50, at 0.75, and for small "
        "(below 32 × 32 px), medium and large (above 96 × 96 px) objects. A dash: there are no such objects.",
        best=tuple(place for column in range(1, 1 + len(_SCORES)) for place in _best_of(rows, column)),
    )


def _best_of(rows: Sequence[tuple[Cell, ...]], column: int) -> list[tuple[int, int]]:
    values = [row[column] for row in rows]
    known = [value for value in values if isinstance(value, float)]
    if len(known) < 2 or min(known) == max(known):
        return []
    return [(i, column) for i, value in enumerate(values) if value == max(known)]


def _curves(arms: Sequence[Arm]) -> Plots:
    plots = []
    for kind, label in (("losses", "training loss"), ("scores_over_time", "AP on held-out pictures")):
        drawn = [(arm, getattr(arm, kind)) for arm in arms]
        if any(points for _, points in drawn):
            svg = line_plot(
                [
                    Series(name=a.name, x=[p.seconds for p in ps], y=[p.value for p in ps], breaks=a.breaks)
                    for a, ps in drawn
                ],
                x_label="seconds of training",
                y_label=label,
                smoothing=0.015 if kind == "losses" else 0.0,
                dots=kind != "losses",
                y_zero=True,
            )
            ends = "; ".join(
                f"{a.name} ends at {ps[-1].value:.3f} after {_duration(a.seconds)}" for a, ps in drawn if ps
            )
            plots.append(Plot(svg=svg, caption=_capital(label), alt=f"{_capital(label)} over time. {ends}."))
    note = "A dotted line marks the end of a stage; losses at different resolutions are not comparable."
    return Plots(title="How they learned", plots=tuple(plots), note=note if any(arm.breaks for arm in arms) else "")


def _by_class(arm: Arm) -> dict[str, float | None]:
    found = {}
    for name, value in (arm.scores.get("by_class") or {}).items():
        found[str(name)] = _score(value if isinstance(value, Mapping) else {"AP": value}, "AP")
    return found


def _class_names(arms: Sequence[Arm]) -> list[str]:
    return list(dict.fromkeys(name for arm in arms for name in _by_class(arm)))


def _class_plot(arms: Sequence[Arm], classes: Sequence[str], *, most: int = 40) -> Plots:
    """Where there are many classes, those with the largest spread between arms."""
    values = [_by_class(arm) for arm in arms]

    def spread(name: str) -> float:
        known = [v for v in (arm.get(name) for arm in values) if v is not None]
        return max(known) - min(known) if known else 0.0

    chosen = set(sorted(classes, key=spread, reverse=True)[:most])
    shown = [name for name in classes if name in chosen]
    series = [(arm.name, [v.get(name) for name in shown]) for arm, v in zip(arms, values, strict=True)]
    caption = "AP by class" if len(shown) == len(classes) else f"AP of the {most} classes that differ most"
    leads = sum((values[-1].get(n) or 0.0) > (values[0].get(n) or 0.0) for n in classes)
    alt = f"{caption}. {arms[-1].name} is ahead of {arms[0].name} in {leads} of {len(classes)} classes."
    return Plots(
        title="Class by class", plots=(Plot(svg=bar_plot(shown, series, x_label="AP"), caption=caption, alt=alt),)
    )


def _class_table(arms: Sequence[Arm], classes: Sequence[str]) -> Table:
    values = [_by_class(arm) for arm in arms]
    rows: list[tuple[Cell, ...]] = []
    for name in classes:
        aps = [v.get(name) for v in values]
        change = None if aps[0] is None or aps[-1] is None else aps[-1] - aps[0]
        rows.append((name, *aps, None if change is None else f"{change:+.3f}"))
    return Table(
        title="Class by class, in numbers",
        columns=("class", *(arm.name for arm in arms), "difference"),
        rows=tuple(rows),
        folded=True,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
