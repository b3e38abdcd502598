"""Folders of classes: a picture shows the class that its folder is called by, and no other.

Known layouts, each also one or more folders deeper (images/, 256_ObjectCategories/):

    CLASS/picture
    SPLIT/CLASS/picture        SPLIT: train, val, test and their longer forms

Where every folder begins with a number and a full stop, as in Caltech-256 ("001.ak47") and CUB-200, the number is no
part of the name. Pictures may lie deeper in a folder of a class, and all of them count.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gesso.data.blocks import no_objects, one_label_each
from gesso.data.pictures import SUFFIXES
from gesso.data.readers.ids import stable_ids
from gesso.data.records import ImageBlock, Issue, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace

_SPLIT = re.compile(r"(train|training|trainval|val|valid|validation|test|testing)[-_]?\d*", re.IGNORECASE)
_NUMBERED = re.compile(r"\d+\.(?=.)")


def class_folder_splits(folder: Path) -> list[str]:
    """The splits of a folder of classes, [""] where it is not divided; [] where it holds none, or one class alone."""
    base = _base(folder)
    splits = _splits(base)
    parts = [base / split for split in splits] or [base]
    classes = {place.name for part in parts for place in _folders(part) if _holds_pictures(place)}
    return (splits or [""]) if len(classes) > 1 else []


def read_image_folder(folder: Path, *, split: str = "", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads one split of a folder of classes; ``progress`` is told the number of pictures found.

    The classes are those of all splits, in the order of their folders' names; an image's id is a hash of its name.

    Raises:
        DataError: there are fewer than two classes, two folders mean the same class, or the split does not exist.
    """
    base = _base(folder)
    splits = _splits(base)
    if split and split not in splits:
        raise DataError(f"holds no folder of the split '{split}'", where=base)
    parts = [base / one for one in splits] or [base]
    issues: list[Issue] = []
    classes = _classes(base, parts, issues)
    part = base / split
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        place = f"{split}/{name}" if split else name
        for picture in _pictures(part / name):
            names.append(f"{place}/{picture}")
            labels.append(label)
            if progress is not None and len(names) % 256 == 0:
                progress(len(names))
    for loose in sorted(entry.name for entry in part.iterdir() if _is_picture(entry.name)):
        issues.append(Issue(loose, None, "picture in no folder of a class", "left out"))
    return Reading(
        name=folder.absolute().name,
        split=split,
        roots=(base.absolute(),),
        label_space=_space(list(classes), base),
        images=ImageBlock(
            ids=stable_ids(names),
            names=Strings.of(names),
            widths=np.zeros(len(names), np.int32),
            heights=np.zeros(len(names), np.int32),
            verified=one_label_each(labels),
        ),
        objects=no_objects(),
        issues=tuple(issues),
        truth="class",
    )


def _base(folder: Path) -> Path:
    """The folder that holds the classes or splits: below ``folder``, while one folder alone holds all pictures."""
    while True:
        inner = [place for place in _folders(folder) if _holds_pictures(place)]
        loose = any(_is_picture(entry.name) for entry in folder.iterdir())
        if len(inner) != 1 or loose or _SPLIT.fullmatch(inner[0].name) or not _folders(inner[0]):
            return folder
        folder = inner[0]


def _splits(base: Path) -> list[str]:
    """The names of the splits: none, unless all folders are called like splits and hold folders with pictures."""
    inner = [place for place in _folders(base) if _holds_pictures(place)]
    divided = inner and all(_SPLIT.fullmatch(place.name) for place in inner)
    return [place.name for place in inner] if divided else []


def _classes(base: Path, parts: list[Path], issues: list[Issue]) -> tuple[str, ...]:
    """The names of the folders that hold pictures in some part; one that holds none anywhere is an issue."""
    found = sorted({place.name for part in parts for place in _folders(part)})
    filled = tuple(name for name in found if any(_holds_pictures(part / name) for part in parts))
    for name in found:
        if name not in filled:
            issues.append(Issue("", None, "folder of a class without pictures", "class left out", name))
    if len(filled) < 2:
        one = f"of one class alone, '{filled[0]}'" if filled else "in no folder of a class"
        remedy = "A folder of classes holds CLASS/picture or SPLIT/CLASS/picture, and two classes or more."
        raise DataError(f"holds pictures {one}", where=base, remedy=remedy)
    return filled


def _space(folders: list[str], base: Path) -> LabelSpace:
    numbered = all(_NUMBERED.match(name) for name in folders)
    names = [_NUMBERED.sub("", name, count=1) for name in folders] if numbered else folders
    try:
        return LabelSpace.from_names(names)
    except DataError as error:
        raise DataError(error.what, where=base, remedy="Join or rename the folders of the classes.") from None


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _holds_pictures(folder: Path) -> bool:
    return next(_pictures(folder), None) is not None


def _pictures(folder: Path) -> Iterator[str]:
    """All pictures below a folder, as paths relative to it, folder by folder, each sorted by name."""
    start = len(os.fspath(folder)) + 1
    for place, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")))
        within = place[start:].replace(os.sep, "/")
        for name in sorted(files):
            if _is_picture(name):
                yield f"{within}/{name}" if within else name


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122
