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
    """One class: its name, the images that show it, its boxes, and their share of all boxes (0 to 1)."""

    name: str
    images: int
    boxes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The counts of an index.

    Attributes:
        images, boxes, categories: how many there are.
        labels: image-level labels of classes that are present.
        maps: images with a semantic map.
        negatives: images without a box, of which no label and no map tells what they show either.
        unused: the names of the categories that no image shows by a box or a label; none, where maps alone would tell.
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
    labels: int
    maps: int
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
    labelled = images_with_labels(index)
    mapped = images_with_maps(index)
    only_maps = not len(labels) and not labelled.any() and mapped.any()
    known = (np.asarray(index.widths) > 0) & (np.asarray(index.heights) > 0)
    return Statistics(
        images=len(index),
        boxes=len(labels),
        categories=len(index.label_space),
        labels=len(_shown_labels(index)[0]),
        maps=int(mapped.sum()),
        negatives=int(((per_image == 0) & ~labelled & ~mapped).sum()),
        unused=() if only_maps else tuple(row.name for row in rows if not row.images),
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
    """int64 (C,): the images that show each class, by a box or by an image-level label."""
    classes = len(index.label_space)
    found = np.zeros(classes, np.int64)
    step = max(1, _CELLS // max(classes, 1))
    rows, labels = _shown_labels(index)
    for first in range(0, len(index), step):
        offsets = np.asarray(index.offsets[first : first + step + 1])
        images = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        seen = np.zeros((len(offsets) - 1, classes), bool)
        seen[images, index.labels[offsets[0] : offsets[-1]]] = True
        some = slice(*np.searchsorted(rows, (first, first + step)).tolist())
        seen[rows[some] - first, labels[some]] = True
        found += seen.sum(axis=0)
    return found


def image_classes(index: Index) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (image, class) pairs of an index, each once: two int64 arrays, ordered by image and then by class.

    An image shows a class by a box or by an image-level label.
    """
    classes = max(len(index.label_space), 1)
    images = np.repeat(np.arange(len(index), dtype=np.int64), np.diff(index.offsets))
    keys = images * classes + index.labels
    rows, labels = _shown_labels(index)
    if len(rows):
        keys = np.concatenate([keys, rows * classes + labels])
    order = np.sort(keys, kind="stable")
    keys = order[np.concatenate((np.ones(len(order[:1]), bool), order[1:] != order[:-1]))]
    rows, labels = np.divmod(keys, classes)
    return rows, labels


def images_with_labels(index: Index) -> npt.NDArray[np.bool_]:
    """bool (N,): an image-level label says of the image that a class is present."""
    found = np.zeros(len(index), bool)
    found[_shown_labels(index)[0]] = True
    return found


def images_with_maps(index: Index) -> npt.NDArray[np.bool_]:
    """bool (N,): the image has a semantic map."""
    if index.semantic is None:
        return np.zeros(len(index), bool)
    return np.asarray(np.diff(index.semantic.offsets) > 0)


def _shown_labels(index: Index) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (image, class) pairs of which an image-level label says that the class is present, ordered by image."""
    given = index.verified_columns
    if given is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    present = np.asarray(given.states) == 1
    rows = np.repeat(np.arange(len(index), dtype=np.int64), np.diff(given.offsets))
    return rows[present], np.asarray(given.labels, np.int64)[present]


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
