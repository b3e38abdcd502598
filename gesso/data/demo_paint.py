"""The brush of the embedded data set: crops of photographs, and figures with anti-aliased edges and exact masks."""

import colorsys
import dataclasses
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_INK = 0.45  # the level of the enlarged sample at which ink begins
_EDGE_PX = 1.2  # width of the anti-aliased edge
_DRAFT = 4.0  # pixels for each of the sample when its extent is measured


@dataclass(frozen=True)
class Figure:
    """A shape at a place, with its colours.

    Attributes:
        alpha: float32 (h, w) in [0, 1], cropped to ``mask``'s box.
        mask: bool (h, w), ``alpha`` of at least one half; it touches all four borders.
        relief: float32 (h, w) in [0, 1]: the ink's thickness; where it is thin, the colour is nearer the background.
        x: column of the left border on the canvas; ``y`` the row of the upper border.
        fill: float32 (h, w, 3) RGB in [0, 255].
        glow: -1 to 1: how strongly a soft rim darkens (below 0) or lightens the surroundings.
    """

    alpha: Plane
    mask: npt.NDArray[np.bool_]
    relief: Plane
    x: int = 0
    y: int = 0
    fill: Plane | None = None
    glow: float = 0.0

    def moved(self, x: int, y: int) -> "Figure":
        """The figure with its upper left corner at (x, y)."""
        return dataclasses.replace(self, x=x, y=y)

    def mask_on(self, side: int) -> npt.NDArray[np.bool_]:
        """The mask on a square canvas: bool (side, side)."""
        whole = np.zeros((side, side), np.bool_)
        height, width = self.mask.shape
        whole[self.y : self.y + height, self.x : self.x + width] = self.mask
        return whole

    def coloured(self, canvas: Pixels, rng: np.random.Generator) -> "Figure":
        """The figure in a random colour that stands out from what lies under it on ``canvas``."""
        height, width = self.mask.shape
        under = canvas[self.y : self.y + height, self.x : self.x + width].reshape(-1, 3) @ _LUMA
        here = float(under.mean())
        goal = here + rng.uniform(105, 160) * (1 if rng.random() < (255 - here) / 255 else -1)
        if not 10 <= goal <= 245:
            goal = 2 * here - goal
        goal = float(np.clip(goal, 10, 245))
        hue, colour = rng.random(), rng.uniform(0.2, 1.0)
        first = _colour(hue, colour, goal)
        second = _colour(hue + rng.normal(0, 0.06), colour, goal + rng.uniform(-22, 22))
        turn = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
        ramp = (columns / width - 0.5) * np.cos(turn) + (rows / height - 0.5) * np.sin(turn) + 0.5
        blend = np.clip(ramp, 0, 1)[..., None].astype(np.float32)
        clear = 1 - np.float32(rng.uniform(0.25, 0.6)) * (1 - self.relief[..., None])
        fill = first * (1 - blend) + second * blend
        fill = here + (fill - here) * clear
        glow = rng.uniform(0.15, 0.6) * (-1 if goal > here else 1)
        return dataclasses.replace(self, fill=fill, glow=float(glow))


