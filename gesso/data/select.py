"""Parts of an index as new indexes: ``subset`` by rows, ``split`` into train, val and test."""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gesso.data.blocks import take_images
from gesso.data.duplicates import DISTANCE, fingerprints, group_equal, group_near
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter, check_target
from gesso.data.narrowing import Narrowing
from gesso.data.partition import Holdings, Quota, assign, quota
from gesso.data.records import ImageBlock, ObjectBlock, take_column
from gesso.data.statistics import image_classes
from gesso.errors import DataError, InputError
from gesso.files import new_parents
from gesso.random_key import fold, stream

_SPLIT = stream("split")
_BLOCK = 1 << 15
_MAX_PIXELS = 100_000_000

Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a split: its name, folder, numbers of images and boxes, and the images with each class (C,)."""

    name: str
    path: Path
    images: int
    boxes: int
    images_by_class: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """What ``split`` made.

    Attributes:
        parts: in the order of the request.
        left_out: images in no part.
        duplicates: images with the content of another image.
        near_duplicates: further images that are nearly another image.
        largest_group: images in the largest group that had to stay together.
        notes: what the user should know, one line each.
    """

    parts: tuple[Part, ...]
    left_out: int
    duplicates: int
    near_duplicates: int
    largest_group: int
    notes: tuple[str, ...]


def subset(
    index: Index,
    out: str | Path,
    rows: npt.ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Index:
    """Writes a new index of some images of another; everything that belongs to them is kept, in the order of ``rows``.

    Annotation ids, flags with their known bits, masks, further columns, image-level labels, sources and the lines of
    the import report that name one of the images are kept; box ids are counted anew.

    Args:
        index: the index to take from.
        out: the folder of the new index.
        rows: integer (K,), rows of images, each at most once.
        classes: the classes that stay, in the order of the label space; the boxes and labels of all others go, and so
            do semantic maps, which number all classes. None keeps the label space whole.
        overwrite: replaces an index that stands there.

    Returns:
        The new index.

    Raises:
        InputError: a row does not exist or stands twice.
        DataError: a class does not exist; something else stands at ``out``, or it cannot be written.
    """
    wanted = np.asarray(rows, np.int64).reshape(-1)
    if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(index)):
        raise InputError(f"an image row is outside 0 to {len(index) - 1}", where=index.path)
    if len(np.unique(wanted)) != len(wanted):
        raise InputError("an image row stands twice", where=index.path, remedy="Name every row once.")
    narrowing = None if classes is None else Narrowing.of(index.label_space, classes)
    space = index.label_space if narrowing is None else narrowing.space
    sources = index.sources if narrowing is None else [narrowing.source(source) for source in index.sources]
    writer = IndexWriter(out, space, sources=sources, overwrite=overwrite)
    names: set[str] = set()
    for first in range(0, len(wanted), _BLOCK):
        some = wanted[first : first + _BLOCK]
        block = _images(index, some)
        names.update(block.names)
        first_row = writer.add_images(block if narrowing is None else narrowing.images(block))
        objects = _objects(index, some, first_row)
        writer.add_objects(objects if narrowing is None else narrowing.objects(objects))
    writer.add_issues(issue for issue in index.iter_issues() if issue.image in names)
    return Index.open(writer.finish())


def split(
    index: Index,
    out: str | Path,
    parts: Mapping[str, float | int] | None = None,
    *,
    seed: int = 0,
    near_duplicates: bool = True,
    distance: int = DISTANCE,
    balance: bool = True,
    keep: str | Path | None = None,
    progress: Progress | None = None,
) -> Split:
    """Splits an index into new indexes ``out/NAME``, by a hash of the image ids.

    Duplicates (by content hash) and near-duplicates (``gesso.data.duplicates``) stay together, and the classes are
    balanced (``gesso.data.partition``). The same index, parts and seed give the same split.

    When images are added to a data set later, an image stays in its part, but for the few that balancing moves and
    those near a border where numbers are asked for. Where none may change its part, name the earlier split as
    ``keep``; or give shares and ``balance=False``: then the hash alone decides.

    Args:
        index: the index to split.
        out: the folder that gets one index a part; other things in it stay.
        parts: name -> share of the images (float) or number of images (int). What is left becomes "train", unless a
            part has that name. None = {"train": 0.8, "val": 0.2}.
        seed: another seed, another split.
        near_duplicates: looks for near-duplicates too; needs the pictures, and about 1 ms for each.
        distance: bits in which the 64-bit hashes of near-duplicates may differ, 0 to 8.
        balance: balances the classes; False leaves every group where the hash put it.
        keep: the folder of an earlier split, whose images stay in the parts of the same names.
        progress: called with (pictures read, all pictures).

    Raises:
        ConfigError: the parts make no sense for this index.
        InputError: ``keep`` holds none of the parts.
        DataError: the index has no image, a part exists already or cannot be written.
    """
    if not len(index):
        raise DataError("there is no image to split", where=index.path)
    parts = {"train": 0.8, "val": 0.2} if parts is None else parts
    due = quota(parts, len(index))
    folders = [Path(out) / name for name in due.names]
    for folder in folders:
        check_target(folder.absolute(), overwrite=False, can_overwrite=False)
    notes: list[str] = []
    content = np.asarray(index.content_hashes)
    equal = group_equal(content, content != 0)
    if not (content != 0).all():
        notes.append(f"{int((content == 0).sum())} images have no content hash; their exact copies are not known")
    together = _near_groups(index, equal, distance, notes, progress) if near_duplicates else equal
    first, groups, sizes = np.unique(together, return_inverse=True, return_counts=True)
    pinned = np.full(len(index), -1, np.int64) if keep is None else _pinned(index, Path(keep), due.names)
    part = _assign(index, groups, sizes, parts=pinned, seed=seed, due=due, balance=balance, notes=notes)
    if sizes.max() > max(2, 0.05 * len(index)):
        notes.append(f"{sizes.max()} images are near-duplicates of one another and stay together")
    why = "groups stay together" if keep is None else "images stay in their earlier part, and groups together"
    notes += _unmet(parts, np.bincount(part, minlength=len(due.names)), due.names, why)
    made = _write_parts(index, due.names, folders, part)
    return Split(
        parts=made,
        left_out=int((part == len(made)).sum()),
        duplicates=len(index) - len(np.unique(equal)),
        near_duplicates=len(np.unique(equal)) - len(first),
        largest_group=int(sizes.max()),
        notes=tuple(notes),
    )


def _near_groups(index: Index, equal: Ints, distance: int, notes: list[str], progress: Progress | None) -> Ints:
    pixels = np.asarray(index.widths, np.int64) * index.heights
    paths: list[Path | None] = [
        index.image_path(row) if equal[row] == row and pixels[row] <= _MAX_PIXELS else None for row in range(len(index))
    ]
    prints = fingerprints(paths, progress=progress)
    unread = int((~prints.usable).sum()) - sum(path is None for path in paths)
    if unread:
        notes.append(f"{unread} pictures are without texture or cannot be read; their near-duplicates are not known")
    return group_near(equal, prints, distance=distance)


def _assign(
    index: Index, groups: Ints, sizes: Ints, *, parts: Ints, seed: int, due: Quota, balance: bool, notes: list[str]
) -> Ints:
    """The part of each image. ``parts``: the part that an image must be in, or -1."""
    rows, labels = image_classes(index)
    held = Holdings(sizes, groups[rows], labels, len(index.label_space))
    # A group stands where its member with the least id stands, so that a later copy of an old image changes nothing.
    ids = np.asarray(index.image_ids)
    order = np.lexsort((ids, groups))
    representative = ids[order][np.concatenate(([0], np.cumsum(sizes)[:-1]))]
    positions = _positions(representative, seed)
    pinned = np.full(len(sizes), -1, np.int64)
    fixed = np.flatnonzero(parts >= 0)[::-1]
    pinned[groups[fixed]] = parts[fixed]
    part = assign(due, positions, held, pinned=pinned, balance=balance)[groups]
    torn = np.flatnonzero((parts >= 0) & (parts != part))
    if len(torn):
        notes.append(f"{len(torn)} images stay in their earlier part, though a duplicate of theirs is in another")
        part[torn] = parts[torn]
    return np.asarray(part, np.int64)


def _unmet(parts: Mapping[str, float | int], counts: Ints, names: tuple[str, ...], why: str) -> list[str]:
    """A note for each number asked for that is not met, and for each part without images."""
    notes = []
    for name, count in zip(names, counts.tolist(), strict=False):
        wanted = parts.get(name, 0.0)
        if not isinstance(wanted, float) and count != wanted:
            notes.append(f"{name} has {count} images instead of {wanted}: {why}")
        elif not count:
            notes.append(f"{name} is empty: there are too few images, or {why}")
    return notes


def _positions(ids: Ints, seed: int) -> npt.NDArray[np.float64]:
    """The place in [0, 1) of each image id, with 53 bits."""
    high, low = fold(seed, _SPLIT, ids, 0), fold(seed, _SPLIT, ids, 1)
    return np.asarray(((high << 21) | (low >> 11)) * 2.0**-53, np.float64)


def _pinned(index: Index, keep: Path, names: tuple[str, ...]) -> Ints:
    """The part of an earlier split that each image stands in, -1 where it is in none; by image id."""
    pinned = np.full(len(index), -1, np.int64)
    found = [(number, keep / name) for number, name in enumerate(names) if (keep / name).is_dir()]
    if not found:
        listed = ", ".join(names)
        raise InputError(f"holds none of the parts {listed}", where=keep, remedy="Name the folder of a split.")
    for number, folder in found:
        pinned[np.isin(index.image_ids, Index.open(folder).image_ids)] = number
    return pinned


def _write_parts(index: Index, names: tuple[str, ...], folders: list[Path], part: Ints) -> tuple[Part, ...]:
    """Writes all parts or none."""
    made = []
    rows, labels = image_classes(index)
    with new_parents(folders[0]), contextlib.ExitStack() as undo:
        for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
            written = subset(index, folder, np.flatnonzero(part == number))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            counts = np.bincount(labels[part[rows] == number], minlength=len(index.label_space))
            made.append(
                Part(
                    name=name,
                    path=folder,
                    images=len(written),
                    boxes=written.num_boxes,
                    images_by_class=tuple(counts.tolist()),
                )
            )
        undo.pop_all()
    return tuple(made)


def _images(index: Index, rows: Ints) -> ImageBlock:
    whole = ImageBlock(
        ids=index.image_ids,
        names=index.names,
        widths=index.widths,
        heights=index.heights,
        sources=index.source_rows,
        normalised=index.normalised,
        orientations=index.orientations,
        hashes=index.content_hashes,
        semantic=index.semantic,
        verified=index.verified_columns,
        columns=index.image_columns,
    )
    return take_images(whole, rows)


def _objects(index: Index, rows: Ints, first: int) -> ObjectBlock:
    """The objects of the images ``rows``, which are the rows ``first`` and on of the new index."""
    starts, counts = index.offsets[rows], index.offsets[rows + 1] - index.offsets[rows]
    at = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
    return ObjectBlock(
        rows=np.repeat(np.arange(first, first + len(rows), dtype=np.int32), counts),
        xyxy=index.boxes[at],
        labels=index.labels[at],
        flags=index.flags[at],
        known_flags=index.known_flags[at],
        areas=index.areas[at],
        annotation_ids=index.annotation_ids[at],
        masks=None if index.mask_columns is None else index.mask_columns.take(at),
        columns={name: take_column(column, at) for name, column in index.object_columns.items()},
    )
