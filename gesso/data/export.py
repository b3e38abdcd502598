"""Writes an index back as COCO JSON, PASCAL VOC XML or YOLO text, loss-free for what the format can hold."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from gesso.data.index import Index
from gesso.data.writers.coco import write_coco
from gesso.data.writers.names import safe_name, split_name, yolo_name
from gesso.data.writers.voc import PICTURES as VOC_PICTURES
from gesso.data.writers.voc import write_voc
from gesso.data.writers.yolo import PICTURES as YOLO_PICTURES
from gesso.data.writers.yolo import write_yolo
from gesso.errors import ConfigError, DataError, InputError, nearest
from gesso.files import atomic_file, atomic_folder

ExportFormat = Literal["coco", "voc", "yolo"]
Pictures = Literal["none", "link", "copy"]
ANNOTATIONS = "annotations.json"
COCO_PICTURES = "images"
MARK = ".gesso-export"
"""An empty file in every exported folder: only such a folder is ever replaced, never a data set of the user's own."""
_ENTRIES = frozenset(
    (MARK, ANNOTATIONS, COCO_PICTURES, VOC_PICTURES, YOLO_PICTURES, "Annotations", "ImageSets", "labels", "data.yaml")
)


def export(
    index: Index,
    out: str | Path,
    format: ExportFormat = "coco",
    *,
    pictures: Pictures = "none",
    overwrite: bool = False,
) -> list[str]:
    """Writes an index in a format that other tools read.

    Args:
        index: what to write.
        out: a new folder: ``annotations.json`` for COCO; ``Annotations`` and ``ImageSets`` for VOC; ``labels`` and
            ``data.yaml`` for YOLO. For COCO without pictures a name that ends in ".json" is the file itself.
        format: coco, voc or yolo.
        pictures: "none" writes annotations alone, with names relative to the index's root; "link" and "copy" put the
            pictures beside them (``images``, ``JPEGImages``, ``images/SPLIT``).
        overwrite: replaces an earlier export that stands at ``out``; a folder with anything else in it stays.

    Returns:
        What the format cannot hold, one line for each kind of loss; empty where nothing is lost.

    Raises:
        ConfigError: an unknown format or way to bring the pictures, or pictures beside a single file.
        DataError: the format cannot hold these images at all (sizes unknown, names that clash).
        InputError: ``out`` exists, a picture is missing, or the disk is full.
    """
    _one_of("format", format, get_args(ExportFormat))
    _one_of("pictures", pictures, get_args(Pictures))
    try:
        return _export(index, Path(out), format, pictures, overwrite)
    except UnicodeEncodeError as error:
        what = f"the name {error.object!r} is no UTF-8, so no file of annotations can hold it"
        raise DataError(what, where=index.path, remedy="Rename the picture and import the data again.") from error


def _export(index: Index, target: Path, format: ExportFormat, pictures: Pictures, overwrite: bool) -> list[str]:
    if target.suffix.lower() == ".json":
        if format != "coco" or pictures != "none":
            what = "a single file holds the annotations of COCO alone"
            raise ConfigError(what, where=target, remedy="Name a folder.")
        return _single_file(index, target, overwrite)
    if target.exists() and overwrite:
        _check_ours(target)
    with atomic_folder(target, overwrite=overwrite) as folder:
        (folder / MARK).touch()
        if format == "coco":
            with (folder / ANNOTATIONS).open("wb") as file:
                losses = write_coco(index, file)
        else:
            losses = {"voc": write_voc, "yolo": write_yolo}[format](index, folder)
        if pictures != "none":
            _bring(index, folder, _places(index, format), copy=pictures == "copy")
    return losses


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {what} '{value}'", remedy=nearest(value, known))


def _check_ours(target: Path) -> None:
    """Refuses to overwrite a folder that is no export, or holds more than one."""
    if target.is_dir() and not (target / MARK).is_file():
        what = "was not exported by Gesso, so it is not overwritten"
        raise InputError(what, where=target, remedy="Name another folder.")
    strange = (
        sorted(entry.name for entry in target.iterdir() if entry.name not in _ENTRIES) if target.is_dir() else [""]
    )
    if strange:
        what = f"holds '{strange[0]}', so it is no export and is not overwritten" if strange[0] else "is no folder"
        raise InputError(what, where=target, remedy="Name another folder.")


def _single_file(index: Index, target: Path, overwrite: bool) -> list[str]:
    if target.exists() and not overwrite:
        raise InputError("exists already", where=target, remedy="Name another file, or replace it with --overwrite.")
    with atomic_file(target) as temporary, temporary.open("wb") as file:
        losses = write_coco(index, file)
        file.flush()
    return losses


def _places(index: Index, format: ExportFormat) -> Callable[[int], str]:
    """Where the picture of an image stands in the exported folder, for the rows of the index."""
    if format == "coco":
        return lambda row: f"{COCO_PICTURES}/{safe_name(index, row)}"
    if format == "voc":
        return lambda row: f"{VOC_PICTURES}/{safe_name(index, row)}"
    return lambda row: f"{YOLO_PICTURES}/{split_name(index, row)}/{yolo_name(index, row)}"


def _bring(index: Index, folder: Path, place: Callable[[int], str], *, copy: bool) -> None:
    for row in range(len(index)):
        source, target = index.image_path(row), folder / place(row)
        if not source.is_file():
            raise InputError(
                "the picture is missing", where=source, remedy="Export without pictures, or bring it back."
            )
        if target.exists():
            what = f"two pictures are called '{index.name(row)}'"
            raise InputError(what, where=index.path, remedy="Export without pictures, or split the index by source.")
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source.absolute())
