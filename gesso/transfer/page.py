"""The page of a matrix: whether pre-training paid, on which target, and at what cost."""

from collections.abc import Sequence
from pathlib import Path

from gesso.reports.html import Cell, Plot, Plots, Report, Section, Table, Text, write_report
from gesso.reports.plots import Series, bar_plot, line_plot
from gesso.transfer.summary import Row

_LINES = 4


def write_page(path: Path, rows: Sequence[Row], *, title: str, footer: str = "") -> Path:
    """Writes the page of a matrix's rows as one HTML file."""
    targets = list(dict.fromkeys(row.target for row in rows))
    sections: list[Section] = [_table(rows, target) for target in targets]
    sections.append(Plots(title="Scores", plots=tuple(_bars(rows, target) for target in targets)))
    curves = [plot for target in targets if (plot := _curves(rows, target)) is not None]
    if curves:
        note = "The mean over the seeds, at the steps at which all were evaluated. At most four lines are drawn."
        sections.append(Plots(title="Scores over the steps of training", plots=tuple(curves), note=note))
    errors = [f"{row.target}, {row.label}: {error}" for row in rows for error in row.errors]
    if errors:
        sections.append(Text(title="Runs that failed", paragraphs=tuple(errors)))
    seeds = max((row.runs for row in rows), default=0)
    hedge = "Differences within the spread are no proof." if seeds > 1 else "One seed: a direction, no proof."
    return write_report(
        path, Report(title=title, summary=_summary(rows, targets), hedge=hedge, sections=tuple(sections), footer=footer)
    )


def _summary(rows: Sequence[Row], targets: Sequence[str]) -> str:
    words = []
    for target in targets:
        here = [row for row in rows if row.target == target]
        known = [row for row in here if row.mean is not None]
        if not known:
            words.append(f"{target}: no run tells a score.")
            continue
        best = max(known, key=lambda row: row.mean or 0.0)
        gain = "" if best.gain is None else f", {100 * best.gain:+.1f} points over {here[0].label}"
        words.append(f"{target}: {best.label} is best with {best.primary} {best.mean:.3f}{gain}.")
    return " ".join(words)


def _table(rows: Sequence[Row], target: str) -> Table:
    here = [row for row in rows if row.target == target]
    primary = here[0].primary
    others = [name for name in here[0].scores if name != primary][:2]
    cells: list[tuple[Cell, ...]] = [
        (
            row.label,
            row.mean,
            row.spread,
            row.gain,
            *(row.scores.get(name) for name in others),
            _seconds(row.seconds),
            "" if row.cost is None else f"{100 * row.cost:+.0f}%",
            _days(row.device_days),
            _days(row.pretraining_days),
            f"{row.runs}" + (f", {row.failed} failed" if row.failed else ""),
        )
        for row in here
    ]
    known = [i for i, row in enumerate(here) if row.mean is not None]
    best = max(known, key=lambda i: here[i].mean or 0.0, default=None)
    columns = ("pre-training", primary, "spread", "gain", *others)
    return Table(
        title=target,
        columns=(*columns, "training", "cost", "device days", "its pre-training, days", "seeds"),
        rows=tuple(cells),
        best=() if best is None else ((best, 1),),
        note="Spread: standard deviation over the seeds. Gain and cost: against the first row; cost is of training "
        "alone, by the clock on a GPU, by processor time on a CPU.",
    )


def _bars(rows: Sequence[Row], target: str) -> Plot:
    here = [row for row in rows if row.target == target]
    svg = bar_plot([row.label for row in here], [(target, [row.mean for row in here])], x_label=here[0].primary)
    told = ", ".join(f"{row.label} {row.mean:.3f}" for row in here if row.mean is not None)
    return Plot(svg=svg, caption=f"{here[0].primary} on {target}", alt=told or "no score")


def _curves(rows: Sequence[Row], target: str) -> Plot | None:
    here = [row for row in rows if row.target == target and len(row.curve) > 1]
    if not here:
        return None
    first = here[: 1 if here[0].gain is None else 0]
    ranked = sorted(here[len(first) :], key=lambda row: -(row.mean or 0.0))
    shown = [*first, *ranked][:_LINES]
    lines = [
        Series(name=row.label, x=[step for step, _ in row.curve], y=[value for _, value in row.curve]) for row in shown
    ]
    svg = line_plot(lines, x_label="step", y_label=here[0].primary, y_zero=True, dots=True)
    told = ", ".join(f"{row.label} ends at {row.curve[-1][1]:.3f}" for row in shown)
    return Plot(svg=svg, caption=target, alt=told)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} s"


def _days(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
