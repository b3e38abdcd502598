"""SUN-397: scenes in folders a/abbey, a/apartment_building/outdoor, ..., and lists of ten random splits.

A list, Training_01.txt or Testing_01.txt, names a picture a line: /a/abbey/sun_aaaaaaaaaaaaaaaa.jpg. The first split is
the one that papers use: 50 pictures a class for training and 50 for testing, 19,850 each. Source: Xiao et al., "SUN
Database: Large-scale Scene Recognition from Abbey to Zoo", CVPR 2010, and the lists that come with it.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from gesso.data.blocks import no_objects, one_label_each
from gesso.data.readers.ids import stable_ids
from gesso.data.readers.voc import lines_of
from gesso.data.records import ImageBlock, Issue, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace

FIRST_SPLITS = ("train", "test")
"""The splits of the first pair of lists; those of the others are called train-02, test-02, and so on."""
_LIST = re.compile(r"(Training|Testing)_(\d\d)\.txt")
_PLACES = ("", "Partitions", "split")


def sun397_lists(folder: Path) -> dict[str, Path]:
    """The lists of pictures by the names of their splits; empty where the folder is not SUN-397."""
    found: dict[str, Path] = {}
    for place in _PLACES:
        for file in sorted((folder / place).glob("T*ing_[0-9][0-9].txt")):
            if match := _LIST.fullmatch(file.name):
                split = "train" if match[1] == "Training" else "test"
                found.setdefault(split if match[2] == "01" else f"{split}-{match[2]}", file)
    return found


def read_sun397(folder: Path, *, split: str = "train", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads one split of SUN-397; ``progress`` is told the number of lines read.

    The classes are those of ClassName.txt or, where it is missing, of all lists, by name: "abbey",
    "apartment_building/outdoor". An image's id is a hash of its path.

    Raises:
        DataError: the list is missing, names no picture, or names one of a class that is not in ClassName.txt.
    """
    lists = sun397_lists(folder)
    if split not in lists:
        raise DataError(f"holds no list of the split '{split}'", where=folder, remedy=f"Known: {', '.join(lists)}.")
    space = _space(folder, lists)
    issues: list[Issue] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(lines_of(lists[split]), start=1):
        name = line.strip("/")
        try:
            label = space.index(_class_of(name))
        except DataError as error:
            raise DataError(f"line {number}: {error.what}", where=lists[split], remedy=error.remedy) from None
        if name in labels:
            issues.append(Issue(name, None, "picture stands twice in the list", "kept once", f"line {number}"))
            continue
        labels[name] = label
        if progress is not None and number % 256 == 0:
            progress(number)
    names = list(labels)
    if not names:
        raise DataError("the list names no picture", where=lists[split])
    above = lists[split].parent
    return Reading(
        name=folder.absolute().name,
        split=split,
        roots=tuple(place.absolute() for place in (folder, folder / "images", folder / "SUN397", above)),
        label_space=space,
        images=ImageBlock(
            ids=stable_ids(names),
            names=Strings.of(names),
            widths=np.zeros(len(names), np.int32),
            heights=np.zeros(len(names), np.int32),
            verified=one_label_each(list(labels.values())),
        ),
        objects=no_objects(),
        issues=tuple(issues),
        truth="class",
    )


def _space(folder: Path, lists: dict[str, Path]) -> LabelSpace:
    for place in _PLACES:
        file = folder / place / "ClassName.txt"
        if file.is_file():
            return LabelSpace.from_names(_without_letter(line.strip("/")) for line in lines_of(file))
    found = {_class_of(line.strip("/")) for file in lists.values() for line in lines_of(file)}
    return LabelSpace.from_names(sorted(found))


def _class_of(name: str) -> str:
    return _without_letter(str(PurePosixPath(name).parent))


def _without_letter(path: str) -> str:
    """The name of a class; its folder lies in one that is called by its first letter."""
    letter, _, rest = path.partition("/")
    return rest if len(letter) == 1 and rest else path
