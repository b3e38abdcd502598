"""Learning rates as pure functions of the step.

Linear scaling: Goyal et al., "Accurate, Large Minibatch SGD", section 2.1; for detectors MegDet, section 3.1: one step
on k times the pictures at k times the rate has the variance of k steps. Warm-up: Goyal et al., section 2.2; the form of
direct pre-training's published code, lr * (1 - (1 - t / W) * (1 - ratio)). Steps at shares of the schedule: Faster
R-CNN with FPN (8 and 11 of 12 epochs). A power of what is left: DeepLab (Chen et al. 2017), section 4.1.2, and PSPNet.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from gesso.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves from the first step to the last."""

    kind: Literal["constant", "multi_step", "cosine", "poly"] = "multi_step"
    """constant; multi_step: times a factor at each milestone; cosine and poly: down to 0 at the end."""
    base_images: int | None = None
    """The pictures of a step that the optimizer's rate is stated for: the rate used is the rate times batch_size /
    base_images (linear scaling). None = the rate is used as it is."""
    warmup_steps: int = 500
    """Steps in which the rate rises linearly from ``warmup_ratio`` times the rate; 0 = no warm-up."""
    warmup_ratio: float | None = 0.001
    """The first rate as a share of the rate. None = the optimizer's rate before it is scaled, so that larger batches
    start as those of ``base_images`` do; smaller ones then have no warm-up."""
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    """Where a multi-step schedule drops, as shares of all steps, rising."""
    factor: float = 0.1
    """What a multi-step schedule multiplies the rate by at each milestone."""
    factors: tuple[float, ...] = ()
    """The factor of each milestone, where they differ; empty = ``factor`` at each."""
    power: float = 0.9
    """A poly schedule multiplies the rate by the share of the steps that is left, to this power."""

    def __post_init__(self) -> None:
        ratio = self.warmup_ratio
        if self.warmup_steps < 0 or (ratio is not None and not 0 <= ratio <= 1):
            raise ConfigError("schedule: warmup_steps must be at least 0 and warmup_ratio between 0 and 1")
        if self.base_images is not None and self.base_images < 1:
            raise ConfigError(f"schedule: base_images must be at least 1, found {self.base_images}")
        if ratio is None and self.base_images is None:
            raise ConfigError("schedule: warmup_ratio None needs base_images", remedy="Give one of them a number.")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ConfigError(f"schedule: milestones must rise between 0 and 1, found {self.milestones}")
        if not all(0 < factor <= 1 for factor in (self.factor, *self.factors)):
            found = self.factors or self.factor
            raise ConfigError(f"schedule: every factor must lie above 0 and not above 1, found {found}")
        if not self.power > 0:
            raise ConfigError(f"schedule: power must be above 0, found {self.power}")
        if self.factors and len(self.factors) != len(self.milestones):
            raise ConfigError(
                f"schedule: there are {len(self.factors)} factors for {len(self.milestones)} milestones",
                remedy="Give one for each, or none.",
            )


def rate_factor(config: ScheduleConfig, step: int, total_steps: int, batch_size: int) -> float:
    """What the optimizer's rate is multiplied by at ``step`` (counted from 0) of ``total_steps``.

    ``batch_size`` is the number of pictures of a step, over all processes.
    """
    return _scale(config, batch_size) * _warmup(config, step, batch_size) * _decay(config, step, total_steps)


def describe_rule(config: ScheduleConfig, rate: float, batch_size: int, total_steps: int) -> list[str]:
    """What follows from the optimizer's ``rate``, and by which rule, as lines for the log."""
    reached = rate * _scale(config, batch_size)
    first = reached * _first_share(config, batch_size)
    scaling = (
        "" if config.base_images is None else f" = {rate:g} x {batch_size} / {config.base_images} (linear scaling)"
    )
    lines = [f"learning rate {reached:g}{scaling}"]
    if config.warmup_steps > 0 and first < reached:
        lines.append(f"warm-up over {config.warmup_steps:,} steps from {first:g} to {reached:g}")
    else:
        lines.append("no warm-up")
    if config.kind == "cosine":
        lines.append(f"down to 0 along half a cosine over {total_steps:,} steps")
    elif config.kind == "poly":
        lines.append(f"down to 0 as the share of {total_steps:,} steps that is left, to the power {config.power:g}")
    elif config.kind == "multi_step" and config.milestones:
        lines.append(f"{_drops(config, total_steps)}, of {total_steps:,} in all")
    else:
        lines.append(f"constant over {total_steps:,} steps")
    return lines


def _drops(config: ScheduleConfig, total_steps: int) -> str:
    """For example "times 0.1 after steps 3,106 and 3,954, times 0.5 after step 4,802"."""
    pairs = zip(_factors(config), _drop_steps(config, total_steps), strict=True)
    parts = []
    for factor, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        steps = [f"{step:,}" for _, step in group]
        listed = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(steps[:-1])} and {steps[-1]}"
        parts.append(f"times {factor:g} after {listed}")
    return ", ".join(parts)


def _scale(config: ScheduleConfig, batch_size: int) -> float:
    return 1.0 if config.base_images is None else batch_size / config.base_images


def _first_share(config: ScheduleConfig, batch_size: int) -> float:
    """The first rate as a share of the rate that the warm-up reaches."""
    if config.warmup_ratio is None:
        return min(1.0, 1.0 / _scale(config, batch_size))
    return config.warmup_ratio


def _warmup(config: ScheduleConfig, step: int, batch_size: int) -> float:
    if step >= config.warmup_steps:
        return 1.0
    return 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - _first_share(config, batch_size))


def _decay(config: ScheduleConfig, step: int, total_steps: int) -> float:
    if config.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(step / max(total_steps, 1), 1.0)))
    if config.kind == "poly":
        left = 1.0 - min(step / max(total_steps, 1), 1.0)
        return math.pow(left, config.power)
    if config.kind == "multi_step":
        passed = sum(step >= drop for drop in _drop_steps(config, total_steps))
        return math.prod(_factors(config)[:passed])
    return 1.0


def _drop_steps(config: ScheduleConfig, total_steps: int) -> list[int]:
    return [round(milestone * total_steps) for milestone in config.milestones]


def _factors(config: ScheduleConfig) -> tuple[float, ...]:
    return config.factors or (config.factor,) * len(config.milestones)
