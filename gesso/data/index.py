"""The index: a folder of memory-mapped columns that holds a data set. ``index_writer.IndexWriter`` makes it.

``index.json`` holds the format version, the label space, the sources and the columns' sizes and checksums; every other
file is one ``.npy`` column, mapped on first use, so that opening costs the same at any size and all processes share the
pages. N images, M objects over the whole index, C categories. Needs numpy and the standard library only.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gesso.data.records import Array, Column, Issue, Mask, Masks, Source, Strings, Verified
from gesso.errors import DataError
from gesso.label_space import LabelSpace

FORMAT, VERSION = "gesso-index", 1
HEAD, REPORT = "index.json", "report.jsonl"
_KEYS = {"images", "boxes", "label_space", "sources", "columns", "image_columns", "object_columns"}


class Objects(NamedTuple):
    """The n objects of one image, as views of the index: never write to them.

    Attributes:
        xyxy: (n, 4) float32.
        labels: (n,) integer.
        flags: (n,) uint16, bits of ``records.FLAGS``.
        areas: (n,) float32.
        box_ids: (n,) int64, counted from 1 over the whole index.
    """

    xyxy: Array
    labels: Array
    flags: Array
    areas: Array
    box_ids: Array


class Index:
    """A data set on disk, opened with ``Index.open``. Immutable; pickles as its path.

    Attributes:
        path: the folder, absolute.
        label_space: names and numbers of the categories.
        sources: where the images came from; ``root`` is absolute.
        num_boxes: M.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Use ``Index.open``."""
        self.path = path
        self._head = head
        self.label_space = LabelSpace.from_dict(head["label_space"])
        self.num_boxes: int = head["boxes"]
        self._length: int = head["images"]

    @classmethod
    def open(cls, path: str | Path) -> "Index":
        """Opens the index in the folder ``path``.

        Raises:
            DataError: there is no index, its head is damaged, it is of another format version, or a column is missing
                or cut off.
        """
        folder = Path(path).absolute()
        try:
            head = json.loads((folder / HEAD).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise _no_index(folder) from None
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {error}", where=folder / HEAD, remedy="Import the data again.") from None
        if not isinstance(head, dict) or head.get("format") != FORMAT or "version" not in head:
            raise _no_head(folder)
        if head["version"] != VERSION:
            remedy = "Import the data again with this version, or use the version of Gesso that wrote it."
            raise DataError(f"has format version {head['version']}, not {VERSION}", where=folder, remedy=remedy)
        if not head.keys() >= _KEYS or not isinstance(head["columns"], dict):
            raise _no_head(folder)
        for name, entry in head["columns"].items():
            file = folder / f"{name}.npy"
            try:
                size = file.stat().st_size
            except OSError:
                size = -1
            if size != entry["bytes"]:
                what = "is missing" if size < 0 else f"has {size} bytes instead of {entry['bytes']}"
                raise DataError(f"a column of the index {what}", where=file, remedy="Import the data again.")
        return cls(folder, head)

    def __reduce__(self) -> tuple[Callable[[str], "Index"], tuple[str]]:
        return Index.open, (str(self.path),)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}: {len(self)} images, {self.num_boxes} boxes, {len(self.label_space)} classes)"

    def has_column(self, name: str) -> bool:
        """Whether the index stores the column ``name`` (a ``.npy`` file of its folder)."""
        return name in self._head["columns"]

    def _load(self, name: str) -> Array:
        file = self.path / f"{name}.npy"
        if 0 in self._head["columns"][name]["shape"]:  # nothing can be mapped
            return np.asarray(np.load(file, allow_pickle=False))
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))

    def _strings(self, name: str) -> Strings:
        return Strings(self._load(f"{name}.offsets"), self._load(f"{name}.data"))

    def _any(self, name: str) -> Column:
        return self._load(name) if self.has_column(name) else self._strings(name)

    @cached_property
    def image_ids(self) -> Array:
        """(N,) int64, the ids of the source."""
        return self._load("image_id")

    @cached_property
    def widths(self) -> Array:
        """(N,) int32 pixels after EXIF transposition; 0 where unknown."""
        return self._load("width")

    @cached_property
    def heights(self) -> Array:
        """(N,) int32 pixels after EXIF transposition; 0 where unknown."""
        return self._load("height")

    @cached_property
    def normalised(self) -> Array:
        """(N,) bool: the image's size is unknown and its boxes are shares of it."""
        return self._load("normalised")

    @cached_property
    def orientations(self) -> Array:
        """(N,) uint8, EXIF orientation 1 to 8 of the file; 0 where unknown."""
        return self._load("orientation")

    @cached_property
    def content_hashes(self) -> Array:
        """(N,) uint64 of the file's bytes; 0 where unknown."""
        return self._load("content_hash")

    @cached_property
    def source_rows(self) -> Array:
        """(N,) int32 rows of ``sources``."""
        return self._load("source")

    @cached_property
    def names(self) -> Strings:
        """(N,) file names relative to their roots."""
        return self._strings("name")

    @cached_property
    def offsets(self) -> Array:
        """(N + 1,) int64: image i has the objects offsets[i] to offsets[i + 1]."""
        return self._load("offset")

    @cached_property
    def boxes(self) -> Array:
        """(M, 4) float32 xyxy."""
        return self._load("xyxy")

    @cached_property
    def labels(self) -> Array:
        """(M,) int16, or int32 for large label spaces."""
        return self._load("label")

    @cached_property
    def flags(self) -> Array:
        """(M,) uint16 bits of ``records.FLAGS``."""
        return self._load("flag")

    @cached_property
    def known_flags(self) -> Array:
        """(M,) uint16: the bits that the source gave a value for."""
        return self._load("known_flag")

    @cached_property
    def areas(self) -> Array:
        """(M,) float32."""
        return self._load("area")

    @cached_property
    def annotation_ids(self) -> Array:
        """(M,) int64, the ids of the source; they need not be unique."""
        return self._load("annotation_id")

    @cached_property
    def mask_columns(self) -> Masks | None:
        """The masks of all objects; None where no object has one."""
        if not self.has_column("mask_kind"):
            return None
        parts = (self._load(f"mask_{part}") for part in ("kind", "offset", "part_offset", "data"))
        kinds, offsets, part_offsets, data = parts
        return Masks(kinds=kinds, offsets=offsets, part_offsets=part_offsets, data=data)

    @cached_property
    def verified_columns(self) -> Verified | None:
        """The image-level labels; None where there are none."""
        if not self.has_column("verified_offset"):
            return None
        offsets, labels, states = (self._load(f"verified_{part}") for part in ("offset", "label", "state"))
        return Verified(offsets=offsets, labels=labels, states=states)

    @cached_property
    def semantic(self) -> Strings | None:
        """(N,) paths of semantic maps relative to the root; None where there are none."""
        return self._strings("semantic") if self.has_column("semantic.offsets") else None

    @cached_property
    def image_columns(self) -> dict[str, Column]:
        """The further columns of images, by name."""
        return {name: self._any(f"image.{name}") for name in self._head["image_columns"]}

    @cached_property
    def object_columns(self) -> dict[str, Column]:
        """The further columns of objects, by name."""
        return {name: self._any(f"object.{name}") for name in self._head["object_columns"]}

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The sources. A root is where it was at import or, where that is gone, at the same place from the index."""
        found = []
        for entry in self._head["sources"]:
            root = Path(entry["root"])
            beside = Path(os.path.normpath(self.path / entry["relative_root"]))
            if not root.is_dir() and beside.is_dir():
                root = beside
            labelled = entry["labelled"]
            labelled = None if labelled is None else tuple(labelled)
            found.append(Source(name=entry["name"], root=str(root), split=entry["split"], labelled=labelled))
        return tuple(found)

    def name(self, i: int) -> str:
        """The file name of image i relative to its root."""
        name: str = self.names[i]
        return name

    def image_path(self, i: int) -> Path:
        """The path of image i."""
        return Path(self.sources[self.source_rows[i]].root, self.name(i))

    def semantic_path(self, i: int) -> Path | None:
        """The path of the semantic map of image i, or None."""
        name = self.semantic[i] if self.semantic is not None else ""
        return Path(self.sources[self.source_rows[i]].root, name) if name else None

    def objects(self, i: int) -> Objects:
        """The objects of image i, in the order of the source."""
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        ids = np.arange(start + 1, end + 1, dtype=np.int64)
        at = slice(start, end)
        return Objects(self.boxes[at], self.labels[at], self.flags[at], self.areas[at], ids)

    def masks(self, i: int) -> list[Mask]:
        """The mask of each object of image i: ``records.Polygons``, ``records.Rle`` or None."""
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        if self.mask_columns is None:
            return [None] * (end - start)
        return [self.mask_columns[k] for k in range(start, end)]

    def verified(self, i: int) -> Array | None:
        """(C,) int8 of image i: 0 unverified, 1 present, 2 absent; None = every class was verified.

        Verified are the classes that the source labels in every image (``Source.labelled``), 1 with a box and 2
        without, and those that the image's own labels tell. None: the source labels all classes, and the image has no
        labels of its own. A box speaks against an absence; it does not verify a class by itself, since more instances
        may be hidden (LVIS's ``not_exhaustive_category_ids``). Only where nothing but ``labelled`` tells of the image
        does a box make a further class 1.
        """
        labelled = self.sources[self.source_rows[i]].labelled
        image_level = self.verified_columns
        start, end = (0, 0) if image_level is None else (int(v) for v in image_level.offsets[i : i + 2])
        if labelled is None and start == end:
            return None
        states = np.full(len(self.label_space), 2 if labelled is None else 0, np.int8)
        if labelled is not None:
            states[[self.label_space.index(name) for name in labelled]] = 2
        if image_level is not None:
            states[image_level.labels[start:end]] = image_level.states[start:end]
        shown = self.labels[self.offsets[i] : self.offsets[i + 1]]
        # ``labelled`` is empty where images speak for themselves: there, an image without labels verifies nothing.
        by_source_alone = labelled and start == end
        states[shown if by_source_alone else shown[states[shown] == 2]] = 1
        return states

    def issues(self) -> list[Issue]:
        """The import report."""
        return list(self.iter_issues())

    def iter_issues(self) -> Iterator[Issue]:
        """The import report, one line at a time."""
        with (self.path / REPORT).open("rb") as file:
            for line in file:
                row = json.loads(line.decode("utf-8", "surrogateescape"))  # file names need not be text
                yield Issue(row["image"], row["annotation_id"], row["what"], row["action"], row.get("detail", ""))

    def verify(self) -> None:
        """Reads every column and compares its checksum. Raises DataError at the first that differs."""
        for name, entry in self._head["columns"].items():
            if sha256(self.path / f"{name}.npy") != entry["sha256"]:
                remedy = "Import the data again."
                raise DataError("a column's checksum differs", where=self.path / f"{name}.npy", remedy=remedy)


def sha256(file: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _no_head(folder: Path) -> DataError:
    return DataError("is not the head of an index", where=folder / HEAD, remedy="Import the data again.")


def _no_index(folder: Path) -> DataError:
    """Says what the folder is instead of an index."""
    if not folder.is_dir():
        what = "is a file, not the folder of an index" if folder.exists() else "does not exist"
        return DataError(what, where=folder, remedy="Make an index with 'gesso data import SOURCE --out INDEX'.")
    inner = sorted(entry.parent.name for entry in folder.glob(f"*/{HEAD}"))
    if inner:
        return DataError(f"holds the indexes {', '.join(inner)}", where=folder, remedy="Name one of them.")
    remedy = "Make an index with 'gesso data import SOURCE --out INDEX'."
    return DataError(f"is no index (it holds no {HEAD})", where=folder, remedy=remedy)
