"""Masks as COCO files tell them: rings, run lengths, or the pixels of one value in a picture of whole numbers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from gesso.data import rle
from gesso.data.records import NO_MASK, Array, ImageBlock, Issue, Mask, Masks, ObjectBlock, Polygons, Rle
from gesso.errors import DataError

NO_BOX = (float("nan"),) * 4
_FOLDER = "masks"


def extent(mask: Mask) -> tuple[float, float, float, float]:
    """x, y, width and height of a mask, whose pixels are not drawn for it; NaN where it is empty or none."""
    if isinstance(mask, Polygons):
        points = np.concatenate(mask.rings).astype(np.float64)
        low, high = points.min(0), points.max(0)
    elif mask is not None and rle.area(mask):
        counts = rle.uncompress(mask.counts)
        ends = np.cumsum(counts)
        first_and_last = np.stack((ends[:-1:2], ends[1::2] - 1))[:, counts[1::2] > 0]
        x, y = np.divmod(first_and_last, mask.size[0])
        # Pixels are counted column by column: a run that goes on in the next column fills both to the border.
        longer = x[0] != x[1]
        y[0, longer], y[1, longer] = 0, mask.size[0] - 1
        low, high = np.array((x.min(), y.min())), np.array((x.max(), y.max())) + 1
    else:
        return NO_BOX
    return (*low.tolist(), *(high - low).tolist())


def polygons(rings: list[list[float]]) -> Polygons | None:
    """The rings that are rings. DataError where there are values but no ring."""
    whole = [np.array(ring, np.float32).reshape(-1, 2) for ring in rings if len(ring) >= 6 and len(ring) % 2 == 0]
    whole = [ring for ring in whole if np.isfinite(ring).all()]
    if not whole and any(rings):
        raise DataError("no ring has at least three points")
    return Polygons(tuple(whole)) if whole else None


def masks_in_files(
    folder: Path, images: ImageBlock, files: Mapping[int, str], objects: ObjectBlock, values: Array
) -> tuple[ObjectBlock, list[Issue]]:
    """Gives objects that have no mask the pixels of their value in their picture's mask file, as run lengths.

    Args:
        folder: where the annotation file lies; the mask files lie there or in masks/.
        images: the pictures.
        files: the names of the mask files by image id.
        objects: M objects.
        values: (M,) int64, what the pixels of each object hold; 0 = the object has no such mask.

    Returns:
        The objects, and an issue for each mask that cannot be read.
    """
    bare = values != 0 if objects.masks is None else (values != 0) & (np.asarray(objects.masks.kinds) == NO_MASK)
    wanted = np.flatnonzero(bare)
    wanted = wanted[np.argsort(objects.rows[wanted], kind="stable")]
    borders = np.flatnonzero(np.diff(objects.rows[wanted])) + 1
    numbers = np.zeros(len(objects), np.int64) if objects.annotation_ids is None else objects.annotation_ids
    issues: list[Issue] = []
    places: list[int] = []
    found: list[Mask] = []
    for some in np.split(wanted, borders) if len(wanted) else ():
        row = int(objects.rows[some[0]])
        name = files.get(int(images.ids[row]))
        if name is None:
            continue
        try:
            masks = read_masks_of(folder, name, values[some])
        except DataError as error:
            issues.append(Issue(images.names[row], None, "mask file cannot be read", "masks dropped", str(error)))
            continue
        for at, mask in zip(some.tolist(), masks, strict=True):
            if mask is None:
                told = f"the value {values[at]} is not in {name}"
                issues.append(Issue(images.names[row], int(numbers[at]), "mask cannot be read", "mask dropped", told))
            else:
                places.append(at)
                found.append(mask)
    if not found:
        return objects, issues
    before = Masks.none(len(objects)) if objects.masks is None else objects.masks
    order = np.arange(len(objects))
    order[places] = len(objects) + np.arange(len(found))
    return dataclasses.replace(objects, masks=Masks.concatenate([before, Masks.of(found)]).take(order)), issues


def read_masks_of(folder: Path, name: str, values: Array) -> list[Rle | None]:
    """The pixels of each of ``values`` in one mask file; None where it holds none of them. DataError: no such file."""
    file = next((place for place in (folder / _FOLDER / name, folder / name) if place.is_file()), None)
    if file is None:
        raise DataError("the mask file is missing", where=folder / _FOLDER / name)
    try:
        with Image.open(file) as opened:
            pixels = np.asarray(opened)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"the mask file cannot be read: {error}", where=file) from None
    if pixels.ndim != 2 or pixels.dtype.kind not in "ui":
        raise DataError("the mask file holds something else than one whole number a pixel", where=file)
    return runs_of_values(pixels, values)


def runs_of_values(pixels: Array, values: Array) -> list[Rle | None]:
    """The run lengths of ``pixels == value`` for each of ``values``; ``pixels`` (H, W) of integers are read once."""
    height, width = pixels.shape
    flat = pixels.T.ravel()
    starts = np.concatenate([np.zeros(min(1, len(flat)), np.int64), np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.concatenate([starts[1:], np.full(min(1, len(flat)), len(flat), np.int64)])
    shown = flat[starts]
    order = np.argsort(shown, kind="stable")
    ranked = shown[order]
    first, last = (np.searchsorted(ranked, values, side=side) for side in ("left", "right"))
    found: list[Rle | None] = []
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        runs = order[a:b]
        if not len(runs):
            found.append(None)
            continue
        borders = np.stack([starts[runs], ends[runs]], 1).ravel()
        counts = np.diff(np.concatenate([[0], borders, [len(flat)]]))
        found.append(Rle((height, width), rle.compress(counts if counts[-1] else counts[:-1])))
    return found
