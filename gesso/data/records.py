"""What readers yield and the index writer takes: blocks of columns, never one Python object a box.

N images of a block, M objects. Boxes are float32 (M, 4) xyxy in absolute pixels of the stored picture (after EXIF
transposition), or in shares of its width and height where the image is ``normalised``. Needs numpy and the standard
library only.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gesso.label_space import LabelSpace

CROWD, IGNORE, DIFFICULT, GROUP_OF, OCCLUDED, TRUNCATED, DEPICTION, INSIDE = (1 << bit for bit in range(8))
IGNORED = CROWD | IGNORE | DIFFICULT
"""An object with one of these is neither learnt nor missed."""
FLAGS: Mapping[str, int] = {
    "crowd": CROWD,
    "ignore": IGNORE,
    "difficult": DIFFICULT,
    "group_of": GROUP_OF,
    "occluded": OCCLUDED,
    "truncated": TRUNCATED,
    "depiction": DEPICTION,
    "inside": INSIDE,
}
"""Bits of ``flags``; the same bit of ``known_flags`` says that the source gave a value for it."""

Array: TypeAlias = NDArray[Any]


class Issue(NamedTuple):
    """One line of the import report.

    Attributes:
        image: the file name of the picture, or "" where the case concerns none.
        annotation_id: the id in the source file; None where the case concerns a picture or a file.
        what: the kind of case, one of few words, so that cases can be counted ("empty box").
        action: what was done ("dropped", "clipped", "kept aside").
        detail: values or the reader's own message; "" where there is nothing to add.
    """

    image: str
    annotation_id: int | None
    what: str
    action: str
    detail: str = ""


class Strings(Sequence[str]):
    """A column of strings: one UTF-8 blob (uint8) and int64 offsets (n + 1,)."""

    def __init__(self, offsets: Array, data: Array) -> None:
        self.offsets = offsets
        self.data = data

    @classmethod
    def of(cls, values: Iterable[str]) -> "Strings":
        """The column that holds ``values``."""
        parts = [value.encode("utf-8", "surrogateescape") for value in values]
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(parts), np.uint8))

    @classmethod
    def concatenate(cls, columns: Sequence["Strings"]) -> "Strings":
        """One column after the other."""
        lengths = [np.diff(column.offsets) for column in columns]
        offsets = np.zeros(sum(map(len, lengths)) + 1, np.int64)
        if columns:
            np.cumsum(np.concatenate(lengths), out=offsets[1:])
        blobs = [column.data[column.offsets[0] : column.offsets[-1]] for column in columns]
        return cls(offsets, np.concatenate(blobs) if blobs else np.zeros(0, np.uint8))

    def take(self, rows: Array) -> "Strings":
        """The column of the strings at ``rows`` (int64)."""
        offsets, data = take_ragged(self.offsets, self.data, rows)
        return Strings(offsets, data)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        blob, offsets = self.data.tobytes(), self.offsets.tolist()
        for start, end in itertools.pairwise(offsets):
            yield blob[start:end].decode("utf-8", "surrogateescape")


def take_ragged(offsets: Array, data: Array, rows: Array) -> tuple[Array, Array]:
    """Gathers the segments ``rows`` of a CSR column: new int64 offsets (len(rows) + 1,) and the gathered ``data``."""
    starts = np.asarray(offsets)[rows]
    lengths = np.asarray(offsets)[np.asarray(rows) + 1] - starts
    new = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=new[1:])
    positions = np.arange(new[-1], dtype=np.int64) + np.repeat(starts - new[:-1], lengths)
    return new, np.asarray(data)[positions]


@dataclass(frozen=True)
class Polygons:
    """An instance mask as rings: each float32 (k, 2) x, y in absolute pixels, k >= 3; their union is the mask."""

    rings: tuple[Array, ...]


@dataclass(frozen=True)
class Rle:
    """An instance mask as COCO's compressed run lengths (column-major), ``size`` = (height, width) of the picture."""

    size: tuple[int, int]
    counts: bytes


