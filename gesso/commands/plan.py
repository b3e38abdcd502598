"""``gesso plan scaling`` and ``gesso plan bench``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gesso import config as configs
from gesso import distributed
from gesso.commands.parsing import Result, parse, table
from gesso.commands.recipes import option_names, steps_before_epochs
from gesso.errors import ConfigError
from gesso.planning import published
from gesso.planning.bench import Bench, Link, bench
from gesso.planning.page import (
    COLUMNS,
    MEGDET_COLUMNS,
    PFDET_COLUMNS,
    basis,
    megdet_rows,
    megdet_words,
    pfdet_rows,
    pfdet_words,
    plan_rows,
    scaling_report,
)
from gesso.planning.scaling import Network, Plan, StepMeasurement, Work, messages_of, predict
from gesso.planning.workload import (
    CLASSES,
    classes_of,
    detector_traffic,
    measured_step,
    stage_of,
    total_images,
)
from gesso.recipes.catalog import make_config
from gesso.reports.html import write_report
from gesso.run.config import RunConfig, read_run_config
from gesso.run.folder import RunFolder
from gesso.training.stage import TrainingConfig

COUNTS = "1,2,4,8,16,32,64,128,256,512,1024"
DEFAULT = "debug:tiny"
GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Predicts hours and efficiency from 1 to 1,024 GPUs: gesso plan scaling [RECIPE], from a step measured on one.

    The step is that of --run, or --step-seconds with --images-per-gpu. RECIPE may be left out with --run; its fields
    are options too. What the network does is measured by gesso plan bench.
    """

    run: Path | None = None
    """A run of one process, whose steps to take."""
    step_seconds: float | None = None
    """Seconds of one forward and backward pass with update, on one GPU."""
    images_per_gpu: int | None = None
    """Pictures in it."""
    stage: Literal["pretraining", "training"] = "training"
    """The stage of the recipe to plan."""
    images: int | None = None
    """Pictures of an epoch; the recipe's data by default."""
    epochs: float | None = None
    """Epochs; by default the recipe's epochs, or its steps."""
    accumulate: int | None = None
    """Passes of a GPU before the weights move; the recipe's by default."""
    norm_images: int | None = None
    """Pictures that batch norm takes statistics over; 0 = those of each GPU. The recipe's policy by default."""
    classes: int | None = None
    """Classes of the detector; by default those of the run or the recipe's data, else 80."""
    backward_share: float = 0.6
    """Share of the step in which gradients travel unnoticed."""
    jitter: float = 0.0
    """Standard deviation of step times from GPU to GPU, as a share of the step."""
    gpus: str = COUNTS
    """Numbers of GPUs, with commas."""
    gpus_per_machine: int = 8
    """GPUs of a machine."""
    inside_bandwidth: float = 100.0
    """GB/s from a GPU to the next in its machine; 100 is NVLink, 10 is PCIe."""
    inside_latency: float = 5.0
    """Microseconds of a hop there."""
    between_bandwidth: float = 12.5
    """GB/s from a machine to the next; 12.5 is one port of 100 Gb/s."""
    between_latency: float = 20.0
    """Microseconds of a hop there."""
    published: bool = False
    """Check the model against the published figures of MegDet and PFDet; needs no recipe."""
    out: Path | None = None
    """A folder for scaling.html."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class ScalingArguments(ScalingOptions):
    """Predicts hours and efficiency of a recipe from 1 to 1,024 GPUs; every field of the recipe is an option."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]


def scaling(words: list[str]) -> Result:
    """``gesso plan scaling``."""
    given, config, name = _parse_scaling(words)
    planned = config is not None or given.run is not None or not given.published
    plan = _plan(given, config, name) if planned else None
    lines = [] if plan is None else [*basis(plan), "", table(COLUMNS, plan_rows(plan))]
    data: dict[str, Any] = {} if plan is None else _plan_data(plan)
    if given.published:
        lines += [*([""] if lines else []), *_published_lines()]
        data["published"] = _published_data()
    if given.out is not None:
        page = write_report(given.out / "scaling.html", scaling_report(plan))
        lines += ["", f"The page: {page.absolute().as_uri()}"]
    return Result("\n".join(lines), data if given.json else None)


