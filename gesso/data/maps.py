"""Which semantic maps can be used: those of the upright picture's size whose values are classes of the label space.

0 is background or another class, 1 + label a class, 255 void (no class was told). A map of another numbering is never
kept: at import it is left out, with the name of the file and the value in the report, and ``gesso data check`` finds it
later.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from gesso.data.index import Index
from gesso.data.records import ImageBlock, Issue, Strings
from gesso.data.semantic import VOID, Map, read_semantic
from gesso.errors import DataError
from gesso.files import atomic_folder

NUMBERING = f"A map holds 0 for the background, 1 for the first class, 2 for the second, and {VOID} for void."
_AT_ONCE = 256

Progress = Callable[[int], None]


class Look(NamedTuple):
    """What was found in a map.

    Attributes:
        values: (256,) bool, the values that it holds.
        what: what is wrong, in few words, so that cases can be counted; "" where nothing is.
        detail: the file with the value, or the sizes.
    """

    values: npt.NDArray[np.bool_]
    what: str = ""
    detail: str = ""


_NONE = Look(np.zeros(VOID + 1, np.bool_))


def look(path: Path, size: tuple[int, int], classes: int) -> Look:
    """Reads the map of a picture of ``size`` (width, height; 0 = unknown) in a space of ``classes`` classes."""
    try:
        return look_at(read_semantic(path), path, size, classes)
    except DataError as error:
        what = "semantic map cannot be read" if path.exists() else "semantic map is missing"
        return Look(_NONE.values, what, f"{path}: {error.what}")


def look_at(pixels: Map, path: Path, size: tuple[int, int], classes: int) -> Look:
    """The same for a map that was read from ``path``."""
    values = np.bincount(pixels.ravel(), minlength=VOID + 1) > 0
    height, width = pixels.shape
    if all(size) and (width, height) != size:
        told = f"{path}: {width} x {height}, the picture {size[0]} x {size[1]}"
        return Look(values, "semantic map has another size", told)
    wrong = np.flatnonzero(values[classes + 1 : VOID]) + classes + 1
    if len(wrong):
        told = f"{path}: {wrong[0]}, but there are {classes} classes"
        return Look(values, "semantic map has an unknown value", told)
    return Look(values)


def look_through(
    paths: Iterable[Path | None], sizes: Iterable[tuple[int, int]], classes: int, *, progress: Progress | None = None
) -> Iterator[Look]:
    """Looks at many maps in order, by threads; None, for a picture without a map, gives a look without any value."""

    def one(task: tuple[Path | None, tuple[int, int]]) -> Look:
        return _NONE if task[0] is None else look(task[0], task[1], classes)

    remaining, done = zip(paths, sizes, strict=True), 0
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        while some := list(itertools.islice(remaining, _AT_ONCE)):
            yield from pool.map(one, some)
            done += len(some)
            if progress is not None:
                progress(done)


def look_through_index(index: Index, *, progress: Progress | None = None) -> Iterator[Look]:
    """Looks at the maps of an index, one look an image."""
    sizes = zip(index.widths.tolist(), index.heights.tolist(), strict=True)
    paths = (index.semantic_path(row) for row in range(len(index)))
    return look_through(paths, sizes, len(index.label_space), progress=progress)


def sound_maps(
    images: ImageBlock, root: Path, classes: int, *, required: bool, progress: Progress | None = None
) -> tuple[ImageBlock, list[Issue]]:
    """The images with those of their maps that can be used; every other is an issue.

    Raises:
        DataError: maps are ``required``, and none can be used or none shows a class.
    """
    names = [] if images.semantic is None else list(images.semantic)
    if not any(names):
        return images, []
    sizes = list(zip(images.widths.tolist(), images.heights.tolist(), strict=True))
    paths = [root / name if name else None for name in names]
    issues = []
    seen = np.zeros(VOID + 1, bool)
    for row, found in enumerate(look_through(paths, sizes, classes, progress=progress)):
        if found.what:
            issues.append(Issue(images.names[row], None, found.what, "map left out", found.detail))
            names[row] = ""
        else:
            seen |= found.values
    if required and not any(names):
        raise DataError(f"no semantic map can be used; {issues[0].what}: {issues[0].detail}", remedy=NUMBERING)
    if required and not seen[1:VOID].any():
        first = next(path for path in paths if path is not None)
        raise DataError("no semantic map shows a class", where=first.parent, remedy=NUMBERING)
    return dataclasses.replace(images, semantic=Strings.of(names)), issues


def draw_maps(
    images: ImageBlock, draw: Callable[[str], Map], root: Path, folder: Path, classes: int, *, overwrite: bool
) -> tuple[ImageBlock, list[Issue]]:
    """Writes the maps that the source keeps in another form as PNGs into ``folder``, for images that have none yet.

    Returns the images with the paths of their maps, relative to ``root``, and an issue for each that cannot be used.

    Raises:
        DataError: ``folder`` holds something else than maps, or none can be used.
        InputError: ``folder`` is there and ``overwrite`` is off, or the disk is full.
    """
    if folder.is_dir() and any(entry.suffix != ".png" for entry in folder.iterdir()):
        raise DataError("holds other things than semantic maps, so it is not overwritten", where=folder)
    issues = []
    names = [""] * len(images) if images.semantic is None else list(images.semantic)
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        for row, name in enumerate(images.names):
            if names[row]:
                continue
            file = f"{Path(name).stem}.png"
            size = (int(images.widths[row]), int(images.heights[row]))
            try:
                pixels = draw(name)
            except DataError as error:
                issues.append(Issue(name, None, "semantic map cannot be read", "map left out", str(error)))
                continue
            found = look_at(pixels, Path(file), size, classes)
            if found.what:
                issues.append(Issue(name, None, found.what, "map left out", found.detail))
                continue
            Image.fromarray(pixels).save(temporary / file)
            names[row] = os.path.relpath(folder / file, root)
        if issues and not any(names):
            raise DataError(f"no semantic map can be used; {issues[0].what}: {issues[0].detail}", remedy=NUMBERING)
    return dataclasses.replace(images, semantic=Strings.of(names)), issues
