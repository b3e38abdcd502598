"""Boxes with names and scores, and masks, drawn on pictures for people to look at.

Colours are Okabe and Ito's ("Color Universal Design", 2008), told apart by all common kinds of colour vision; each line
has a dark rim, so that it shows on any ground. Pictures are uint8 (H, W, 3) RGB; boxes (n, 4) xyxy in their pixels.
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

Picture: TypeAlias = npt.NDArray[np.uint8]
Boxes: TypeAlias = npt.NDArray[Any]
Colour: TypeAlias = tuple[int, int, int]
Rectangle: TypeAlias = tuple[float, float, float, float]

PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
)
_GREY: Colour = (160, 160, 160)
_DARK: Colour = (20, 20, 20)
_LIGHT: Colour = (255, 255, 255)
_SMALLEST_TEXT = 11
_MANY = 30
_OPACITY = 0.45
"""Of a mask."""


def colour_of(name: str, classes: Sequence[str] = ()) -> Colour:
    """The colour of a class: by its place in ``classes``, or by its name alone where it is not there."""
    number = classes.index(name) if name in classes else zlib.crc32(name.encode())
    return PALETTE[number % len(PALETTE)]


def write_map(path: Path, values: Picture) -> None:
    """Writes a semantic map (H, W) as an indexed PNG, its classes in the colours of ``PALETTE`` in turn, 255 white."""
    colours = [_DARK, *itertools.islice(itertools.cycle(PALETTE), 254), _LIGHT]
    image = Image.fromarray(values)
    image.putpalette([part for colour in colours for part in colour])
    image.save(path, format="PNG")


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


@dataclass(frozen=True)
class _Style:
    """Widths in pixels of the drawn picture."""

    line: int
    text: int
    dash: int

    @classmethod
    def of(cls, size: tuple[int, int]) -> "_Style":
        side = min(size)
        line = max(2, round(side / 240))
        return cls(line=line, text=max(_SMALLEST_TEXT, round(side / 36)), dash=5 * line)


def draw_detections(
    image: Picture,
    xyxy: Boxes,
    labels: Sequence[str],
    scores: Sequence[float] | npt.NDArray[Any] | None = None,
    *,
    classes: Sequence[str] = (),
    dashed: bool = False,
    ignored: Sequence[bool] | npt.NDArray[np.bool_] | None = None,
    min_side: int = 320,
    masks: Sequence[npt.NDArray[np.bool_]] | npt.NDArray[np.bool_] | None = None,
) -> Picture:
    """The picture with boxes, names and scores on it; a name that would hide the names of better boxes is left out.

    Where there are more than 30 boxes, so are names that would be larger than their box.

    Args:
        image: (H, W, 3) uint8 RGB; it is not changed.
        xyxy: (n, 4) pixels of ``image``.
        labels: n names.
        scores: n, written behind the names as percent; the best are drawn on top.
        classes: all class names in order, so that a class has the same colour on every picture.
        dashed: interrupted lines, for ground truth.
        ignored: n, drawn in grey.
        min_side: a picture with a shorter side below it is enlarged by a whole factor, so that text can be read; 0
            keeps the size.
        masks: (n, H, W) bool, filled translucently in the colours of their classes under all boxes; or None.

    Returns:
        uint8 (H * f, W * f, 3), f = 1 for most pictures.
    """
    factor = max(1, -(-min_side // max(1, min(image.shape[:2]))))
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable") if scores is not None else np.arange(len(labels))
    grey = np.zeros(len(labels), bool) if ignored is None else np.asarray(ignored, bool)
    colours = [_GREY if out else colour_of(name, classes) for name, out in zip(labels, grey, strict=True)]
    canvas = Image.fromarray(image).convert("RGB")
    if factor > 1:
        canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    style = _Style.of(canvas.size)
    if masks is not None:
        assert len(masks) == len(labels), "one mask for each box"
        for i in order[::-1]:
            _fill(canvas, masks[i], colours[i], style)
    draw = ImageDraw.Draw(canvas)
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4) * factor
    for i in order[::-1]:
        _rectangle(draw, tuple(boxes[i].tolist()), colours[i], style, dashed)
    taken: list[Rectangle] = []
    written: list[tuple[str, Rectangle, Colour]] = []
    for i in order:
        text = labels[i] if scores is None else f"{labels[i]} {100 * float(scores[i]):.0f}"
        spot = _spot(text, tuple(boxes[i].tolist()), style, taken, canvas.size)
        if spot is not None and not (len(boxes) > _MANY and _area(spot) > _area(boxes[i].tolist())):
            taken.append(spot)
            written.append((text, spot, colours[i]))
    for text, spot, colour in reversed(written):
        _write(draw, text, spot, colour, style)
    return np.asarray(canvas)


def draw_comparison(
    image: Picture,
    truth: tuple[Boxes, Sequence[str]],
    found: tuple[Boxes, Sequence[str], Sequence[float] | npt.NDArray[Any]],
    *,
    classes: Sequence[str] = (),
    ignored: Sequence[bool] | npt.NDArray[np.bool_] | None = None,
    min_side: int = 320,
) -> Picture:
    """Ground truth (dashed, left) and detections (right) of one picture, side by side under captions.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: boxes (n, 4) and n names.
        found: boxes (m, 4), m names and m scores.
        classes: all class names in order, for the colours.
        ignored: n, ground truth that counts for nothing, drawn in grey.
        min_side: as in ``draw_detections``.

    Returns:
        uint8 RGB.
    """
    left = draw_detections(image, *truth, classes=classes, dashed=True, ignored=ignored, min_side=min_side)
    right = draw_detections(image, *found, classes=classes, min_side=min_side)
    height, width = left.shape[:2]
    text = max(13, _Style.of((width, height)).text)
    head, gap = 2 * text, max(4, width // 60)
    canvas = Image.new("RGB", (2 * width + gap, height + head), _LIGHT)
    draw = ImageDraw.Draw(canvas)
    for x, caption, part in ((0, "ground truth", left), (width + gap, "detections", right)):
        draw.text((x + text // 3, head // 2), caption, fill=_DARK, font=_font(text), anchor="lm")
        canvas.paste(Image.fromarray(part), (x, head))
    return np.asarray(canvas)


def _fill(canvas: Image.Image, mask: npt.NDArray[np.bool_], colour: Colour, style: _Style) -> None:
    """Lays a mask of the picture before it was enlarged over the canvas, with a border of its colour."""
    stencil = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    region = stencil.getbbox()
    if region is None:
        return
    across, down = canvas.width // stencil.width, canvas.height // stencil.height
    stencil = stencil.crop(region).resize(((region[2] - region[0]) * across, (region[3] - region[1]) * down))
    at = (region[0] * across, region[1] * down)
    inner = ImageOps.expand(stencil, style.line).filter(ImageFilter.MinFilter(2 * (style.line // 2) + 1))
    inner = ImageOps.crop(inner, style.line)
    opacity = np.where(np.asarray(stencil) > 127, np.where(np.asarray(inner) > 127, round(255 * _OPACITY), 230), 0)
    canvas.paste(colour, at, Image.fromarray(opacity.astype(np.uint8)))


def _rectangle(draw: ImageDraw.ImageDraw, box: Rectangle, colour: Colour, style: _Style, dashed: bool) -> None:
    x1, y1, x2, y2 = box
    x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
    corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1))
    for width, ink in ((style.line + 2, _DARK), (style.line, colour)):
        if not dashed:
            draw.rectangle(
                (x1 - width // 2, y1 - width // 2, x2 + width // 2, y2 + width // 2), outline=ink, width=width
            )
            continue
        for start, end in itertools.pairwise(corners):
            for dash in _dashes(start, end, style.dash):
                draw.line(dash, fill=ink, width=width)


def _dashes(start: tuple[float, float], end: tuple[float, float], length: int) -> Iterator[Rectangle]:
    """Pieces of a side, as long as their gaps; both corners are drawn."""
    a, b = np.array(start), np.array(end)
    count = 2 * max(1, round(float(np.abs(b - a).max()) / (2 * length))) + 1
    points = a + (b - a) * np.arange(count + 1)[:, None] / count
    for k in range(0, count, 2):
        yield (*points[k].tolist(), *points[k + 1].tolist())


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _spot(
    text: str, box: Rectangle, style: _Style, taken: Sequence[Rectangle], size: tuple[int, int]
) -> Rectangle | None:
    """The place at the box where the text covers least of other texts; None where it would hide another."""
    pad = _pad(style)
    left, _, right, _ = _font(style.text).getbbox(text, anchor="la")
    width, height = right - left + 2 * pad, style.text + 2 * pad
    x1, y1, x2, y2 = box
    places = [(x1, y1 - height), (x1, y1), (x2 - width, y1), (x1, y2), (x1, y2 - height), (x2 - width, y2 - height)]
    spots = [_inside(x, y, width, height, size) for x, y in places]
    covered = [sum(_overlap(spot, other) for other in taken) for spot in spots]
    best = int(np.argmin(covered))
    return spots[best] if covered[best] < 0.15 * width * height else None


def _write(draw: ImageDraw.ImageDraw, text: str, spot: Rectangle, colour: Colour, style: _Style) -> None:
    font = _font(style.text)
    draw.rectangle(spot, fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    left = font.getbbox(text, anchor="la")[0]
    at = (spot[0] + _pad(style) - left, (spot[1] + spot[3]) / 2)
    draw.text(at, text, fill=_DARK if luminance > 110 else _LIGHT, font=font, anchor="lm")


def _pad(style: _Style) -> int:
    return max(2, style.text // 5)


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> Rectangle:
    x = max(0.0, min(x, size[0] - width))
    y = max(0.0, min(y, size[1] - height))
    return x, y, x + width, y + height


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