def _parse_scaling(words: list[str]) -> tuple[ScalingOptions, RunConfig | None, str]:
    """The options, and where a recipe stands first its configuration and name."""
    if not words or words[0].startswith("-"):
        return parse(ScalingOptions, words, "plan scaling"), None, ""
    name = words[0]
    start = ScalingArguments(config=steps_before_epochs(make_config(name), words[1:]))
    known = option_names(start.config)
    given = parse(ScalingArguments, words[1:], f"plan scaling {name}", default=start, known=known)
    return given, given.config, name


def _plan(given: ScalingOptions, named: RunConfig | None, name: str) -> Plan:
    folder = None if given.run is None else RunFolder.open(given.run)
    config = _config(named, folder)
    stage = stage_of(config, given.stage)
    measured = _measured(given, folder)
    known = classes_of(config) if folder is None else len(folder.read_label_space())
    classes = next(number for number in (given.classes, known, CLASSES) if number is not None)
    traffic = detector_traffic(config, classes, stage.norm.parts)
    synchronised, over = _norm(given, stage)
    step = dataclasses.replace(
        measured,
        gradient_bytes=traffic.gradient_bytes,
        messages=messages_of(traffic.gradient_bytes),
        backward_share=given.backward_share,
        norm_layers=traffic.norm_layers if synchronised else 0,
        norm_bytes=traffic.norm_bytes if synchronised else 0,
        norm_images=over,
        jitter=given.jitter,
    )
    network = Network(
        gpus_per_machine=given.gpus_per_machine,
        inside_bandwidth=given.inside_bandwidth * GIGA,
        inside_latency=given.inside_latency * MICRO,
        between_bandwidth=given.between_bandwidth * GIGA,
        between_latency=given.between_latency * MICRO,
    )
    work = Work(
        images=total_images(config, stage, given.images, given.epochs),
        accumulate=stage.accumulate if given.accumulate is None else given.accumulate,
    )
    return Plan(
        name=name or str(given.run),
        step=step,
        network=network,
        work=work,
        rate=stage.optimizer.rate / (stage.schedule.base_images or stage.batch_size),
        rows=tuple(predict(step, network, work, count) for count in numbers_of("--gpus", given.gpus, "1,8,64")),
    )


def _config(named: RunConfig | None, folder: RunFolder | None) -> RunConfig:
    """That of the recipe, else that of the run; where there are both, they describe one detector."""
    stored = None if folder is None else read_run_config(folder)
    if stored is not None and named is not None and configs.differences(stored.model, named.model):
        raise ConfigError("the recipe has another detector than the run", remedy="Leave the recipe out.")
    found = named or stored
    if found is None:
        raise ConfigError("nothing is named to plan", remedy="Add a recipe, or --run RUN, or --published.")
    return found


def _measured(given: ScalingOptions, folder: RunFolder | None) -> StepMeasurement:
    asked = given.step_seconds is not None or given.images_per_gpu is not None
    if folder is not None:
        if asked:
            raise ConfigError(
                "--run gives the step and its pictures already", remedy="Leave --step-seconds and --images-per-gpu out."
            )
        return measured_step(folder, given.stage)
    if given.step_seconds is None or given.images_per_gpu is None:
        raise ConfigError(
            "the step on one GPU is not known",
            remedy="Add --run RUN, or --step-seconds S and --images-per-gpu B (gesso plan bench measures them).",
        )
    if not given.step_seconds > 0:
        raise ConfigError(f"--step-seconds is {given.step_seconds}", remedy="Give a number above 0.")
    return StepMeasurement(seconds=given.step_seconds, images=given.images_per_gpu)


def _norm(given: ScalingOptions, stage: TrainingConfig) -> tuple[bool, int | None]:
    """Whether batch norm is synchronised, and over how many pictures (None = all)."""
    if given.norm_images is None:
        return stage.norm.kind == "sync", stage.norm.images if stage.norm.kind == "sync" else None
    return given.norm_images != 0, given.norm_images or None


