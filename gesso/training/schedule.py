"""Learning rates as pure functions of the step.

Warm-up: Goyal et al., "Accurate, Large Minibatch SGD", section 2.2; the form of direct pre-training's published code,
lr * (1 - (1 - t / W) * (1 - ratio)). Steps at shares of the schedule: Faster R-CNN with FPN (8 and 11 of 12 epochs).
"""

import math
from dataclasses import dataclass
from typing import Literal

from gesso.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves from the first step to the last."""

    kind: Literal["constant", "multi_step", "cosine"] = "multi_step"
    """constant; multi_step: times ``factor`` at each milestone; cosine: down to 0 at the end."""
    warmup_steps: int = 500
    """Steps in which the rate rises linearly from ``warmup_ratio`` times the rate; 0 = no warm-up."""
    warmup_ratio: float = 0.001
    """The first rate as a share of the rate."""
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    """Where a multi-step schedule drops, as shares of all steps, rising."""
    factor: float = 0.1
    """What a multi-step schedule multiplies the rate by at each milestone."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.warmup_ratio <= 1:
            raise ConfigError("schedule: warmup_steps must be at least 0 and warmup_ratio between 0 and 1")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ConfigError(f"schedule: milestones must rise between 0 and 1, found {self.milestones}")
        if not 0 < self.factor <= 1:
            raise ConfigError(f"schedule: factor must lie above 0 and not above 1, found {self.factor}")


def rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """What the learning rate is multiplied by at ``step`` (counted from 0) of ``total_steps``."""
    return _warmup(config, step) * _decay(config, step, total_steps)


def _warmup(config: ScheduleConfig, step: int) -> float:
    if step >= config.warmup_steps:
        return 1.0
    return 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)


def _decay(config: ScheduleConfig, step: int, total_steps: int) -> float:
    if config.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(step / max(total_steps, 1), 1.0)))
    if config.kind == "multi_step":
        passed = sum(step >= round(milestone * total_steps) for milestone in config.milestones)
        return float(config.factor**passed)
    return 1.0