Mask: TypeAlias = Polygons | Rle | None
Column: TypeAlias = Array | Strings
NO_MASK, POLYGONS, RLE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The masks of M objects as a two-level CSR: object -> parts -> bytes.

    Attributes:
        kinds: (M,) uint8: NO_MASK, POLYGONS or RLE.
        offsets: (M + 1,) int64 into the parts.
        part_offsets: (parts + 1,) int64 into ``data``, multiples of four.
        data: uint8. A ring is its float32 x, y pairs; an RLE its int32 height and width and then its counts, padded
            with zero bytes.
    """

    kinds: Array
    offsets: Array
    part_offsets: Array
    data: Array

    @classmethod
    def of(cls, masks: Sequence[Mask]) -> "Masks":
        """The columns of ``masks``."""
        kinds = np.zeros(len(masks), np.uint8)
        counts = np.zeros(len(masks), np.int64)
        parts: list[bytes] = []
        for i, mask in enumerate(masks):
            if isinstance(mask, Polygons):
                kinds[i] = POLYGONS
                parts.extend(np.ascontiguousarray(ring, np.float32).tobytes() for ring in mask.rings)
                counts[i] = len(mask.rings)
            elif isinstance(mask, Rle):
                kinds[i], counts[i] = RLE, 1
                head = np.asarray(mask.size, np.int32).tobytes()
                parts.append(head + mask.counts + b"\0" * (-len(mask.counts) % 4))
        part_offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=part_offsets[1:])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        data = np.frombuffer(b"".join(parts), np.uint8)
        return cls(kinds=kinds, offsets=offsets, part_offsets=part_offsets, data=data)

    @classmethod
    def none(cls, count: int) -> "Masks":
        """``count`` objects without a mask."""
        return cls(
            kinds=np.zeros(count, np.uint8),
            offsets=np.zeros(count + 1, np.int64),
            part_offsets=np.zeros(1, np.int64),
            data=np.zeros(0, np.uint8),
        )

    @classmethod
    def concatenate(cls, masks: Sequence["Masks"]) -> "Masks":
        """The masks of one block after the other."""

        def join(columns: list[Array]) -> Array:
            steps = np.concatenate([np.zeros(0, np.int64), *(np.diff(column) for column in columns)])
            return np.concatenate([np.zeros(1, np.int64), np.cumsum(steps)])

        return cls(
            kinds=np.concatenate([np.zeros(0, np.uint8), *(m.kinds for m in masks)]),
            offsets=join([m.offsets for m in masks]),
            part_offsets=join([m.part_offsets for m in masks]),
            data=np.concatenate([np.zeros(0, np.uint8), *(m.data for m in masks)]),
        )

    def take(self, rows: Array) -> "Masks":
        """The masks of the objects at ``rows`` (int64)."""
        parts = np.arange(len(self.part_offsets) - 1, dtype=np.int64)
        offsets, picked = take_ragged(self.offsets, parts, rows)
        part_offsets, data = take_ragged(self.part_offsets, self.data, picked)
        return Masks(kinds=np.asarray(self.kinds)[rows], offsets=offsets, part_offsets=part_offsets, data=data)

    def rle_sizes(self) -> tuple[Array, Array]:
        """The objects that have an RLE (K,) int64, and its height and width (K, 2) int32."""
        at = np.flatnonzero(np.asarray(self.kinds) == RLE)
        heads = np.asarray(self.part_offsets)[np.asarray(self.offsets)[at]]
        sizes = np.asarray(self.data)[heads[:, None] + np.arange(8)].view(np.int32)
        return at, sizes.reshape(-1, 2)

    def without(self, at: Array) -> "Masks":
        """The same objects; those at ``at`` (int64) have no mask."""
        none = Masks.none(1)
        order = np.arange(len(self))
        order[at] = len(self)
        return Masks.concatenate([self, none]).take(order)

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, i: int) -> Mask:
        kind = self.kinds[i]
        if kind == NO_MASK:
            return None
        ends = self.part_offsets[self.offsets[i] : self.offsets[i + 1] + 1].tolist()
        parts = [self.data[a:b] for a, b in itertools.pairwise(ends)]
        if kind == POLYGONS:
            return Polygons(tuple(part.view(np.float32).reshape(-1, 2) for part in parts))
        height, width = parts[0][:8].view(np.int32).tolist()
        return Rle((height, width), parts[0][8:].tobytes().rstrip(b"\0"))


PRESENT, ABSENT = 1, 2
"""What an image-level label says of a class."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Image-level labels by CSR over N images: which classes were checked, and what was found.

    Attributes:
        offsets: (N + 1,) int64.
        labels: (L,) int32, labels of the index's label space.
        states: (L,) int8, ``PRESENT`` or ``ABSENT``.
    """

    offsets: Array
    labels: Array
    states: Array


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a group of images came from.

    Attributes:
        name: a word for reports (the annotation file's or the folder's name).
        root: the folder that the images' names are relative to.
        split: "train", "val", ... or "".
        labelled: the names of the classes that this source labels in every image; None = all classes of the space.
    """

    name: str
    root: str
    split: str = ""
    labelled: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ImageBlock:
    """Columns of N images.

    Attributes:
        ids: (N,) int64, as in the source.
        names: (N,) file names relative to the source's root.
        widths, heights: (N,) int32 pixels after EXIF transposition; 0 where unknown.
        sources: (N,) int32 rows of the index's list of sources; None = all 0.
        normalised: (N,) bool, the image's boxes are shares of its unknown size; None = none is.
        orientations: (N,) uint8, the EXIF orientation 1 to 8; 0 where unknown. None = all unknown.
        hashes: (N,) uint64 of the file's bytes; 0 where unknown. None = all unknown.
        semantic: (N,) paths of semantic maps relative to the root, "" where there is none; None = none at all.
        verified: image-level labels; None = none given.
        columns: further columns by name: arrays (N, ...) or ``Strings``.
    """

    ids: Array
    names: Strings
    widths: Array
    heights: Array
    sources: Array | None = None
    normalised: Array | None = None
    orientations: Array | None = None
    hashes: Array | None = None
    semantic: Strings | None = None
    verified: Verified | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class ObjectBlock:
    """Columns of M objects, in any order of images; the order within an image is kept.

    Attributes:
        rows: (M,) integer, the image's row in the index.
        xyxy: (M, 4) float32.
        labels: (M,) integer, labels of the index's label space.
        flags, known_flags: (M,) uint16 bits (``FLAGS``); None = no flag is known.
        areas: (M,) float32, the source's area (of the mask where there is one); None = of the box.
        annotation_ids: (M,) int64, as in the source; None = 0.
        masks: M masks; None = no object has one.
        columns: further columns by name (height, vis_ratio, score, author): arrays (M, ...) or ``Strings``.
    """

    rows: Array
    xyxy: Array
    labels: Array
    flags: Array | None = None
    known_flags: Array | None = None
    areas: Array | None = None
    annotation_ids: Array | None = None
    masks: Masks | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def box_areas(xyxy: Array) -> Array:
    """Areas (M,) float32 of boxes (M, 4)."""
    areas: Array = ((xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])).astype(np.float32)
    return areas