def background_crop(photograph: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """A random square of a photograph (h, w, 3), turned, mirrored and tinted at random: uint8 (side, side, 3)."""
    height, width = photograph.shape[:2]
    longest = min(height, width)
    size = round(longest * rng.uniform(0.45, 1.0))
    x, y = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
    crop = photograph[y : y + size, x : x + size]
    method = cv2.INTER_AREA if size > side else cv2.INTER_CUBIC
    crop = np.rot90(cv2.resize(crop, (side, side), interpolation=method), int(rng.integers(4)))
    pixels: npt.NDArray[Any] = crop.astype(np.float32) if rng.random() < 0.5 else crop[:, ::-1].astype(np.float32)
    grey = (pixels @ _LUMA)[..., None]
    pixels = grey + (pixels - grey) * np.float32(rng.uniform(0.4, 1.3))
    tint = rng.uniform(0.8, 1.2, 3).astype(np.float32)
    contrast, middle = np.float32(rng.uniform(0.65, 1.1)), grey.mean()
    pixels = (middle + (pixels - middle) * contrast) * tint + np.float32(rng.uniform(-25, 25))
    done: Pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return done


def digit_figure(glyph: Plane, size: float, angle: float, rng: np.random.Generator) -> Figure:
    """A handwritten digit whose longer side is ``size`` pixels, sheared and stretched a little.

    Args:
        glyph: float32 (8, 8) in [0, 1].
        size: in pixels; the figure's longer side is within a pixel of it.
        angle: in radians.
        rng: draws shear, stretch and weight of the stroke.
    """
    shear, stretch = rng.uniform(-0.2, 0.2), np.exp(rng.uniform(-0.2, 0.2))
    level = _INK + rng.uniform(-0.08, 0.06)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shape = rotation @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([stretch, 1 / stretch])
    source: Plane = np.asarray(cv2.GaussianBlur(np.pad(glyph, 2), (3, 3), 0.55), np.float32)
    draft = _enlarge(source, shape * _DRAFT) >= level
    height, width = _extent(draft)
    zoom = _DRAFT * size / max(height, width)
    values = _enlarge(source, shape * zoom)
    relief = np.sqrt(np.clip((values - level) / (values.max() - level), 0, 1))
    return _figure(np.clip(0.5 + (values - level) * (1.3 * zoom / _EDGE_PX), 0, 1).astype(np.float32), relief)


def card_figure(digit: Figure, angle: float, rng: np.random.Generator) -> Figure:
    """A turned rounded rectangle with room for ``digit`` in its middle."""
    digit_height, digit_width = digit.mask.shape
    half = np.array([digit_width, digit_height]) / 2 * rng.uniform(1.35, 1.6) + 2
    radius = float(rng.uniform(0.1, 0.35) * half.min())
    reach = int(np.ceil(np.hypot(*half))) + 2
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    u = columns * np.cos(angle) + rows * np.sin(angle)
    v = rows * np.cos(angle) - columns * np.sin(angle)
    beyond = np.stack([np.abs(u) - half[0] + radius, np.abs(v) - half[1] + radius])
    distance = np.hypot(*np.maximum(beyond, 0)) + np.minimum(beyond.max(0), 0) - radius
    alpha = np.clip(0.5 - distance / _EDGE_PX, 0, 1).astype(np.float32)
    return _figure(alpha, np.ones_like(alpha))


def paste(canvas: Pixels, figure: Figure) -> Pixels:
    """A copy of ``canvas`` (H, W, 3) with a coloured figure painted on it, and its soft rim around it."""
    assert figure.fill is not None, "coloured() comes before paste()"
    height, width = figure.mask.shape
    rim = max(2, round(0.12 * max(height, width)))
    spread = cv2.GaussianBlur(np.pad(figure.alpha, rim), (0, 0), rim / 2.5)
    top, left = figure.y - rim, figure.x - rim
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + spread.shape[0], canvas.shape[0]), min(left + spread.shape[1], canvas.shape[1])
    result = canvas.copy()
    around = result[y0:y1, x0:x1].astype(np.float32)
    weight = (abs(figure.glow) * spread[y0 - top : y1 - top, x0 - left : x1 - left])[..., None]
    around += weight * ((255.0 if figure.glow > 0 else 0.0) - around)
    inner = around[figure.y - y0 : figure.y - y0 + height, figure.x - x0 : figure.x - x0 + width]
    inner += figure.alpha[..., None] * (figure.fill - inner)
    result[y0:y1, x0:x1] = np.clip(np.rint(around), 0, 255).astype(np.uint8)
    return result


def _enlarge(source: Plane, linear: npt.NDArray[np.float64]) -> Plane:
    """``source`` (n, n) under a linear map about its middle, on a canvas that holds all of it."""
    half = source.shape[0] / 2
    reach = int(np.ceil(half * np.abs(linear).sum(1).max()))
    offset = reach - linear @ np.array([half - 0.5, half - 0.5]) - 0.5
    warp = np.concatenate([linear, offset[:, None]], 1)
    result: Plane = np.asarray(cv2.warpAffine(source, warp, (2 * reach, 2 * reach), flags=cv2.INTER_CUBIC), np.float32)
    return result


def _extent(mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def _figure(alpha: Plane, relief: Plane) -> Figure:
    mask = alpha >= 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Figure(alpha=alpha[window], mask=mask[window], relief=relief[window])


def _colour(hue: float, saturation: float, luma: float) -> Plane:
    """RGB of a hue whose luma is ``luma``; the saturation gives way where both cannot be had."""
    rgb = np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, 1.0), np.float32) * 255
    bright = float(rgb @ _LUMA)
    luma = float(np.clip(luma, 5, 250))
    if luma <= bright:
        return rgb * np.float32(luma / bright)
    return rgb + (255 - rgb) * np.float32((luma - bright) / (255 - bright))
