"""The plan of a recipe's memory: resolutions and batches of each stage, what they hold and cost, and the disk.

Memory is counted (``account.py``), time measured for a few settings and extrapolated (``pace.py``), and one setting
taken (``choices.py``).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gesso import distributed, log
from gesso.data.transforms import InputConfig, Shape
from gesso.errors import ConfigError
from gesso.models.norm import check_images
from gesso.planning.account import StepAccount, StepBytes
from gesso.planning.choices import Choice, Limits, bytes_of_batches, judged, take
from gesso.planning.disk import Disk, data_bytes
from gesso.planning.pace import Pace, Setting, measure_pace, memory_at_hand
from gesso.planning.stages import at_resolution, resolution_of, worst_shape
from gesso.planning.workload import images_of, stage_of, total_images
from gesso.run.config import RunConfig
from gesso.training.memory import parse_memory
from gesso.training.stage import TrainingConfig

RESOLUTIONS, BATCHES = (224, 320, 448, 640), (2, 4, 8, 16)
"""The grid of "Rethinking Training from Scratch for Object Detection": sides in pixels, and pictures on a GPU."""
NORM_PICTURES = 8
"""Pictures on a GPU that batch norm takes its statistics over in that paper's pre-training."""
SECONDS = 8.0
"""For the measurements of one stage."""
_DAY = 86_400

