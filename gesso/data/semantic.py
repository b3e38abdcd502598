"""Semantic maps: uint8 (H, W), 0 background, 1 + label of a class, 255 void, of the same size as their picture.

Values are numbers in a file, so they change with the label space: ``SemanticMaps`` gives them in the classes of a run.
"""

import struct
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from gesso.data.index import Index
from gesso.data.placement import Placement
from gesso.errors import ConfigError, DataError

Map: TypeAlias = npt.NDArray[np.uint8]

VOID = 255
_MODES = ("L", "P", "1")
_UNFINISHED = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, TypeError, KeyError)


def read_semantic(path: Path) -> Map:
    """Reads a semantic map as uint8 (H, W): the numbers of the pixels, of an indexed picture those before its palette.

    Raises:
        DataError: the file is missing, no picture, broken off, or of more than one channel or more than 8 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode not in _MODES:
                    what = f"the semantic map has pixels of mode {image.mode}, not one number of 8 bits each"
                    raise DataError(what, where=path, remedy="Store it as a grey or an indexed PNG.")
                return np.ascontiguousarray(np.asarray(image), np.uint8)
    except UnidentifiedImageError as error:
        raise DataError("the semantic map is no picture of a known format", where=path) from error
    except Image.DecompressionBombError as error:
        raise DataError("the semantic map is too large", where=path) from error
    except _UNFINISHED as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the semantic map cannot be read: {reason}", where=path, remedy="Get it again.") from error


class SemanticMaps:
    """The semantic maps of an index, in the classes of a run.

    Args:
        index: the data set.
        labels: (C,) from the index's labels to the run's, -1 where the run lacks the class: its pixels become
            background, as its objects do.

    Raises:
        DataError: the index has no semantic map at all.
        ConfigError: a class of the run has no number below 255.
    """

    def __init__(self, index: Index, labels: npt.NDArray[np.int64]) -> None:
        if index.semantic is None:
            remedy = "Import the data with the paths of its maps, or train without them."
            raise DataError("the data set has no semantic maps", where=index.path, remedy=remedy)
        if labels.max(initial=-1) + 1 >= VOID:
            what = f"class {labels.max()} has no number in a semantic map, which holds {VOID - 1} classes and the void"
            raise ConfigError(what, remedy="Train on fewer classes, or without semantic maps.")
        self._index = index
        self._classes = len(labels)
        self._table = np.zeros(VOID + 1, np.uint8)
        count = min(self._classes, VOID - 1)
        self._table[1 : count + 1] = np.maximum(labels[:count] + 1, 0)
        self._table[VOID] = VOID

    def read(self, row: int) -> Map | None:
        """The map of image ``row`` at its original size; None where it has none.

        Raises:
            DataError: the map cannot be read, has another size than its picture, or holds a value that is neither void
                nor the number of a class.
        """
        path = self._index.semantic_path(row)
        if path is None:
            return None
        found = read_semantic(path)
        height, width = int(self._index.heights[row]), int(self._index.widths[row])
        if found.shape != (height, width):
            what = f"the semantic map is {found.shape[1]} x {found.shape[0]}, its picture {width} x {height}"
            raise DataError(what, where=path, remedy="Make them the same size.")
        wrong = (found > self._classes) & (found != VOID)
        if wrong.any():
            what = f"the semantic map holds the value {found[wrong].min()}, and there are {self._classes} classes"
            remedy = f"The values are 0 for background, 1 to {self._classes} for the classes, {VOID} for void."
            raise DataError(what, where=path, remedy=remedy)
        return self._table[found]


def draw_semantic(semantic: Map, placement: Placement, canvas: Map) -> None:
    """Draws a map (H, W) of the stored picture on its ``canvas`` of shape ``placement.canvas``, in place.

    Each pixel takes the value where its centre lies in the stored picture; the padding stays as it is.
    """
    rows, columns = placement.pixels()
    canvas[: len(rows), : len(columns)] = semantic[rows][:, columns]
