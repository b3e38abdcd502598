"""Ground truth as columns, from a COCO file or an index: what every score compares detections with.

A COCO file is taken as pycocotools takes it: nothing is repaired, ``area`` is the annotation's own, ``ignore`` counts
for nothing beside ``iscrowd``. What differs is on purpose: annotations are numbered anew (an id of 0 and ids that stand
twice are harmless), a missing ``iscrowd`` is 0 and a missing ``area`` that of the box, and an annotation on an unknown
image or of an unknown category is an error.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from gesso.data.index import Index
from gesso.data.records import CROWD, DIFFICULT, IGNORE, IGNORED, Array
from gesso.errors import DataError
from gesso.evaluation.masks import check, to_coco

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Details:
    """What VOC's AP and the miss rate ask of the M objects beside COCO's fields.

    A file's floats are float64, an index's float32: compare them with Python's floats, which numpy then takes to the
    same type, so that a ratio of 0.65 is not below 0.65 in either.

    Attributes:
        difficult: (M,) bool, VOC's flag.
        ignore: (M,) bool, the field ``ignore`` or ``iscrowd``.
        heights: (M,) float pixels of the whole body (the field ``height``); of the box where there is no such field.
        vis_ratios: (M,) float, the visible share of the area (the field ``vis_ratio``); NaN where there is none.
    """

    difficult: Array
    ignore: Array
    heights: Array
    vis_ratios: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class GroundTruth:
    """The objects of N images, M in all.

    Attributes:
        image_ids: (N,) int64, rising.
        sizes: (N, 2) int64 height and width; 0 where unknown.
        category_ids: one a class, in the order of the labels.
        names: one a class; they need not be unique.
        rows: (M,) int64, rows of ``image_ids``.
        labels: (M,) int64.
        xywh: (M, 4) float64 pixels.
        areas: (M,) float64, of the masks where there are masks.
        crowd: (M,) bool: never positive, and what lies in it is no false positive.
        segmentations: M segmentations in COCO's form, or None where they were not read.
        details: further fields, or None where they were not read.
        where: the file or folder, for messages.
    """

    image_ids: Array
    sizes: Array
    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    rows: Array
    labels: Array
    xywh: Array
    areas: Array
    crowd: Array
    segmentations: list[Any] | None = None
    details: Details | None = None
    where: str = "ground truth"

    def __len__(self) -> int:
        return len(self.image_ids)

    def unique_names(self) -> tuple[str, ...]:
        """The names; those that stand twice with their category id behind them."""
        twice = {name for name in self.names if self.names.count(name) > 1}
        pairs = zip(self.names, self.category_ids, strict=True)
        return tuple(f"{name} ({number})" if name in twice else name for name, number in pairs)

    def rows_of(self, image_ids: Array, *, where: str | Path = "detections") -> Array:
        """The rows (D,) int64 of ``image_ids`` (D,). Raises DataError where one is not in the ground truth."""
        if not len(image_ids):
            return np.zeros(0, np.int64)
        if not len(self):
            raise DataError("it has no images", where=self.where, remedy="Score against the set that was predicted.")
        rows = np.minimum(np.searchsorted(self.image_ids, image_ids), len(self) - 1)
        known = self.image_ids[rows] == image_ids
        if not known.all():
            row = int(np.argmin(known))
            raise DataError(
                f"result {row} (counted from 0) is on image {image_ids[row]}, which is not in {self.where}",
                where=where,
                remedy="Score against the ground truth of the images that were predicted.",
            )
        return rows


class _Image(msgspec.Struct, gc=False):
    id: int
    height: float | None = 0
    width: float | None = 0


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = 0


class _DetailedAnnotation(_Annotation, gc=False):
    difficult: int | bool | None = 0
    ignore: int | bool | None = 0
    height: float | None = None
    vis_ratio: float | None = None


class _MaskAnnotation(_Annotation, gc=False):
    segmentation: Any = None


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _DetailedFile(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_DetailedAnnotation]
    categories: list[_Category]


class _MaskFile(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_MaskAnnotation]
    categories: list[_Category]


def load_ground_truth(
    source: str | Path | Index | GroundTruth, *, masks: bool = False, details: bool = False
) -> GroundTruth:
    """The ground truth in a COCO file or an index (its folder, or open).

    Args:
        source: where it is; a ``GroundTruth`` is given back as it is.
        masks: read the masks too.
        details: read the further fields too (``Details``), which takes longer; of a COCO file not beside ``masks``.

    Raises:
        DataError: see ``read_coco`` and ``from_index``; or a ``GroundTruth`` has not what is asked for.
    """
    if isinstance(source, GroundTruth):
        if masks and source.segmentations is None:
            raise DataError("it was read without masks", where=source.where, remedy="Read it with masks=True.")
        if details and source.details is None:
            raise DataError("it was read without details", where=source.where, remedy="Read it with details=True.")
        return source
    if isinstance(source, Index):
        return from_index(source, masks=masks, details=details)
    if Path(source).is_dir():
        return from_index(Index.open(source), masks=masks, details=details)
    return read_coco(source, masks=masks, details=details)


def read_coco(path: str | Path, *, masks: bool = False, details: bool = False) -> GroundTruth:
    """Reads a COCO annotation file. File names are not needed, category id 0 is legal.

    Args:
        path: the JSON file.
        masks: read ``segmentation`` too; every annotation must have one then, and needs no box.
        details: read ``difficult``, ``ignore``, ``height`` and ``vis_ratio`` too; not beside ``masks``.

    Raises:
        DataError: the file is missing, breaks off, or lacks a key; an annotation is on an unknown image, of an unknown
            category, without a box (a mask), or not finite; two categories share an id.
    """
    assert not (masks and details), "nothing needs both"
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(error.strerror or str(error), where=path, remedy="Check the path.") from error
    kind: type[_File | _DetailedFile | _MaskFile] = _MaskFile if masks else _DetailedFile if details else _File
    file = _decode(path, data, kind)
    image_ids, first = np.unique(_ints(path, "id", (i.id for i in file.images)), return_index=True)
    sizes = np.array([(i.height or 0, i.width or 0) for i in file.images], np.float64).reshape(-1, 2)
    sizes = sizes[first].astype(np.int64)
    category_ids = tuple(category.id for category in file.categories)
    if len(set(category_ids)) != len(category_ids):
        twice = next(i for i in category_ids if category_ids.count(i) > 1)
        raise DataError(f"two categories have the id {twice}", where=path, remedy="Number the categories anew.")
    annotations: Sequence[_Annotation] = file.annotations
    images = _ints(path, "image_id", (a.image_id for a in annotations))
    rows = _find(path, "image_id", images, image_ids)
    labels = _find(
        path,
        "category_id",
        _ints(path, "category_id", (a.category_id for a in annotations)),
        np.array(category_ids, np.int64),
    )
    segmentations = None
    if isinstance(file, _MaskFile):
        segmentations = _segmentations(path, [a.segmentation for a in file.annotations], sizes[rows])
    else:
        _require(path, [a.bbox is not None for a in annotations], "bbox")
    nowhere = (np.nan,) * 4
    xywh = np.array([nowhere if a.bbox is None else a.bbox for a in annotations], np.float64).reshape(-1, 4)
    given = np.array([np.nan if a.area is None else a.area for a in annotations], np.float64)
    areas = np.where(np.isnan(given), xywh[:, 2] * xywh[:, 3], given)
    _require(path, np.isfinite(areas), "area")
    xywh = np.nan_to_num(xywh) if masks else xywh
    _require(path, np.isfinite(xywh).all(1), "finite bbox")
    crowd = np.array([bool(a.iscrowd) for a in annotations], bool)
    return GroundTruth(
        image_ids=image_ids,
        sizes=sizes,
        category_ids=category_ids,
        names=tuple(category.name for category in file.categories),
        rows=rows,
        labels=labels,
        xywh=xywh,
        areas=areas,
        crowd=crowd,
        segmentations=segmentations,
        details=_details(path, file.annotations, crowd, xywh) if isinstance(file, _DetailedFile) else None,
        where=str(path),
    )


def _details(path: Path, annotations: Sequence[_DetailedAnnotation], crowd: Array, xywh: Array) -> Details:
    given = np.array([np.nan if a.height is None else a.height for a in annotations], np.float64)
    heights = np.where(np.isnan(given), xywh[:, 3], given)
    _require(path, np.isfinite(heights), "finite height")
    return Details(
        difficult=np.array([bool(a.difficult) for a in annotations], bool),
        ignore=crowd | np.array([bool(a.ignore) for a in annotations], bool),
        heights=heights,
        vis_ratios=np.array([np.nan if a.vis_ratio is None else a.vis_ratio for a in annotations], np.float64),
    )


def from_index(index: Index, *, masks: bool = False, details: bool = False, ignored: int = IGNORED) -> GroundTruth:
    """The ground truth of an index. Its boxes and areas are float32 and were repaired at import.

    Args:
        index: the data set; its label space numbers the labels.
        masks: give the masks too; every object must have one then.
        details: give the further fields too: flags and the columns ``height`` and ``vis_ratio``.
        ignored: objects with any of these flag bits count as crowd: never positive, and a detection that lies in one
            (by its own area) is no false positive.

    Raises:
        DataError: image ids stand twice (merged sets), a box is in shares of an unknown image size, or a mask is
            missing.
    """
    order = np.argsort(index.image_ids, kind="stable")
    image_ids = np.asarray(index.image_ids)[order]
    if (np.diff(image_ids) == 0).any():
        twice = image_ids[1:][np.diff(image_ids) == 0][0]
        raise DataError(f"two images have the id {twice}", where=index.path, remedy="Merge the sets with new ids.")
    if np.asarray(index.normalised).any():
        remedy = "Import them with their pictures."
        raise DataError("images of unknown size cannot be scored in pixels", where=index.path, remedy=remedy)
    counts = np.diff(np.asarray(index.offsets))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    xyxy = np.asarray(index.boxes, np.float64).reshape(-1, 4)
    sizes = np.stack([index.heights, index.widths], axis=1)[order].astype(np.int64)
    rows = np.repeat(place, counts)
    segmentations = None
    if masks:
        columns = index.mask_columns
        found = [None if columns is None else columns[k] for k in range(index.num_boxes)]
        _require(index.path, [mask is not None for mask in found], "mask")
        segmentations = _segmentations(index.path, [to_coco(mask) for mask in found], sizes[rows])
    return GroundTruth(
        image_ids=image_ids,
        sizes=sizes,
        category_ids=index.label_space.ids,
        names=index.label_space.names,
        rows=rows,
        labels=np.asarray(index.labels, np.int64),
        xywh=np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1),
        areas=np.asarray(index.areas, np.float64),
        crowd=(np.asarray(index.flags) & ignored) != 0,
        segmentations=segmentations,
        details=_index_details(index) if details else None,
        where=str(index.path),
    )


def _index_details(index: Index) -> Details:
    nothing = np.full(index.num_boxes, np.nan, np.float32)
    flags, columns = np.asarray(index.flags), index.object_columns
    boxes = np.asarray(index.boxes).reshape(-1, 4)
    heights = np.asarray(columns.get("height", nothing))
    return Details(
        difficult=(flags & DIFFICULT) != 0,
        ignore=(flags & (IGNORE | CROWD)) != 0,
        heights=np.where(np.isnan(heights), boxes[:, 3] - boxes[:, 1], heights),
        vis_ratios=np.asarray(columns.get("vis_ratio", nothing)),
    )


def _decode(path: Path, data: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")
        remedy = "A COCO annotation file has the lists images, annotations and categories."
        raise DataError(f"{what}{place and ' in ' + place.strip('`')}", where=path, remedy=remedy) from error
    except msgspec.DecodeError as error:
        pass_on = error
    try:
        json.loads(data)
    except json.JSONDecodeError as error:
        what = (
            f"this is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno} (character {error.pos})"
        )
        raise DataError(what, where=path, remedy="The file may have been cut off: write it again.") from pass_on
    except UnicodeDecodeError as error:
        raise DataError(f"this is not a text file (byte {error.start})", where=path, remedy="Check it.") from pass_on
    what = re.sub(r"\(byte (\d+)\)", r"at byte \1", str(pass_on))
    raise DataError(f"this is not valid JSON: {what}", where=path, remedy="NaN and Infinity are not allowed.")


def _segmentations(path: Path, segmentations: Sequence[Any], sizes: Array) -> list[Any]:
    checked = []
    for row, (segmentation, (height, width)) in enumerate(zip(segmentations, sizes.tolist(), strict=True)):
        try:
            checked.append(check(segmentation, (height, width)))
        except DataError as error:
            what = f"annotation {row} (counted from 0): {error.what}"
            raise DataError(what, where=path, remedy="Mend or drop it, or score boxes (bbox).") from error
    return checked


def _ints(path: Path, key: str, values: Any) -> Array:
    try:
        return np.fromiter(values, np.int64)
    except OverflowError:
        raise DataError(f"a number under '{key}' has more than 64 bits", where=path, remedy="Number anew.") from None


def _find(path: Path, key: str, values: Array, known: Array) -> Array:
    """The position of each value in ``known``."""
    if not len(values):
        return np.zeros(0, np.int64)
    order = np.argsort(known)
    at = np.minimum(np.searchsorted(known, values, sorter=order), max(len(known) - 1, 0))
    found = known[order[at]] == values if len(known) else np.zeros(len(values), bool)
    if not found.all():
        row = int(np.argmin(found))
        raise DataError(
            f"annotation {row} (counted from 0) has the {key} {values[row]}, which the file does not list",
            where=path,
            remedy="Add it to the file, or drop the annotation.",
        )
    positions: Array = order[at]
    return positions


def _require(path: Path, present: Any, what: str) -> None:
    if not np.all(present):
        row = int(np.argmin(present))
        raise DataError(f"annotation {row} (counted from 0) has no {what}", where=path, remedy="Mend or drop it.")
