"""The search for what is computed again: a walk over a detector's units, each move a segment or a unit that is kept.

All functions are pure. Bytes are those of activations; a step's peak is where what is kept in front, what the move at
work keeps or has computed again, and the gradients at work are most together. What lies behind is free by then.

Source: Training Deep Nets with Sublinear Memory Cost (Chen et al. 2016), section 4 and appendix A.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from gesso.models.segments import Segment
from gesso.training.activations import UnitCost, total_bytes

_FINENESS = 4096
"""Parts of the whole in which bytes are counted while the least time is looked for."""


class Move(NamedTuple):
    """From the unit ``start`` to the unit ``stop``.

    Attributes:
        start: the first unit.
        stop: behind the last unit.
        segment: what is computed again; None where the one unit is kept.
        keeps: bytes that stay from its forward to its backward pass.
        again: bytes that are computed again.
        most: the most bytes during its backward pass, aside from what the units in front keep.
        seconds: of computing it again.
    """

    start: int
    stop: int
    segment: Segment | None
    keeps: int
    again: int
    most: int
    seconds: float


Moves = Sequence[Sequence[Move]]
"""All that may be done at each unit."""


class _State(NamedTuple):
    """Bytes kept and seconds spent on the units so far, and the moves, the last one first."""

    kept: int
    seconds: float
    move: Move | None = None
    before: "_State | None" = None

    def after(self, move: Move) -> "_State":
        return _State(self.kept + move.keeps, self.seconds + move.seconds, move, self)

    def moves(self) -> list[Move]:
        found, state = [], self
        while state.move is not None and state.before is not None:
            found.append(state.move)
            state = state.before
        return found[::-1]


def all_moves(costs: Sequence[UnitCost]) -> Moves:
    """At each unit, keeping it first, then the segments that begin there, those aside for which nothing is kept."""
    beside = _beside(costs)
    found: list[list[Move]] = []
    for start, first in enumerate(costs):
        whole = first.bytes + first.input_bytes
        found.append([Move(start, start + 1, None, whole, 0, whole + beside[start], 0.0)])
        there, most, seconds = 0, 0, 0.0
        for stop in range(start + 1, len(costs) + 1):
            last = costs[stop - 1]
            if not last.holder or not first.starts or (last.bound and stop > start + 1):
                break
            there += last.bytes + last.input_bytes
            most = max(most, there + beside[stop - 1])
            seconds += last.seconds
            segment = _segment(costs, start, stop)
            if segment is not None and there > first.input_bytes:
                keeps = first.input_bytes
                found[start].append(Move(start, stop, segment, keeps, there - keeps, most, seconds))
    return found


def _beside(costs: Sequence[UnitCost]) -> list[int]:
    """Of each unit, the bytes that are there during its backward pass beside what is kept for it and in front of it.

    They are its output, which a ReLU at its end keeps; two gradients of its output or of its largest tensor inside;
    and those of earlier maps, which the backward pass of the neck has made by then.
    """
    outputs = [*(cost.input_bytes for cost in costs[1:]), 0]
    found, maps = [], 0
    for cost, output in zip(costs, outputs, strict=True):
        maps += cost.input_bytes if cost.bound else 0
        found.append(output + 2 * max(cost.largest_bytes, output) + maps)
    return found


def _segment(costs: Sequence[UnitCost], start: int, stop: int) -> Segment | None:
    """The one segment of a run of units; None where they cannot run as one."""
    run = costs[start:stop]
    stage = run[0].stage
    if all(a.holder == b.holder and a.stop == b.start for a, b in pairwise(run)):
        return Segment(run[0].holder, run[0].start, run[-1].stop)
    around = [cost.stage for cost in (*costs[max(start - 1, 0) : start], *costs[stop : stop + 1])]
    if all(cost.whole and cost.stage == stage for cost in run) and stage not in around:
        return Segment(stage, 0, 0)
    return None


def peak(chosen: Iterable[Move]) -> int:
    """The most bytes at any time of a step."""
    kept = most = 0
    for move in chosen:
        most = max(most, kept + move.most)
        kept += move.keeps
    return most


def keep_all(moves: Moves) -> list[Move]:
    """Nothing is computed again."""
    return [options[0] for options in moves]


def by_stages(costs: Sequence[UnitCost], moves: Moves) -> list[Move]:
    """The longest segments within each stage, one after the other."""
    chosen: list[Move] = []
    at = 0
    while at < len(costs):
        inside = [m for m in moves[at] if all(cost.stage == costs[at].stage for cost in costs[at : m.stop])]
        chosen.append(inside[-1])
        at = inside[-1].stop
    return chosen


def smallest_sum(costs: Sequence[UnitCost], moves: Moves) -> list[Move]:
    """Those with which the kept bytes and the largest segment's together are least; of equal ones the faster."""
    best, chosen = (total_bytes(costs), 0.0), keep_all(moves)
    for largest in sorted({move.again for options in moves for move in options}):
        state = _least_kept([[move for move in options if move.again <= largest] for options in moves])
        assert state is not None  # there is no limit
        if (state.kept + largest, state.seconds) < best:
            best, chosen = (state.kept + largest, state.seconds), state.moves()
    return chosen


def _least_kept(moves: Moves, limit: float = math.inf) -> _State | None:
    """The choice that keeps least, of those whose peak is at most ``limit``; None where there is none."""
    states: list[_State | None] = [_State(0, 0.0), *(None for _ in moves)]
    for at, options in enumerate(moves):
        state = states[at]
        if state is None:
            continue
        for move in options:
            old = states[move.stop]
            new = state.after(move)
            if state.kept + move.most <= limit and (old is None or new[:2] < old[:2]):
                states[move.stop] = new
    return states[-1]


def least_peak(moves: Moves) -> list[Move]:
    """The choice with the least peak, by halving the interval that it lies in."""
    chosen = keep_all(moves)
    low, high = 0, peak(chosen)
    while low < high:
        middle = (low + high) // 2
        state = _least_kept(moves, middle)
        if state is None:
            low = middle + 1
        else:
            chosen, high = state.moves(), middle
    return chosen


def quickest(moves: Moves, limit: int) -> list[Move] | None:
    """The choice of least time whose peak is at most ``limit``; None where there is none.

    Bytes are rounded up, so that few states remain; what just fits may be missed, but for the choice of ``least_peak``
    and for keeping all.
    """
    certain = [chosen for chosen in (keep_all(moves), least_peak(moves)) if peak(chosen) <= limit]
    grain = max(sum(options[0].keeps for options in moves) // _FINENESS, 1)
    states: list[dict[int, _State]] = [{0: _State(0, 0.0)}, *({} for _ in moves)]
    for at, options in enumerate(moves):
        fastest = math.inf
        for state in sorted(states[at].values(), key=lambda state: state.kept):
            if state.seconds >= fastest:
                continue  # another one keeps less and is no slower
            fastest = state.seconds
            for move in options:
                if state.kept + move.most > limit:
                    continue
                kept = -(-(state.kept + move.keeps) // grain) * grain
                seconds = state.seconds + move.seconds
                if kept not in states[move.stop] or seconds < states[move.stop][kept].seconds:
                    states[move.stop][kept] = _State(kept, seconds, move, state)
    certain += [state.moves() for state in states[-1].values()]
    return min(certain, key=lambda chosen: sum(move.seconds for move in chosen), default=None)
