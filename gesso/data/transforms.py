"""Where a picture comes to lie on its canvas, and its boxes with it: resize, crop, flip, pad, colour.

This file decides; ``decode.py`` moves the pixels. Every random choice hashes the sample's key (``random_key.py``) and
depends on nothing else. Pictures fall into at most five fixed padded shapes, numbered by the resize configuration; all
pictures of a global batch have one shape and one scale. Needs numpy only.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gesso.errors import ConfigError
from gesso.random_key import stream, uniform

FLIP, SCALE, CROP, COLOUR = (stream(f"transforms.{name}") for name in ("flip", "scale", "crop", "colour"))
CROP_ATTEMPTS = 10
STRIDE = 32

Shape: TypeAlias = tuple[int, int]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]


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
    """

    original: Shape
    resized: Shape
    offset: Shape
    size: Shape
    canvas: Shape
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels here per original pixel, for height and width."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    def move(self, boxes: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Boxes (n, 4) of the stored picture on the canvas, clipped to the valid part, and which are not empty (n,)."""
        scale, offset, limit = (_xyxy(pair) for pair in (self.scale, self.offset, self.size))
        moved = np.clip(boxes * scale - offset, 0, limit)
        if self.flip:
            moved[:, [0, 2]] = self.size[1] - moved[:, [2, 0]]
        return moved, (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])

    def frames(self, boxes: Floats) -> Floats:
        """Boxes (n, 4) of the canvas in pixels of the stored picture; where mirrored, x1 > x2."""
        back = boxes.copy()
        if self.flip:
            back[:, [0, 2]] = self.size[1] - back[:, [0, 2]]
        frames: Floats = (back + _xyxy(self.offset)) / _xyxy(self.scale)
        return frames


