"""``gesso plan memory``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gesso.commands.parsing import Result, parse, table
from gesso.commands.plan import numbers_of
from gesso.commands.recipes import option_names, recipe_name, steps_before_epochs
from gesso.errors import ConfigError
from gesso.planning.choices import Choice
from gesso.planning.memory import MemoryPlan, StagePlan, Wishes, plan_memory
from gesso.planning.memory_page import (
    basis,
    chosen_words,
    columns_of,
    disk_words,
    memory_report,
    memory_table,
    rows_of,
)
from gesso.recipes.catalog import make_config
from gesso.reports.html import write_report
from gesso.run.config import RunConfig
from gesso.training.memory import parse_bytes, words_of


@dataclass(frozen=True, kw_only=True)
class MemoryArguments:
    """Which resolutions and batches fit into the memory of a GPU, and what they cost.

    Nothing is trained: memory is counted, and time taken from a few steps on this machine. Every field of the recipe is
    an option too. For example: gesso plan memory direct:small --memory 11GB.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    memory: str
    """Memory for the tensors of one device, such as 11GB or 10GiB. A GPU's context and the gaps between tensors need
    some beside that."""
    stage: Literal["pretraining", "training"] | None = None
    """The stage of the recipe to plan; each by default."""
    resolutions: str | None = None
    """Sides in pixels, with commas; by default 224,320,448,640 and the recipe's own."""
    batches: str | None = None
    """Pictures of one device in a step, with commas; by default 2,4,8,16."""
    least_pictures: int | None = None
    """Pictures that a device should have at least; by default 8 where batch norm is trained on those of one device."""
    images: int | None = None
    """Pictures of an epoch; the recipe's data by default."""
    epochs: float | None = None
    """Epochs; by default the recipe's epochs, pictures or steps."""
    out: Path | None = None
    """A folder for memory.html."""
    json: bool = False
    """Print JSON."""


def memory(words: list[str]) -> Result:
    """``gesso plan memory RECIPE``."""
    name, rest = recipe_name(words, "plan memory")
    start = MemoryArguments(config=steps_before_epochs(make_config(name), rest), memory=tyro.MISSING)
    given = parse(MemoryArguments, rest, f"plan memory {name}", default=start, known=option_names(start.config))
    plan = plan_memory(given.config, name, _stages(given), _wishes(given))
    page = None if given.out is None else write_report(given.out / "memory.html", memory_report(plan))
    lines = [line for stage in plan.stages for line in _lines(plan, stage)]
    lines += [f"Disk: {disk_words(plan)}", *([] if page is None else ["", f"The page: {page.absolute().as_uri()}"])]
    return Result("\n".join(lines), _data(plan) if given.json else None)


def _stages(given: MemoryArguments) -> list[str]:
    return [given.stage] if given.stage is not None else [name for name, _ in given.config.stages()]


def _wishes(given: MemoryArguments) -> Wishes:
    budget = parse_bytes(given.memory)
    if budget == 0:
        raise ConfigError(f"--memory is '{given.memory}'", remedy="Give an amount in MB, GB, MiB or GiB, such as 11GB.")
    if given.least_pictures is not None and given.least_pictures < 1:
        raise ConfigError(f"--least-pictures is {given.least_pictures}", remedy="Give a number above 0.")

    def several(option: str, text: str | None) -> tuple[int, ...] | None:
        return None if text is None else tuple(numbers_of(option, text, "224,448"))

    return Wishes(
        budget=budget,
        resolutions=several("--resolutions", given.resolutions),
        batches=several("--batches", given.batches),
        least_pictures=given.least_pictures,
        images=given.images,
        epochs=given.epochs,
    )


def _lines(plan: MemoryPlan, stage: StagePlan) -> list[str]:
    return [
        chosen_words(stage),
        f"On one device: gesso train {plan.name} {' '.join(stage.options)}",
        "",
        table(columns_of(plan), rows_of([one for one in stage.choices if one.best])),
        "",
        table(*memory_table(stage)),
        f"* does not fit into {words_of(plan.budget)}",
        "",
        *basis(plan, stage),
        "",
    ]


def _data(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "recipe": plan.name,
        "device": plan.device,
        "memory": plan.budget,
        "unit": plan.unit,
        "stages": {stage.name: _stage_data(stage) for stage in plan.stages},
        "disk": dataclasses.asdict(plan.disk) | {"bytes": plan.disk.bytes},
    }


def _stage_data(stage: StagePlan) -> dict[str, Any]:
    pace = stage.pace
    return {
        "settings": [_choice_data(one) for one in stage.choices],
        "recommended": _choice_data(stage.chosen) | {"reason": stage.reason, "options": list(stage.options)},
        "left_out": list(stage.left_out),
        "images": stage.images,
        "memory_of_smallest": dataclasses.asdict(stage.parts) | {"activations": stage.parts.activations},
        "time": None
        if pace is None
        else {
            "seconds_a_step": pace.a,
            "seconds_a_picture": pace.b,
            "seconds_a_megapixel": pace.c,
            "measured": [dataclasses.asdict(timed) for timed in pace.measured],
        },
    }


def _choice_data(one: Choice) -> dict[str, Any]:
    return {
        "resolution": one.resolution,
        "shape": one.shape,
        "batch": one.pictures,
        "memory": one.bytes,
        "counted": one.counted,
        "step_seconds": one.seconds,
        "measured": one.measured,
        "images_per_second": one.images_per_second,
        "days": one.days,
        "fits": one.fits,
        "best": one.best,
    }
