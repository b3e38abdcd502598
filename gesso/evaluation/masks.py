"""Instance masks of detections as COCO run lengths: packing, areas, boxes, outlines, the paste of a head's output."""

from collections.abc import Sequence
from typing import Any

import cv2
import hotcoco.mask
import numpy as np

from gesso.data import rle
from gesso.data.records import Array, Polygons, Rle
from gesso.data.records import Mask as RecordMask
from gesso.errors import DataError


def pack(segmentation: dict[str, Any]) -> Rle:
    """COCO's RLE dictionary, its counts compressed (text, bytes) or not (a list of numbers), as ``Rle``.

    Raises:
        DataError: it is no RLE, or its counts do not fill the picture.
    """
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) and side >= 0 for side in size):
        raise DataError(f"a mask's size is [height, width], not {size}")
    if isinstance(counts, list) and all(isinstance(count, int) for count in counts):
        return rle.from_counts(np.asarray(counts, np.int64), (size[0], size[1]))
    if isinstance(counts, bytes):
        return Rle((size[0], size[1]), counts)
    if not isinstance(counts, str) or not counts.isascii():
        raise DataError("a mask's counts are text or a list of integers")
    return Rle((size[0], size[1]), counts.encode("ascii"))


def to_coco(mask: RecordMask) -> Any:
    """COCO's ``segmentation`` of a mask: an RLE dictionary with counts as bytes, a list of rings, or []."""
    if isinstance(mask, Rle):
        return {"size": list(mask.size), "counts": mask.counts}
    if isinstance(mask, Polygons):
        return [ring.astype(np.float64).reshape(-1).tolist() for ring in mask.rings]
    return []


def as_json(mask: RecordMask) -> Any:
    """As ``to_coco``, but the counts are text, as they stand in a JSON file."""
    if isinstance(mask, Rle):
        return {"size": list(mask.size), "counts": mask.counts.decode("ascii")}
    return to_coco(mask)


def check(segmentation: Any, size: tuple[int, int]) -> Any:
    """The ``segmentation`` of an annotation, fit to be counted; an uncompressed RLE comes back compressed.

    Args:
        segmentation: an RLE dictionary or a list of rings x, y, x, y, ...
        size: height and width of the picture; 0 where unknown.

    Raises:
        DataError: it is neither, its runs do not fill a picture of ``size``, a ring has fewer than three points or an
            odd number of coordinates, or there are rings and the size is unknown.
    """
    if isinstance(segmentation, dict):
        mask = pack(segmentation)
        if rle.uncompress(mask.counts).sum() != mask.size[0] * mask.size[1] or (all(size) and mask.size != size):
            raise DataError(f"the mask's runs do not fill a picture of {size[0] or '?'} x {size[1] or '?'}")
        return to_coco(mask)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError("a mask is an RLE or a list of polygons")
    for ring in segmentation:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            raise DataError("a polygon is a list x, y, x, y, ... of at least three points")
        if not all(isinstance(value, int | float) for value in ring):
            raise DataError("a polygon holds something that is no number")
    if not all(size):
        raise DataError("polygons need the height and width of their image")
    return segmentation


def first_broken(masks: Sequence[Rle]) -> int | None:
    """The number of the first mask whose counts are no run lengths or exceed its size, or None."""
    rles = [to_coco(mask) for mask in masks]
    try:
        hotcoco.mask.area(rles)
    except ValueError:
        return next(i for i, one in enumerate(rles) if not _readable(one))
    return None


def _readable(one: dict[str, Any]) -> bool:
    try:
        hotcoco.mask.area(one)
    except ValueError:
        return False
    return True


def areas_and_boxes(masks: Sequence[Rle]) -> tuple[Array, Array]:
    """Areas (n,) float64 in pixels and tight boxes (n, 4) float64 xywh of RLE masks."""
    if not masks:
        return np.zeros(0), np.zeros((0, 4))
    rles = [to_coco(mask) for mask in masks]
    areas: Array = np.asarray(hotcoco.mask.area(rles), np.float64)
    return areas, np.asarray(hotcoco.mask.to_bbox(rles), np.float64).reshape(-1, 4)


