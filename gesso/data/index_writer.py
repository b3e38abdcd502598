"""Writes an index: blocks of columns in, a whole folder or nothing out."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gesso.data.blocks import join_columns, join_masks
from gesso.data.index import FORMAT, HEAD, REPORT, VERSION, sha256
from gesso.data.records import (
    Array,
    Column,
    ImageBlock,
    Issue,
    IssueBlock,
    ObjectBlock,
    Source,
    Strings,
    Verified,
    box_areas,
    take_column,
)
from gesso.errors import DataError
from gesso.files import atomic_folder, write_json
from gesso.label_space import LabelSpace


class IndexWriter:
    """Collects blocks and makes the index appear at ``path`` in one rename.

    Blocks are kept in memory (about 45 bytes a box) until ``finish``; nothing stands on the disk before, and nothing
    is left there when it fails.
    """

    def __init__(
        self, path: str | Path, label_space: LabelSpace, *, sources: Sequence[Source], overwrite: bool = False
    ) -> None:
        """Checks the target.

        Args:
            path: the folder to make.
            label_space: what the labels of all blocks mean.
            sources: what ``ImageBlock.sources`` counts; at least one.
            overwrite: replaces an index that stands at ``path``.

        Raises:
            DataError: something stands at ``path`` and is not an index to be overwritten, or its parent is a file.
        """
        self.path = Path(path).absolute()
        self.label_space = label_space
        self.sources = tuple(sources)
        self.overwrite = overwrite
        self._images: list[ImageBlock] = []
        self._objects: list[ObjectBlock] = []
        self._issues: list[Issue | IssueBlock] = []
        self._length = 0
        assert self.sources, "an index needs a source"
        check_target(self.path, overwrite=overwrite)

    def add_images(self, block: ImageBlock) -> int:
        """Appends images and returns the row of the first."""
        first = self._length
        self._images.append(block)
        self._length += len(block)
        return first

    def add_objects(self, block: ObjectBlock) -> None:
        """Appends objects; their images may still follow."""
        self._objects.append(block)

    def add_issues(self, issues: Iterable[Issue | IssueBlock]) -> None:
        """Appends to the import report."""
        self._issues.extend(issues)

    def finish(self) -> Path:
        """Writes the index and returns its path.

        Raises:
            InputError: the disk is full or cannot be written.
        """
        check_target(self.path, overwrite=self.overwrite)
        with atomic_folder(self.path, overwrite=True) as temporary:
            _Folder(temporary).write(self)
        return self.path

    def issues(self, names: Strings) -> Iterator[Issue]:
        """The report, blocks told apart by annotation; ``names`` are those of all images."""
        for entry in self._issues:
            if isinstance(entry, Issue):
                yield entry
            else:
                for row, annotation in zip(entry.rows.tolist(), entry.annotation_ids.tolist(), strict=True):
                    yield Issue(names[row], annotation, entry.what, entry.action)


class _Folder:
    """The columns of an index that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.columns: dict[str, dict[str, Any]] = {}

    def write(self, writer: IndexWriter) -> None:
        images, objects = writer._images, writer._objects
        names = Strings.concatenate([block.names for block in images])
        self._write_images(images, names)
        self._write_verified(images)
        image_columns = self._write_extra("image", [(block.columns, len(block)) for block in images], order=None)
        rows = np.concatenate([np.zeros(0, np.int32), *(block.rows.astype(np.int32, copy=False) for block in objects)])
        length, boxes = len(names), len(rows)
        assert not boxes or (rows.min() >= 0 and rows.max() < length), "an object lies on no image"
        offsets = np.zeros(length + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=length), out=offsets[1:])
        order = None if np.all(rows[:-1] <= rows[1:]) else np.argsort(rows, kind="stable")
        del rows
        self.array("offset", offsets)
        self._write_objects(objects, order, num_classes=len(writer.label_space))
        object_columns = self._write_extra("object", [(block.columns, len(block)) for block in objects], order)
        self._write_report(writer.issues(names))
        head = {
            "format": FORMAT,
            "version": VERSION,
            "images": length,
            "boxes": boxes,
            "label_space": writer.label_space.to_dict(),
            "sources": [_source_entry(source, writer.path) for source in writer.sources],
            "columns": self.columns,
            "image_columns": image_columns,
            "object_columns": object_columns,
        }
        write_json(self.folder / HEAD, head)

    def array(self, name: str, values: Array) -> None:
        file = self.folder / f"{name}.npy"
        with file.open("wb") as opened:
            np.lib.format.write_array(opened, np.ascontiguousarray(values), allow_pickle=False)
        self.columns[name] = {"shape": list(values.shape), "bytes": file.stat().st_size, "sha256": sha256(file)}

    def strings(self, name: str, values: Strings) -> None:
        self.array(f"{name}.offsets", values.offsets - values.offsets[0])
        self.array(f"{name}.data", values.data[values.offsets[0] : values.offsets[-1]])

    def _write_images(self, blocks: Sequence[ImageBlock], names: Strings) -> None:
        def join(field: str, kind: Any) -> Array:
            values = [getattr(block, field) for block in blocks]
            filled = [np.zeros(len(b), kind) if v is None else v for v, b in zip(values, blocks, strict=True)]
            return np.concatenate([np.zeros(0, kind), *(v.astype(kind, copy=False) for v in filled)])

        self.strings("name", names)
        self.array("image_id", join("ids", np.int64))
        self.array("width", join("widths", np.int32))
        self.array("height", join("heights", np.int32))
        self.array("source", join("sources", np.int32))
        self.array("normalised", join("normalised", np.bool_))
        self.array("orientation", join("orientations", np.uint8))
        self.array("content_hash", join("hashes", np.uint64))
        if any(block.semantic is not None for block in blocks):
            filled = [b.semantic if b.semantic is not None else Strings.of([""] * len(b)) for b in blocks]
            self.strings("semantic", Strings.concatenate(filled))

    def _write_verified(self, blocks: Sequence[ImageBlock]) -> None:
        if all(block.verified is None for block in blocks):
            return
        counts, labels, states = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int8)]
        for block in blocks:
            given: Verified | None = block.verified
            counts.append(np.zeros(len(block), np.int64) if given is None else np.diff(given.offsets))
            if given is not None:
                labels.append(given.labels)
                states.append(given.states)
        self.array("verified_offset", np.cumsum(np.concatenate(counts)))
        self.array("verified_label", np.concatenate(labels).astype(np.int32))
        self.array("verified_state", np.concatenate(states).astype(np.int8))

    def _write_objects(self, blocks: Sequence[ObjectBlock], order: Array | None, *, num_classes: int) -> None:
        label_kind = np.int16 if num_classes < 2**15 else np.int32

        def put(name: str, kind: Any, values: Iterable[Array], shape: tuple[int, ...] = ()) -> None:
            joined = np.concatenate([np.zeros((0, *shape), kind), *(v.astype(kind, copy=False) for v in values)])
            self.array(name, joined if order is None else joined[order])

        put("xyxy", np.float32, (b.xyxy for b in blocks), shape=(4,))
        put("label", label_kind, (b.labels for b in blocks))
        put("flag", np.uint16, (_or_zeros(b.flags, len(b)) for b in blocks))
        put("known_flag", np.uint16, (_or_zeros(b.known_flags, len(b)) for b in blocks))
        put("area", np.float32, (box_areas(b.xyxy) if b.areas is None else b.areas for b in blocks))
        put("annotation_id", np.int64, (_or_zeros(b.annotation_ids, len(b)) for b in blocks))
        masks = join_masks([(block.masks, len(block)) for block in blocks])
        if masks is not None:
            masks = masks if order is None else masks.take(order)
            self.array("mask_kind", masks.kinds)
            self.array("mask_offset", masks.offsets)
            self.array("mask_part_offset", masks.part_offsets)
            self.array("mask_data", masks.data)

    def _write_extra(
        self, prefix: str, blocks: Sequence[tuple[Mapping[str, Column], int]], order: Array | None
    ) -> list[str]:
        names = sorted({name for columns, _ in blocks for name in columns})
        for name in names:
            column = join_columns([(columns.get(name), count) for columns, count in blocks])
            column = column if order is None else take_column(column, order)
            if isinstance(column, Strings):
                self.strings(f"{prefix}.{name}", column)
            else:
                self.array(f"{prefix}.{name}", column)
        return names

    def _write_report(self, issues: Iterable[Issue]) -> None:
        with (self.folder / REPORT).open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as opened:
            for issue in issues:
                row = issue._asdict()
                if not issue.detail:
                    del row["detail"]
                opened.write(json.dumps(row, ensure_ascii=False) + "\n")


