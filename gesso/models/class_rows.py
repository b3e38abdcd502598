"""Which rows of a head's weights belong to which class, so that they can be carried over to other classes.

A module that holds such weights says so in ``class_rows``; ``weights.load_weights`` looks for it.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """How the first axis of a tensor is divided: ``before`` blocks of (background and) classes of ``after`` rows each.

    Attributes:
        background: whether a background stands before the classes.
        before: blocks, such as the anchors of a cell.
        after: rows of a class, such as the four deltas of its boxes.
    """

    background: bool = False
    before: int = 1
    after: int = 1

    def length(self, classes: int) -> int:
        """The first axis for so many classes."""
        return self.before * (classes + self.background) * self.after

    def by_class(self, values: Tensor) -> Tensor:
        """The tensor as (before, background + classes, after, ...), a view where that can be one."""
        return values.reshape(self.before, -1, self.after, *values.shape[1:])


@runtime_checkable
class HasClassRows(Protocol):
    """A module some of whose weights stand for classes."""

    def class_rows(self) -> dict[str, ClassRows]:
        """Its tensors with a row, or several, for each class, by their names within the module."""
        ...
