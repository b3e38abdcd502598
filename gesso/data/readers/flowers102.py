"""Oxford Flowers-102: jpg/image_00001.jpg and on, imagelabels.mat (classes 1 to 102) and setid.mat (three splits).

``setid.mat`` holds the numbers of the pictures of a split: ``trnid`` (1,020), ``valid`` (1,020), ``tstid`` (6,149). The
papers' 2.0k and 6.1k are train and val together, and test. Beware: some publications train on ``tstid`` and test on
``trnid``, since it is the larger. The files give no names; a class is called "flower 1" to "flower 102". Source:
Nilsback and Zisserman, "Automated flower classification over a large number of classes", ICVGIP 2008, and its page.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gesso.data.blocks import no_objects, one_label_each
from gesso.data.readers.ids import stable_ids
from gesso.data.readers.mat import read_mat
from gesso.data.records import Array, ImageBlock, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace

FLOWERS102 = ("train", "val", "test", "trainval")
TRAINVAL = "trainval"
"""The split that repeats two others."""
CLASSES = 102
_LABELS, _SETS, _PICTURES = "imagelabels.mat", "setid.mat", "jpg"
_VARIABLES = {"train": ("trnid",), "val": ("valid",), "test": ("tstid",), TRAINVAL: ("trnid", "valid")}


def is_flowers102(folder: Path) -> bool:
    """Whether the folder holds the two files of labels."""
    return (folder / _LABELS).is_file() and (folder / _SETS).is_file()


def read_flowers102(folder: Path, *, split: str = "train", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads one split of Flowers-102; an image's id is a hash of its name. ``progress`` is told when all is read.

    Raises:
        DataError: a file is missing or of another kind, a class is outside 1 to 102, or a picture has no class.
    """
    if split not in _VARIABLES:
        raise DataError(f"holds no split '{split}'", where=folder, remedy=f"Known: {', '.join(FLOWERS102)}.")
    (labels,) = (_numbers(values, folder / _LABELS) for values in read_mat(folder / _LABELS, "labels"))
    sets = [_numbers(values, folder / _SETS) for values in read_mat(folder / _SETS, *_VARIABLES[split])]
    wrong = labels[(labels < 1) | (labels > CLASSES)]
    if len(wrong):
        raise DataError(f"holds the class {wrong[0]}; there are 1 to {CLASSES}", where=folder / _LABELS)
    numbers = np.sort(np.concatenate(sets))
    wrong = numbers[(numbers < 1) | (numbers > len(labels))]
    if len(wrong):
        what = f"names the picture {wrong[0]}, but '{_LABELS}' holds the classes of {len(labels)}"
        raise DataError(what, where=folder / _SETS, remedy="Are both files of the same data set?")
    names = [f"image_{number:05d}.jpg" for number in numbers.tolist()]
    if progress is not None:
        progress(len(names))
    return Reading(
        name=folder.absolute().name,
        split=split,
        roots=((folder / _PICTURES).absolute(), folder.absolute()),
        label_space=LabelSpace.from_names(f"flower {number}" for number in range(1, CLASSES + 1)),
        images=ImageBlock(
            ids=stable_ids(names),
            names=Strings.of(names),
            widths=np.zeros(len(names), np.int32),
            heights=np.zeros(len(names), np.int32),
            verified=one_label_each(labels[numbers - 1] - 1),
        ),
        objects=no_objects(),
        truth="class",
    )


def _numbers(values: object, file: Path) -> Array:
    """int64 (K,). DataError where there is something else than whole numbers."""
    found = np.atleast_1d(np.asarray(values))
    if found.ndim != 1 or found.dtype.kind not in "iuf" or not np.array_equal(found, np.floor(found)):
        raise DataError("holds something else than a list of whole numbers", where=file)
    return found.astype(np.int64)
