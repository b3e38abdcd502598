"""Writes COCO JSON: original category ids, xywh boxes, areas, flags, polygons and RLE, and all further columns."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec
import numpy as np

from gesso.data.index import Index
from gesso.data.records import CROWD, FLAGS, POLYGONS, RLE, Array, Column, Masks, Rle, Strings
from gesso.data.writers.numbers import fewest_digits, short
from gesso.errors import DataError

_BLOCK = 4096
_IMAGE_KEYS = frozenset(("id", "file_name", "width", "height"))
_OBJECT_KEYS = frozenset(("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", *FLAGS))


def write_coco(index: Index, file: BinaryIO) -> list[str]:
    """Writes the index as one JSON document.

    Args:
        index: what to write.
        file: open for writing bytes.

    Returns:
        What COCO cannot hold, one line for each kind of loss.

    Raises:
        DataError: an image of unknown size has boxes that are shares of it.
    """
    bare = np.asarray(index.normalised) & (np.diff(index.offsets) > 0)
    if bare.any():
        raise DataError(
            f"{int(bare.sum())} images have boxes as shares of an unknown size, and COCO needs pixels",
            where=index.path,
            remedy="Import the data with its pictures, or export YOLO.",
        )
    encode = msgspec.json.Encoder().encode
    file.write(b'{"info":{"description":"Exported by Gesso"},\n"categories":[')
    _write_rows(file, (encode(row) for row in _categories(index)))
    file.write(b'],\n"images":[')
    _write_rows(file, (encode(row) for row in _images(index)))
    file.write(b'],\n"annotations":[')
    _write_rows(file, (encode(row) for row in _annotations(index)))
    file.write(b"]}\n")
    return _losses(index)


def _write_rows(file: BinaryIO, rows: Iterator[bytes]) -> None:
    separator = b"\n"
    for row in rows:
        file.write(separator)
        file.write(row)
        separator = b",\n"


def _categories(index: Index) -> Iterator[dict[str, Any]]:
    space = index.label_space
    for number, name, above in zip(space.ids, space.names, space.supercategories, strict=True):
        row = {"id": number, "name": name}
        if above is not None:
            row["supercategory"] = above
        yield row


def _images(index: Index) -> Iterator[dict[str, Any]]:
    columns = _plain(index.image_columns, _IMAGE_KEYS)
    for first in range(0, len(index), _BLOCK):
        at = slice(first, first + _BLOCK)
        further = _further(columns, at, len(index.image_ids[at]))
        numbers = zip(index.image_ids[at].tolist(), index.widths[at].tolist(), index.heights[at].tolist(), strict=True)
        for row, ((number, width, height), more) in enumerate(zip(numbers, further, strict=True), start=first):
            size = {"width": width, "height": height} if width and height else {}
            yield {"id": number, "file_name": index.name(row), **size, **more}


def _annotations(index: Index) -> Iterator[dict[str, Any]]:
    ids = index.annotation_ids if _unique(index.annotation_ids) else np.arange(1, index.num_boxes + 1)
    categories = np.asarray(index.label_space.ids, np.int64)
    columns = _plain(index.object_columns, _OBJECT_KEYS)
    for first in range(0, len(index), _BLOCK):
        offsets = np.asarray(index.offsets[first : first + _BLOCK + 1])
        at = slice(int(offsets[0]), int(offsets[-1]))
        images = np.repeat(index.image_ids[first : first + _BLOCK], np.diff(offsets))
        boxes = _xywh(np.asarray(index.boxes[at]))
        areas = short(np.asarray(index.areas[at]))
        rows = zip(
            ids[at].tolist(),
            images.tolist(),
            categories[index.labels[at]].tolist(),
            boxes.tolist(),
            areas.tolist(),
            (np.asarray(index.flags[at]) & CROWD).tolist(),
            _segmentations(index, at),
            _flags(np.asarray(index.flags[at]), np.asarray(index.known_flags[at])),
            _further(columns, at, len(images)),
            strict=True,
        )
        for number, image, category, box, area, crowd, mask, flags, more in rows:
            row = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area}
            yield {**row, "iscrowd": crowd, **mask, **flags, **more}


def _xywh(xyxy: Array) -> Array:
    """(M, 4) float64: adding width to x and height to y in float64 gives the float32 corners again."""
    corner = short(xyxy[:, :2])
    sides = xyxy[:, 2:].astype(np.float64) - corner
    return np.concatenate((corner, fewest_digits(sides, lambda side: corner + side, xyxy[:, 2:])), axis=1)


def _unique(ids: Array) -> bool:
    return len(np.unique(ids)) == len(ids)


def _flags(flags: Array, known: Array) -> Iterator[dict[str, int]]:
    """The known flags but crowd, each 0 or 1; the few kinds of dictionary are made once."""
    made: dict[tuple[int, int], dict[str, int]] = {}
    for value, given in zip(flags.tolist(), known.tolist(), strict=True):
        if (value, given) not in made:
            bits = FLAGS.items()
            made[value, given] = {n: int(bool(value & bit)) for n, bit in bits if given & bit and bit != CROWD}
        yield made[value, given]


def _segmentations(index: Index, at: slice) -> Iterator[dict[str, Any]]:
    if index.mask_columns is None:
        for _ in range(at.start, at.stop):
            yield {}
        return
    masks: Masks = index.mask_columns.take(np.arange(at.start, at.stop))
    numbers = short(masks.data.view(np.float32)).tolist()
    bounds, kinds, parts = (masks.part_offsets // 4).tolist(), masks.kinds.tolist(), masks.offsets.tolist()
    for row, kind in enumerate(kinds):
        if kind == POLYGONS:
            rings = range(parts[row], parts[row + 1])
            yield {"segmentation": [numbers[bounds[ring] : bounds[ring + 1]] for ring in rings]}
        elif kind == RLE:
            mask = masks[row]
            assert isinstance(mask, Rle)
            yield {"segmentation": {"size": list(mask.size), "counts": mask.counts.decode("ascii")}}
        else:
            yield {}


def _plain(columns: dict[str, Column], reserved: frozenset[str]) -> dict[str, Column]:
    """The columns that JSON can hold under their own name: strings and numbers, one a row."""
    return {
        name: column
        for name, column in columns.items()
        if name not in reserved and (isinstance(column, Strings) or column.ndim == 1)
    }


def _further(columns: dict[str, Column], at: slice, count: int) -> Iterator[dict[str, Any]]:
    """The further values of some rows; NaN and empty strings, which mean that there is none, are left out."""
    names, values = [], []
    for name, column in columns.items():
        names.append(name)
        if isinstance(column, Strings):
            values.append([value or None for value in column[at]])
        elif column.dtype == np.float32:
            values.append([None if value != value else value for value in short(np.asarray(column[at])).tolist()])
        else:
            values.append([None if value != value else value for value in column[at].tolist()])
    if not names:
        for _ in range(count):
            yield {}
        return
    for row in zip(*values, strict=True):
        yield {name: value for name, value in zip(names, row, strict=True) if value is not None}


def _losses(index: Index) -> list[str]:
    losses = []
    space = index.label_space
    if space.ids != tuple(sorted(space.ids)):
        losses.append("the order of the classes: a reader orders them by their ids")
    if space.parents or space.parts or space.synonyms:
        losses.append("the label space's hierarchy, part-of relations and synonyms are not in COCO JSON")
    if index.verified_columns is not None or any(source.labelled is not None for source in index.sources):
        losses.append("image-level labels are not in COCO JSON")
    if index.semantic is not None and any(index.semantic):
        losses.append("the paths of semantic maps are not in COCO JSON")
    if len(index.sources) > 1:
        losses.append(f"the {len(index.sources)} sources become one: file names are relative to different folders")
    if index.num_boxes and not _unique(index.annotation_ids):
        losses.append("the annotation ids of the source are not unique: they are counted anew from 1")
    kept = _plain(index.image_columns, _IMAGE_KEYS).keys() | _plain(index.object_columns, _OBJECT_KEYS).keys()
    lost = sorted((index.image_columns.keys() | index.object_columns.keys()) - kept)
    if lost:
        losses.append(f"columns that JSON cannot hold as plain values: {', '.join(lost)}")
    return losses