@dataclass(frozen=True, kw_only=True)
class KeepRatio:
    """Resize by min(short / min(h, w), long / max(h, w)), keeping the aspect ratio; pad to one of five fixed shapes.

    The shapes are: a square; 4:3 and 3:4; and long ones both ways that take every picture. A picture goes to the first
    into which it fits at every listed short side. Source: Faster R-CNN, section 3.3; sizes: SPPnet, section 2.3.
    """

    short_sides: tuple[int, ...] = (800,)
    """One to five short sides in pixels; one is drawn per global batch. Inference takes the largest."""
    long_side: int = 1333
    """No side becomes longer than this, in pixels."""
    stride: int = STRIDE
    """Both sides of a padded shape are multiples of this, itself a multiple of 32: anchors lie on that grid."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.short_sides) <= 5 or min(self.short_sides) < 1:
            raise ConfigError(f"short_sides must be one to five positive numbers, found {self.short_sides}")
        if len(set(self.short_sides)) < len(self.short_sides):
            raise ConfigError(f"short_sides names a side twice: {self.short_sides}")
        if self.long_side < max(self.short_sides):
            raise ConfigError(f"long_side {self.long_side} is shorter than the short side {max(self.short_sides)}")
        if self.stride < STRIDE or self.stride % STRIDE:
            raise ConfigError(f"stride must be a multiple of {STRIDE}, found {self.stride}")

    @property
    def num_scales(self) -> int:
        """How many short sides there are to draw from."""
        return len(self.short_sides)

    @property
    def inference_scale(self) -> int:
        """The number of the scale at which inference runs: the largest."""
        return self.short_sides.index(max(self.short_sides))

    def shapes(self, scale: int) -> tuple[Shape, ...]:
        """The padded shapes (height, width) at scale number ``scale``, five (some may be equal)."""
        short = self.short_sides[scale]
        side, middle, long = (
            -(-length // self.stride) * self.stride
            for length in (short, min(-(-short * 4 // 3), self.long_side), self.long_side)
        )
        return (side, side), (side, middle), (middle, side), (side, long), (long, side)

    def assign(self, heights: npt.ArrayLike, widths: npt.ArrayLike) -> Ints:
        """The shape number (N,) of each picture: the first into which it fits at every scale."""
        fits = np.ones((5, np.size(heights)), bool)
        for scale in range(self.num_scales):
            high, wide = self._resized(heights, widths, scale)
            for number, (height, width) in enumerate(self.shapes(scale)):
                fits[number] &= (high <= height) & (wide <= width)
        numbers: Ints = fits.argmax(0)
        return numbers

    def _resized(self, heights: npt.ArrayLike, widths: npt.ArrayLike, scale: int) -> tuple[Ints, Ints]:
        high, wide = np.atleast_1d(np.asarray(heights, np.float64)), np.atleast_1d(np.asarray(widths, np.float64))
        factor = np.minimum(self.short_sides[scale] / np.minimum(high, wide), self.long_side / np.maximum(high, wide))
        to_side = [np.maximum(np.floor(sides * factor + 0.5), 1).astype(np.int64) for sides in (high, wide)]
        return to_side[0], to_side[1]

    def place(self, height: int, width: int, *, shape: int, scale: int, key: int | None, attempt: int = 0) -> Placement:
        """The placement of a picture on shape number ``shape``; there is no chance in it."""
        high, wide = self._resized(height, width, scale)
        size = int(high[0]), int(wide[0])
        return Placement((height, width), size, (0, 0), size, self.shapes(scale)[shape])


@dataclass(frozen=True, kw_only=True)
class Direct:
    """Resize the long side to ``side * a`` with a ~ U[low, high), crop at random to ``side``, pad to side x side.

    Source: Li et al., "Rethinking Training from Scratch for Object Detection", 2021, and its published code. The
    reference draws another picture where a crop loses all boxes; here the crop is drawn anew, up to ten times, and the
    picture is then kept as a negative, so that sample numbers stay what they are.
    """

    side: int = 448
    """Height and width of the padded picture in pixels, a multiple of 32."""
    low: float = 0.8
    """The least resize factor."""
    high: float = 1.2
    """The largest resize factor."""
    mode: Literal["keep", "square"] = "keep"
    """Keep the aspect ratio (the reference's code), or stretch to a square (its paper's text)."""

    def __post_init__(self) -> None:
        if self.side < STRIDE or self.side % STRIDE:
            raise ConfigError(f"side must be a multiple of {STRIDE}, found {self.side}")
        if not 0 < self.low <= self.high or int(self.side * self.low) < 1:
            raise ConfigError(f"the resize factors need 0 < low <= high, found {self.low} and {self.high}")

    @property
    def num_scales(self) -> int:
        """One: the factor is drawn per picture."""
        return 1

    @property
    def inference_scale(self) -> int:
        """Number 0."""
        return 0

    def shapes(self, scale: int) -> tuple[Shape, ...]:
        """The one padded shape."""
        return ((self.side, self.side),)

    def assign(self, heights: npt.ArrayLike, widths: npt.ArrayLike) -> Ints:
        """Zeros (N,): all pictures have the one shape."""
        return np.zeros(np.size(heights), np.int64)

    def place(self, height: int, width: int, *, shape: int, scale: int, key: int | None, attempt: int = 0) -> Placement:
        """The placement of a picture; ``key`` None is inference: the long side becomes ``side``, nothing is cropped."""
        factor = 1.0 if key is None else self.low + (self.high - self.low) * uniform(key, SCALE)
        long = int(self.side * factor)
        if self.mode == "keep":
            ratio = long / max(height, width)
            resized = max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)
        else:
            resized = long, long
        slack = [max(side - self.side, 0) for side in resized]
        top, left = (
            0 if key is None else int(uniform(key, CROP, 2 * attempt + axis) * (most + 1))
            for axis, most in enumerate(slack)
        )
        size = min(resized[0], self.side), min(resized[1], self.side)
        return Placement((height, width), resized, (top, left), size, (self.side, self.side))


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How stored pictures become the detector's input."""

    resize: KeepRatio | Direct = KeepRatio()
    """The resize, and with it the padded shapes."""
    flip: float = 0.5
    """The probability of mirroring left to right, in training."""
    brightness: float = 0.0
    """Training multiplies the picture by a factor from [1 - b, 1 + b]."""
    contrast: float = 0.0
    """Training blends the picture with its mean grey by a factor from [1 - c, 1 + c]."""
    saturation: float = 0.0
    """Training blends the picture with its grey form by a factor from [1 - s, 1 + s]."""

    def __post_init__(self) -> None:
        for name in ("flip", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, found {getattr(self, name)}")


def training_placement(
    config: InputConfig, height: int, width: int, boxes: Floats, *, shape: int, scale: int, key: int
) -> Placement:
    """Draws the placement of a training picture of ``height`` x ``width`` from its key.

    Where a crop loses all of ``boxes`` (n, 4), it is drawn anew, up to ten times in all; the last one stands.
    """
    for attempt in range(CROP_ATTEMPTS):
        placement = config.resize.place(height, width, shape=shape, scale=scale, key=key, attempt=attempt)
        if not len(boxes) or placement.move(boxes)[1].any():
            break
    return dataclasses.replace(placement, flip=bool(uniform(key, FLIP) < config.flip))


def inference_placement(config: InputConfig, height: int, width: int) -> tuple[int, Placement]:
    """The shape number and the placement of a picture at inference: no crop, no flip, the largest short side."""
    scale = config.resize.inference_scale
    shape = int(config.resize.assign(height, width)[0])
    return shape, config.resize.place(height, width, shape=shape, scale=scale, key=None)


def colour_factors(config: InputConfig, key: int) -> tuple[float, float, float]:
    """The factors of brightness, contrast and saturation for one sample; 1 changes nothing."""
    spread = (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = (
        1.0 + amount * (2.0 * uniform(key, COLOUR, element) - 1.0) for element, amount in enumerate(spread)
    )
    return brightness, contrast, saturation


def _xyxy(pair: tuple[float, float]) -> npt.NDArray[Any]:
    return np.array([pair[1], pair[0], pair[1], pair[0]], np.float32)