def _or_zeros(values: Array | None, count: int) -> Array:
    return np.zeros(count, np.uint16) if values is None else values


def _source_entry(source: Source, path: Path) -> dict[str, Any]:
    root = Path(source.root).absolute()
    return {
        "name": source.name,
        "root": str(root),
        "relative_root": os.path.relpath(root, path),
        "split": source.split,
        "labelled": None if source.labelled is None else list(source.labelled),
    }


def check_target(path: Path, *, overwrite: bool, can_overwrite: bool = True) -> None:
    """Raises DataError unless an index may be written at ``path``: nothing there, an empty folder, or ``overwrite``.

    ``can_overwrite``: whether the remedy names that option.
    """
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise DataError("is a file, so no index can be written under it", where=parent)
            break
    if not (path.exists() or path.is_symlink()):
        return
    if not path.is_dir() or path.is_symlink():
        raise DataError("exists and is not a folder", where=path, remedy="Choose another --out.")
    if (path / HEAD).is_file():
        if not overwrite:
            remedy = "Choose another --out or --overwrite." if can_overwrite else "Choose another --out."
            raise DataError("an index stands here already", where=path, remedy=remedy)
        foreign = sorted(e.name for e in path.iterdir() if e.name not in (HEAD, REPORT) and e.suffix != ".npy")
        if foreign:
            what = f"the folder holds '{foreign[0]}' beside the index, so it is not overwritten"
            raise DataError(what, where=path, remedy="Choose another --out.")
    elif any(path.iterdir()):
        raise DataError("the folder is not empty and holds no index", where=path, remedy="Choose another --out.")
