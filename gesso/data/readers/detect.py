"""Finds out in which format a folder or file of annotations is, and which splits it holds."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args
from xml.etree import ElementTree

from gesso.data.pictures import SUFFIXES
from gesso.data.readers.citypersons import citypersons_files
from gesso.data.readers.flowers102 import FLOWERS102, TRAINVAL, is_flowers102
from gesso.data.readers.image_folder import class_folder_splits
from gesso.data.readers.masks import mask_splits
from gesso.data.readers.sun397 import FIRST_SPLITS, sun397_lists
from gesso.data.readers.voc import ROOT, lines_of, stem_of
from gesso.data.readers.yolo_names import describe
from gesso.errors import DataError, nearest

Format: TypeAlias = Literal["coco", "voc", "yolo", "citypersons", "sun397", "flowers102", "masks", "folder"]
FormatChoice: TypeAlias = Literal["auto", Format]
_COCO_KEYS = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[\s*[{\]]')
_CLASSES = re.compile(rb'"classes"\s*:\s*\[\s*[{"]')
_PEEK = 1 << 16
_LATER: tuple[Format, ...] = ("masks", "folder")
"""Formats without annotations of their own: taken where no other is found, in this order."""


class Found(NamedTuple):
    """One split of a source.

    Attributes:
        format: of its annotations.
        path: the JSON file (coco), the folder that holds Annotations/ or the XML files (voc), the data.yaml or the
            folder that holds labels/ (yolo), the .mat file (citypersons), or the source itself.
        split: "train", "val", ...; "" where the source is not split.
        by_name_only: the split is taken only where its name is asked for: it repeats others, or is optional and has no
            pictures.
    """

    format: Format
    path: Path
    split: str
    by_name_only: bool = False


def detect(source: str | Path, format: str = "auto") -> list[Found]:
    """The splits of ``source``, sorted by name, "train" first.

    Args:
        source: a folder, a COCO JSON file, a YOLO data.yaml or a .mat file of CityPersons.
        format: one of ``Format``, or "auto".

    Raises:
        DataError: there is nothing, nothing known, or more than one format, or a data.yaml cannot be understood; says
            what was found and the remedy.
    """
    path = Path(source)
    if format != "auto" and format not in get_args(Format):
        raise DataError(f"unknown format '{format}'", remedy=nearest(format, ("auto", *get_args(Format))))
    if path.is_file():
        return _of_file(path, format)
    if not path.is_dir():
        raise DataError("does not exist", where=path, remedy="Check the path.")
    asked = _FINDERS if format == "auto" else {format: _FINDERS[format]}
    found = {name: splits for name, find in asked.items() if name not in _LATER and (splits := find(path))}
    for name in _LATER:
        if name in asked and not found and (splits := asked[name](path)):
            found[name] = splits
    if not found:
        raise _nothing(path, format)
    if len(found) > 1:
        remedy = f"Choose one with --format {' or '.join(found)}."
        raise DataError(f"holds annotations in several formats ({', '.join(found)})", where=path, remedy=remedy)
    (splits,) = found.values()
    return sorted(splits, key=lambda one: (one.split != "train", one.split))


def choose(found: list[Found], split: str | None, source: str | Path) -> list[Found]:
    """The one with the name ``split``; where it is None, all but those by name only. DataError with the known names."""
    if split is None:
        return [one for one in found if not one.by_name_only] or found
    chosen = [one for one in found if one.split == split]
    if not chosen:
        remedy = nearest(split, [one.split for one in found if one.split])
        raise DataError(f"holds no split '{split}'", where=source, remedy=remedy)
    return chosen


def _of_file(path: Path, format: str) -> list[Found]:
    suffix = path.suffix.lower()
    known: dict[str, Format] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".mat": "citypersons"}
    if suffix not in known or format not in ("auto", known[suffix]):
        remedy = "Give a COCO .json file, a YOLO data.yaml, a .mat file of CityPersons, or the folder of the data set."
        raise DataError("the format of this file is not known", where=path, remedy=remedy)
    if known[suffix] == "yolo":
        return _yaml_splits(path)
    return [Found(known[suffix], path, "")]


def _coco(folder: Path) -> list[Found]:
    places = (folder, folder / "annotations")
    files = [file for place in places for file in sorted(place.glob("*.json")) if file.is_file() and _is_coco(file)]
    instances = [file for file in files if file.stem.startswith("instances")]
    files = instances or files
    if len(files) == 1:
        return [Found("coco", files[0], "")]
    found = [Found("coco", file, _split_name(file.stem)) for file in files]
    names = [one.split for one in found]
    return found if len(set(names)) == len(names) else [Found("coco", file, file.stem) for file in files]


def _split_name(stem: str) -> str:
    return re.sub(r"^(instances|annotations)[_-]", "", stem) or stem


def _is_coco(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(_PEEK)
        opened.seek(0, 2)
        opened.seek(max(opened.tell() - _PEEK, 0))
        both = head + opened.read()
    keys = {match[1] for match in _COCO_KEYS.finditer(both)}
    if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") or not keys:
        return False
    # Images beside a list of classes: labels of whole pictures.
    return keys != {b"images"} or not _CLASSES.search(both)


def _voc(folder: Path) -> list[Found]:
    annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    if not any(_may_be_voc(file) for file in annotations.rglob("*.xml")):
        return []
    lists = sorted((folder / "ImageSets" / "Main").glob("*.txt")) or sorted((folder / "ImageSets").glob("*.txt"))
    splits = [file.stem for file in lists if not _is_of_one_class(file, annotations)]
    parts = {"train", "val"} <= set(splits)
    return [Found("voc", folder, name, parts and name == "trainval") for name in splits] or [Found("voc", folder, "")]


def _may_be_voc(file: Path) -> bool:
    """False where the root is another one. A file that is no XML may be a broken annotation: the reader reports it."""
    try:
        with file.open("rb") as opened:
            _, root = next(ElementTree.iterparse(opened, events=("start",)))
    except (ElementTree.ParseError, ValueError, LookupError, OSError):
        return True
    return bool(root.tag == ROOT)


def _is_of_one_class(file: Path, annotations: Path) -> bool:
    """Whether a list is one of CLASS_SPLIT.txt: behind each picture stands whether it shows the class."""
    first = next(iter(lines_of(file)), "")
    return "_" in file.stem and stem_of(first, annotations) != first


def _yolo(folder: Path) -> list[Found]:
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            return _yaml_splits(folder / name)
    labels = folder / "labels"
    if not labels.is_dir():
        return []
    inner = sorted(entry.name for entry in labels.iterdir() if entry.is_dir())
    return [Found("yolo", folder, name) for name in inner] or [Found("yolo", folder, "")]


def _yaml_splits(file: Path) -> list[Found]:
    description = describe(file)
    splits = [Found("yolo", file, name, name in description.missing) for name in description.places]
    return splits or [Found("yolo", file, "")]


def _citypersons(folder: Path) -> list[Found]:
    return [Found("citypersons", file, split) for split, file in citypersons_files(folder).items()]


def _sun397(folder: Path) -> list[Found]:
    return [Found("sun397", folder, split, split not in FIRST_SPLITS) for split in sun397_lists(folder)]


def _flowers102(folder: Path) -> list[Found]:
    splits = FLOWERS102 if is_flowers102(folder) else ()
    return [Found("flowers102", folder, split, split == TRAINVAL) for split in splits]


def _masks(folder: Path) -> list[Found]:
    return [Found("masks", folder, split, by_name) for split, by_name in mask_splits(folder)]


def _folder(folder: Path) -> list[Found]:
    return [Found("folder", folder, split) for split in class_folder_splits(folder)]


_FINDERS: Mapping[str, Callable[[Path], list[Found]]] = {
    "coco": _coco,
    "voc": _voc,
    "yolo": _yolo,
    "citypersons": _citypersons,
    "sun397": _sun397,
    "flowers102": _flowers102,
    "masks": _masks,
    "folder": _folder,
}
_WANTED: Mapping[str, str] = {
    "coco": "a COCO .json file (here or in annotations/)",
    "voc": "Annotations/*.xml",
    "yolo": "data.yaml or labels/",
    "citypersons": "anno_train.mat (here or in annotations/)",
    "sun397": "Training_01.txt (here, in Partitions/ or in split/)",
    "flowers102": "jpg/, imagelabels.mat and setid.mat",
    "masks": "images/ and masks/, or JPEGImages/ and SegmentationClass/",
    "folder": "a folder for each of two or more classes",
}


def _nothing(folder: Path, format: str) -> DataError:
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not entries:
        return DataError("the folder is empty", where=folder, remedy="Check the path.")
    pictures = sum(Path(name).suffix.lower() in SUFFIXES for name in entries)
    found = f"found {pictures} pictures but no annotations" if pictures else f"found {', '.join(entries[:5])}"
    sought = _WANTED[format] if format in _WANTED else ", ".join(_WANTED.values())
    return DataError(f"holds no annotations: {found}", where=folder, remedy=f"Sought: {sought}.")
