"""Instance masks of detections as COCO run lengths: packing, areas, boxes, and the paste of a mask head's output."""

from collections.abc import Sequence
from typing import Any

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
    across = _weights(low[0], high[0], box[0], box[2], side)
    down = _weights(low[1], high[1], box[1], box[3], side)
    picture = np.zeros((height, width), np.bool_)
    picture[low[1] : high[1], low[0] : high[0]] = down @ probabilities @ across.T >= threshold
    return rle.encode(picture)


def _weights(low: int, high: int, start: float, end: float, side: int) -> Array:
    """(high - low, side): the share of each grid cell in the pixels ``low`` to ``high`` along one axis."""
    at = (np.arange(low, high) + 0.5 - start) / max(end - start, 1e-9) * side - 0.5
    weights: Array = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(side)))
    return weights
