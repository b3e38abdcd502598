"""PASCAL VOC: one XML file a picture in Annotations/, pictures in JPEGImages/, lists of a split in ImageSets/Main/.

Corners in the files are 1-based inclusive pixels, so the box is [xmin - 1, xmax] x [ymin - 1, ymax] here. Source: the
VOC2012 development kit, sections 4 and 6.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from gesso.data.readers.ids import stable_ids
from gesso.data.records import DIFFICULT, OCCLUDED, TRUNCATED, ImageBlock, Issue, ObjectBlock, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace, normalise

_FLAGS = {"difficult": DIFFICULT, "truncated": TRUNCATED, "occluded": OCCLUDED}


class _Object(NamedTuple):
    name: str
    xyxy: tuple[float, float, float, float]
    flags: int
    known: int


class _Picture(NamedTuple):
    name: str
    width: int
    height: int
    objects: list[_Object]


def read_voc(folder: Path, *, split: str = "", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads the VOC folder; ``progress`` is told the number of files read.

    Categories are in the order of their names; an image's id is a hash of its file name.

    Raises:
        DataError: the list of the split is missing, or holds no picture with annotations.
    """
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    stems = (
        _listed(folder, split)
        if split
        else sorted(file.relative_to(annotations).with_suffix("").as_posix() for file in annotations.rglob("*.xml"))
    )
    folders = [place for place in (folder / "JPEGImages", folder / "images", folder) if place.is_dir()]
    pictures: list[_Picture] = []
    issues: list[Issue] = []
    for done, stem in enumerate(stems, start=1):
        file = annotations / f"{stem}.xml"
        try:
            pictures.append(_read(file, folders))
        except FileNotFoundError:
            issues.append(Issue(stem, None, "annotation file is missing", "picture left out", file.name))
        except (ElementTree.ParseError, ValueError, OSError) as error:
            issues.append(
                Issue(stem, None, "annotation file cannot be read", "picture left out", f"{file.name}: {error}")
            )
        if progress is not None and done % 256 == 0:
            progress(done)
    if stems and not pictures:
        raise DataError(f"none of {len(stems)} annotation files could be read: {issues[0].detail}", where=annotations)
    return _columns(folder, split, folders, pictures, issues)


def _listed(folder: Path, split: str) -> list[str]:
    for file in (folder / "ImageSets" / "Main" / f"{split}.txt", folder / "ImageSets" / f"{split}.txt"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            return [line.split()[0] for line in lines if line.strip()]
    raise DataError(f"holds no list of the split '{split}'", where=folder / "ImageSets" / "Main")


def _read(file: Path, folders: list[Path]) -> _Picture:
    root = ElementTree.parse(file).getroot()
    name = (root.findtext("filename") or "").strip()
    if not any((place / name).is_file() for place in folders if name):
        name = next((hit.name for place in folders for hit in _beside(place, file.stem)), name or f"{file.stem}.jpg")
    width, height = (_whole(root.findtext(f"size/{side}")) for side in ("width", "height"))
    return _Picture(name, width, height, [_object(node) for node in root.iterfind("object")])


def _beside(place: Path, stem: str) -> list[Path]:
    hits = (place / f"{stem}{suffix}" for suffix in (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp"))
    return [hit for hit in hits if hit.is_file()]


def _object(node: ElementTree.Element) -> _Object:
    corners = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        try:
            corners.append(float(node.findtext(f"bndbox/{corner}") or "nan"))
        except ValueError:
            corners.append(math.nan)
    flags = known = 0
    for key, bit in _FLAGS.items():
        text = (node.findtext(key) or "").strip().lower()
        known |= bit if text else 0
        flags |= bit if text in ("1", "true", "yes") else 0
    x1, y1, x2, y2 = corners
    name = (node.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object has no name")
    return _Object(name, (x1 - 1, y1 - 1, x2, y2), flags, known)


def _whole(text: str | None) -> int:
    try:
        return max(int(float(text or 0)), 0)
    except (ValueError, OverflowError):
        return 0


def _columns(folder: Path, split: str, folders: list[Path], pictures: list[_Picture], issues: list[Issue]) -> Reading:
    objects = [one for picture in pictures for one in picture.objects]
    spellings = {normalise(one.name): one.name for one in reversed(objects)}
    space = LabelSpace.from_names(spellings[key] for key in sorted(spellings))
    labels = {key: label for label, key in enumerate(sorted(spellings))}
    counts = [len(picture.objects) for picture in pictures]
    total = len(objects)
    numbers = np.concatenate([np.zeros(0, np.int64), *(np.arange(1, count + 1) for count in counts)])
    maps = [Path("SegmentationClass", Path(picture.name).stem + ".png") for picture in pictures]
    root = next((place for place in folders if place.name in ("JPEGImages", "images")), folder)
    semantic = [str(Path("..", name)) if root != folder and (folder / name).is_file() else "" for name in maps]
    return Reading(
        name=folder.absolute().name,
        split=split,
        roots=tuple(place.absolute() for place in folders),
        label_space=space,
        images=ImageBlock(
            ids=stable_ids([picture.name for picture in pictures]),
            names=Strings.of(picture.name for picture in pictures),
            widths=np.array([picture.width for picture in pictures], np.int32),
            heights=np.array([picture.height for picture in pictures], np.int32),
            semantic=Strings.of(semantic) if any(semantic) else None,
        ),
        objects=ObjectBlock(
            rows=np.repeat(np.arange(len(pictures), dtype=np.int32), counts),
            xyxy=np.array([one.xyxy for one in objects], np.float32).reshape(-1, 4),
            labels=np.fromiter((labels[normalise(one.name)] for one in objects), np.int32, total),
            flags=np.fromiter((one.flags for one in objects), np.uint16, total),
            known_flags=np.fromiter((one.known for one in objects), np.uint16, total),
            annotation_ids=numbers,
        ),
        issues=tuple(issues),
    )