def outline(mask: RecordMask, *, tolerance: float = 0.7) -> list[Array]:
    """The borders of a mask as closed rings (k, 2) float64 x, y in pixels, to be filled by the even-odd rule.

    Args:
        mask: rings come back as they are; of run lengths the borders are traced; None has none.
        tolerance: how far, in pixels, a traced border may lie from the true one, to have fewer points.
    """
    if isinstance(mask, Polygons):
        return [ring.astype(np.float64) for ring in mask.rings]
    if mask is None:
        return []
    found, _ = cv2.findContours(np.ascontiguousarray(rle.decode(mask)), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = [cv2.approxPolyDP(ring, tolerance, closed=True)[:, 0] for ring in found]
    return [ring + 0.5 for ring in rings if len(ring) > 2]


def paste(probabilities: Array, box: Array, size: tuple[int, int], *, threshold: float = 0.5) -> Rle:
    """The mask of one detection on its whole picture.

    Pixel centres inside the box are sampled bilinearly from the S x S grid, whose cells divide the box; outside the
    grid the probability falls to 0 (Mask R-CNN, section 3.1, resizes to the RoI and cuts at 0.5).

    Args:
        probabilities: (S, S) float.
        box: (4,) xyxy in pixels of the picture.
        size: height and width of the picture.
        threshold: from which probability on a pixel belongs to the mask.
    """
    height, width = size
    side = probabilities.shape[0]
    low = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    high = np.clip(np.ceil(box[2:]), low, (width, height)).astype(int)
    near, far, by_near, by_far = _neighbours(low[1], high[1], box[1], box[3], side)
    rows = probabilities.T[:, near] * by_near + probabilities.T[:, far] * by_far
    near, far, by_near, by_far = _neighbours(low[0], high[0], box[0], box[2], side)
    part = rows[near] * by_near[:, None] + rows[far] * by_far[:, None]  # column by column, as run lengths go
    return _encode(part >= threshold, (int(low[1]), int(low[0])), size)


def _encode(part: Array, corner: tuple[int, int], size: tuple[int, int]) -> Rle:
    """The RLE of a mask that lies within a part of its picture: only the part is looked at.

    Args:
        part: (w, h) bool, column by column.
        corner: the row and column in the picture of the part's first pixel.
        size: height and width of the picture.
    """
    width, height = part.shape
    flat = np.zeros(width * (height + 1) + 1, np.bool_)  # a 0 first, and one behind each column
    flat[1:].reshape(width, height + 1)[:, :height] = part
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]), height + 1)  # where runs begin and end, in turn
    places = (corner[1] + column) * size[0] + corner[0] + row
    again = np.flatnonzero(places[1:] == places[:-1])  # a run that goes on at the top of the next column
    places = np.delete(places, np.concatenate([again, again + 1]))
    counts = np.diff(np.concatenate([[0], places, [size[0] * size[1]]]))
    return Rle(size, rle.compress(counts if counts[-1] or len(counts) == 1 else counts[:-1]))


def _neighbours(low: int, high: int, start: float, end: float, side: int) -> tuple[Array, Array, Array, Array]:
    """The two grid cells beside each of the pixels ``low`` to ``high`` along one axis, and their shares in it."""
    at = (np.arange(low, high) + 0.5 - start) / max(end - start, 1e-9) * side - 0.5
    cell = np.floor(at)
    shares = [np.where((k >= 0) & (k < side), 1 - np.abs(at - k), 0.0) for k in (cell, cell + 1)]
    cells = [np.clip(k, 0, side - 1).astype(np.int64) for k in (cell, cell + 1)]
    return (*cells, *shares)
