"""How long training takes on many GPUs, from one measured step and the network: pure functions on plain numbers.

Every GPU does the same work in a step, so a step on n GPUs is

    data + compute + gradients not hidden behind the backward pass + batch norm + waiting for the slowest GPU

and hours are steps times that, without evaluation, start-up and checkpoints. The terms:

- an all-reduce over k ranks in a ring: 2 (k - 1) hops, each a latency and a k-th of the bytes (Patarasu and Yuan,
  "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009, section 3). Within a machine and between
  machines there is a ring each, one after the other. Libraries that use trees between many machines have fewer hops;
  then the latency between machines is overestimated here.
- gradients travel in equal messages, ready at equal distances in the backward pass, one after the other; what has not
  arrived when that pass ends is waited for, and the last message always is.
- synchronised batch norm needs two collectives a layer, one in the forward and one in the backward pass, which nothing
  hides; both count as all-reduces (``models/ops/sync_norm.py`` gathers in the first, which has half the hops).
- step times of single GPUs scatter: all wait for the slowest of n. Times are taken as normal and independent; the
  expected largest of n is Blom's approximation (Blom, "Statistical Estimates and Transformed Beta-Variables", 1958).
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gesso.errors import ConfigError

BUCKET = 25 * 2**20
"""Bytes of gradients that travel as one message: the default of torch's DistributedDataParallel."""


def _are_amounts(*numbers: float) -> bool:
    return all(0 <= number < math.inf for number in numbers)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What GPUs are joined by. The defaults are NVLink in machines of eight and one port of 100 Gb/s a machine."""

    gpus_per_machine: int = 8
    """GPUs of a full machine."""
    inside_bandwidth: float = 100e9
    """Bytes a second that a GPU sends to its neighbour in the same machine."""
    inside_latency: float = 5e-6
    """Seconds of one hop of a small message within a machine."""
    between_bandwidth: float = 12.5e9
    """Bytes a second that a machine sends to the next one."""
    between_latency: float = 20e-6
    """Seconds of one hop of a small message between machines."""

    def __post_init__(self) -> None:
        if self.gpus_per_machine < 1 or not (self.inside_bandwidth > 0 and self.between_bandwidth > 0):
            raise ConfigError("network: the GPUs of a machine and both bandwidths must be above 0")
        if not _are_amounts(self.inside_latency, self.between_latency):
            raise ConfigError("network: latencies must not be negative")


@dataclass(frozen=True, kw_only=True)
class StepMeasurement:
    """One forward and backward pass on one GPU, and what it has to tell the others."""

    seconds: float
    """Of computing, without waiting for data."""
    images: int
    """Pictures in it."""
    gradient_bytes: float = 0.0
    """Bytes of all gradients."""
    messages: int = 1
    """Messages that the gradients travel in; see ``messages_of``."""
    backward_share: float = 0.6
    """The part of ``seconds`` in which gradients can travel while others are still computed: a backward pass takes
    about twice as long as a forward pass, and the update a little."""
    norm_layers: int = 0
    """Batch-norm layers whose statistics are synchronised."""
    norm_bytes: float = 0.0
    """Bytes of the statistics of all these layers: two float32 a channel."""
    norm_images: int | None = None
    """Pictures that the statistics are taken over; None = those of all GPUs."""
    data_seconds: float = 0.0
    """Waiting for data."""
    jitter: float = 0.0
    """The standard deviation of a GPU's step time from that of the others, as a share of ``seconds``."""

    def __post_init__(self) -> None:
        if not _are_amounts(self.seconds) or self.images < 1:
            raise ConfigError("a step needs a time and at least one picture")
        if self.messages < 1 or not 0 <= self.backward_share <= 1:
            raise ConfigError("a step needs at least one message, and a backward share between 0 and 1")
        if not _are_amounts(self.gradient_bytes, self.norm_layers, self.norm_bytes, self.data_seconds, self.jitter):
            raise ConfigError("a step's bytes, layers, seconds of data and jitter must not be negative")
        if self.norm_images is not None and (self.norm_images < 1 or self.norm_images % self.images):
            raise ConfigError(
                f"batch norm over {self.norm_images} pictures cannot be had with {self.images} pictures a GPU",
                remedy="Choose a multiple of the pictures a GPU.",
            )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What there is to do."""

    images: float
    """Pictures to train on, repeats included."""
    accumulate: int = 1
    """Passes that each GPU does before the gradients are added and the weights move."""

    def __post_init__(self) -> None:
        if not (_are_amounts(self.images) and self.images > 0) or self.accumulate < 1:
            raise ConfigError("there must be pictures to train on, and accumulate must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Training on ``gpus`` GPUs; the parts of a step are seconds."""

    gpus: int
    machines: int
    batch: int
    """Pictures of a step over all GPUs."""
    steps: int
    compute: float
    data: float
    gradients: float
    norm: float
    stragglers: float

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return self.compute + self.data + self.gradients + self.norm + self.stragglers

    @property
    def images_per_second(self) -> float:
        """Over all GPUs."""
        return self.batch / self.step_seconds

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.steps * self.step_seconds / 3600

    @property
    def efficiency(self) -> float:
        """Pictures a second over what as many GPUs would do that need not wait for each other."""
        return (self.compute + self.data) / self.step_seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predictions for several numbers of GPUs, and what they rest on."""

    name: str
    """Of the recipe or the run."""
    step: StepMeasurement
    network: Network
    work: Work
    rate: float
    """The learning rate of one picture a step; a batch has as many times as much (Goyal et al. 2017, section 2.1)."""
    rows: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredHours:
    """The hours that a training took on a number of GPUs."""

    gpus: int
    hours: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ``calibrate`` found.

    Attributes:
        step: with the fitted seconds.
        network: with the fitted latency between machines.
        residuals: of each row, (predicted - measured) / measured.
    """

    step: StepMeasurement
    network: Network
    residuals: tuple[float, ...]


