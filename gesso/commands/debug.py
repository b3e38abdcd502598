"""``gesso debug replay``."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from gesso.commands.parsing import Result, parse
from gesso.run.finite import Finding
from gesso.run.replay import Picture, Replay, replay

MOST = 8
"""Names of a list that are shown."""


@dataclass(frozen=True)
class ReplayArguments:
    """Repeats a training step that was not finite, and names the first module with a number that is not.

    Exit code 0: it was not finite again; 1: this time it was finite.
    """

    file: Positional[Path]
    """RUN/failures/STEP.pt, which gesso train names where it stops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON; numbers that are not finite are the texts nan, inf and -inf in it."""


def replay_(words: list[str]) -> Result:
    """``gesso debug replay``."""
    given = parse(ReplayArguments, words, "debug replay")
    found = replay(given.file, device=given.device)
    return Result("\n".join(_lines(found)), _data(found) if given.json else None, 0 if found.repeated else 1)


def _data(found: Replay) -> Any:
    """The same as JSON."""
    data = dataclasses.asdict(found) | {"repeated": found.repeated}
    for key in ("rows", "length") if found.finding is not None else ():
        del data["finding"][key]  # the pictures say it
    return _plain(data)


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _lines(found: Replay) -> list[str]:
    """What was found, for people."""
    made = f"{found.pictures} pictures" + (f" on {found.processes} processes" if found.processes > 1 else "")
    norm = "" if found.gradient_norm is None else f", gradient_norm {found.gradient_norm:.4g}"
    lines = [
        f"step {found.step} ({found.stage} {found.stage_step}), {made}; repeated in one process on {found.device}",
        ", ".join(f"{name} {value:.4g}" for name, value in found.losses.items()) + norm,
        "",
        *_verdict(found),
        "",
    ]
    if found.broken_pictures:
        lines.append(f"not finite in the batch itself: {_pictures(found.broken_pictures)}")
    if found.bad_weights:
        lines.append(f"not finite among the weights: {_some(found.bad_weights)}")
    if found.bad_gradients:
        lines.append(f"not finite among the gradients: {_some(found.bad_gradients)}")
    name, size = found.largest_weight
    ratio = "" if found.weight_ratio is None else f", {found.weight_ratio:,.4g} times the median of all layers"
    return [*lines, f"the largest weight: {size:.4g} in {name}{ratio}", *found.inexact]


def _verdict(found: Replay) -> list[str]:
    if found.finding is None:
        if not found.repeated:
            return ["This time everything is finite."]
        if found.gradient_norm is None:
            return ["No module makes the first number that is not finite."]
        return ["Every gradient is finite, but not their norm, the root of the sum of their squares."]
    lines = _described(found.finding, backward=found.backward)
    if found.bad_pictures:
        whole = len(found.bad_pictures) == found.pictures > 1
        lines.append(f"  pictures: {'all' if whole else _pictures(found.bad_pictures)}")
    if not found.repeated:
        lines.append("This time loss and gradients are finite all the same.")
    return lines


def _described(finding: Finding, *, backward: bool) -> list[str]:
    way = "In the backward pass the first" if backward else "The first"
    lines = [
        f"{way} module with a number that is not finite: {finding.module or 'the detector itself'} ({finding.kind})",
        f"  {finding.what}: {finding.bad:,} of {finding.values:,} values are not finite",
    ]
    if finding.input_range is not None:
        least, largest = finding.input_range
        lines.append(f"  its inputs lie between {least:.4g} and {largest:.4g}")
    return lines


def _pictures(pictures: Sequence[Picture]) -> str:
    return _some([f"row {p.row}" + (f" ({p.name})" if p.name else "") for p in pictures])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
