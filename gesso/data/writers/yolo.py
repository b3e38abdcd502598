"""Writes YOLO: labels/SPLIT/NAME.txt with shares of the picture's size, data.yaml, and the pictures in images/SPLIT."""

import json
from pathlib import Path

import numpy as np

from gesso.data.index import Index
from gesso.data.records import Array, Polygons
from gesso.data.writers.losses import losses
from gesso.data.writers.names import split_name, stems, yolo_name
from gesso.data.writers.numbers import fewest_digits, text
from gesso.errors import DataError

PICTURES = "images"
_DECIMALS = (4, 6, 8, 10, 12)
_NEAR = 0.1


def write_yolo(index: Index, folder: Path) -> list[str]:
    """Writes labels and ``data.yaml`` into ``folder``.

    A row is "class x y width height", or "class x1 y1 x2 y2 ..." for an object whose mask is one ring that spans its
    box (to 0.1 pixels): then the box is the ring's extent. An image without boxes gets an empty file.

    Returns:
        What YOLO cannot hold, one line for each kind of loss.

    Raises:
        DataError: boxes in pixels on an image of unknown size, two images with the same name but for the ending, or a
            name that leads out of the folder.
    """
    lost_masks = 0
    splits = set()
    for row, stem in enumerate(stems(index, yolo_name)):
        lines, lost = _lines(index, row)
        lost_masks += lost
        split = split_name(index, row)
        splits.add(split)
        file = folder / "labels" / split / f"{stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    head = "".join(f"{split}: {PICTURES}/{split}\n" for split in sorted(splits))
    # A JSON string is a YAML string too.
    names = (
        f"  {label}: {json.dumps(name, ensure_ascii=False)}\n" for label, name in enumerate(index.label_space.names)
    )
    yaml = f"path: .\n{head}nc: {len(index.label_space)}\nnames:\n{''.join(names)}"
    (folder / "data.yaml").write_text(yaml, encoding="utf-8")
    found = losses(index, "YOLO", flags=0)
    if lost_masks:
        found.append(f"{lost_masks} masks are not one ring that spans its box: YOLO gets the boxes alone")
    return found


def _lines(index: Index, row: int) -> tuple[list[str], int]:
    """The rows of one image, and how many masks they do not hold."""
    objects = index.objects(row)
    if not len(objects.labels):
        return [], 0
    size = _size(index, row)
    shares = _shares(objects.xyxy, size)
    lines, lost = [], 0
    for label, box, share, mask in zip(objects.labels.tolist(), objects.xyxy, shares, index.masks(row), strict=True):
        numbers = share
        if isinstance(mask, Polygons) and _spans(mask, box):
            ring = mask.rings[0]
            numbers = fewest_digits(ring / size, lambda value: value * size, ring).ravel()
        elif mask is not None:
            lost += 1
        lines.append(" ".join([str(label), *map(text, numbers.tolist())]))
    return lines, lost


def _size(index: Index, row: int) -> Array:
    """float64 (2,): what the boxes are divided by."""
    if index.normalised[row]:
        return np.ones(2)
    size = np.array([index.widths[row], index.heights[row]], np.float64)
    if not size.all():
        remedy = "Import the data with its pictures."
        raise DataError(
            f"the size of '{index.name(row)}' is unknown, and YOLO needs it", where=index.path, remedy=remedy
        )
    return size


def _shares(xyxy: Array, size: Array) -> Array:
    """(n, 4) float64: centre and sides as shares of the size, with the fewest digits that give the corners again."""
    exact = xyxy.astype(np.float64)
    centre, side = (exact[:, :2] + exact[:, 2:]) / 2 / size, (exact[:, 2:] - exact[:, :2]) / size
    found = np.concatenate((centre, side), axis=1)
    left = np.ones(len(found), bool)
    for decimals in _DECIMALS:
        rounded = np.round(np.concatenate((centre, side), axis=1), decimals)
        low, high = rounded[:, :2] - rounded[:, 2:] / 2, rounded[:, :2] + rounded[:, 2:] / 2
        back = np.concatenate((low * size, high * size), axis=1).astype(np.float32)
        good = left & (back == xyxy).all(axis=1)
        found[good] = rounded[good]
        left &= ~good
    return found


def _spans(mask: Polygons, box: Array) -> bool:
    if len(mask.rings) != 1:
        return False
    extent = np.concatenate((mask.rings[0].min(axis=0), mask.rings[0].max(axis=0)))
    return bool((np.abs(extent - box) <= _NEAR).all())
