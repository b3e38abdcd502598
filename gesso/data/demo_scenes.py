"""Scenes of the embedded data set: digits, and cards that carry digits, pasted over photographs, with exact truth.

A scene depends on nothing but the settings, the seed, the split and its own number, so that scene 7 is the same
whether ten or ten thousand are made. Objects are painted in order; a later one hides what it covers.
"""

from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from gesso.data.demo_paint import Figure, background_crop, card_figure, digit_figure, paste
from gesso.data.demo_sources import DIGIT_NAMES, load_glyphs, load_photographs
from gesso.errors import ConfigError
from gesso.label_space import LabelSpace
from gesso.random_key import fold, stream

CARD = "card"
VOID = 255

_SCENE, _SCENE_LOW = stream("demo scene"), stream("demo scene low")
_HIDE, _HIDE_LOW = stream("demo hide"), stream("demo hide low")
_SPLIT_CODES = {"train": 0, "val": 1, "test": 2}
_PLACES_TRIED = 16
_CARD_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the embedded data set holds. The same settings give the same bytes (with the same library versions)."""

    images: int = 1000
    """Number of scenes."""
    side: int = 192
    """Width and height of a scene in pixels."""
    seed: int = 0
    """Every seed gives another set."""
    split: Literal["train", "val", "test"] = "train"
    """Splits share neither digit samples nor background pixels."""
    objects: tuple[int, int] = (1, 6)
    """Fewest and most figures of a scene; fewer where no room is left. A card with its digit is one figure."""
    scale: tuple[float, float] = (0.12, 0.40)
    """Smallest and largest longer side of a digit, as shares of the scene's side."""
    long_tail: float = 0.0
    """Exponent t of the class frequencies, (1 + digit) ** -t; 0 is balanced."""
    hierarchy: bool = False
    """Adds the classes even, odd and digit, with is-a relations down to the ten digits."""
    coarse_labels: float = 0.0
    """With ``hierarchy``: share of the digits labelled as even or odd only; the classes below are unverified there."""
    parts: bool = False
    """Adds the class card: half of the digits stand on a card and are part of it."""
    hidden_labels: float = 0.0
    """Share of the annotations left out; their classes, and as large a share of the absent ones, are unverified."""
    occlusion: float = 0.5
    """Largest hidden share of an object; 0 keeps objects apart."""
    crowding: float = 0.25
    """Share of the figures that are placed beside or over an earlier one on purpose."""

    def __post_init__(self) -> None:
        if self.images < 1 or self.side < 32:
            raise ConfigError("the demo needs at least 1 image, and a side of at least 32 px")
        if not 0 <= self.objects[0] <= self.objects[1] <= 50:
            raise ConfigError(f"objects {self.objects}: expected 0 <= fewest <= most <= 50")
        if not 0 < self.scale[0] <= self.scale[1] <= 0.6:
            raise ConfigError(f"scale {self.scale}: expected 0 < smallest <= largest <= 0.6")
        if self.scale[0] * self.side < 6:
            raise ConfigError(f"digits of {self.scale[0] * self.side:.1f} px", remedy="Nothing below 6 px is legible.")
        if not 0 <= self.long_tail <= 5:
            raise ConfigError(f"long_tail {self.long_tail}: expected 0 to 5")
        for name, most in (("coarse_labels", 1.0), ("hidden_labels", 1.0), ("occlusion", 0.9), ("crowding", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} {getattr(self, name)}: expected 0 to {most:g}")
        if self.coarse_labels and not self.hierarchy:
            raise ConfigError("coarse_labels without hierarchy has no effect", remedy="Set hierarchy as well.")


@dataclass(frozen=True)
class SceneObject:
    """One object and its truth; boxes are float32 (4,) xyxy in pixels, masks bool (side, side).

    Attributes:
        name: its class, as annotated (even or odd where only that is known).
        leaf: its finest class.
        xyxy: the box of the whole object, hidden parts included.
        visible_xyxy: the box of what can be seen.
        mask: what can be seen. The digit on a card belongs to the card's mask as well.
        occluded: the hidden share of its area.
        whole: the place in the scene's objects of the card that it stands on, or None.
        hidden_label: True where the annotation is left out.
        figure: what was painted: the digit, or the card.
    """

    name: str
    leaf: str
    xyxy: npt.NDArray[np.float32]
    visible_xyxy: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    occluded: float
    whole: int | None
    hidden_label: bool
    figure: Figure


@dataclass(frozen=True)
class Scene:
    """A picture with its truth.

    Attributes:
        pixels: uint8 (side, side, 3) RGB.
        background: the same without objects.
        photograph: file name of the background's photograph; ``licence`` is the licence of that.
        objects: in the order of painting.
        semantic: uint8 (side, side): 0 background, 1 + label of the leaf class, 255 on the borders of objects.
        unverified: names of the classes whose absence is not known (empty where no label is hidden or coarse).
    """

    pixels: npt.NDArray[np.uint8]
    background: npt.NDArray[np.uint8]
    photograph: str
    licence: str
    objects: tuple[SceneObject, ...]
    semantic: npt.NDArray[np.uint8]
    unverified: tuple[str, ...]


def demo_label_space(config: DemoConfig) -> LabelSpace:
    """The ten digits; then card where ``config.parts``; then even, odd and digit where ``config.hierarchy``."""
    names = list(DIGIT_NAMES)
    supers: list[str | None] = [_parity(digit) for digit in range(10)]
    parents: list[tuple[str, str]] = []
    if config.parts:
        names.append(CARD)
        supers.append("thing")
    if config.hierarchy:
        names += ["even", "odd", "digit"]
        supers += ["digit", "digit", "digit"]
        parents = [(DIGIT_NAMES[digit], _parity(digit)) for digit in range(10)]
        parents += [("even", "digit"), ("odd", "digit")]
    return LabelSpace(
        names=tuple(names),
        supercategories=tuple(supers),
        parents=tuple(parents),
        parts=tuple((CARD, name) for name in DIGIT_NAMES) if config.parts else (),
    )


def make_scene(config: DemoConfig, number: int) -> Scene:
    """Paints scene ``number`` (0-based; it may lie beyond ``config.images``)."""
    rng = _generator(config, number, _SCENE, _SCENE_LOW)
    photographs = load_photographs(config.split)
    photograph = photographs[int(rng.integers(len(photographs)))]
    background = background_crop(photograph.pixels, config.side, rng)
    canvas = _Canvas(background)
    for _ in range(int(rng.integers(config.objects[0], config.objects[1] + 1))):
        _add_figure(canvas, config, rng)
    objects, unverified = _annotate(canvas, config, number)
    return Scene(
        pixels=canvas.pixels,
        background=background,
        photograph=photograph.name,
        licence=photograph.licence,
        objects=objects,
        semantic=_semantic(canvas, config),
        unverified=unverified,
    )


def _parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def _generator(config: DemoConfig, number: int, high: int, low: int) -> np.random.Generator:
    words = (_SPLIT_CODES[config.split], number)
    return np.random.Generator(np.random.PCG64(fold(config.seed, high, *words) << 32 | fold(config.seed, low, *words)))


@dataclass
class _Item:
    """An object on the canvas: ``shape`` is its whole mask, ``visible`` what is left of it."""

    leaf: str
    figure: Figure
    whole: int | None
    shape: npt.NDArray[np.bool_]
    visible: npt.NDArray[np.bool_]


@dataclass
class _Canvas:
    pixels: npt.NDArray[np.uint8]
    items: list[_Item] = field(default_factory=list)

    def leaves_enough(self, cover: npt.NDArray[np.bool_], occlusion: float) -> bool:
        """Whether every object would keep its visible share when ``cover`` were painted over it."""
        return all(
            np.count_nonzero(item.visible & ~cover) >= (1 - occlusion) * np.count_nonzero(item.shape)
            for item in self.items
        )

    def paint(self, leaf: str, figure: Figure, whole: int | None) -> int:
        shape = figure.mask_on(self.pixels.shape[0])
        for place, item in enumerate(self.items):
            if place != whole:
                item.visible &= ~shape
        self.pixels = paste(self.pixels, figure)
        self.items.append(_Item(leaf, figure, whole, shape, shape.copy()))
        return len(self.items) - 1


def _add_figure(canvas: _Canvas, config: DemoConfig, rng: np.random.Generator) -> None:
    """Draws one figure and paints it where it leaves enough of the others; where there is no room, nothing."""
    odds = (1.0 + np.arange(10)) ** -config.long_tail
    digit = int(np.searchsorted(np.cumsum(odds / odds.sum())[:-1], rng.random(), side="right"))
    glyphs = load_glyphs(config.split)[digit]
    glyph = glyphs[int(rng.integers(len(glyphs)))]
    size = float(rng.uniform(*config.scale)) * config.side
    angle = float(rng.uniform(-0.26, 0.26))
    on_card = config.parts and rng.random() < _CARD_SHARE
    figure = digit_figure(glyph, size, angle, rng)
    card = card_figure(figure, angle, rng) if on_card else None
    outer = card or figure
    height, width = outer.mask.shape
    if max(height, width) > config.side:
        return
    for _ in range(_PLACES_TRIED):
        x, y = _place(canvas, config, (width, height), rng)
        cover = outer.moved(x, y).mask_on(config.side)
        if canvas.leaves_enough(cover, config.occlusion):
            whole = None
            if card is not None:
                placed = card.moved(x, y).coloured(canvas.pixels, rng)
                whole = canvas.paint(CARD, placed, None)
                x, y = x + (width - figure.mask.shape[1]) // 2, y + (height - figure.mask.shape[0]) // 2
            canvas.paint(DIGIT_NAMES[digit], figure.moved(x, y).coloured(canvas.pixels, rng), whole)
            return


def _place(canvas: _Canvas, config: DemoConfig, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """The upper left corner of a place for a figure of ``size`` (w, h): anywhere, or near an earlier object."""
    room = np.array([config.side - size[0], config.side - size[1]])
    crowd, corner = rng.random() < config.crowding, rng.integers(0, room + 1)
    if crowd and canvas.items:
        other = canvas.items[int(rng.integers(len(canvas.items)))].figure
        height, width = other.mask.shape
        reach = rng.uniform(0.3, 0.8) * (np.array([width, height]) + size) / 2
        turn = rng.uniform(0, 2 * np.pi)
        centre = np.array([other.x + width / 2, other.y + height / 2]) + reach * np.array([np.cos(turn), np.sin(turn)])
        corner = np.clip(np.rint(centre - np.array(size) / 2), 0, room).astype(np.int64)
    return int(corner[0]), int(corner[1])


def _annotate(canvas: _Canvas, config: DemoConfig, number: int) -> tuple[tuple[SceneObject, ...], tuple[str, ...]]:
    """Boxes, shares and labels. Hiding has its own chance, so that it changes no pixel."""
    rng = _generator(config, number, _HIDE, _HIDE_LOW)
    objects = []
    for item in canvas.items:
        coarse, hidden = rng.random() < config.coarse_labels, rng.random() < config.hidden_labels
        coarse = coarse and item.leaf != CARD
        objects.append(
            SceneObject(
                name=_parity(DIGIT_NAMES.index(item.leaf)) if coarse else item.leaf,
                leaf=item.leaf,
                xyxy=mask_box(item.shape),
                visible_xyxy=mask_box(item.visible),
                mask=item.visible,
                occluded=1.0 - np.count_nonzero(item.visible) / np.count_nonzero(item.shape),
                whole=item.whole,
                hidden_label=hidden,
                figure=item.figure,
            )
        )
    hidden_names = {item.name for item in objects if item.hidden_label}
    present = {item.name for item in objects}
    space = demo_label_space(config)
    if config.hierarchy:
        present |= {above for name in present for above in space.ancestors(name)}
        hidden_names |= {above for name in hidden_names for above in space.ancestors(name)}
        coarse_names = {item.name for item in objects if item.name != item.leaf}
        hidden_names |= {below for name in coarse_names for below in space.descendants(name)}
    doubted = rng.random(len(space)) < config.hidden_labels
    unverified = tuple(
        name
        for name, doubt in zip(space.names, doubted, strict=True)
        if name in hidden_names or (doubt and name not in present)
    )
    return tuple(objects), unverified


def mask_box(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The tight box of a mask (H, W) with at least one pixel: float32 (4,) xyxy, right and lower edge exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _semantic(canvas: _Canvas, config: DemoConfig) -> npt.NDArray[np.uint8]:
    """Classes by pixel; where the kernel sees two objects, or an object and the background, it is void."""
    owner = np.zeros((config.side, config.side), np.uint8)
    classes = np.zeros(len(canvas.items) + 1, np.uint8)
    names = demo_label_space(config).names
    for place, item in enumerate(canvas.items, start=1):
        owner[item.visible] = place
        classes[place] = 1 + names.index(item.leaf)
    kernel = np.ones((3, 3), np.uint8)
    semantic = classes[owner]
    semantic[cv2.dilate(owner, kernel) != cv2.erode(owner, kernel)] = VOID
    return semantic
