"""CityPersons: boxes of people on the pictures of Cityscapes, in anno_train.mat and anno_val.mat.

The variable ``anno_train_aligned`` holds one structure a picture with ``cityname``, ``im_name`` and ``bbs``, whose rows
are

    class, x1, y1, w, h, instance, x1 visible, y1 visible, w visible, h visible

with the classes 0 ignore region, 1 pedestrian, 2 rider, 3 sitting person, 4 other person, 5 group of people. As in the
official evaluation there is one category, pedestrian, and all rows of another class are boxes to ignore. Pictures are
leftImg8bit/SPLIT/CITY/NAME. Source: Zhang, Benenson and Schiele, "CityPersons: A Diverse Dataset for Pedestrian
Detection", CVPR 2017, and the README beside the files.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gesso.data.readers.ids import stable_ids
from gesso.data.readers.mat import read_mat
from gesso.data.records import IGNORE, Array, ImageBlock, ObjectBlock, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace

CLASSES = ("ignore", "pedestrian", "rider", "sitting person", "other person", "people group")
"""What a row's class number means; kept as the text column ``kind``."""
_PEDESTRIAN = 1
_COLUMNS = 10
_FILE = re.compile(r"anno_(\w+)\.mat")


def citypersons_files(folder: Path) -> dict[str, Path]:
    """The annotation files by split."""
    files = [file for place in (folder, folder / "annotations") for file in sorted(place.glob("anno_*.mat"))]
    return {match[1]: file for file in reversed(files) if (match := _FILE.fullmatch(file.name))}


def read_citypersons(path: Path, *, split: str = "", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads one annotation file; ``progress`` is told the number of pictures read.

    Beside the boxes stand the columns ``height`` (of the whole person, pixels), ``vis_ratio`` (visible area / whole
    area, at most 1), ``visible_xyxy`` (M, 4) float32, and ``kind``. An image's id is a hash of its name.

    Raises:
        DataError: the file is of another kind, or a row has other than ten numbers or another class than 0 to 5.
    """
    match = _FILE.fullmatch(path.name)
    split = split or (match[1] if match else "")
    if not split:
        raise DataError("the file's name does not tell the split", where=path, remedy="Call it anno_train.mat.")
    (records,) = read_mat(path, f"anno_{split}_aligned")
    names: list[str] = []
    rows: list[Array] = []
    for number, record in enumerate(np.atleast_1d(records), start=1):
        name, boxes = _record(record, f"{path}: record {number}")
        names.append(f"leftImg8bit/{split}/{name}")
        rows.append(boxes)
        if progress is not None and number % 256 == 0:
            progress(number)
    counts = [len(boxes) for boxes in rows]
    above = path.parent.absolute()
    return Reading(
        name=path.name,
        split=split,
        roots=(above, above.parent, above.parent.parent),
        label_space=LabelSpace.from_names(["pedestrian"]),
        images=ImageBlock(
            ids=stable_ids(names),
            names=Strings.of(names),
            widths=np.zeros(len(names), np.int32),
            heights=np.zeros(len(names), np.int32),
        ),
        objects=_objects(np.concatenate([np.zeros((0, _COLUMNS)), *rows]), counts),
    )


def _record(record: Any, where: str) -> tuple[str, Array]:
    """CITY/NAME and the rows (n, 10) float64 of one picture."""
    try:
        city, name, boxes = str(record.cityname), str(record.im_name), np.asarray(record.bbs, np.float64)
    except (AttributeError, TypeError, ValueError):
        what = "is no structure with cityname, im_name and bbs"
        raise DataError(what, where=where, remedy="Is this the file of CityPersons?") from None
    if boxes.size % _COLUMNS or (boxes.ndim > 1 and boxes.shape[1] != _COLUMNS):
        raise DataError(f"the rows of bbs have {boxes.shape[-1]} numbers instead of {_COLUMNS}", where=where)
    boxes = boxes.reshape(-1, _COLUMNS)
    wrong = boxes[~np.isin(boxes[:, 0], range(len(CLASSES))), 0]
    if len(wrong):
        raise DataError(f"a row has the class {wrong[0]:g}; there are 0 to {len(CLASSES) - 1}", where=where)
    return f"{city}/{name}", boxes


def _objects(rows: Array, counts: list[int]) -> ObjectBlock:
    kinds = rows[:, 0].astype(np.int64)
    whole, visible = _corners(rows[:, 1:5]), _corners(rows[:, 6:])
    areas = rows[:, 3] * rows[:, 4]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(areas > 0, np.minimum(rows[:, 8] * rows[:, 9] / areas, 1), 0)
    return ObjectBlock(
        rows=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        xyxy=whole,
        labels=np.zeros(len(rows), np.int32),
        flags=np.where(kinds == _PEDESTRIAN, 0, IGNORE).astype(np.uint16),
        known_flags=np.full(len(rows), IGNORE, np.uint16),
        annotation_ids=rows[:, 5].astype(np.int64),
        columns={
            "height": rows[:, 4].astype(np.float32),
            "vis_ratio": shares.astype(np.float32),
            "visible_xyxy": visible,
            "kind": Strings.of(CLASSES[kind] for kind in kinds.tolist()),
        },
    )


def _corners(xywh: Array) -> Array:
    """xyxy (M, 4) float32 of corner and sides."""
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32)
