"""The counts of a data set: images, boxes, sizes, flags, and a table of its classes. Reads columns, never pictures."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gesso.data.index import Index
from gesso.data.records import CROWD, DIFFICULT, IGNORE

SMALL, MEDIUM = 32.0**2, 96.0**2
"""COCO's borders between small, medium and large areas (cocoapi, cocoeval.py). Here the sizes do not overlap."""
_CELLS = 1 << 26
"""Most cells of the table of images and classes that is held at a time."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class: its name, the images that hold it, its boxes, and their share of all boxes (0 to 1)."""

    name: str
    images: int
    boxes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The counts of an index.

    Attributes:
        images, boxes, categories: how many there are.
        negatives: images without a box.
        unused: the names of the categories without a box.
        unsized: images whose size is unknown.
        boxes_per_image_mean, boxes_per_image_median, boxes_per_image_max: over all images, negatives too.
        crowd, ignore, difficult: boxes with the flag.
        masks: boxes with a mask.
        small, medium, large: boxes by their area in pixels, below 32**2, below 96**2, and the others. Boxes that are
            shares of an unknown size (``Index.normalised``) are in none.
        widths, heights: (least, median, greatest) in pixels over the images of known size; zeros where there is none.
        classes: one row a category, in the order of the label space.
    """

    images: int
    boxes: int
    categories: int
    negatives: int
    unused: tuple[str, ...]
    unsized: int
    boxes_per_image_mean: float
    boxes_per_image_median: float
    boxes_per_image_max: int
    crowd: int
    ignore: int
    difficult: int
    masks: int
    small: int
    medium: int
    large: int
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    classes: tuple[ClassRow, ...]


def statistics(index: Index) -> Statistics:
    """Counts an index; 10 million boxes take about a second."""
    per_image = np.diff(index.offsets)
    labels, flags = np.asarray(index.labels), np.asarray(index.flags)
    boxes_of = np.bincount(labels, minlength=len(index.label_space))
    images_of = images_per_class(index)
    small, medium, large = _sizes(index, per_image)
    rows = tuple(
        ClassRow(name=name, images=images, boxes=boxes, share=boxes / max(len(labels), 1))
        for name, images, boxes in zip(index.label_space.names, images_of.tolist(), boxes_of.tolist(), strict=True)
    )
    known = (np.asarray(index.widths) > 0) & (np.asarray(index.heights) > 0)
    return Statistics(
        images=len(index),
        boxes=len(labels),
        categories=len(index.label_space),
        negatives=int((per_image == 0).sum()),
        unused=tuple(row.name for row in rows if not row.boxes),
        unsized=int((~known).sum()),
        boxes_per_image_mean=float(per_image.mean()) if len(per_image) else 0.0,
        boxes_per_image_median=float(np.median(per_image)) if len(per_image) else 0.0,
        boxes_per_image_max=int(per_image.max(initial=0)),
        crowd=int(np.count_nonzero(flags & CROWD)),
        ignore=int(np.count_nonzero(flags & IGNORE)),
        difficult=int(np.count_nonzero(flags & DIFFICULT)),
        masks=0 if index.mask_columns is None else int(np.count_nonzero(index.mask_columns.kinds)),
        small=small,
        medium=medium,
        large=large,
        widths=_spread(np.asarray(index.widths)[known]),
        heights=_spread(np.asarray(index.heights)[known]),
        classes=rows,
    )


def images_per_class(index: Index) -> npt.NDArray[np.int64]:
    """int64 (C,): the images that hold at least one box of each class."""
    classes = len(index.label_space)
    found = np.zeros(classes, np.int64)
    step = max(1, _CELLS // max(classes, 1))
    for first in range(0, len(index), step):
        offsets = np.asarray(index.offsets[first : first + step + 1])
        images = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        seen = np.zeros((len(offsets) - 1, classes), bool)
        seen[images, index.labels[offsets[0] : offsets[-1]]] = True
        found += seen.sum(axis=0)
    return found


def image_classes(index: Index) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (image, class) pairs of an index, each once: two int64 arrays, ordered by image and then by class."""
    images = np.repeat(np.arange(len(index), dtype=np.int64), np.diff(index.offsets))
    keys = images * len(index.label_space) + index.labels
    order = np.sort(keys, kind="stable")
    keys = order[np.concatenate((np.ones(len(order[:1]), bool), order[1:] != order[:-1]))]
    rows, labels = np.divmod(keys, max(len(index.label_space), 1))
    return rows, labels


def _sizes(index: Index, per_image: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    areas = np.asarray(index.areas)
    if np.any(index.normalised):
        areas = areas[~np.repeat(np.asarray(index.normalised), per_image)]
    below = int(np.count_nonzero(areas < SMALL)), int(np.count_nonzero(areas < MEDIUM))
    return below[0], below[1] - below[0], len(areas) - below[1]


def _spread(values: npt.NDArray[np.int32]) -> tuple[int, int, int]:
    if not len(values):
        return 0, 0, 0
    return int(values.min()), int(np.median(values)), int(values.max())
