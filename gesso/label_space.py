"""The label space: ordered category names and what is known about them. The only owner of names <-> numbers.

Labels are int64, 0-based, in the order of ``names``. Names, never numbers, cross a file or module border; one space
maps to another by name, and says what was dropped. Needs the standard library only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gesso.errors import DataError, nearest


def normalise(name: str) -> str:
    """The form in which names are compared: stripped, inner white space single, lower case."""
    return " ".join(name.split()).lower()


@dataclass(frozen=True)
class LabelMap:
    """A map from the labels of one space to those of another.

    ``targets[i]`` is the label in the other space of source label i, or -1 where it is dropped; ``dropped`` are the
    source names without a counterpart, ``unused`` the target names that nothing maps to.
    """

    targets: tuple[int, ...]
    dropped: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LabelSpace:
    """Ordered category names, with super-categories, an is-a hierarchy, part-of relations, synonyms and original ids.

    Args:
        names: unique after ``normalise``; their order numbers the labels.
        supercategories: one a name, or None where there is none; empty means none at all.
        parents: is-a edges (child, parent), both names of the space; a child may have several parents.
        parts: part-of relations (whole, part), both names of the space.
        synonyms: other spelling -> name of the space.
        ids: the category ids of the source files, one a name; empty means 1, 2, 3, ...

    Raises:
        DataError: a name stands twice or is empty; an edge, part or synonym names an unknown category; the hierarchy
            has a circle; lengths differ.
    """

    names: tuple[str, ...]
    supercategories: tuple[str | None, ...] = ()
    parents: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.supercategories:
            object.__setattr__(self, "supercategories", (None,) * len(self.names))
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(1, len(self.names) + 1)))
        for what, values in (("super-categories", self.supercategories), ("category ids", self.ids)):
            if len(values) != len(self.names):
                raise DataError(f"{len(values)} {what} for {len(self.names)} category names")
        seen: dict[str, str] = {}
        for name in self.names:
            key = normalise(name)
            if not key:
                raise DataError("a category name is empty", remedy="Give every category a name.")
            if key in seen:
                raise DataError(f"the category name '{name}' stands twice (also as '{seen[key]}')")
            seen[key] = name
        for relation, pairs in (("is-a", self.parents), ("part-of", self.parts)):
            for pair in pairs:
                for name in pair:
                    if name not in self.names:
                        raise DataError(f"the {relation} relation {pair} names an unknown category '{name}'")
        for other, name in self.synonyms.items():
            if name not in self.names:
                raise DataError(f"the synonym '{other}' stands for an unknown category '{name}'")
        for name in self.names:
            if name in self.ancestors(name):
                raise DataError(f"the is-a hierarchy has a circle through '{name}'")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers = {normalise(name): i for i, name in enumerate(self.names)}
        for other, name in self.synonyms.items():
            numbers.setdefault(normalise(other), self.names.index(name))
        return numbers

    def find(self, name: str) -> int | None:
        """The label of ``name`` or of a synonym, compared after ``normalise``; None where it is unknown."""
        return self._numbers.get(normalise(name))

    def index(self, name: str) -> int:
        """The label of ``name``. Raises DataError with the nearest names where it is unknown."""
        label = self.find(name)
        if label is None:
            raise DataError(f"unknown category '{name}'", remedy=nearest(name, self.names))
        return label

    def map_to(self, other: "LabelSpace") -> LabelMap:
        """Maps this space to ``other`` by name and synonym (of either), and says what has no counterpart."""
        spellings: dict[str, list[str]] = {name: [name] for name in self.names}
        for synonym, name in self.synonyms.items():
            spellings[name].append(synonym)
        targets = []
        for name in self.names:
            labels = (other.find(spelling) for spelling in spellings[name])
            targets.append(next((label for label in labels if label is not None), -1))
        used = set(targets)
        return LabelMap(
            targets=tuple(targets),
            dropped=tuple(name for name, label in zip(self.names, targets, strict=True) if label < 0),
            unused=tuple(name for label, name in enumerate(other.names) if label not in used),
        )

    def ancestors(self, name: str) -> frozenset[str]:
        """All names above ``name`` in the is-a hierarchy, over all paths, without itself."""
        return self._reach(name, self._up)

    def descendants(self, name: str) -> frozenset[str]:
        """All names below ``name`` in the is-a hierarchy, without itself."""
        return self._reach(name, self._down)

    @cached_property
    def _up(self) -> dict[str, list[str]]:
        edges: dict[str, list[str]] = {}
        for child, parent in self.parents:
            edges.setdefault(child, []).append(parent)
        return edges

    @cached_property
    def _down(self) -> dict[str, list[str]]:
        edges: dict[str, list[str]] = {}
        for child, parent in self.parents:
            edges.setdefault(parent, []).append(child)
        return edges

    @staticmethod
    def _reach(name: str, edges: Mapping[str, Sequence[str]]) -> frozenset[str]:
        found: set[str] = set()
        todo = list(edges.get(name, ()))
        while todo:
            at = todo.pop()
            if at not in found:
                found.add(at)
                todo.extend(edges.get(at, ()))
        return frozenset(found)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; ``from_dict`` takes it back."""
        return {
            "names": list(self.names),
            "supercategories": list(self.supercategories),
            "parents": [list(pair) for pair in self.parents],
            "parts": [list(pair) for pair in self.parts],
            "synonyms": dict(self.synonyms),
            "ids": list(self.ids),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LabelSpace":
        """Builds a space from ``to_dict``'s dictionary; keys other than ``names`` may be missing."""
        return cls(
            names=tuple(data["names"]),
            supercategories=tuple(data.get("supercategories", ())),
            parents=tuple((child, parent) for child, parent in data.get("parents", ())),
            parts=tuple((whole, part) for whole, part in data.get("parts", ())),
            synonyms=dict(data.get("synonyms", {})),
            ids=tuple(data.get("ids", ())),
        )

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "LabelSpace":
        """A plain space with these names, in this order."""
        return cls(names=tuple(names))
