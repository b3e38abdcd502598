"""How long a step takes, from a few real steps at the small end of the settings: a line in pictures and pixels.

seconds of a step = a + b x pictures + c x pictures x megapixels, none of them below 0: what every step takes (the
update), what every picture takes whatever its size (heads on a fixed number of regions), and what its pixels take. It
is fitted in least squares of the relative errors. Two measurements give b and c, one gives c alone.
"""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import nnls

from gesso.data.transforms import Shape
from gesso.planning.account import SharesRead, choose_memory
from gesso.planning.stages import in_one_process, new_stage, worst_pair
from gesso.run.config import RunConfig
from gesso.training.stage import Stage
from gesso.training.step import train_step
from gesso.training.worst_case import Pair

STEPS = 4
"""Steps of each measurement, as far as there is time; the fastest counts."""
Setting: TypeAlias = tuple[Shape, int]
"""The padded shape and the pictures of a step."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A measured step.

    Attributes:
        shape: height and width of the padded pictures.
        pictures: in the step.
        seconds: of the fastest of a few.
    """

    shape: Shape
    pictures: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The seconds of a step of one stage on one device.

    Attributes:
        a: seconds of every step.
        b: of every picture.
        c: of every picture's megapixel.
        measured: what they are fitted to.
        shares: of ``SharesRead``, in the smallest step.
        units: seconds of the units that can be computed again, by name; empty unless ``memory`` asks for them.
    """

    a: float
    b: float
    c: float
    measured: tuple[Timed, ...]
    shares: tuple[float, ...] = ()
    units: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, shape: Shape, pictures: int) -> float:
        """Of a step: as measured where it was, else by the line."""
        for timed in self.measured:
            if (timed.shape, timed.pictures) == (shape, pictures):
                return timed.seconds
        return float(np.dot(_row(shape, pictures), (self.a, self.b, self.c)))

    def describe(self) -> str:
        """What was measured, and the line."""
        done = ", ".join(f"{t.shape[0]} x {t.shape[1]} x {t.pictures} in {t.seconds:.3g} s" for t in self.measured)
        terms = ((self.a, ""), (self.b, " a picture"), (self.c, " a picture's megapixel"))
        others = ": " + " + ".join(f"{seconds:.3g} s{of}" for seconds, of in terms if seconds)
        if len(self.measured) == 1:
            others = " in proportion to pictures and pixels, which is rather too much for larger pictures"
        return f"measured: {done} (the fastest of up to {STEPS} steps); all others{others}"


def fit_pace(measured: Sequence[Timed]) -> tuple[float, float, float]:
    """a, b and c for measured steps; what they do not settle is 0."""
    terms = [2]
    if len({timed.shape for timed in measured}) > 1:
        terms.append(1)
    if len({timed.pictures for timed in measured}) > 1 and len(measured) > len(terms):
        terms.append(0)
    seconds = np.array([timed.seconds for timed in measured])
    rows = np.array([_row(timed.shape, timed.pictures) for timed in measured])
    found = np.zeros(3)
    found[terms] = nnls(rows[:, terms] / seconds[:, None], np.ones(len(seconds)))[0]
    a, b, c = found.tolist()
    return a, b, c


def measure_pace(
    config: RunConfig, name: str, settings: Sequence[Setting], *, device: torch.device, limit: float
) -> Pace:
    """Measures steps of a stage, in eager mode.

    The setting of least work is measured in any case, then three more as far as there is time: one of more pixels, one
    of more pictures, and the largest.

    Args:
        config: the recipe.
        name: of the stage.
        settings: padded shape and pictures of a step, at least one.
        device: to measure on.
        limit: seconds after which no step is begun, and no measurement that would take longer.
    """
    ordered = sorted(settings, key=lambda setting: (_work(setting), setting))
    until = time.perf_counter() + limit
    stage, pair = _begin(config, name, ordered[0], device)
    units = choose_memory(stage, pair)
    reads = SharesRead()
    measured = [_time(stage, pair, ordered[0], until, reads)]
    while (following := _next(ordered, measured, until - time.perf_counter())) is not None:
        stage, pair = _begin(config, name, following, device)
        choose_memory(stage, pair)
        measured.append(_time(stage, pair, following, until))
    a, b, c = fit_pace(measured)
    return Pace(a=a, b=b, c=c, measured=tuple(measured), shares=tuple(reads.shares), units=units)


def _next(ordered: Sequence[Setting], measured: Sequence[Timed], left: float) -> Setting | None:
    """What to measure next in ``left`` seconds; None where all is done that can be."""
    done, line = {(timed.shape, timed.pictures) for timed in measured}, fit_pace(measured)
    affordable = [s for s in ordered if s not in done and STEPS * np.dot(_row(*s), line) <= left]
    smallest = ordered[0][0]
    larger = [s for s in affordable if math.prod(s[0]) > math.prod(smallest)]
    more = [s for s in affordable if s[0] == smallest]
    kinds = (larger[:1], more[:1], affordable[-1:])[len(measured) - 1 :]
    return next((kind[0] for kind in kinds if kind), None)


def memory_at_hand(device: torch.device) -> int:
    """Bytes that measurements may take: what a GPU has free, or half of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _begin(config: RunConfig, name: str, setting: Setting, device: torch.device) -> tuple[Stage, Pair]:
    """A stage and its largest batch."""
    shape, pictures = setting
    stage = new_stage(in_one_process(config, name, pictures), name, device, pictures)
    return stage, worst_pair(stage.module, pictures, shape, config.data.max_boxes, device)


def _time(stage: Stage, pair: Pair, setting: Setting, until: float, first: SharesRead | None = None) -> Timed:
    """A few steps, at least one; the first under the mode ``first``, and no further one after the time ``until``."""
    found: list[float] = []
    while not found or (len(found) < STEPS and time.perf_counter() < until):
        with first if first is not None and not found else contextlib.nullcontext():
            began = time.perf_counter()
            train_step(stage, *pair).read()
            found.append(time.perf_counter() - began)
    return Timed(shape=setting[0], pictures=setting[1], seconds=min(found))


def _row(shape: Shape, pictures: int) -> tuple[float, float, float]:
    return 1.0, pictures, pictures * math.prod(shape) / 1e6


def _work(setting: Setting) -> int:
    return math.prod(setting[0]) * setting[1]