def ring_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """An all-reduce of ``size`` bytes in a ring; 0 for one rank."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


def all_reduce_seconds(size: float, ranks: int, network: Network) -> float:
    """An all-reduce of ``size`` bytes: in a ring within each machine, and in one over the machines."""
    inside = min(ranks, network.gpus_per_machine)
    return ring_seconds(size, inside, network.inside_bandwidth, network.inside_latency) + ring_seconds(
        size, machines_of(ranks, network), network.between_bandwidth, network.between_latency
    )


def exposed_seconds(message: float, count: int, window: float) -> float:
    """How long after the backward pass the last of ``count`` messages arrives.

    Args:
        message: seconds that each takes, one after the other.
        count: messages; the k-th is ready after k / count of the backward pass.
        window: seconds of the backward pass.
    """
    return max(message, count * message - window * (1 - 1 / count))


def largest_of(count: int) -> float:
    """The expected largest of ``count`` standard normal numbers."""
    return statistics.NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def messages_of(gradient_bytes: float) -> int:
    """The messages that gradients travel in, in buckets of 25 MiB."""
    return max(1, math.ceil(gradient_bytes / BUCKET))


def machines_of(gpus: int, network: Network) -> int:
    """The machines that so many GPUs fill."""
    return -(-gpus // network.gpus_per_machine)


def predict(step: StepMeasurement, network: Network, work: Work, gpus: int) -> Prediction:
    """What training takes on ``gpus`` GPUs, each with the pictures of ``step``."""
    if gpus < 1:
        raise ConfigError(f"{gpus} GPUs cannot train", remedy="Choose numbers above 0.")
    batch = gpus * step.images * work.accumulate
    message = all_reduce_seconds(step.gradient_bytes / step.messages, gpus, network)
    return Prediction(
        gpus=gpus,
        machines=machines_of(gpus, network),
        batch=batch,
        steps=math.ceil(work.images / batch),
        compute=step.seconds * work.accumulate,
        data=step.data_seconds * work.accumulate,
        gradients=exposed_seconds(message, step.messages, step.backward_share * step.seconds),
        norm=work.accumulate * _norm_seconds(step, network, gpus),
        stragglers=math.sqrt(work.accumulate) * step.jitter * step.seconds * largest_of(gpus),
    )


def _norm_seconds(step: StepMeasurement, network: Network, gpus: int) -> float:
    """The all-reduces of batch norm in one pass, each of one layer over one group of GPUs."""
    if not step.norm_layers:
        return 0.0
    group = gpus if step.norm_images is None else min(gpus, step.norm_images // step.images)
    return 2 * step.norm_layers * all_reduce_seconds(step.norm_bytes / step.norm_layers, group, network)


def calibrate(rows: Sequence[MeasuredHours], step: StepMeasurement, network: Network, work: Work) -> Calibration:
    """Fits two numbers to measured hours: the seconds of a step, and the latency between machines.

    Everything else is taken as it is given, except that nothing is hidden behind the backward pass: what was hidden
    makes the fitted latency smaller. With one message it is the latency of all messages of a step together, and holds
    whatever else grows by the same seconds with each machine. Two rows are met exactly, more of them in least squares
    of the relative errors.

    Raises:
        ConfigError: the rows do not settle both numbers, or one would be negative.
    """
    plain = dataclasses.replace(step, backward_share=0.0)

    def hours(gpus: int, seconds: float, latency: float) -> float:
        """Linear in both."""
        moved = dataclasses.replace(network, between_latency=latency)
        return predict(dataclasses.replace(plain, seconds=seconds), moved, work, gpus).hours

    known = np.array([hours(row.gpus, 0, 0) for row in rows])
    slopes = np.array([[hours(row.gpus, 1, 0), hours(row.gpus, 0, 1)] for row in rows]) - known[:, None]
    measured = np.array([row.hours for row in rows])
    (seconds, latency), _, rank, _ = np.linalg.lstsq(slopes / measured[:, None], (measured - known) / measured)
    if rank < 2:
        raise ConfigError(
            "these hours do not tell computing from the network", remedy="Give rows of two numbers of machines."
        )
    latency = latency if abs(latency) > 1e-9 else 0.0  # no latency, and rounding
    if seconds <= 0 or latency < 0:
        raise ConfigError(
            "these hours would make the step or the network take no time", remedy="Check the rows and the bandwidths."
        )
    predicted = np.array([hours(row.gpus, float(seconds), float(latency)) for row in rows])
    return Calibration(
        step=dataclasses.replace(plain, seconds=float(seconds)),
        network=dataclasses.replace(network, between_latency=float(latency)),
        residuals=tuple((predicted / measured - 1).tolist()),
    )
