"""Where one picture comes to lie on its canvas, and its boxes with it. Needs numpy only."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Shape: TypeAlias = tuple[int, int]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """How one picture comes to lie on its canvas: resized, then cropped, then mirrored, then padded right and below.

    Attributes:
        original: height and width of the stored picture.
        resized: height and width after the resize.
        offset: top and left of the crop in the resized picture.
        size: height and width of the crop, which is the valid part of the canvas.
        canvas: height and width of the padded picture.
        flip: the crop is mirrored left to right.
        region: top, left, height and width of the part of the stored picture that is cut out before the resize, so
            that ``resized`` is the size of this part; None is the whole picture.
    """

    original: Shape
    resized: Shape
    offset: Shape
    size: Shape
    canvas: Shape
    flip: bool = False
    region: tuple[int, int, int, int] | None = None

    @property
    def source(self) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part of the stored picture that is resized."""
        return (0, 0, *self.original) if self.region is None else self.region

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels here per original pixel, for height and width."""
        _, _, height, width = self.source
        return self.resized[0] / height, self.resized[1] / width

    @property
    def whole(self) -> bool:
        """Nothing of the picture is cut off."""
        return self.region is None and self.size == self.resized

    def move(self, boxes: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Boxes (n, 4) of the stored picture on the canvas, and which of them are kept (n,).

        The one rule for boxes that a crop cuts, whatever the resize: they are clipped to the valid part, and kept where
        width and height are then above 0, however little is left.
        """
        scale, offset, limit = (_xyxy(pair) for pair in (self.scale, self.offset, self.size))
        moved = np.clip((boxes - _xyxy(self.source[:2])) * scale - offset, 0, limit)
        if self.flip:
            moved[:, [0, 2]] = self.size[1] - moved[:, [2, 0]]
        return moved, (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])

    def frames(self, boxes: Floats) -> Floats:
        """Boxes (n, 4) of the canvas in pixels of the stored picture; where mirrored, x1 > x2."""
        back = boxes.copy()
        if self.flip:
            back[:, [0, 2]] = self.size[1] - back[:, [0, 2]]
        frames: Floats = (back + _xyxy(self.offset)) / _xyxy(self.scale) + _xyxy(self.source[:2])
        return frames

    def pixels(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The rows (h,) and columns (w,) of the stored picture in which the centres of the valid part's pixels lie."""
        top, left, height, width = self.source
        rows, columns = (
            start + ((2 * (np.arange(count) + first) + 1) * length) // (2 * resized)
            for start, count, first, length, resized in zip(
                (top, left), self.size, self.offset, (height, width), self.resized, strict=True
            )
        )
        return rows, columns[::-1] if self.flip else columns


def _xyxy(pair: tuple[float, float]) -> npt.NDArray[Any]:
    return np.array([pair[1], pair[0], pair[1], pair[0]], np.float32)
