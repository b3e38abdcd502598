"""Import, second step: the pictures that annotations name are found, and their heads join the columns."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gesso.data.blocks import take_images, take_objects
from gesso.data.orientation import turn_objects
from gesso.data.pictures import Header, read_headers
from gesso.data.records import Array, ImageBlock, Issue, IssueBlock, ObjectBlock, Reading
from gesso.errors import DataError

TURNED = "picture has an EXIF orientation"
TURNED_UNTOLD = "picture has an EXIF orientation, and no size tells whether boxes were drawn upright"

_SAMPLE = 200


def find_root(reading: Reading, *, images: bool) -> Path:
    """The likely folder where most of a sample of the pictures stand."""
    names = reading.images.names
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), _SAMPLE)).astype(int)]
    counts = {root: sum((root / name).is_file() for name in sample if name) for root in reading.roots}
    best = max(reading.roots, key=lambda root: counts[root])
    if images and sample and not counts[best]:
        raise _no_pictures(sample[0], reading.roots)
    return best


def require_some(reading: Reading, root: Path) -> None:
    """DataError unless ``root``, which the user named, is a folder and holds one picture of the reading at least."""
    if not root.is_dir():
        raise DataError("the folder of the pictures does not exist", where=root, remedy="Check --images-root.")
    names = reading.images.names
    if len(names) and not any((root / name).is_file() for name in names):
        raise _no_pictures(names[0], (root,))


def _no_pictures(name: str, roots: Iterable[Path]) -> DataError:
    remedy = "Name their folder with --images-root, or import the annotations alone with --no-images."
    places = ", ".join(str(root) for root in roots)
    return DataError(f"none of the pictures was found (such as '{name}') in {places}", remedy=remedy)


def with_pictures(
    block: ImageBlock,
    objects: ObjectBlock,
    root: Path,
    issues: list[Issue | IssueBlock],
    *,
    hash_images: bool,
    progress: Callable[[int], None] | None,
) -> tuple[Array, ObjectBlock, ImageBlock]:
    """Takes sizes, orientations and hashes from the pictures; leaves out those that cannot be used.

    Returns the positions of the objects that stay, these objects, and the images.
    """
    total = len(block)
    paths = (root / name for name in block.names)
    stored = np.zeros((total, 2), np.int32)
    orientations, hashes = np.ones(total, np.uint8), np.zeros(total, np.uint64)
    good = np.ones(total, bool)
    counts = np.bincount(objects.rows, minlength=total) if total else np.zeros(0, np.int64)
    turned = np.zeros(total, np.uint8)
    for row, header in enumerate(read_headers(paths, content_hash=hash_images, progress=progress)):
        stored[row] = header.width, header.height
        orientations[row], hashes[row] = header.orientation, header.content_hash
        good[row] = not header.problem
        annotated = (int(block.widths[row]), int(block.heights[row]))
        case, turn = _compare(block.names, row, header, annotated, int(counts[row]))
        issues.extend(case)
        turned[row] = turn
    objects = turn_objects(objects, stored, turned)
    swapped = orientations >= 5
    kept = np.flatnonzero(good)
    block = dataclasses.replace(
        block,
        widths=np.where(swapped, stored[:, 1], stored[:, 0]),
        heights=np.where(swapped, stored[:, 0], stored[:, 1]),
        orientations=orientations,
        hashes=hashes,
    )
    if good.all():
        return np.arange(len(objects)), objects, block
    stay = np.flatnonzero(good[objects.rows])
    new_rows = np.cumsum(good) - 1
    objects = take_objects(objects, stay)
    return stay, dataclasses.replace(objects, rows=new_rows[objects.rows].astype(np.int32)), take_images(block, kept)


def _compare(
    names: Sequence[str], row: int, header: Header, annotated: tuple[int, int], boxes: int
) -> tuple[list[Issue], int]:
    """The issues of one picture, and the orientation by which its boxes must be turned (0 = as they are).

    The loader shows every picture upright (EXIF transposed). Boxes drawn on the stored pixels, which the annotated
    size tells where the two sizes differ, are turned along; all others are taken as drawn on the upright picture. Where
    nothing tells (no annotated size; mirrored, half turned or square pictures), that is an issue of its own.
    """
    if header.problem:
        return [Issue(names[row], None, header.problem, "kept aside", f"{header.detail}; {boxes} boxes")], 0
    stored, upright = (header.width, header.height), header.transposed
    found = []
    turn = 0
    if header.orientation > 1:
        turn = header.orientation if annotated == stored != upright else 0
        action = "picture and boxes turned" if turn else "picture turned, boxes taken as they are"
        told = stored != upright and annotated in (stored, upright)
        what = TURNED if told or not boxes else TURNED_UNTOLD
        found.append(Issue(names[row], None, what, action, f"orientation {header.orientation}"))
    if all(annotated) and annotated not in (stored, upright):
        detail = f"{annotated[0]} x {annotated[1]} in the annotations, {upright[0]} x {upright[1]} in the file"
        found.append(Issue(names[row], None, "picture has another size", "size of the file taken", detail))
    return found, turn