def numbers_of(option: str, text: str, example: str) -> list[int]:
    """Numbers above 0, with commas; each once, in order. ConfigError where they are none."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{option} is '{text}'", remedy=f"Give numbers above 0 with commas: {example}.")
    return sorted({int(word) for word in words})


def _plan_data(plan: Plan) -> dict[str, Any]:
    def row_data(row: Any) -> dict[str, Any]:
        more = ("step_seconds", "images_per_second", "hours", "efficiency")
        return dataclasses.asdict(row) | {
            "learning_rate": plan.rate * row.batch,
            **{key: getattr(row, key) for key in more},
        }

    parts = {key: dataclasses.asdict(getattr(plan, key)) for key in ("step", "network", "work")}
    return {**parts, "rows": [row_data(row) for row in plan.rows]}


def _published_lines() -> list[str]:
    return [
        megdet_words(),
        "",
        table(MEGDET_COLUMNS, megdet_rows()),
        "",
        pfdet_words(),
        "",
        table(PFDET_COLUMNS, pfdet_rows()),
    ]


def _published_data() -> dict[str, Any]:
    found, rows = published.megdet()
    return {
        "megdet": {
            "seconds": found.step.seconds,
            "between_latency": found.network.between_latency,
            "rows": [dataclasses.asdict(row) | {"error": row.error} for row in rows],
        },
        "pfdet": [
            {
                "assumed": case.name,
                "hours": case.prediction.hours,
                "efficiency": case.prediction.efficiency,
                "step": dataclasses.asdict(case.step),
                "network": dataclasses.asdict(case.network),
            }
            for case in published.pfdet()
        ],
    }


@dataclass(frozen=True)
class BenchArguments:
    """Measures real efficiency over the processes at hand: gesso plan bench [RECIPE], alone or under torchrun.

    RECIPE is debug:tiny where none is named; its fields are options too. With N processes: torchrun --nproc-per-node N
    -m gesso plan bench RECIPE.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    stage: Literal["pretraining", "training"] = "training"
    """The stage of the recipe whose steps to take."""
    steps: int = 10
    """Steps to measure each way, after two to warm up."""
    json: bool = False
    """Print JSON."""


def bench_(words: list[str]) -> Result:
    """``gesso plan bench``."""
    named = bool(words) and not words[0].startswith("-")
    name, rest = (words[0], words[1:]) if named else (DEFAULT, words)
    start = BenchArguments(config=make_config(name))
    given = parse(BenchArguments, rest, "plan bench", default=start, known=option_names(start.config))
    if given.steps < 1:
        raise ConfigError(f"--steps is {given.steps}", remedy="Give a number above 0.")
    began = distributed.initialise(distributed.choose_device(given.config.device))
    try:
        found = bench(given.config, given.stage, steps=given.steps)
    finally:
        if began:
            distributed.shutdown()
    data = dataclasses.asdict(found) | {"efficiency": found.efficiency, "communication": found.communication}
    accumulate = stage_of(given.config, given.stage).accumulate
    return Result(_bench_text(found, name, accumulate), data if given.json else None)


def _bench_text(found: Bench, name: str, accumulate: int) -> str:
    height, width = found.shape
    lines = [
        f"{found.processes} process{'' if found.processes == 1 else 'es'} on {found.machines} "
        f"machine{'' if found.machines == 1 else 's'} ({found.device}), each with {found.images} pictures of "
        f"{height} x {width} a step; one step alone takes {found.step_seconds:.4g} s",
        "",
    ]
    rates = [("alone, one process of a machine at a time", found.alone)]
    if found.at_once is not None and found.together is not None:
        rates += [("all at once, each for itself", found.at_once), ("together", found.together)]
    lines += [table(("", "images/s"), rates)]
    if found.efficiency is None:
        lines += ["", "One process waits for no other. For efficiency start several: torchrun --nproc-per-node N ..."]
    else:
        lines += [
            "",
            f"efficiency {found.efficiency:.1%}; of a step together {found.communication:.1%} is beyond one of all at "
            f"once, and {found.waiting:.1%} is spent in collectives other than those of gradients",
            "",
            table(
                ("all-reduce, KiB", "processes", "ms"),
                [(f"{x.size // 1024}", x.ranks, 1000 * x.seconds) for x in found.exchanges],
            ),
        ]
    seconds, images = found.step_seconds / accumulate, found.images // accumulate
    options = [f"--step-seconds {seconds:.4g} --images-per-gpu {images} --jitter {found.jitter:.2g}"]
    options += [_link_options(side, link) for side in ("inside", "between") if (link := getattr(found, side))]
    return "\n".join([*lines, "", f"For the plan: gesso plan scaling {name} {' '.join(options)}"])


def _link_options(side: str, link: Link) -> str:
    return f"--{side}-bandwidth {link.bandwidth / GIGA:.4g} --{side}-latency {link.latency / MICRO:.4g}"
