"""Real efficiency over the processes at hand: the same steps alone and together, and what the network does.

Every process trains on its share of the pictures, of noise with an object in every slot (``worst_case.py``):

1. alone, while the other processes of its machine wait;
2. alone, all processes at once: what they take from each other's memory and cores;
3. together, as in a run: what they wait for each other.

Efficiency is the pictures a second of 3 over those of 1. Then all-reduces of several sizes give the bandwidth and the
latency that ``scaling.py`` takes.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from gesso import distributed, log
from gesso.data.transforms import Shape
from gesso.planning.scaling import ring_seconds
from gesso.planning.stages import new_stage, worst_pair, worst_shape
from gesso.planning.workload import stage_of
from gesso.run.config import RunConfig, check_processes
from gesso.training.stage import Stage
from gesso.training.step import Numbers, train_step
from gesso.training.worst_case import Pair

logger = log.get_logger(__name__)

Floats = npt.NDArray[np.float64]
WARM_UP = 2
SIZES = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20)
"""Bytes of the all-reduces that are timed."""
UNLIMITED = 1e15
"""Bytes a second where larger messages took no longer."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """How ranks are joined: bytes a second of one to the next, and seconds of a hop; see ``scaling.Network``."""

    bandwidth: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """An all-reduce of ``size`` bytes over ``ranks`` processes, and the seconds of one."""

    size: int
    ranks: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured; pictures a second are those of all processes.

    Attributes:
        processes: all of them.
        machines: that they are on.
        device: of process 0.
        images: pictures of a process in a step.
        shape: height and width of the padded pictures.
        step_seconds: of one process alone.
        jitter: standard deviation of these over steps and processes, as a share of their mean.
        alone: pictures a second, of each process while the others of its machine wait.
        at_once: pictures a second, of all at once without a word to each other; None in one process.
        together: pictures a second of training; None in one process.
        waiting: the share of that time that the host waited in collectives other than those of gradients; None in one
            process.
        exchanges: all-reduces, smallest first: within a machine, then over all processes.
        inside: between the processes of a machine; None where there is one.
        between: between machines; None where there is one.
    """

    processes: int
    machines: int
    device: str
    images: int
    shape: Shape
    step_seconds: float
    jitter: float
    alone: float
    at_once: float | None
    together: float | None
    waiting: float | None
    exchanges: tuple[Exchange, ...]
    inside: Link | None
    between: Link | None

    @property
    def efficiency(self) -> float | None:
        """Pictures a second together over those alone."""
        return None if self.together is None else self.together / self.alone

    @property
    def communication(self) -> float | None:
        """The share of a step together that goes beyond one of all at once; noise may bring it below 0."""
        return None if self.together is None or self.at_once is None else 1 - self.together / self.at_once


def bench(config: RunConfig, stage_name: str, *, steps: int) -> Bench:
    """Measures ``steps`` steps each way; all processes call it together, and all get the result.

    Raises:
        ConfigError: there is no such stage, or its batch cannot be divided among the processes.
    """
    world = distributed.world_size()
    settings = distributed.from_main(lambda: stage_of(config, stage_name))
    distributed.from_main(lambda: check_processes(config, world))
    device = distributed.choose_device(config.device)
    share, shape = settings.batch_size // world, worst_shape(config, settings.input)
    with distributed.alone():
        stage = new_stage(config, stage_name, device, share)
    pair = worst_pair(stage.module, share, shape, config.data.max_boxes, device)
    where = distributed.machines()
    places = [where[:rank].count(machine) for rank, machine in enumerate(where)]
    alone = np.zeros(0)
    for turn in range(max(places) + 1):
        _say("one process of each machine (%d of %d)", turn + 1, max(places) + 1)
        distributed.barrier()
        if places[distributed.rank()] == turn:
            with distributed.alone():
                alone = _time(stage, pair, steps)
    alone = distributed.gather_array(alone[None])
    at_once, together, waiting = _all(config, stage_name, stage, pair, steps) if world > 1 else (None, None, None)
    exchanges, inside, between = links(where, device)
    return Bench(
        processes=world,
        machines=len(set(where)),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        images=share,
        shape=shape,
        step_seconds=float(alone.mean()),
        jitter=float(alone.std() / alone.mean()),
        alone=_rate(alone, share),
        at_once=at_once,
        together=together,
        waiting=waiting,
        exchanges=exchanges,
        inside=inside,
        between=between,
    )


