"""The choices by which pictures become the detector's input: resize, crop, flip, pad, colour.

This file decides; ``placement.py`` moves the boxes, ``decode.py`` the pixels. Every random choice hashes the sample's
key (``random_key.py``) and depends on nothing else. Pictures fall into at most five fixed padded shapes, numbered by
the resize configuration; all pictures of a global batch have one shape and one scale. Needs numpy only.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gesso.data.placement import Floats, Placement, Shape
from gesso.errors import ConfigError
from gesso.random_key import stream, uniform

__all__ = [
    "MULTI_SCALE",
    "PFDET_SCALES",
    "STRIDE",
    "Direct",
    "ImageNetCrop",
    "InputConfig",
    "KeepRatio",
    "Placement",
    "Shape",
    "colour_factors",
    "inference_placement",
    "training_placement",
]

FLIP, SCALE, CROP, COLOUR, PART = (stream(f"transforms.{name}") for name in ("flip", "scale", "crop", "colour", "part"))
CROP_ATTEMPTS = 10
STRIDE = 32

MULTI_SCALE = (640, 680, 720, 760, 800)
"""``short_sides`` of multi-scale training. The field draws one of 640, 672, ..., 800, which are six; five evenly spaced
ones have the same range and the same mean."""
PFDET_SCALES = (640, 744, 848, 952, 1056)
"""``short_sides`` of PFDet, which draws from all of 640 to 1056 (Akiba et al., 2018): five evenly spaced ones."""

Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class KeepRatio:
    """Resize by min(short / min(h, w), long / max(h, w)), keeping the aspect ratio; pad to one of five fixed shapes.

    The shapes are: a square; 4:3 and 3:4; and long ones both ways that take every picture. A picture goes to the first
    into which it fits at every listed short side. Source: Faster R-CNN, section 3.3; sizes: SPPnet, section 2.3.

    With ``divide`` n, both sides after this resize are divided by n and rounded down, so that n x n pictures side by
    side fit where one did (Chen et al., "Stitcher", 2020).
    """

    short_sides: tuple[int, ...] = (800,)
    """One to five short sides in pixels; one is drawn per global batch. Inference takes the largest."""
    long_side: int = 1333
    """No side becomes longer than this, in pixels."""
    stride: int = STRIDE
    """Both sides of a padded shape are multiples of this, itself a multiple of 32: anchors lie on that grid."""
    divide: int = 1
    """Both sides of the resized picture, and of the room for it, are divided by this."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.short_sides) <= 5 or min(self.short_sides) < 1:
            raise ConfigError(f"short_sides must be one to five positive numbers, found {self.short_sides}")
        if len(set(self.short_sides)) < len(self.short_sides):
            raise ConfigError(f"short_sides names a side twice: {self.short_sides}")
        if self.long_side < max(self.short_sides):
            raise ConfigError(f"long_side {self.long_side} is shorter than the short side {max(self.short_sides)}")
        if self.stride < STRIDE or self.stride % STRIDE:
            raise ConfigError(f"stride must be a multiple of {STRIDE}, found {self.stride}")
        if not 1 <= self.divide <= min(self.short_sides):
            raise ConfigError(f"divide must lie between 1 and the shortest short side, found {self.divide}")

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
            -(-(length // self.divide) // self.stride) * self.stride
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
        usual = (np.floor(sides * factor + 0.5).astype(np.int64) for sides in (high, wide))
        divided = [np.maximum(sides // self.divide, 1) for sides in usual]
        return divided[0], divided[1]

    def place(self, height: int, width: int, *, shape: int, scale: int, key: int | None, attempt: int = 0) -> Placement:
        """The placement of a picture on shape number ``shape``; there is no chance in it."""
        high, wide = self._resized(height, width, scale)
        size = int(high[0]), int(wide[0])
        return Placement((height, width), size, (0, 0), size, self.shapes(scale)[shape])


class _OneSquare:
    """What resizes have in common that put every picture on one square canvas, ``side`` x ``side``."""

    side: int

    def _check_side(self) -> None:
        if self.side < STRIDE or self.side % STRIDE:
            raise ConfigError(f"side must be a multiple of {STRIDE}, found {self.side}")

    @property
    def num_scales(self) -> int:
        """One: what is random is drawn per picture."""
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


@dataclass(frozen=True, kw_only=True)
class Direct(_OneSquare):
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
        self._check_side()
        if not 0 < self.low <= self.high or int(self.side * self.low) < 1:
            raise ConfigError(f"the resize factors need 0 < low <= high, found {self.low} and {self.high}")

    def place(self, height: int, width: int, *, shape: int, scale: int, key: int | None, attempt: int = 0) -> Placement:
        """The placement of a picture; ``key`` None is inference: the long side becomes ``side``, nothing is cropped."""
        factor = 1.0 if key is None else self.low + (self.high - self.low) * uniform(key, SCALE)
        long = int(self.side * factor)
        resized = _long_side(height, width, long) if self.mode == "keep" else (long, long)
        slack = [max(side - self.side, 0) for side in resized]
        top, left = (
            0 if key is None else int(uniform(key, CROP, 2 * attempt + axis) * (most + 1))
            for axis, most in enumerate(slack)
        )
        size = min(resized[0], self.side), min(resized[1], self.side)
        return Placement((height, width), resized, (top, left), size, (self.side, self.side))


@dataclass(frozen=True, kw_only=True)
class ImageNetCrop(_OneSquare):
    """Cut out a random part of the picture and stretch it to side x side, as classifiers are trained on ImageNet.

    The part has a share of the picture's area from U[area) and a ratio of width to height whose logarithm is from
    U[log ratio); after ten parts that do not fit it is the largest central one with the nearest ratio. Source: Szegedy
    et al., "Going deeper with convolutions", 2015, section 6, as drawn by torchvision's ``RandomResizedCrop``. Where a
    part loses all boxes, another is drawn as with ``Direct``; pictures without boxes are drawn exactly as there.
    """

    side: int = 224
    """Height and width of the padded picture in pixels, a multiple of 32."""
    area: tuple[float, float] = (0.08, 1.0)
    """The least and the largest share of the picture's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The least and the largest ratio of the part's width to its height."""
    inference: Literal["whole", "centre"] = "whole"
    """The whole picture with its long side ``side``, so that no box is lost; or, for classifiers (their boxes would not
    lead back to the picture), the centre side x side of the picture with its short side 256/224 ``side``."""

    def __post_init__(self) -> None:
        self._check_side()
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"area needs 0 < least <= largest <= 1, found {self.area}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"ratio needs 0 < least <= largest, found {self.ratio}")

    def place(self, height: int, width: int, *, shape: int, scale: int, key: int | None, attempt: int = 0) -> Placement:
        """The placement of a picture; ``key`` None is inference."""
        square = (self.side, self.side)
        if key is not None:
            region = self._part(height, width, key, attempt)
            return Placement((height, width), square, (0, 0), square, square, region=region)
        if self.inference == "whole":
            resized = _long_side(height, width, self.side)
            return Placement((height, width), resized, (0, 0), resized, square)
        short = self.side * 256 // 224  # the other side is rounded down, the offset half to even, as in torchvision
        resized = (short * height // min(height, width), short * width // min(height, width))
        offset = (round((resized[0] - self.side) / 2), round((resized[1] - self.side) / 2))
        return Placement((height, width), resized, offset, square, square)

    def _part(self, height: int, width: int, key: int, attempt: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random part."""
        shortest, widest = math.log(self.ratio[0]), math.log(self.ratio[1])
        for trial in range(attempt * CROP_ATTEMPTS, (attempt + 1) * CROP_ATTEMPTS):
            share, form, down, right = (uniform(key, PART, 4 * trial + number) for number in range(4))
            area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * share)
            ratio = math.exp(shortest + (widest - shortest) * form)
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                return int(down * (height - high + 1)), int(right * (width - wide + 1)), high, wide
        high = min(height, max(round(width / self.ratio[0]), 1))
        wide = min(width, max(round(height * self.ratio[1]), 1))
        return (height - high) // 2, (width - wide) // 2, high, wide


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How stored pictures become the detector's input."""

    resize: KeepRatio | Direct | ImageNetCrop = KeepRatio()
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
        if not len(boxes) or placement.whole or placement.move(boxes)[1].any():
            break
    return dataclasses.replace(placement, flip=bool(uniform(key, FLIP) < config.flip))


def inference_placement(config: InputConfig, height: int, width: int) -> tuple[int, Placement]:
    """The shape number and the placement of a picture at inference: no chance, no flip, the largest short side."""
    scale = config.resize.inference_scale
    shape = int(config.resize.assign(height, width)[0])
    return shape, config.resize.place(height, width, shape=shape, scale=scale, key=None)


def colour_factors(config: InputConfig, key: int) -> tuple[float, float, float]:
    """The factors of brightness, contrast and saturation for one sample; 1 changes nothing."""
    spread = (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = (
        1.0 + amount * (2.0 * uniform(key, COLOUR, element) - 1.0) if amount else 1.0
        for element, amount in enumerate(spread)
    )
    return brightness, contrast, saturation


def _long_side(height: int, width: int, long: int) -> Shape:
    """The picture's size with its long side ``long``, the other one rounded to the nearest."""
    ratio = long / max(height, width)
    return max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)
