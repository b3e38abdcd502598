"""Fewer classes: a label space, and blocks of columns, without some of their classes."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from gesso.data.blocks import take_objects
from gesso.data.readers.lvis import map_verdicts
from gesso.data.records import Array, ImageBlock, ObjectBlock, Source
from gesso.label_space import LabelSpace


@dataclass(frozen=True)
class Narrowing:
    """From one label space to a part of it.

    Attributes:
        space: the classes that stay, in their order, with their ids, super-categories, relations and synonyms. What was
            related by way of a class that goes stays related.
        targets: (C,) int32, the new label of each old one; -1 where its class goes.
    """

    space: LabelSpace
    targets: Array

    @classmethod
    def of(cls, space: LabelSpace, names: Collection[str]) -> "Narrowing":
        """The classes ``names`` of ``space``. DataError where one does not exist: the nearest are named."""
        stay = np.zeros(len(space), bool)
        stay[[space.index(name) for name in names]] = True
        kept = [label for label in range(len(space)) if stay[label]]
        words = {space.names[label] for label in kept}
        part = LabelSpace(
            names=tuple(space.names[label] for label in kept),
            supercategories=tuple(space.supercategories[label] for label in kept),
            parents=_edges(space, words),
            parts=tuple(pair for pair in space.parts if words.issuperset(pair)),
            synonyms={other: name for other, name in space.synonyms.items() if name in words},
            ids=tuple(space.ids[label] for label in kept),
        )
        return cls(part, np.where(stay, np.cumsum(stay) - 1, -1).astype(np.int32))

    def source(self, source: Source) -> Source:
        """The source, which labels those of its classes that stay."""
        if source.labelled is None:
            return source
        labelled = tuple(name for name in source.labelled if self.space.find(name) is not None)
        return dataclasses.replace(source, labelled=labelled)

    def images(self, block: ImageBlock) -> ImageBlock:
        """The images with the labels that stay. Their maps number the old classes: they go."""
        verified = None if block.verified is None else map_verdicts(block.verified, self.targets)
        whole = bool((self.targets >= 0).all())
        return dataclasses.replace(block, verified=verified, semantic=block.semantic if whole else None)

    def objects(self, block: ObjectBlock) -> ObjectBlock:
        """The objects whose classes stay."""
        labels = self.targets[block.labels]
        return take_objects(dataclasses.replace(block, labels=labels), np.flatnonzero(labels >= 0))


def _edges(space: LabelSpace, kept: set[str]) -> tuple[tuple[str, str], ...]:
    """Is-a edges from each kept name to the nearest kept names above it, in the order of the space."""
    above: dict[str, list[str]] = {}
    for child, parent in space.parents:
        above.setdefault(child, []).append(parent)
    found = []
    for name in space.names:
        if name not in kept:
            continue
        todo, seen = list(above.get(name, ())), set[str]()
        while todo:
            parent = todo.pop(0)
            if parent in seen:
                continue
            seen.add(parent)
            if parent in kept:
                found.append((name, parent))
            else:
                todo.extend(above.get(parent, ()))
    return tuple(found)
