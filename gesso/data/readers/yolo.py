"""YOLO: one text file a picture in labels/, pictures in images/, names in data.yaml or classes.txt.

A row is "class x y width height" (centre and sides) or "class x1 y1 x2 y2 x3 y3 ..." (a polygon), all as shares of the
picture's width and height. Source: docs.ultralytics.com/datasets/detect and /segment.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gesso.data.pictures import SUFFIXES
from gesso.data.readers.ids import stable_ids
from gesso.data.readers.yolo_names import Description, describe
from gesso.data.records import Array, ImageBlock, Issue, ObjectBlock, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace


class _Row(NamedTuple):
    image: int
    label: int
    number: int
    xyxy: tuple[float, float, float, float]
    ring: Array | None


def read_yolo(path: Path, *, split: str = "", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads a YOLO folder or data.yaml; ``progress`` is told the number of pictures read.

    Boxes stay shares; an image's id is a hash of its file name.

    Raises:
        DataError: no class names or no pictures are found, or a class number is beyond the names (file and line named).
    """
    description = describe(path)
    root = description.root
    pictures = list(_pictures(description, path, split))
    space = _space(description, path)
    issues = [
        Issue("", None, "split has no pictures", "left out", f"{absent}: {place} does not exist")
        for absent, place in description.missing.items()
    ]
    rows: list[_Row] = []
    for image, (name, labels) in enumerate(pictures):
        if labels is not None:
            rows.extend(_rows(labels, image, name, len(space), issues))
        if progress is not None and image % 256 == 0:
            progress(image)
    boxes = np.array([row.xyxy for row in rows], np.float64).reshape(-1, 4)
    return Reading(
        name=root.absolute().name,
        split=split,
        roots=(root.absolute(),),
        label_space=space,
        images=ImageBlock(
            ids=stable_ids([name for name, _ in pictures]),
            names=Strings.of(name for name, _ in pictures),
            widths=np.zeros(len(pictures), np.int32),
            heights=np.zeros(len(pictures), np.int32),
        ),
        objects=ObjectBlock(
            rows=np.array([row.image for row in rows], np.int32),
            xyxy=boxes,
            labels=np.array([row.label for row in rows], np.int32),
            annotation_ids=np.array([row.number for row in rows], np.int64),
        ),
        normalised=True,
        rings=tuple(row.ring for row in rows) if any(row.ring is not None for row in rows) else None,
        issues=tuple(issues),
    )


def _space(description: Description, path: Path) -> LabelSpace:
    try:
        names = description.names
        return LabelSpace(names=tuple(names.values()), ids=tuple(names)) if names else LabelSpace.from_names(())
    except DataError as error:
        raise DataError(error.what, where=path) from None


def _pictures(description: Description, path: Path, split: str) -> Iterable[tuple[str, Path | None]]:
    """Name relative to the root, and label file, of every picture of the split."""
    found = sorted(set(_files(description, path, split)))
    if not found:
        what = f"holds no pictures of the split '{split}'" if split else "holds no pictures"
        raise DataError(what, where=path, remedy="Pictures should lie in images/ beside labels/.")
    for picture in found:
        try:
            name = picture.relative_to(description.root).as_posix()
        except ValueError:
            name = str(picture.absolute())
        labels = _labels_of(picture)
        yield name, labels if labels.is_file() else None


def _files(description: Description, path: Path, split: str) -> Iterable[Path]:
    places = description.places.get(split) if split else None
    if places is None:
        listed = [place for some in description.places.values() for place in some] if not split else []
        images = description.root / "images"
        places = listed or [images / split if split else (images if images.is_dir() else description.root)]
    for place in places:
        if place.is_dir():
            yield from (file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif place.suffix == ".txt" and place.is_file():
            for line in place.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    yield description.root / line.strip()
        else:
            remedy = "Correct the path, or choose another --split."
            raise DataError(f"the folder or list '{place}' of pictures does not exist", where=path, remedy=remedy)


def _labels_of(picture: Path) -> Path:
    """labels/x.txt for images/x.jpg (the last folder named images is replaced), else x.txt beside the picture."""
    parts = list(picture.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _rows(file: Path, image: int, name: str, num_classes: int, issues: list[Issue]) -> Iterable[_Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        issues.append(Issue(name, None, "annotation file cannot be read", "picture kept without boxes", str(error)))
        return
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        polygon = len(values) >= 7 and len(values) % 2 == 1
        if not (len(values) == 5 or polygon) or not values[0].is_integer():
            issues.append(Issue(name, number, "annotation cannot be read", "dropped", line[:80]))
            continue
        label = int(values[0])
        if not 0 <= label < num_classes:
            what = f"line {number} has the class {label}, but there are {num_classes} class names"
            raise DataError(what, where=file, remedy="Complete the names in data.yaml or classes.txt.")
        if polygon:
            ring = np.array(values[1:], np.float64).reshape(-1, 2)
            low, high = ring.min(0).tolist(), ring.max(0).tolist()
            yield _Row(image, label, number, (low[0], low[1], high[0], high[1]), ring)
        else:
            x, y, w, h = values[1:]
            yield _Row(image, label, number, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), None)
