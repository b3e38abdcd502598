"""Resolutions with batches: which fit into a memory, which are worth a thought, and which one to take. Pure functions.

Source: Li et al., "Rethinking Training from Scratch for Object Detection", 2021, equation 1: resolution and batch are
chosen together so that a step fits into the memory of one card, at the least cost.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gesso.data.transforms import Shape
from gesso.errors import ConfigError
from gesso.training.memory import words_of


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One resolution with one batch.

    Attributes:
        resolution: the side of the recipe's resize (the short one, where it keeps the aspect ratio).
        shape: height and width of the largest padded pictures.
        pictures: on one device in a step.
        bytes: that a step holds at its worst moment.
        counted: for this batch; otherwise they are read off the line between two others.
        seconds: of a step; None where none could be measured.
        measured: for this setting; otherwise they are extrapolated.
        days: of one device, for all pictures of the stage.
        fits: into the memory.
        best: it fits, and no other that fits is as good in resolution, pictures and time, and better in one of them.
    """

    resolution: int
    shape: Shape
    pictures: int
    bytes: int
    counted: bool = True
    seconds: float | None = None
    measured: bool = False
    days: float | None = None
    fits: bool = False
    best: bool = False

    @property
    def images_per_second(self) -> float | None:
        """Pictures trained on in a second."""
        return None if self.seconds is None else self.pictures / self.seconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a choice has to keep to, where it can.

    Attributes:
        least: pictures on one device, at least.
        least_words: why so many.
        most: the highest resolution; None = any.
        most_words: what that is.
    """

    least: int = 1
    least_words: str = ""
    most: int | None = None
    most_words: str = ""

    def allows(self, resolution: int) -> bool:
        """Whether a resolution is not too high."""
        return self.most is None or resolution <= self.most


def bytes_of_batches(
    count: Callable[[int], int], batches: Sequence[int], *, every: bool = False
) -> dict[int, tuple[int, bool]]:
    """Bytes of a step for each batch, and whether they were counted.

    Counted are the smallest and the largest batch. Between them the straight line is taken, which is never below: the
    peak is the largest of several amounts, one for each moment of the step, that grow in a straight line each.

    Args:
        count: gives the bytes of a batch.
        batches: pictures.
        every: count all of them.
    """
    low, high = min(batches), max(batches)
    found = {batch: count(batch) for batch in batches if every or batch in (low, high)}
    slope = 0.0 if low == high else (found[high] - found[low]) / (high - low)
    return {b: (found.get(b, math.ceil(found[low] + slope * (b - low))), b in found) for b in batches}


def judged(choices: Sequence[Choice], budget: int) -> list[Choice]:
    """The same with ``fits`` and ``best`` for a memory of ``budget`` bytes."""
    fitting = [choice for choice in choices if choice.bytes <= budget]
    return [
        dataclasses.replace(
            choice,
            fits=choice in fitting,
            best=choice in fitting and not any(_beats(other, choice) for other in fitting),
        )
        for choice in choices
    ]


def _beats(one: Choice, other: Choice) -> bool:
    """Whether ``one`` is nowhere worse and somewhere better."""
    a, b = _merits(one), _merits(other)
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _merits(choice: Choice) -> tuple[float, float, float]:
    return choice.resolution, choice.pictures, -(choice.days or 0.0)


def take(choices: Sequence[Choice], limits: Limits, *, name: str, budget: int, unit: str) -> tuple[Choice, str]:
    """The choice to take, and the reason.

    Of those that fit and keep to the limits, those of the highest resolution, and of these the one of the fewest days.
    Where none has the least pictures, those with the most pictures come first.

    Args:
        choices: of ``judged``.
        limits: what to keep to.
        name: of the stage.
        budget: bytes.
        unit: of days.

    Raises:
        ConfigError: none fits; the message says what the smallest needs.
    """
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        smallest = min(choices, key=lambda choice: choice.bytes)
        raise ConfigError(
            f"{name}: nothing fits into {words_of(budget)}: the smallest setting, {_words(smallest)}, needs "
            f"{words_of(smallest.bytes)}",
            remedy=f"Give --memory {words_of(smallest.bytes)} or more, or smaller --resolutions or --batches.",
        )
    if not any(limits.allows(choice.resolution) for choice in fitting):
        limits = dataclasses.replace(limits, most=None, most_words="")
    allowed = [choice for choice in fitting if limits.allows(choice.resolution)]
    many = [choice for choice in allowed if choice.pictures >= limits.least]
    if not many:
        return max(allowed, key=lambda c: (c.pictures, c.resolution, -(c.days or 0.0))), (
            f"{_pictures(limits.least)} on a device ({limits.least_words}) fit at no resolution; these are the "
            "most that do, at the highest resolution for them"
        )
    chosen = max(many, key=lambda c: (c.resolution, -(c.days or 0.0), c.pictures))
    reason = f"the highest resolution{limits.most_words} that fits into {words_of(budget)}"
    if limits.least > 1:
        reason += f" with at least {_pictures(limits.least)} on a device ({limits.least_words})"
    if chosen.days is not None and sum(c.resolution == chosen.resolution for c in many) > 1:
        reason += f"; of its batches the cheapest, {number_words(chosen.days)} {unit}"
    higher = [c for c in choices if c.resolution > chosen.resolution and c.pictures >= limits.least]
    higher = [c for c in higher if limits.allows(c.resolution)]
    if higher:
        following = min(higher, key=lambda c: (c.resolution, c.bytes))
        reason += f"; {_words(following)} would need {words_of(following.bytes)}"
    return chosen, reason


def number_words(value: float | None) -> str:
    """Three digits, and all before the point; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _words(choice: Choice) -> str:
    return f"{choice.resolution} pixels with {_pictures(choice.pictures)}"


def _pictures(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"
