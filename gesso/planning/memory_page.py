"""The words and the page of a memory plan: what fits, what it costs, and what to take."""

from collections.abc import Sequence

from gesso.planning.choices import Choice, number_words
from gesso.planning.memory import MemoryPlan, StagePlan
from gesso.reports.html import Figure, Plot, Plots, Report, Section, Table, Text
from gesso.reports.plots import Series, line_plot
from gesso.training.memory import words_of

Row = tuple[str | int | float, ...]
_GIGA = 1e9
_LINES = 4
"""As many as a plot can tell apart."""


def columns_of(plan: MemoryPlan) -> tuple[str, ...]:
    """The columns of ``rows_of``."""
    return ("resolution", "padded", "pictures", "memory", "step s", "images/s", plan.unit)


def rows_of(choices: Sequence[Choice]) -> list[Row]:
    """Choices as rows under ``columns_of``."""
    return [
        (
            one.resolution,
            f"{one.shape[0]} x {one.shape[1]}",
            one.pictures,
            words_of(one.bytes),
            *(number_words(value) for value in (one.seconds, one.images_per_second, one.days)),
        )
        for one in choices
    ]


def memory_table(stage: StagePlan) -> tuple[tuple[str, ...], list[Row]]:
    """Columns and rows of the memory of every resolution with every batch; * marks what does not fit."""
    batches = sorted({one.pictures for one in stage.choices})
    rows: list[Row] = []
    for side in sorted({one.resolution for one in stage.choices}):
        there = {one.pictures: one for one in stage.choices if one.resolution == side}
        cells = [_memory(there[batch]) if batch in there else "-" for batch in batches]
        rows.append((str(side), *cells))
    return ("resolution", *(f"{batch} pictures" for batch in batches)), rows


def chosen_words(stage: StagePlan) -> str:
    """The choice and its reason."""
    return f"{_short(stage)}: {stage.reason}."


def basis(plan: MemoryPlan, stage: StagePlan) -> list[str]:
    """What the numbers of a stage rest on."""
    parts = stage.parts
    pieces = ", ".join(
        f"{name} {words_of(value)}"
        for name, value in (
            ("weights", parts.weights),
            ("gradients", parts.gradients),
            ("optimizer", parts.optimizer),
            ("buffers and averages", parts.buffers),
            ("activations and the rest", parts.activations),
        )
    )
    between = "" if all(one.counted for one in stage.choices) else ", others lie on the line between two counts"
    time = (
        "not measured: the smallest step needs more memory than there is here"
        if stage.pace is None
        else (stage.pace.describe())
    )
    return [
        f"Memory: tensors of one step at its worst moment, counted without computing it{between}; of the smallest "
        f"setting {pieces}.",
        f"Time on {plan.device}: {time}.",
        f"Work: {stage.images:,.0f} pictures.",
        *(f"Left out: {words}." for words in stage.left_out),
    ]


def disk_words(plan: MemoryPlan) -> str:
    """What a run takes on disk."""
    disk = plan.disk
    data = (
        f"data not counted: {disk.data_words}"
        if disk.data is None
        else (f"data {words_of(disk.data)} ({disk.data_words})")
    )
    return (
        f"{words_of(disk.bytes)}: {disk.checkpoints} checkpoints of {words_of(disk.checkpoint)} (the best one "
        f"included); {data}."
    )


def memory_report(plan: MemoryPlan) -> Report:
    """The page."""
    return Report(
        title=f"Memory: {plan.name}",
        summary=f"In {words_of(plan.budget)}: {'; '.join(_short(stage) for stage in plan.stages)}.",
        hedge="Memory is counted and time extrapolated from a few steps on this machine; no training was run. How "
        "good a detector becomes at a resolution is not predicted.",
        figures=tuple(
            Figure(
                label=stage.name,
                value=f"{stage.chosen.resolution} x {stage.chosen.pictures}",
                note=_figure_note(plan, stage.chosen),
            )
            for stage in plan.stages
        ),
        sections=(
            *(section for stage in plan.stages for section in _sections(plan, stage)),
            Text(title="Disk", paragraphs=(disk_words(plan),)),
        ),
        settings={"recipe": plan.name, "memory": words_of(plan.budget), "device": plan.device},
    )


def _sections(plan: MemoryPlan, stage: StagePlan) -> list[Section]:
    columns, rows = memory_table(stage)
    best = [one for one in stage.choices if one.best]
    return [
        Plots(title=f"{stage.name}: what fits", plots=_plots(plan, stage)),
        Table(
            title=f"{stage.name}: worth a thought",
            columns=columns_of(plan),
            rows=tuple(rows_of(best)),
            note="Of those that fit, all that no other one equals or beats in resolution, pictures and time.",
        ),
        Table(title=f"{stage.name}: memory", columns=columns, rows=tuple(rows), note="* does not fit."),
        Text(
            title=f"{stage.name}: what it rests on",
            paragraphs=(chosen_words(stage), *basis(plan, stage)),
            commands=(("On one device:", f"gesso train {plan.name} {' '.join(stage.options)}"),),
        ),
    ]


def _plots(plan: MemoryPlan, stage: StagePlan) -> tuple[Plot, ...]:
    """Memory over pictures, and what pictures cost, each with a line for a resolution, the highest four."""
    sides = sorted({one.resolution for one in stage.choices})[-_LINES:]
    lines = {side: [one for one in stage.choices if one.resolution == side] for side in sides}
    memory = line_plot(
        [
            Series(name=f"{side} pixels", x=[c.pictures for c in row], y=[c.bytes / _GIGA for c in row])
            for side, row in lines.items()
        ],
        x_label="pictures a device",
        y_label="GB",
        y_zero=True,
        dots=True,
    )
    words = "; ".join(
        f"{side} pixels {', '.join(f'{words_of(c.bytes)} for {c.pictures}' for c in row)}"
        for side, row in lines.items()
    )
    found = [Plot(svg=memory, caption=f"Memory of a step; there are {words_of(plan.budget)}.", alt=f"Memory: {words}.")]
    if stage.pace is not None:
        rate = line_plot(
            [
                Series(name=f"{side} pixels", x=[c.pictures for c in row], y=[c.images_per_second or 0.0 for c in row])
                for side, row in lines.items()
            ],
            x_label="pictures a device",
            y_label="images/s",
            y_zero=True,
            dots=True,
        )
        words = "; ".join(
            f"{side} pixels {', '.join(f'{number_words(c.images_per_second)} with {c.pictures}' for c in row)}"
            for side, row in lines.items()
        )
        found.append(Plot(svg=rate, caption=f"Pictures a second on {plan.device}.", alt=f"Images a second: {words}."))
    return tuple(found)


def _short(stage: StagePlan) -> str:
    return f"{stage.name} at {stage.chosen.resolution} pixels with {stage.chosen.pictures} pictures a device"


def _figure_note(plan: MemoryPlan, one: Choice) -> str:
    days = "" if one.days is None else f", {number_words(one.days)} {plan.unit}"
    return f"{words_of(one.bytes)}{days}"


def _memory(one: Choice) -> str:
    return words_of(one.bytes) + ("" if one.fits else "*")
