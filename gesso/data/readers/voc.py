"""PASCAL VOC: one XML file a picture in Annotations/, pictures in JPEGImages/, lists of a split in ImageSets/Main/.

Corners in the files are 1-based inclusive pixels, so the box is [xmin - 1, xmax] x [ymin - 1, ymax] here. Source: the
VOC2012 development kit, sections 4 and 6.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from gesso.data.known_spaces import known_space
from gesso.data.pictures import SUFFIXES
from gesso.data.readers.ids import stable_ids
from gesso.data.records import DIFFICULT, OCCLUDED, TRUNCATED, ImageBlock, Issue, ObjectBlock, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace, normalise

ROOT = "annotation"
"""The root element of an annotation file."""
_FLAGS = {"difficult": DIFFICULT, "truncated": TRUNCATED, "occluded": OCCLUDED}
_OF_CLASS = re.compile(r"\s+(-1|0|1)$")
_MAX_SIDE = np.iinfo(np.int32).max


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

    Categories are in the order of their names; an image's id is a hash of its file name. The picture of x.xml is the
    one that is called x; only where there is none, the file's ``filename`` counts. Semantic maps in SegmentationClass
    are numbered by VOC's 20 classes: they are kept where all names are among these, which are then the categories.

    Raises:
        DataError: the list of the split is missing, or holds no picture with annotations.
    """
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    stems = (
        [stem_of(line, annotations) for line in _listed(folder, split)]
        if split
        else sorted(file.relative_to(annotations).with_suffix("").as_posix() for file in annotations.rglob("*.xml"))
    )
    folders = [place for place in (folder / "JPEGImages", folder / "images", folder) if place.is_dir()]
    stored = _Stored(folders)
    pictures: list[_Picture] = []
    issues: list[Issue] = []
    for done, stem in enumerate(stems, start=1):
        file = annotations / f"{stem}.xml"
        try:
            pictures.append(_read(file, stem, stored))
        except FileNotFoundError:
            issues.append(Issue(stem, None, "annotation file is missing", "picture left out", file.name))
        except (ElementTree.ParseError, ValueError, LookupError, OSError) as error:
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
            return lines_of(file)
    raise DataError(f"holds no list of the split '{split}'", where=folder / "ImageSets" / "Main")


def lines_of(file: Path) -> list[str]:
    """The lines of a list that are not blank, stripped. Bytes that are not UTF-8 stay, as in Python's file names."""
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return [line.strip() for line in lines if line.strip()]


def stem_of(line: str, annotations: Path) -> str:
    """The annotation file, without its ending, that a line of a list names.

    In VOC's lists of one class -1, 0 or 1 stands behind it; but a name may end so itself.
    """
    stem = _OF_CLASS.sub("", line)
    return line if stem != line and (annotations / f"{line}.xml").is_file() else stem


class _Stored:
    """The pictures in some folders, of which each is listed once."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._listed: dict[Path, dict[str, list[str]]] = {}

    def name(self, stem: str, given: str) -> str:
        """The file name, relative to one of the folders, of the picture that belongs to the annotation file ``stem``.

        It has the path of that file, or is ``given``, or has the name alone, the first that exists; else it is a guess.
        """
        same = self._called(stem)
        if same:
            return given if given in same else same[0]
        if given and any((folder / given).is_file() for folder in self._folders):
            return given
        last = stem.rpartition("/")[2]
        return next(iter(self._called(last)), given or f"{last}.jpg")

    def _called(self, stem: str) -> list[str]:
        inner, _, last = stem.rpartition("/")
        names = [name for folder in self._folders for name in self._of(folder / inner).get(last, ())]
        return [f"{inner}/{name}" if inner else name for name in names]

    def _of(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listed:
            found: dict[str, list[str]] = {}
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                if file.suffix.lower() in SUFFIXES:
                    found.setdefault(file.stem, []).append(file.name)
            self._listed[folder] = found
        return self._listed[folder]


def _read(file: Path, stem: str, stored: _Stored) -> _Picture:
    root = ElementTree.parse(file).getroot()
    if root.tag != ROOT:
        raise ValueError(f"the root is <{root.tag}> instead of <{ROOT}>")
    name = stored.name(stem, (root.findtext("filename") or "").strip())
    width, height = (_whole(root.findtext(f"size/{side}")) for side in ("width", "height"))
    return _Picture(name, width, height, [_object(node) for node in root.iterfind("object")])


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
    """A side in pixels; 0, unknown, where it is none."""
    try:
        side = int(float(text or 0))
    except (ValueError, OverflowError):
        return 0
    return side if 0 <= side <= _MAX_SIDE else 0


def _columns(folder: Path, split: str, folders: list[Path], pictures: list[_Picture], issues: list[Issue]) -> Reading:
    objects = [one for picture in pictures for one in picture.objects]
    spellings = {normalise(one.name): one.name for one in reversed(objects)}
    maps = [Path("SegmentationClass", Path(picture.name).stem + ".png") for picture in pictures]
    root = next((place for place in folders if place.name in ("JPEGImages", "images")), folder)
    semantic = [str(Path("..", name)) if root != folder and (folder / name).is_file() else "" for name in maps]
    if any(semantic):
        voc = {normalise(name): name for name in known_space("voc").names}
        if spellings.keys() <= voc.keys():
            spellings = voc
        else:
            semantic = [""] * len(pictures)
            other = next(name for key, name in spellings.items() if key not in voc)
            what = "semantic maps are numbered by VOC's 20 classes"
            issues.append(Issue("", None, what, "maps left out", f"'{other}' is none of them"))
    space = LabelSpace.from_names(spellings[key] for key in sorted(spellings))
    labels = {key: label for label, key in enumerate(sorted(spellings))}
    counts = [len(picture.objects) for picture in pictures]
    total = len(objects)
    numbers = np.concatenate([np.zeros(0, np.int64), *(np.arange(1, count + 1) for count in counts)])
    with np.errstate(over="ignore"):
        xyxy = np.array([one.xyxy for one in objects], np.float32).reshape(-1, 4)
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
            xyxy=xyxy,
            labels=np.fromiter((labels[normalise(one.name)] for one in objects), np.int32, total),
            flags=np.fromiter((one.flags for one in objects), np.uint16, total),
            known_flags=np.fromiter((one.known for one in objects), np.uint16, total),
            annotation_ids=numbers,
        ),
        issues=tuple(issues),
    )
