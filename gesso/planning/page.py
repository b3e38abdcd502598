"""The page of a scaling plan: hours and efficiency over GPUs, with published figures beside them."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from gesso.planning import published
from gesso.planning.scaling import Network, Plan, Prediction, StepMeasurement, Work, predict
from gesso.reports.html import Figure, Plot, Plots, Report, Section, Table, Text
from gesso.reports.plots import Series, line_plot

GPUS = "GPUs, as a power of two"
HOURS = "hours, as a power of ten"
COUNTS = tuple(2**k for k in range(11))
COLUMNS = (
    *("GPUs", "machines", "batch", "rate", "step s"),
    *("compute", "data", "gradients", "norm", "stragglers"),
    *("images/s", "hours", "efficiency"),
)
_PARTS = slice(4, 10)
"""The columns of a step and its parts."""
MEGDET_COLUMNS = ("GPUs", "row", "published hours", "predicted", "error, %")
PFDET_COLUMNS = ("assumed", "hours", "efficiency, %")


def plan_rows(plan: Plan) -> list[tuple[str | int | float, ...]]:
    """The rows of the plan's table, under ``COLUMNS``."""
    return [
        (
            row.gpus,
            row.machines,
            row.batch,
            f"{plan.rate * row.batch:.3g}",
            *(f"{value:.3g}" for value in (row.step_seconds, row.compute, row.data)),
            *(f"{value:.3g}" for value in (row.gradients, row.norm, row.stragglers)),
            f"{row.images_per_second:.4g}",
            f"{row.hours:.3g}",
            row.efficiency,
        )
        for row in plan.rows
    ]


def megdet_rows() -> list[tuple[str | int | float, ...]]:
    """The rows of MegDet's table, under ``MEGDET_COLUMNS``."""
    return [
        (
            row.gpus,
            "held out" if row.held_out else "calibration",
            f"{row.published:.1f}",
            f"{row.predicted:.2f}",
            f"{round(100 * row.error, 1) + 0:+.1f}",
        )
        for row in published.megdet()[1]
    ]


def pfdet_rows() -> list[tuple[str | int | float, ...]]:
    """The rows of PFDet's table, under ``PFDET_COLUMNS``."""
    return [
        (case.name, f"{case.prediction.hours:.1f}", f"{100 * case.prediction.efficiency:.0f}")
        for case in published.pfdet()
    ]


def megdet_words() -> str:
    """What the calibration found, and how far to trust the check."""
    found = published.megdet()[0]
    return (
        f"MegDet (Table 3, batch norm over 16 pictures, 2 pictures a GPU), calibrated on 8 and 32 GPUs: "
        f"{found.step.seconds:.3f} s a step and {1000 * found.network.between_latency:.1f} ms for each hop between "
        "machines, of all messages of a step together. These two numbers saw two rows; that the second one is a "
        "latency was chosen with all four in view. The rows cannot tell it from 1.8 hours that every run takes."
    )


def pfdet_words() -> str:
    """What is assumed for PFDet."""
    case = published.pfdet()[0]
    return (
        f"PFDet (512 V100 GPUs, batch 512, 16 epochs in 33 hours, 83%): two published numbers, and two that are solved "
        f"for, {case.step.seconds:.2f} s of computing a step and a scatter of step times of "
        f"{100 * case.step.jitter:.1f}%. Assumed: 1.74 million pictures an epoch, 64 machines of 8 with 100 Gb/s each, "
        "534 MB of gradients in one message with nothing hidden, 157 batch norms over one machine each."
    )


def scaling_report(plan: Plan | None) -> Report:
    """The page; without a plan it holds the check against published figures alone."""
    checks: list[Section] = [
        Plots(title="Published figures and the model", plots=_published_plots()),
        Table(
            title="MegDet: hours",
            columns=MEGDET_COLUMNS,
            rows=tuple(megdet_rows()),
            note=megdet_words(),
        ),
        Table(
            title="PFDet: what gives 83%",
            columns=PFDET_COLUMNS,
            rows=tuple(pfdet_rows()),
            note=pfdet_words(),
        ),
    ]
    if plan is None:
        return Report(
            title="Scaling: the check", summary="The scaling model against published figures.", sections=tuple(checks)
        )
    first, last = plan.rows[0], plan.rows[-1]
    return Report(
        title=f"Scaling: {plan.name}",
        summary=f"On {_gpus(last)} training would take {_duration(last.hours)}, at {last.efficiency:.0%} efficiency.",
        hedge="Predicted from one measured step and the network named below; no such training was run. Hours are those "
        "of training steps, without evaluation and start-up.",
        figures=tuple(
            Figure(label=_gpus(row), value=_duration(row.hours), note=f"{row.efficiency:.0%} efficiency")
            for row in ([first] if first is last else [first, last])
        ),
        sections=(
            Plots(title="Hours and efficiency", plots=_plan_plots(plan)),
            *_plan_tables(plan),
            Text(title="What it rests on", paragraphs=tuple(basis(plan))),
            *checks,
        ),
        settings={**dataclasses.asdict(plan.step), **dataclasses.asdict(plan.network), **dataclasses.asdict(plan.work)},
    )