logger = log.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What to plan; None is the default.

    Attributes:
        budget: bytes of one device.
        resolutions: sides in pixels.
        batches: pictures of one device in a step.
        least_pictures: that it should have.
        images: of an epoch.
        epochs: of the stage.
    """

    budget: int
    resolutions: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    least_pictures: int | None = None
    images: int | None = None
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What was found for one stage.

    Attributes:
        name: of the stage.
        choices: every resolution with every batch, in order.
        left_out: what of the default grid the recipe cannot have, in words.
        parts: of the bytes of the smallest choice.
        pace: of its steps; None where this machine's memory is too small for the smallest one.
        images: to train on, repeats included.
        limits: that the choice keeps to.
        chosen: the one of the choices to take.
        reason: why.
        options: that set it on the command line, on one device.
        checkpoints: how many a run keeps.
    """

    name: str
    choices: tuple[Choice, ...]
    left_out: tuple[str, ...]
    parts: StepBytes
    pace: Pace | None
    images: float
    limits: Limits
    chosen: Choice
    reason: str
    options: tuple[str, ...]
    checkpoints: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The plan of a recipe.

    Attributes:
        name: of the recipe.
        device: in words.
        unit: of days: "GPU days" or "CPU days".
        budget: bytes of one device.
        stages: the plans of its stages.
        disk: of a whole run.
    """

    name: str
    device: str
    unit: str
    budget: int
    stages: tuple[StagePlan, ...]
    disk: Disk


def plan_memory(config: RunConfig, name: str, stages: Sequence[str], wishes: Wishes) -> MemoryPlan:
    """Plans stages of a recipe on the device that it would train on; one process.

    Args:
        config: the recipe.
        name: of the recipe.
        stages: names of its stages, at least one.
        wishes: what to plan.

    Raises:
        ConfigError: there is no such stage, the recipe cannot have what is wished for, or nothing fits: the message
            says what the smallest setting needs.
    """
    device = distributed.choose_device(config.device)
    gpu, threads = device.type == "cuda", torch.get_num_threads()
    unit = "GPU days" if gpu else "CPU days"
    plans = tuple(_Planner(config, stage, wishes, device, unit).plan() for stage in stages)
    data, words = data_bytes(config)
    return MemoryPlan(
        name=name,
        device=torch.cuda.get_device_name(device) if gpu else f"CPU, {threads} thread{'' if threads == 1 else 's'}",
        unit=unit,
        budget=wishes.budget,
        stages=plans,
        disk=Disk(
            checkpoint=max(plan.parts.checkpoint for plan in plans),
            checkpoints=max(plan.checkpoints for plan in plans),
            data=data,
            data_words=words,
        ),
    )


class _Planner:
    """The plan of one stage."""

    def __init__(self, config: RunConfig, name: str, wishes: Wishes, device: torch.device, unit: str) -> None:
        self.config, self.name, self.wishes, self.device, self.unit = config, name, wishes, device, unit
        self.stage = stage_of(config, name)
        self.account = StepAccount(config, name, device=device)
        self.left_out: list[str] = []

    def plan(self) -> StagePlan:
        """The whole of it."""
        inputs, batches = self._inputs(), self._batches()
        shapes = {side: worst_shape(self.config, input) for side, input in inputs.items()}
        first = (min(shapes.values(), key=math.prod), min(batches))
        parts = self.account.count(*first)
        pace = self._pace([(shape, batch) for shape in shapes.values() for batch in batches], parts.peak)
        images = images_to_train(self.config, self.stage, self.wishes)
        logger.info("%s: counting the memory of %d settings", self.name, len(shapes) * len(batches))
        found = [
            self._timed(choice, pace, images) for side in shapes for choice in self._of(side, shapes[side], batches)
        ]
        choices = judged(found, self.wishes.budget)
        limits = self._limits()
        chosen, reason = take(choices, limits, name=self.name, budget=self.wishes.budget, unit=self.unit)
        return StagePlan(
            name=self.name,
            choices=tuple(choices),
            left_out=tuple(self.left_out),
            parts=self.account.count(*first),
            pace=pace,
            images=images,
            limits=limits,
            chosen=chosen,
            reason=reason,
            options=self._options(inputs[chosen.resolution], chosen, images),
            checkpoints=self.stage.keep_checkpoints + 1,
        )

    def _inputs(self) -> dict[int, InputConfig]:
        """The stage's input at every resolution; by default the paper's that it can have, and its own."""
        own, wanted = resolution_of(self.stage.input), self.wishes.resolutions
        found: dict[int, InputConfig] = {}
        for side in sorted({*RESOLUTIONS, own}) if wanted is None else wanted:
            try:
                found[side] = at_resolution(self.stage.input, side)
            except ConfigError as error:
                if wanted is not None:
                    raise
                self.left_out.append(f"{side} pixels: {error.what}")
        return found

    def _batches(self) -> list[int]:
        """Pictures of a step; by default those of the paper that the stage can have."""
        wanted, parts, norm = self.wishes.batches, self.stage.accumulate, self.stage.norm
        found = []
        for batch in BATCHES if wanted is None else wanted:
            try:
                if batch % parts:
                    raise ConfigError(f"{batch} pictures do not fall into accumulate = {parts} parts")
                if norm.images is not None and norm.images <= batch // parts:
                    check_images(norm, pictures=batch // parts, processes=1)
                found.append(batch)
            except ConfigError as error:
                if wanted is not None:
                    raise
                self.left_out.append(f"{batch} pictures: {error.what}")
        if not found:
            raise ConfigError(
                f"{self.name}: it can have none of the batches {', '.join(map(str, BATCHES))}",
                remedy=f"Give others: --batches {parts * (norm.images or 1)}.",
            )
        return found

    def _pace(self, settings: Sequence[Setting], bytes: int) -> Pace | None:
        """Measured where a step surely fits: no more bytes a pixel than the smallest one, of ``bytes``."""
        pixels = min(math.prod(shape) * pictures for shape, pictures in settings)
        room = memory_at_hand(self.device)
        there = [(s, n) for s, n in settings if bytes * math.prod(s) * n <= room * pixels]
        if not there:
            logger.warning("%s: the smallest step needs more memory than there is here; no time is measured", self.name)
            return None
        logger.info("%s: measuring a few steps", self.name)
        pace = measure_pace(self.config, self.name, there, device=self.device, limit=SECONDS)
        self.account.learn(pace.shares, pace.units)
        return pace

    def _of(self, side: int, shape: Shape, batches: Sequence[int]) -> list[Choice]:
        """A resolution with every batch; one that the recipe's own memory budget is too small for is left out."""
        every = parse_memory(self.stage.memory).kind == "budget"
        if every:
            batches = [batch for batch in batches if self._can_be_counted(side, shape, batch)]
        if not batches:
            return []
        found = bytes_of_batches(lambda batch: self.account.count(shape, batch).peak, batches, every=every)
        return [
            Choice(resolution=side, shape=shape, pictures=batch, bytes=bytes, counted=counted)
            for batch, (bytes, counted) in found.items()
        ]

    def _can_be_counted(self, side: int, shape: Shape, batch: int) -> bool:
        try:
            self.account.count(shape, batch)
        except ConfigError as error:
            self.left_out.append(f"{side} pixels with {batch} pictures: {error.what}")
            return False
        return True

    def _timed(self, choice: Choice, pace: Pace | None, images: float) -> Choice:
        if pace is None:
            return choice
        seconds = pace.seconds(choice.shape, choice.pictures)
        measured = any((t.shape, t.pictures) == (choice.shape, choice.pictures) for t in pace.measured)
        days = images / choice.pictures * seconds / _DAY
        return dataclasses.replace(choice, seconds=seconds, measured=measured, days=days)

    def _limits(self) -> Limits:
        """As many pictures as trained batch norm wants of a device that is alone; and no higher resolution than the
        last stage has, below it in the stage before.
        """
        norm, least, words = self.stage.norm, self.wishes.least_pictures, "as asked"
        if least is None and norm.kind in ("train", "sync") and self.account.trains_norm:
            least, words = min(norm.images or NORM_PICTURES, NORM_PICTURES) * self.stage.accumulate, "for batch norm"
        pictures = Limits(least=least or 1, least_words=words)
        if self.wishes.resolutions is not None:
            return pictures
        last, end = self.config.stages()[-1]
        most = resolution_of(end.input)
        if self.name == last:
            return dataclasses.replace(pictures, most=most, most_words=f" up to the recipe's, {most},")
        return dataclasses.replace(pictures, most=most - 1, most_words=f" below that of {last}, {most},")

    def _options(self, input: InputConfig, chosen: Choice, images: float) -> tuple[str, ...]:
        """What sets the choice; as many pictures as now, whatever the batch."""
        resize: Any = input.resize
        head = f"--{self.name}.input.resize"
        if hasattr(resize, "side"):
            found = [f"{head}.side {resize.side}"]
        else:
            found = [
                f"{head}.short-sides {' '.join(map(str, resize.short_sides))}",
                f"{head}.long-side {resize.long_side}",
            ]
        found.append(f"--{self.name}.batch-size {chosen.pictures}")
        by_steps = self.stage.epochs is None and self.stage.images is None
        if by_steps or self.wishes.images is not None or self.wishes.epochs is not None:
            found.append(f"--{self.name}.images {images:.0f}")
        return tuple(found)


def images_to_train(config: RunConfig, stage: TrainingConfig, wishes: Wishes) -> float:
    """``total_images``; where a recipe says epochs and names no data, the steps that it has for the paper's."""
    if wishes.images is None and wishes.epochs is None and stage.epochs is not None and images_of(config) is None:
        return stage.steps * stage.batch_size
    return total_images(config, stage, wishes.images, wishes.epochs)
