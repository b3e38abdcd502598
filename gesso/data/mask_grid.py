"""Instance masks on a grid over their box: uint8 (S, S), each cell the mask's value at the cell's centre.

Polygons and run lengths are sampled where they are, in pixels of the stored picture; resize, crop and flip are in the
frame alone, so nothing is drawn at full size. The grid is that of Mask R-CNN's targets (He et al., section 3).
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gesso.data.records import Mask, Polygons, Rle
from gesso.data.rle import uncompress

Grid: TypeAlias = npt.NDArray[np.uint8]


def rasterise(mask: Mask, frame: npt.NDArray[np.float32], side: int) -> Grid:
    """The mask on a grid of ``side`` x ``side`` cells over ``frame`` (4,), x1 y1 x2 y2 in pixels of the stored picture.

    Where x1 > x2 the grid is mirrored. None gives zeros. Pixel (i, j) covers [j, j + 1) x [i, i + 1).
    """
    if isinstance(mask, Polygons):
        return _polygons(mask, np.asarray(frame, np.float64), side)
    if isinstance(mask, Rle):
        return _run_lengths(mask, np.asarray(frame, np.float64), side)
    return np.zeros((side, side), np.uint8)


def _polygons(mask: Polygons, frame: npt.NDArray[np.float64], side: int) -> Grid:
    """The union of the rings, each filled by the even-odd rule."""
    grid = np.zeros((side, side), np.uint8)
    extent = frame[2:] - frame[:2]
    for ring in mask.rings:
        points = (ring - frame[:2]) / extent * side
        grid |= _fill(points, side)
    return grid


def _fill(points: npt.NDArray[np.float64], side: int) -> Grid:
    """Even-odd: every edge toggles all cells to the right of where it crosses the line through the row's centres."""
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    centres = np.arange(side)[:, None] + 0.5
    row, edge = np.nonzero((y0 <= centres) != (y1 <= centres))
    slope = (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    crossing = x0[edge] + (centres[row, 0] - y0[edge]) * slope
    column = np.clip(np.ceil(crossing - 0.5), 0, side).astype(np.int64)
    toggles = np.bincount(row * (side + 1) + column, minlength=side * (side + 1)).reshape(side, side + 1)
    grid: Grid = (np.cumsum(toggles, axis=1)[:, :side] & 1).astype(np.uint8)
    return grid


def _run_lengths(mask: Rle, frame: npt.NDArray[np.float64], side: int) -> Grid:
    """The run in which each centre's pixel lies tells its value: odd runs are the mask."""
    height, width = mask.size
    ends = np.cumsum(uncompress(mask.counts))
    x, y = (frame[axis] + (np.arange(side) + 0.5) / side * (frame[axis + 2] - frame[axis]) for axis in (0, 1))
    columns = np.clip(np.floor(x).astype(np.int64), 0, width - 1)
    rows = np.clip(np.floor(y).astype(np.int64), 0, height - 1)
    runs = np.searchsorted(ends, columns[None, :] * height + rows[:, None], side="right")
    grid: Grid = (runs & 1).astype(np.uint8)
    return grid