def basis(plan: Plan) -> list[str]:
    """The step, the network and the work in words."""
    step, network, work = plan.step, plan.network, plan.work
    norm = "not synchronised"
    if step.norm_layers:
        over = "all GPUs" if step.norm_images is None else f"{step.norm_images} pictures"
        norm = f"{step.norm_layers} layers with {step.norm_bytes / 1e6:.3g} MB over {over}"
    passes = f", {work.accumulate} passes a step" if work.accumulate > 1 else ""
    messages = "1 message" if step.messages == 1 else f"{step.messages} messages"
    return [
        f"Step: {step.seconds:.4g} s and {step.data_seconds:.3g} s of waiting for data, for {step.images} pictures on "
        f"one GPU; gradients of {step.gradient_bytes / 1e6:.4g} MB in {messages}, behind {step.backward_share:.0%} of "
        f"it; batch norm: {norm}; scatter of step times {step.jitter:.1%}.",
        f"Network: machines of {network.gpus_per_machine}; inside {network.inside_bandwidth / 1e9:.4g} GB/s and "
        f"{network.inside_latency * 1e6:.3g} us a hop; between {network.between_bandwidth / 1e9:.4g} GB/s and "
        f"{network.between_latency * 1e6:.3g} us a hop.",
        f"Work: {work.images:,.0f} pictures{passes}.",
    ]


def _plan_tables(plan: Plan) -> tuple[Table, Table]:
    """The plan's table in two that a page is wide enough for."""
    rows = plan_rows(plan)
    first, parts, last = COLUMNS[: _PARTS.start], COLUMNS[_PARTS], COLUMNS[_PARTS.stop :]
    return (
        Table(
            title="Training",
            columns=(*first, *last),
            rows=tuple((*row[: _PARTS.start], *row[_PARTS.stop :]) for row in rows),
            note="The learning rate follows the linear rule.",
        ),
        Table(
            title="Where the seconds of a step go",
            columns=(COLUMNS[0], *parts),
            rows=tuple((row[0], *row[_PARTS]) for row in rows),
        ),
    )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.3g} h" if hours < 1000 else f"{hours:,.0f} h"
    return f"{60 * hours:.3g} min" if hours >= 1 / 60 else f"{3600 * hours:.3g} s"


def _gpus(row: Prediction) -> str:
    return f"{row.gpus:,} GPU{'' if row.gpus == 1 else 's'}"


def _plan_plots(plan: Plan) -> tuple[Plot, ...]:
    rows = plan.rows
    counts = [row.gpus for row in rows]
    ideal = [row.hours * row.efficiency for row in rows]
    hours = line_plot(
        [_hours("this plan", counts, [row.hours for row in rows]), _hours("nobody waits", counts, ideal)],
        x_label=GPUS,
        y_label=HOURS,
        dots=True,
    )
    efficiency = line_plot(
        [_series("this plan", counts, [row.efficiency for row in rows]), _megdet_efficiency(), _pfdet_efficiency()],
        x_label=GPUS,
        y_label="efficiency",
        y_zero=True,
        dots=True,
    )
    words = ", ".join(f"{_gpus(row)} {_duration(row.hours)} at {row.efficiency:.0%}" for row in rows)
    return (
        Plot(svg=hours, caption="Hours of training.", alt=f"Hours over GPUs: {words}."),
        Plot(
            svg=efficiency,
            caption="Efficiency, and what others published for their own detectors and networks (MegDet's against its "
            "8 GPUs).",
            alt=f"Efficiency over GPUs: {words}; MegDet falls from 100% at 8 GPUs to 60% at 128; PFDet has 83% at 512.",
        ),
    )


def _published_plots() -> tuple[Plot, ...]:
    found, rows = published.megdet()
    counts = [n for n in COUNTS if n >= rows[0].gpus]
    megdet = _over(counts, found.step, found.network, published.MEGDET_WORK)
    case = published.pfdet()[0]
    pfdet = _over(COUNTS, case.step, case.network, published.PFDET_WORK)
    hours = line_plot(
        [
            _hours("MegDet, model", counts, [p.hours for p in megdet]),
            _hours("MegDet, published", [r.gpus for r in rows], [r.published for r in rows]),
        ],
        x_label=GPUS,
        y_label=HOURS,
        dots=True,
    )
    efficiency = line_plot(
        [
            _series("MegDet, model", counts, [p.efficiency / megdet[0].efficiency for p in megdet]),
            _megdet_efficiency(),
            _series("PFDet, model", COUNTS, [p.efficiency for p in pfdet]),
            _pfdet_efficiency(),
        ],
        x_label=GPUS,
        y_label="efficiency",
        y_zero=True,
        dots=True,
    )
    shown = ", ".join(f"{r.gpus} GPUs {r.published:.1f} published and {r.predicted:.2f} predicted" for r in rows)
    return (
        Plot(
            svg=hours,
            caption="MegDet: calibrated on 8 and 32 GPUs; 64 and 128 are predicted.",
            alt=f"MegDet's hours: {shown}.",
        ),
        Plot(
            svg=efficiency,
            caption="Efficiency: MegDet's against its 8 GPUs; PFDet's point is met by construction.",
            alt="The model's efficiency of MegDet falls to 60% at 128 GPUs, that of PFDet to 83% at 512.",
        ),
    )


def _over(counts: Iterable[int], step: StepMeasurement, network: Network, work: Work) -> list[Prediction]:
    return [predict(step, network, work, n) for n in counts]


def _megdet_efficiency() -> Series:
    rows = published.megdet()[1]
    first = rows[0].published * rows[0].gpus
    return _series("MegDet, published", [r.gpus for r in rows], [first / (r.published * r.gpus) for r in rows])


def _pfdet_efficiency() -> Series:
    return _series("PFDet, published", [published.PFDET.gpus], [published.PFDET_EFFICIENCY])


def _series(name: str, gpus: Sequence[int], values: Sequence[float]) -> Series:
    return Series(name=name, x=[math.log2(n) for n in gpus], y=values)


def _hours(name: str, gpus: Sequence[int], hours: Sequence[float]) -> Series:
    return _series(name, gpus, [math.log10(value) for value in hours])
