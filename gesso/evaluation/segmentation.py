"""Scores of semantic segmentation: mean IoU, accuracies, and both within or outside a band along the borders.

Everything follows from one confusion matrix over the pixels of all pictures, to which pictures are added one by one.
Definition of the scores: Long et al., Fully Convolutional Networks, CVPR 2015, section 5; of the trimap: Kohli et al.,
Robust Higher Order Potentials, IJCV 2009, section 5.3, taken around the void pixels as An Analysis of Pre-Training on
Object Detection, section 4.2, does.
"""

import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from gesso.data.pictures import MAX_PIXELS
from gesso.data.records import Array
from gesso.errors import ConfigError, DataError

Shape = Literal["disk", "square"]
MAX_CLASSES = 1 << 12
"""More classes are refused: their confusion matrix would be too large."""
_VALUES = 1 << 16
_IGNORED, _UNKNOWN = -1, -2
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, TypeError, KeyError)


class Confusion:
    """How many pixels of each class were taken for each class, over all pictures added so far.

    Attributes:
        counts: (C, C) int64: rows are the classes of the truth, columns those predicted. Processes that have added a
            part of the pictures each sum theirs up and put the sum here.
    """

    def __init__(self, num_classes: int, *, ignore: int = 255, reduce_zero_label: bool = False) -> None:
        """An empty matrix.

        Args:
            num_classes: C; the classes are the values 0 to C - 1.
            ignore: the value of pixels in the truth that count for nothing.
            reduce_zero_label: in the truth, 0 counts for nothing too and the classes are the values 1 to C (ADE20K);
                predictions are 0 to C - 1 all the same.

        Raises:
            ConfigError: a number is out of range.
        """
        if not 1 <= num_classes <= MAX_CLASSES:
            raise ConfigError(f"the number of classes must be 1 to {MAX_CLASSES}, found {num_classes}")
        if not 0 <= ignore < _VALUES:
            raise ConfigError(f"the value to ignore must be 0 to {_VALUES - 1}, found {ignore}")
        self.num_classes, self.ignore = num_classes, ignore
        self.first = 1 if reduce_zero_label else 0
        self.counts: npt.NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)
        self._classes = np.full(_VALUES, _UNKNOWN, np.int64)
        self._classes[self.first : self.first + num_classes] = np.arange(num_classes)
        self._classes[[ignore, *range(self.first)]] = _IGNORED

    def add(
        self,
        truth: Array,
        prediction: Array,
        *,
        where: tuple[str | Path, str | Path] = ("the truth", "the prediction"),
    ) -> None:
        """Adds the pixels of one picture.

        A prediction may hold the value to ignore where the truth does.

        Args:
            truth, prediction: integers of one shape, mostly (H, W); uint8 is fastest.
            where: names of both, for messages.

        Raises:
            DataError: the shapes differ, or there is a value that is no class and not to be ignored; nothing is added.
        """
        if truth.shape != prediction.shape:
            sizes = [" x ".join(map(str, one.shape)) for one in (prediction, truth)]
            what = f"the prediction has {sizes[0]} pixels, its truth {where[0]} has {sizes[1]}"
            raise DataError(what, where=where[1], remedy="Predict at the size of the truth.")
        values, predicted, counts = _pairs(truth, prediction)
        classes = np.where((values >= 0) & (values < _VALUES), self._classes[values % _VALUES], _UNKNOWN)
        ignored = classes == _IGNORED
        self._require(classes != _UNKNOWN, values, self.first, where[0])
        known = (predicted >= 0) & (predicted < self.num_classes)
        self._require(known | (ignored & (predicted == self.ignore)), predicted, 0, where[1])
        self.counts[classes[~ignored], predicted[~ignored]] += counts[~ignored]

    def _require(self, known: Array, values: Array, first: int, where: str | Path) -> None:
        if not known.all():
            what = f"a pixel has the value {values[np.argmin(known)]}"
            remedy = f"The classes are {first} to {first + self.num_classes - 1}, and {self.ignore} is ignored."
            raise DataError(what, where=where, remedy=remedy)

    def merge(self, other: "Confusion") -> None:
        """Adds the pixels that ``other`` has counted."""
        self.counts += other.counts

    def scores(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The scores of all pixels added so far, as fractions.

        Args:
            names: one a class; None = the classes' numbers.

        Returns:
            ``mIoU``, the mean IoU of the classes that occur in the truth or a prediction; ``pixel_accuracy``;
            ``mean_class_accuracy``, the mean share that was found of each class that occurs in the truth; and
            ``by_class``: name -> IoU in the order of the classes. None where there is nothing to measure on.
        """
        right = np.diag(self.counts)
        of_truth, of_prediction, total = self.counts.sum(1), self.counts.sum(0), self.counts.sum()
        ious = _shares(right, of_truth + of_prediction - right)
        names = [str(number) for number in range(self.num_classes)] if names is None else names
        return {
            "mIoU": _mean(ious),
            "pixel_accuracy": float(right.sum() / total) if total else None,
            "mean_class_accuracy": _mean(_shares(right, of_truth)),
            "by_class": dict(zip(names, ious, strict=True)),
        }


def _pairs(truth: Array, prediction: Array) -> tuple[Array, Array, Array]:
    """The different pairs of a value of the truth and one of the prediction (k,) int64, and how often each stands."""
    if truth.dtype == prediction.dtype == np.uint8:
        joint = truth.astype(np.uint16)
        joint <<= 8
        joint |= prediction
        histogram = np.bincount(joint.reshape(-1), minlength=_VALUES)
        codes = np.flatnonzero(histogram)
        return codes >> 8, codes & 255, histogram[codes]
    both = np.stack([truth.reshape(-1), prediction.reshape(-1)]).astype(np.int64)
    (values, predicted), counts = np.unique(both, axis=1, return_counts=True)
    return values, predicted, counts


def _shares(parts: Array, wholes: Array) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def band(void: Array, width: int, shape: Shape = "disk") -> Array:
    """(H, W) bool: the pixels at most ``width`` from a void one and not void themselves: the trimap.

    Args:
        void: (H, W) bool.
        width: pixels, at least 1.
        shape: "disk" measures Euclid's distance, "square" the larger of both coordinates' distances.
    """
    if not void.any():
        return np.zeros(void.shape, bool)
    outside = (~void).astype(np.uint8)
    if shape == "disk":
        near = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= width
    else:
        side = 2 * width + 1
        near = cv2.erode(outside, np.ones((side, side), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=1) == 0
    return np.asarray(near & ~void)


def score_segmentation(
    ground_truth: str | Path,
    predictions: str | Path,
    *,
    num_classes: int,
    ignore: int = 255,
    reduce_zero_label: bool = False,
    trimap: int | None = None,
    shape: Shape = "disk",
) -> dict[str, Any]:
    """The scores of a folder of predicted label maps.

    Args:
        ground_truth: a folder of PNGs, indexed or grey, in sub-folders too.
        predictions: a folder with a PNG of the same name and size for each of them, and no others.
        num_classes, ignore, reduce_zero_label: see ``Confusion``.
        trimap: score only the pixels at most so far from an ignored one; None = all pixels.
        shape: of the trimap, see ``band``.

    Returns:
        As ``Confusion.scores``, the classes named by their numbers; with ``trimap`` also ``anti_trimap``, the same
        scores of the pixels outside the band.

    Raises:
        DataError: a folder or file is missing or cannot be read, sizes differ, or a pixel's value is unknown.
        ConfigError: a number is out of range.
    """
    if trimap is not None and trimap < 1:
        raise ConfigError(f"the trimap must be at least 1 pixel wide, found {trimap}")
    whole, inner = (Confusion(num_classes, ignore=ignore, reduce_zero_label=reduce_zero_label) for _ in range(2))
    for where in _matched(Path(ground_truth), Path(predictions)):
        truth, prediction = (read_label_map(path) for path in where)
        whole.add(truth, prediction, where=where)
        if trimap is not None:
            void = (truth == ignore) | (truth == 0) if reduce_zero_label else truth == ignore
            near = band(void, trimap, shape)
            inner.add(truth[near], prediction[near], where=where)
    if trimap is None:
        return whole.scores()
    whole.counts -= inner.counts
    return inner.scores() | {"anti_trimap": whole.scores()}


def _matched(ground_truth: Path, predictions: Path) -> list[tuple[Path, Path]]:
    truths, found = _pngs(ground_truth), _pngs(predictions)
    if not truths:
        raise DataError("the folder holds no PNG", where=ground_truth, remedy="Name the folder of the label maps.")
    for name in sorted(truths.keys() - found.keys()):
        what = f"the prediction for {truths[name]} is missing"
        raise DataError(what, where=predictions, remedy=f"Predictions are named as the truth: {name}.png.")
    for name in sorted(found.keys() - truths.keys()):
        what = f"there is no truth of this name in {ground_truth}"
        raise DataError(what, where=found[name], remedy="Score against the set that was predicted.")
    return [(truths[name], found[name]) for name in sorted(truths)]


def _pngs(folder: Path) -> dict[str, Path]:
    """The PNGs below a folder by their path in it, without the ending."""
    if not folder.is_dir():
        what = "this is no folder" if folder.exists() else "there is no such folder"
        raise DataError(what, where=folder, remedy="Name a folder of PNGs.")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() == ".png")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def read_label_map(path: Path) -> Array:
    """The values (H, W), uint8 or uint16, of an indexed or grey PNG: the indices, whatever the palette's colours.

    Raises:
        DataError: the file is missing, no PNG, broken, in colour, or larger than ``MAX_PIXELS``.
    """
    try:
        data = path.read_bytes()
        if data[:8] != b"\x89PNG\r\n\x1a\n":
            raise DataError("this is no PNG", where=path, remedy="Write label maps as indexed or grey PNGs.")
        width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
        if width * height > MAX_PIXELS:
            raise DataError(f"the map is too large ({width} x {height})", where=path, remedy="Cut it into pieces.")
        if kind not in (0, 3):
            what = "the map is in colour"
            raise DataError(what, where=path, remedy="Write the classes' numbers, as an indexed or grey PNG.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                values = np.asarray(image)
    except _BROKEN as error:
        what = f"the map cannot be read: {getattr(error, 'strerror', None) or error}"
        raise DataError(what, where=path, remedy="Get or write the file again.") from error
    if depth == 16:
        return values.astype(np.uint16)
    values = values.astype(np.uint8)
    return values // (255 // ((1 << depth) - 1)) if kind == 0 and depth in (2, 4) else values  # Pillow spreads these
