"""Who goes where when a data set is split: groups of pictures onto parts, by a hash, with the classes balanced.

A group (pictures that must stay together) has a position in [0, 1) that depends on the seed and an image id alone; the
parts are consecutive intervals of it. A part that is given as a share keeps its interval when pictures are added, so a
picture stays where it was. What a hash leaves uneven is mended by few moves: class by class, the rarest first, and at
the end the numbers of pictures, groups are moved from a part with too many to one with too few, until each part is
within ``TOLERANCE`` of what is due to it (and has at least one picture of every class that has enough groups). A move
may not undo what was mended before; but a number of pictures that was asked for is met, whatever the classes.

The order, rarest label first, is that of Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data",
ECML PKDD 2011; starting from the hash is ours, and is what keeps pictures in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gesso.errors import ConfigError

TOLERANCE = 0.1
REST = "train"
_AT_ONCE = 1024

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quota:
    """What is due to each part of N pictures.

    Args:
        names: of the parts, P.
        shares: float64 (P,), of all pictures; they sum to at most 1.
        exact: bool (P,), True where a number was asked for.
    """

    names: tuple[str, ...]
    shares: Floats
    exact: npt.NDArray[np.bool_]


def quota(parts: Mapping[str, float | int], count: int) -> Quota:
    """Reads ``{"train": 0.8, "val": 0.2}`` or ``{"val": 500}`` for ``count`` pictures.

    A float is a share of all pictures, an int a number of them. Where no part is called "train", what is left becomes
    "train"; otherwise what is left is in no part.

    Raises:
        ConfigError: no part, a name that cannot be a folder, a share outside (0, 1], a number below 1, or more pictures
            asked for than there are.
    """
    shares: dict[str, float] = {}
    for name, value in parts.items():
        if not name or name.startswith(".") or any(c in name for c in "/\\:\0"):
            raise ConfigError(f"'{name}' cannot be the name of a part", remedy="It becomes a folder: use letters.")
        if isinstance(value, bool) or not (0 < value <= 1 if isinstance(value, float) else value >= 1):
            raise ConfigError(
                f"part '{name}': {value} is neither a share nor a number",
                remedy="Give a share such as 0.2 or a number of pictures such as 500.",
            )
        shares[name] = value if isinstance(value, float) else value / max(count, 1)
    exact = {name for name, value in parts.items() if not isinstance(value, float)}
    total = sum(shares.values())
    loose = [name for name in shares if name not in exact]
    if 1 < total <= 1 + len(shares) / max(count, 1) and loose:
        # Shares beside numbers that were rounded to fit: the greatest share gives way by less than a picture a part.
        greatest = max(loose, key=lambda name: shares[name])
        shares[greatest] -= min(total - 1, shares[greatest])
        total = sum(shares.values())
    if not shares or total > 1 + 1e-9:
        asked = ", ".join(f"{name} {value}" for name, value in parts.items()) or "nothing"
        raise ConfigError(f"the parts ({asked}) do not fit {count} pictures", remedy="Ask for less.")
    if REST not in shares and total < 1 - 1e-9:
        shares = {REST: 1 - total, **shares}
        if exact == set(parts):
            exact.add(REST)
    values = np.array(list(shares.values()))
    return Quota(tuple(shares), values, np.array([name in exact for name in shares]))


def assign(due: Quota, positions: Floats, holdings: "Holdings", *, pinned: Ints, balance: bool = True) -> Ints:
    """Puts G groups into parts.

    Args:
        due: what is due to each of P parts.
        positions: (G,) in [0, 1).
        holdings: which classes each group holds, and how many pictures it has.
        pinned: int64 (G,), the part that a group must be in, -1 where it is free.
        balance: False leaves every group where the hash put it.

    Returns:
        int64 (G,), the part of each group; P where it is in none.
    """
    shares = np.append(due.shares, max(0.0, 1.0 - float(due.shares.sum())))
    edges = np.cumsum(shares[:-1])
    if shares[-1] < 1e-9:
        edges = edges[:-1]
    at = positions
    if due.exact.any():
        order = np.argsort(positions, kind="stable")
        sizes = holdings.sizes[order]
        at = np.empty(len(positions))
        at[order] = (np.cumsum(sizes) - 0.5 * sizes) / max(int(sizes.sum()), 1)
    part = np.searchsorted(edges, at, side="right").astype(np.int64)
    part = np.where(pinned < 0, part, pinned)
    if not balance or not len(part) or not len(edges):
        return part
    border = np.abs(at[:, None] - edges[None, :]).min(axis=1)
    border[pinned >= 0] = np.inf
    return _Balancer(holdings, part, shares, border).mend_all(np.append(due.exact, due.exact.any()))


class Holdings:
    """How many pictures with each class each group holds: the same entries by group and by class.

    The last class (number C) is "any picture": every group holds it once for each of its pictures.
    """

    def __init__(self, sizes: Ints, groups: Ints, classes: Ints, num_classes: int) -> None:
        """``sizes``: (G,) pictures a group; ``groups`` and ``classes``: one entry for each (picture, class) pair."""
        self.sizes = sizes
        self.num_classes = num_classes
        keys, weights = np.unique(groups * (num_classes + 1) + classes, return_counts=True)
        every = np.arange(len(sizes), dtype=np.int64) * (num_classes + 1) + num_classes
        keys, weights = np.concatenate((keys, every)), np.concatenate((weights, sizes))
        order = np.argsort(keys, kind="stable")
        self.groups, self.classes = np.divmod(keys[order], num_classes + 1)
        self.weights: Ints = weights[order].astype(np.int64)
        self.starts: Ints = np.searchsorted(self.groups, np.arange(len(sizes) + 1)).astype(np.int64)
        self._by_class = np.argsort(self.classes, kind="stable")
        self._class_starts = np.searchsorted(self.classes[self._by_class], np.arange(num_classes + 2))

    def of_class(self, label: int) -> Ints:
        """The rows of the entries of one class."""
        return self._by_class[self._class_starts[label] : self._class_starts[label + 1]]

    def counts(self, part: Ints, parts: int) -> Ints:
        """int64 (C + 1, parts): pictures with each class in each part."""
        cells = self.classes * parts + part[self.groups]
        shape = (self.num_classes + 1, parts)
        return np.bincount(cells, self.weights, shape[0] * shape[1]).astype(np.int64).reshape(shape)


class _Balancer:
    """Moves groups between parts, class by class; what is mended is never made worse again."""

    def __init__(self, holdings: Holdings, part: Ints, shares: Floats, border: Floats) -> None:
        """``border``: (G,) how far a group lies from a border between parts; inf where it must not move."""
        self._held = holdings
        self._part = part.copy()
        self._shares = shares
        self._border = border
        self._counts = holdings.counts(part, len(shares))
        self._low = np.zeros_like(self._counts)
        self._high = np.zeros_like(self._counts)
        self._mended = np.zeros(len(self._counts), bool)

    def mend_all(self, exact: npt.NDArray[np.bool_]) -> Ints:
        """Mends every class, the rarest first, and at the end the numbers of pictures. Returns the parts."""
        totals = self._counts.sum(axis=1)
        for label in np.argsort(totals[:-1], kind="stable").tolist():
            if totals[label]:
                self._set_class_bounds(label)
                self._mend(label)
        due = self._shares * totals[-1]
        self._low[-1] = np.where(exact, np.round(due), np.floor(due * (1 - TOLERANCE / 2)))
        self._high[-1] = np.where(exact, np.round(due), np.ceil(due * (1 + TOLERANCE / 2)))
        self._mend(self._held.num_classes)
        if exact.any():
            self._mend(self._held.num_classes, yielding=True)
        return self._part

    def _set_class_bounds(self, label: int) -> None:
        due = self._shares * self._counts[label].sum()
        low = np.floor(due * (1 - TOLERANCE)).astype(np.int64)
        # With too few groups for all parts, those with the greatest shares come first.
        greatest = np.argsort(-self._shares[:-1], kind="stable")[: len(self._held.of_class(label))]
        low[greatest] = np.maximum(low[greatest], 1)
        self._low[label] = low
        self._high[label] = np.maximum(np.ceil(due * (1 + TOLERANCE)), low)

    def _mend(self, label: int, *, yielding: bool = False) -> None:
        """Moves groups until the bounds of a class hold; only where ``yielding``, at the cost of other classes."""
        rows = self._held.of_class(label)
        rows = rows[np.argsort(self._border[self._held.groups[rows]], kind="stable")]
        rows = rows[np.isfinite(self._border[self._held.groups[rows]])]
        stuck: set[tuple[int, int]] = set()
        self._mended[label] = True
        for _ in range(2 * len(rows)):
            move = self._next_move(label, stuck)
            if move is None:
                return
            group = self._candidate(label, rows, *move, yielding=yielding)
            if group is None:
                stuck.add(move)
            else:
                self._move(group, *move)

    def _next_move(self, label: int, stuck: set[tuple[int, int]]) -> tuple[int, int] | None:
        """The parts (from, to) that are furthest apart where a bound is broken; None where no move would help."""
        counts, low, high = self._counts[label], self._low[label], self._high[label]
        excess = counts - self._shares * counts.sum()
        moves = [
            (float(excess[a] - excess[b]), -a, -b)
            for a in np.flatnonzero(counts > low).tolist()
            for b in np.flatnonzero(counts < high).tolist()
            if a != b and (a, b) not in stuck and (counts[a] > high[a] or counts[b] < low[b])
        ]
        if not moves:
            return None
        _, a, b = max(moves)
        return -a, -b

    def _candidate(self, label: int, rows: Ints, source: int, target: int, *, yielding: bool) -> int | None:
        """The first group, by its distance from a border, that may go; where ``yielding``, that which harms least."""
        here = rows[self._part[self._held.groups[rows]] == source]
        before = self._off(label, source, 0) + self._off(label, target, 0)
        weights = self._held.weights[here]
        better = self._off(label, source, -weights) + self._off(label, target, weights) < before
        groups = self._held.groups[here[better]]
        for first in range(0, len(groups), _AT_ONCE):
            some = groups[first : first + _AT_ONCE]
            harm = self._harm(some, source, target)
            best = int(np.argmin(harm))
            if yielding or not harm[best]:
                return int(some[best])
        return None

    def _harm(self, groups: Ints, source: int, target: int) -> Ints:
        """By how many pictures more the mended classes would be outside of their bounds (over both parts)."""
        starts = self._held.starts[groups]
        counts = self._held.starts[groups + 1] - starts
        first = np.cumsum(counts) - counts
        rows = np.repeat(starts - first, counts) + np.arange(int(counts.sum()))
        labels, weights = self._held.classes[rows], self._held.weights[rows]
        before = self._off(labels, source, 0) + self._off(labels, target, 0)
        after = self._off(labels, source, -weights) + self._off(labels, target, weights)
        return np.asarray(np.add.reduceat(np.maximum(after - before, 0) * self._mended[labels], first), np.int64)

    def _off(self, label: int | Ints, part: int, change: int | Ints) -> Ints:
        """How far the counts of classes in a part would be outside their bounds after a change."""
        count = self._counts[label, part] + change
        outside = np.maximum(self._low[label, part] - count, 0) + np.maximum(count - self._high[label, part], 0)
        return np.asarray(outside, np.int64)

    def _move(self, group: int, source: int, target: int) -> None:
        rows = slice(int(self._held.starts[group]), int(self._held.starts[group + 1]))
        self._counts[self._held.classes[rows], source] -= self._held.weights[rows]
        self._counts[self._held.classes[rows], target] += self._held.weights[rows]
        self._part[group] = target