def _all(config: RunConfig, stage_name: str, stage: Stage, pair: Pair, steps: int) -> tuple[float, float, float]:
    """All processes at once, and together: pictures a second of both, and the share of waiting in the latter."""
    share = len(pair[0].images)
    _say("all processes, each for itself")
    distributed.barrier()
    with distributed.alone():
        own = _time(stage, pair, steps)
    at_once = _rate(distributed.gather_array(own[None]), share)
    _say("all processes together")
    common = new_stage(config, stage_name, stage.device, share)
    _time(common, pair, 0)
    distributed.barrier()
    before, began = distributed.traffic.seconds, time.perf_counter()
    seconds = _time(common, pair, steps)
    waited = (distributed.traffic.seconds - before) / (time.perf_counter() - began)
    found = distributed.gather_array(np.append(seconds, waited)[None])
    return at_once, _rate(found[:, :-1], share), float(found[:, -1].mean())


def _time(stage: Stage, pair: Pair, steps: int) -> Floats:
    """Seconds of each of ``steps`` steps (steps,) after a warm-up; as in a run, the host is one step behind."""
    ends: list[float] = []
    pending: Numbers | None = None
    for _ in range(WARM_UP + steps):
        numbers = train_step(stage, *pair)
        if pending is not None:
            pending.read()
        pending = numbers
        stage.step += 1
        ends.append(time.perf_counter())
    if pending is not None:
        pending.read()
    return np.diff(ends)[WARM_UP - 1 :]


def _rate(seconds: Floats, share: int) -> float:
    """Pictures a second of all processes; seconds (processes, steps)."""
    return float((share / seconds.mean(1)).sum())


def links(where: list[int], device: torch.device) -> tuple[tuple[Exchange, ...], Link | None, Link | None]:
    """All-reduces within a machine and over all, and the links fitted to them; ``where`` is each rank's machine."""
    world, machines = len(where), len(set(where))
    if world == 1:
        return (), None, None
    _say("all-reduces")
    per_machine = world // machines
    even = all(where.count(machine) == per_machine for machine in where)
    inside, between = None, None
    found: list[Exchange] = []
    if per_machine > 1 and even:
        found += _exchanges(distributed.group(per_machine), device)
        inside = fit_link(found)
    if machines > 1:
        whole = _exchanges(distributed.EVERY, device)
        found += whole
        between = fit_link([_beyond(one, inside, per_machine, machines) for one in whole])
    return tuple(found), inside, between


def _beyond(one: Exchange, inside: Link | None, per_machine: int, machines: int) -> Exchange:
    """The part of an all-reduce over everything that goes between machines."""
    within = 0.0 if inside is None else ring_seconds(one.size, per_machine, inside.bandwidth, inside.latency)
    return Exchange(size=one.size, ranks=machines, seconds=max(one.seconds - within, 1e-9))


def _exchanges(group: int, device: torch.device) -> list[Exchange]:
    found = []
    for size in SIZES:
        repeats = max(5, min(50, 2**24 // size))
        message = torch.zeros(size // 4, device=device)
        for _ in range(WARM_UP):
            distributed.all_reduce_sum(message, group)
        _wait(device)
        distributed.barrier()
        began = time.perf_counter()
        for _ in range(repeats):
            distributed.all_reduce_sum(message, group)
        _wait(device)
        own = np.array([(time.perf_counter() - began) / repeats])
        seconds = float(distributed.gather_array(own).mean())
        found.append(Exchange(size=size, ranks=distributed.group_size(group), seconds=seconds))
    return found


def fit_link(exchanges: list[Exchange]) -> Link:
    """Bandwidth and latency of a ring, in least squares of the relative errors; neither is below 0."""
    seconds = np.array([one.seconds for one in exchanges])
    slopes = np.array([[ring_seconds(0, x.ranks, 1, 1), ring_seconds(x.size, x.ranks, 1, 0)] for x in exchanges])
    latency, inverse = nnls(slopes / seconds[:, None], np.ones(len(seconds)))[0].tolist()
    return Link(bandwidth=1 / max(inverse, 1 / UNLIMITED), latency=latency)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(message: str, *values: object) -> None:
    if distributed.is_main():
        logger.info(message, *values)
