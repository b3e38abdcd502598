"""Sublinear memory: which activations of backbone and neck are thrown away and computed again, and what that takes.

    none           nothing is computed again
    stages         each stage of the backbone and the neck is a segment
    sqrt           the segments for which the stored inputs and the largest segment together are smallest: algorithm 3
                   of Chen et al., with measured bytes instead of equal layers
    budget=11GB    the segments that take the least time and keep a step within so many bytes of tensors

Within a segment only the input is kept; everything else is computed again when the backward pass comes to it. Losses,
gradients and running statistics stay what they are (``gesso.models.segments``).

Source: Training Deep Nets with Sublinear Memory Cost (Chen et al. 2016), section 4 and appendix A.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gesso import distributed
from gesso.errors import ConfigError
from gesso.models import segments
from gesso.models.detector import Detector
from gesso.models.segments import Segment
from gesso.structures import ImageBatch, Targets
from gesso.training import recomputation
from gesso.training.activations import COPIES, UnitCost, measure_units, total_bytes
from gesso.training.ema import EMA
from gesso.training.recomputation import Move, Moves

_UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Memory:
    """What is computed again.

    Attributes:
        kind: the way to choose.
        budget: bytes, of the kind budget; else None.
    """

    kind: Literal["none", "stages", "sqrt", "budget"] = "none"
    budget: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is computed again, and what is expected of it; bytes are those of one process.

    Attributes:
        memory: what was asked for.
        segments: for ``apply_memory``.
        units: how many units lie in segments.
        all_units: how many units there are.
        kept_bytes: of the backbone's and neck's activations kept at the end of the forward pass.
        largest_bytes: the largest segment's, while it is computed again.
        all_bytes: of the backbone's and neck's activations where nothing is computed again.
        peak_bytes: the most that a step holds, everything included.
        seconds: of a step's computing again.
        all_seconds: of the forward pass of all units.
    """

    memory: Memory
    segments: tuple[Segment, ...] = ()
    units: int = 0
    all_units: int = 0
    kept_bytes: int = 0
    largest_bytes: int = 0
    all_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    all_seconds: float = 0.0

    def describe(self) -> str:
        """One line for the log."""
        if not self.segments:
            return f"memory {self.memory.kind}: nothing is computed twice"
        return (
            f"memory {self.memory.kind}: {self.units} of {self.all_units} blocks are computed twice, in "
            f"{len(self.segments)} segments; {words_of(self.kept_bytes)} of {words_of(self.all_bytes)} of activations "
            f"of backbone and neck are kept, at most {words_of(self.largest_bytes)} come back at a time; "
            f"{self.seconds / max(self.all_seconds, 1e-9):.0%} of their forward pass is done again; a step should hold "
            f"{words_of(self.peak_bytes)} at most"
        )


def parse_memory(text: str) -> Memory:
    """Reads ``none``, ``stages``, ``sqrt`` or ``budget=11GB``.

    Raises:
        ConfigError: it is none of them.
    """
    if text in ("none", "stages", "sqrt"):
        return Memory(text)  # type: ignore[arg-type]
    key, equals, amount = text.partition("=")
    bytes = parse_bytes(amount) if key.lower() == "budget" and equals else 0
    if bytes == 0:
        raise ConfigError(
            f"memory is '{text}'",
            remedy="Write none, stages, sqrt, or a budget in MB, GB, MiB or GiB such as budget=11GB.",
        )
    return Memory("budget", bytes)


def parse_bytes(text: str) -> int:
    """The bytes of ``11GB``, ``512 MiB`` and the like; 0 where it is nothing of the kind."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})", text, re.IGNORECASE)
    return round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def save_memory(detector: Detector, memory: Memory, batch: ImageBatch, targets: Targets, *, fixed_bytes: int) -> Plan:
    """Chooses what is computed again in training from now on, and lets the detector do so; all processes together.

    Args:
        detector: on its device, with its norm policy applied; what was chosen before is dropped. Where it is compiled,
            compiled graphs need less than is measured here.
        memory: of ``parse_memory``.
        batch: on the device, as many pictures as a process has in one forward pass, of the largest shape.
        targets: their ground truth.
        fixed_bytes: of ``held_bytes``.

    Raises:
        ConfigError: no choice keeps within the budget.
    """

    def choose() -> Plan:
        return plan_memory(memory, measure_units(detector, batch, targets), fixed_bytes)

    plan = Plan(memory=memory) if memory.kind == "none" else distributed.from_main(choose)
    apply_memory(detector, plan)
    return plan


def apply_memory(detector: Detector, plan: Plan) -> None:
    """Lets the detector compute again what ``plan`` says, and nothing else."""
    segments.install(detector, plan.segments)


def held_bytes(module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> int:
    """What a step holds beside activations: weights, buffers, gradients, the optimizer's state and averages."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):  # made by the first step
        moments += [parameter for parameter in trained if parameter not in optimizer.state for _ in range(2)]
    averages = [] if ema is None else list(ema.average.values())
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *trained, *moments, *averages))


def plan_memory(memory: Memory, costs: Sequence[UnitCost], fixed_bytes: int) -> Plan:
    """Which segments are computed again; a pure function.

    Args:
        memory: how to choose.
        costs: of ``measure_units``.
        fixed_bytes: of ``held_bytes``.

    Raises:
        ConfigError: no choice keeps within the budget.
    """
    moves = recomputation.all_moves(costs)
    if memory.kind == "stages":
        chosen = recomputation.by_stages(costs, moves)
    elif memory.kind == "sqrt":
        chosen = recomputation.smallest_sum(costs, moves)
    elif memory.budget is not None:
        chosen = _within(memory.budget, moves, fixed_bytes)
    else:
        chosen = recomputation.keep_all(moves)
    copies = sum(cost.bytes for cost in costs if cost.name == COPIES)
    again = [k for move in chosen if move.segment is not None for k in range(move.start, move.stop)]
    return Plan(
        memory=memory,
        segments=tuple(move.segment for move in chosen if move.segment is not None),
        units=sum(1 for k in again if costs[k].bytes),
        all_units=sum(1 for cost in costs if cost.holder and cost.bytes),
        kept_bytes=sum(move.keeps for move in chosen[:-1]) - copies,
        largest_bytes=max(move.again for move in chosen),
        all_bytes=total_bytes(costs[:-1]) - copies,
        peak_bytes=fixed_bytes + recomputation.peak(chosen),
        seconds=sum(move.seconds for move in chosen),
        all_seconds=sum(cost.seconds for cost in costs),
    )


def _within(budget: int, moves: Moves, fixed_bytes: int) -> list[Move]:
    """The quickest choice that keeps within a budget."""
    chosen = recomputation.quickest(moves, budget - fixed_bytes)
    if chosen is None:
        least = words_of(recomputation.peak(recomputation.least_peak(moves)) + fixed_bytes)
        raise ConfigError(
            f"a step does not fit into the memory budget of {words_of(budget)}: the least is {least}, "
            f"{words_of(fixed_bytes)} of it for weights, gradients, averages and the optimizer",
            remedy=f"Set memory to budget={least} or above, or take fewer pictures at a time.",
        )
    return chosen


def words_of(bytes: int) -> str:
    """Bytes for people, in a unit that budgets are written in; rounded up, so that as much is enough."""
    if bytes < 10**10:
        return f"{math.ceil(bytes / 10**6)}MB"
    return f"{math.ceil(bytes / 10**8) / 10}GB"