def take_column(column: Column, rows: Array) -> Column:
    """The values of a column at ``rows``."""
    return column.take(rows) if isinstance(column, Strings) else column[rows]


@dataclass(frozen=True, kw_only=True)
class IssueBlock:
    """Many issues of one kind: ``what`` was done (``action``) to the annotations ``ids`` on the images ``rows``.

    Attributes:
        what, action: as in ``Issue``.
        rows: (K,) integer, the images' rows in the index.
        annotation_ids: (K,) int64.
    """

    what: str
    action: str
    rows: Array
    annotation_ids: Array

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One split of a data set as a reader found it, before any repair.

    Attributes:
        name: a word for reports: the annotation file's or the folder's name.
        split: "train", "val", ... or "".
        roots: folders that the pictures' names may be relative to, the likeliest first.
        label_space: the categories of the file.
        images: sizes are those that the annotations tell, 0 where they do not.
        objects: ``rows`` count ``images``; boxes may be of any kind (empty, inverted, NaN, beyond the border).
        normalised: boxes (float64 here) and ``rings`` are shares of the picture's width and height.
        rings: where normalised, one polygon (k, 2) float64 or None for each object; None = no object has one.
        issues: what the reader itself dropped.
        truth: what makes an image of use. "objects": nothing more, since one without objects is a negative; "class": it
            shows one class of the space and no other, the one that its image-level label names; "map": a semantic map.
        draw: for images whose semantic map the source keeps in another form than a PNG (and ``images.semantic`` is
            ""): the name of the image -> its map, uint8 (H, W): 0 background, 1 + label, 255 void. It raises DataError.
    """

    name: str
    split: str
    roots: tuple[Path, ...]
    label_space: LabelSpace
    images: ImageBlock
    objects: ObjectBlock
    normalised: bool = False
    rings: tuple[Array | None, ...] | None = None
    issues: tuple[Issue, ...] = ()
    truth: Literal["objects", "class", "map"] = "objects"
    draw: Callable[[str], Array] | None = None
