"""Writes PASCAL VOC: Annotations/NAME.xml, ImageSets/Main/SPLIT.txt, and the pictures in JPEGImages."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from gesso.data.index import Index
from gesso.data.records import DIFFICULT, OCCLUDED, TRUNCATED, Array
from gesso.data.writers.losses import losses
from gesso.data.writers.names import safe_name, split_name, stems
from gesso.data.writers.numbers import fewest_digits, short, text
from gesso.errors import DataError

PICTURES = "JPEGImages"
_FLAGS = (("truncated", TRUNCATED), ("difficult", DIFFICULT), ("occluded", OCCLUDED))


def write_voc(index: Index, folder: Path) -> list[str]:
    """Writes annotations and image sets into ``folder``.

    VOC counts pixels from 1 and includes both ends: x1, y1, x2, y2 become x1 + 1, y1 + 1, x2, y2, so a box of whole
    pixels is written in whole numbers. Fractions are kept as fractions.

    Returns:
        What VOC cannot hold, one line for each kind of loss.

    Raises:
        DataError: an image's size is unknown, two images have the same name but for the ending, or a name leads out of
            the folder.
    """
    unknown = (np.asarray(index.widths) <= 0) | (np.asarray(index.heights) <= 0)
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        remedy = "Import the data with its pictures."
        raise DataError(
            f"the size of '{index.name(row)}' is unknown, and VOC needs it", where=index.path, remedy=remedy
        )
    sets: dict[str, list[str]] = {}
    for row, stem in enumerate(stems(index)):
        file = folder / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        tree = ElementTree.ElementTree(_annotation(index, row))
        ElementTree.indent(tree, "\t")
        tree.write(file, encoding="utf-8")
        sets.setdefault(split_name(index, row), []).append(stem)
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for split, names in sets.items():
        (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return _losses(index)


def _annotation(index: Index, row: int) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    _add(root, "folder", PICTURES)
    _add(root, "filename", safe_name(index, row))
    size = ElementTree.SubElement(root, "size")
    _add(size, "width", str(int(index.widths[row])))
    _add(size, "height", str(int(index.heights[row])))
    _add(size, "depth", "3")
    _add(root, "segmented", "0")
    objects = index.objects(row)
    known = index.known_flags[index.offsets[row] : index.offsets[row + 1]]
    entries = zip(objects.labels.tolist(), _corners(objects.xyxy).tolist(), objects.flags.tolist(), known, strict=True)
    for label, box, flags, given in entries:
        element = ElementTree.SubElement(root, "object")
        _add(element, "name", index.label_space.names[label])
        for name, bit in _FLAGS:
            if given & bit or flags & bit:
                _add(element, name, str(int(bool(flags & bit))))
        bounds = ElementTree.SubElement(element, "bndbox")
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            _add(bounds, name, text(value))
    return root


def _add(parent: ElementTree.Element, name: str, value: str) -> None:
    ElementTree.SubElement(parent, name).text = value


def _corners(xyxy: Array) -> Array:
    """float64 (n, 4) in VOC's pixels."""
    low = fewest_digits(xyxy[:, :2].astype(np.float64) + 1, lambda value: value - 1, xyxy[:, :2])
    return np.concatenate((low, short(xyxy[:, 2:])), axis=1)


def _losses(index: Index) -> list[str]:
    found = losses(index, "VOC", flags=TRUNCATED | DIFFICULT | OCCLUDED)
    masks = 0 if index.mask_columns is None else int(np.count_nonzero(index.mask_columns.kinds))
    if masks:
        found.append(f"VOC's XML has no masks: {masks} are lost")
    empty = int((np.bincount(index.labels, minlength=len(index.label_space)) == 0).sum())
    found.append(f"VOC has no list of classes: their order is lost, and {empty} without a box")
    return found
