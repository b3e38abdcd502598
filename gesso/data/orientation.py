"""Boxes and masks moved along with a picture that its EXIF orientation turns.

Sizes are (width, height) of the stored pixels; the eight orientations are those of EXIF 2.3, tag 0x0112.
"""

import dataclasses

import numpy as np

from gesso.data import rle
from gesso.data.records import Array, Mask, Masks, ObjectBlock, Polygons, Rle


def turn_points(x: Array, y: Array, size: tuple[Array, Array], orientation: int) -> tuple[Array, Array]:
    """Where points of the stored picture stand after EXIF transposition."""
    width, height = size
    return {
        1: (x, y),
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }[orientation]


def turn_mask(mask: Mask, size: tuple[int, int], orientation: int) -> Mask:
    """A mask of the stored picture after EXIF transposition."""
    if isinstance(mask, Polygons):
        width, height = np.array(size, np.float32)
        turned = (turn_points(ring[:, 0], ring[:, 1], (width, height), orientation) for ring in mask.rings)
        return Polygons(tuple(np.stack([x, y], 1).astype(np.float32) for x, y in turned))
    if isinstance(mask, Rle):
        pixels = rle.decode(mask)
        turned_pixels = {
            1: pixels,
            2: pixels[:, ::-1],
            3: pixels[::-1, ::-1],
            4: pixels[::-1],
            5: pixels.T,
            6: pixels[::-1].T,
            7: pixels[::-1, ::-1].T,
            8: pixels[:, ::-1].T,
        }[orientation]
        return rle.encode(turned_pixels)
    return None


def turn_objects(objects: ObjectBlock, sizes: Array, orientations: Array) -> ObjectBlock:
    """Turns the objects of the pictures with ``orientations`` (N,) above 1; ``sizes`` (N, 2) are the stored ones."""
    at = np.flatnonzero(orientations[objects.rows] > 1)
    if not len(at):
        return objects
    xyxy = objects.xyxy.copy()
    for orientation in range(2, 9):
        some = at[orientations[objects.rows[at]] == orientation]
        width, height = sizes[objects.rows[some]].astype(np.float32).T
        x1, y1 = turn_points(xyxy[some, 0], xyxy[some, 1], (width, height), orientation)
        x2, y2 = turn_points(xyxy[some, 2], xyxy[some, 3], (width, height), orientation)
        mirrored_x = orientation in (2, 3, 6, 7)
        mirrored_y = orientation in (3, 4, 7, 8)
        left, right = (x2, x1) if mirrored_x else (x1, x2)
        top, bottom = (y2, y1) if mirrored_y else (y1, y2)
        xyxy[some] = np.stack([left, top, right, bottom], 1)
    masks = objects.masks
    if masks is not None:
        place = objects.rows[at]
        turned = Masks.of(
            [
                turn_mask(masks[k], (int(sizes[row, 0]), int(sizes[row, 1])), int(orientations[row]))
                for k, row in zip(at.tolist(), place.tolist(), strict=True)
            ]
        )
        order = np.arange(len(masks))
        order[at] = len(masks) + np.arange(len(at))
        masks = Masks.concatenate([masks, turned]).take(order)
    return dataclasses.replace(objects, xyxy=xyxy, masks=masks)
