"""Label spaces that ship with the package, and maps between them: COCO, PASCAL VOC, Objects365 version 1 and 2.

Both versions of Objects365 number their categories 1 to 365, but the classes and their order differ, so names count,
never numbers. Where the data come from and under which licence stands in ``spaces/NOTICE``.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from gesso.errors import DataError, nearest
from gesso.label_space import LabelSpace, normalise

KnownSpace: TypeAlias = Literal["coco", "voc", "objects365-v1", "objects365-v2"]
Kind: TypeAlias = Literal["strict", "broad"]
KNOWN: tuple[str, ...] = get_args(KnownSpace)
_FOLDER = Path(__file__).parent / "spaces"


@cache
def known_space(name: str) -> LabelSpace:
    """The label space ``name``, with the ids and super-categories of its publication.

    Misspelt names of Objects365 version 2 stay as published; the corrected spellings are synonyms.

    Raises:
        DataError: no such space ships with the package.
    """
    rows = _categories(name)
    return LabelSpace(
        names=tuple(row["name"] for row in rows),
        supercategories=tuple(row.get("supercategory") for row in rows),
        synonyms={synonym: row["name"] for row in rows for synonym in row.get("synonyms", ())},
        ids=tuple(row["id"] for row in rows),
    )


def known_map(source: str, target: str, kind: Kind = "strict") -> dict[str, str]:
    """Which categories of the space ``source`` count as which of ``target``: name -> name; others are left out.

    Args:
        source: any of the known spaces.
        target: "coco" or "voc" (or ``source`` itself).
        kind: "strict" joins what is the same thing; of several balls each is a "sports ball". "broad" joins near
            relatives too (SUV and car, pigeon and bird): for taking the target's categories out of a data set, where
            nothing like them may stay. Between COCO and VOC both are the same.

    Raises:
        DataError: one of the spaces is unknown, or no map between the two is known.
    """
    if kind not in get_args(Kind):
        raise DataError(f"unknown kind of map '{kind}'", remedy=nearest(kind, get_args(Kind)))
    here, there = known_space(source), known_space(target)
    if source == target or {source, target} == {"coco", "voc"}:
        labels = here.map_to(there).targets
        return {name: there.names[label] for name, label in zip(here.names, labels, strict=True) if label >= 0}
    if target not in ("coco", "voc"):
        what = f"no map from '{source}' to '{target}' is known"
        raise DataError(what, remedy="Maps lead to 'coco' and 'voc'.")
    keys = ("coco",) if kind == "strict" else ("coco", "near_coco")
    found = {row["name"]: row[key] for row in _categories(source) for key in keys if key in row}
    if target == "voc":
        further = known_map("coco", "voc")
        found = {name: further[coco] for name, coco in found.items() if coco in further}
    return found


def spaces_with(space: LabelSpace) -> tuple[str, ...]:
    """The known spaces that hold every category of ``space``, by name or synonym; all of them where it is empty."""
    return tuple(name for name in KNOWN if all(known_space(name).find(word) is not None for word in space.names))


def counterparts(space: LabelSpace, target: LabelSpace, kind: Kind = "strict") -> dict[str, str]:
    """Which categories of any space count as which of another: name -> name; others are left out.

    Categories are joined by name and synonym, and where both spaces are parts of known ones also by their map.
    """
    labels = space.map_to(target).targets
    found = {name: target.names[label] for name, label in zip(space.names, labels, strict=True) if label >= 0}
    for known, other in _mapped(space, target):
        here, there = known_space(known), known_space(other)
        pairs = {normalise(a): b for a, b in known_map(known, other, kind).items()}
        for name in space.names:
            label = here.find(name)
            counted = None if label is None else pairs.get(normalise(here.names[label]))
            place = None if counted is None else _place(there, counted, target)
            if place is not None:
                found.setdefault(name, target.names[place])
    return found


def has_broad_map(space: LabelSpace, target: LabelSpace) -> bool:
    """Whether a broad map between the two says more than the strict one."""
    return any(known_map(a, b, "broad") != known_map(a, b, "strict") for a, b in _mapped(space, target))


def _mapped(space: LabelSpace, target: LabelSpace) -> list[tuple[str, str]]:
    """The pairs of different known spaces that hold the two and have a map."""
    ends = [name for name in spaces_with(target) if name in ("coco", "voc")]
    return [(a, b) for a in spaces_with(space) for b in ends if a != b]


def _place(known: LabelSpace, name: str, target: LabelSpace) -> int | None:
    """The label in ``target``, a part of the known space, of what is called ``name`` there."""
    wanted = known.find(name)
    return next((label for label, word in enumerate(target.names) if known.find(word) == wanted), None)


@cache
def _categories(name: str) -> list[Mapping[str, Any]]:
    if name not in KNOWN:
        raise DataError(f"no label space '{name}' is known", remedy=nearest(name, KNOWN))
    rows: list[Mapping[str, Any]] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))["categories"]
    return rows
