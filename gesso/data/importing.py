"""Import: a reader, the pictures' heads, the repair rules and the index writer, joined."""

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gesso.data.blocks import take_images, take_objects
from gesso.data.index_writer import IndexWriter, check_target
from gesso.data.orientation import turn_objects
from gesso.data.pictures import Header, read_headers
from gesso.data.readers.coco import read_coco
from gesso.data.readers.detect import Found, choose, detect
from gesso.data.readers.lvis import map_verdicts
from gesso.data.readers.voc import read_voc
from gesso.data.readers.yolo import read_yolo
from gesso.data.records import Array, ImageBlock, Issue, IssueBlock, Masks, ObjectBlock, Polygons, Reading, Source
from gesso.data.repair import repair
from gesso.errors import DataError, nearest
from gesso.label_space import LabelSpace, normalise
from gesso.log import get_logger

log = get_logger(__name__)

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the stage ("annotations" in bytes or files, "pictures"), what is done, and the total (0 = unknown)."""

TURNED = "picture has an EXIF orientation"
TURNED_UNTOLD = "picture has an EXIF orientation, and no size tells whether boxes were drawn upright"

_SAMPLE = 200


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import made.

    Attributes:
        path: the index; where the source holds several splits, the folder of their indexes.
        format: of the source.
        split: its name, or "".
        images, boxes, categories: counts; of all splits where there are several (the categories are one space).
        issues: number of cases in the report by kind.
        splits: one summary a split where there are several.
    """

    path: str
    format: str
    split: str
    images: int
    boxes: int
    categories: int
    issues: Mapping[str, int] = field(default_factory=dict)
    splits: tuple["ImportSummary", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Examined:
    """One split after all repairs: what an index of it would hold."""

    format: str
    split: str
    label_space: LabelSpace
    source: Source
    images: ImageBlock
    objects: ObjectBlock
    issues: tuple[Issue | IssueBlock, ...]

    def count_issues(self) -> dict[str, int]:
        """Number of cases by kind."""
        counts: Counter[str] = Counter()
        for issue in self.issues:
            counts[issue.what] += len(issue) if isinstance(issue, IssueBlock) else 1
        return dict(counts)


def import_data(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    images_root: str | Path | None = None,
    images: bool = True,
    label_space: LabelSpace | None = None,
    overwrite: bool = False,
    hash_images: bool = True,
    progress: Progress | None = None,
) -> ImportSummary:
    """Imports a data set as an index.

    A source with several splits becomes one index a split, OUT/train, OUT/val and so on, with one label space, unless
    ``split`` names one of them.

    Args:
        source: a folder or an annotation file.
        out: the folder to make.
        format: "auto", "coco", "voc" or "yolo".
        split: the one split to import, to ``out`` itself.
        images_root: the folder that file names are relative to; found by trying the usual places where None.
        images: reads the pictures' heads: sizes come from them, missing and broken pictures are kept aside. Without,
            everything is taken from the annotations.
        label_space: categories are joined by name to this space instead of the source's own.
        overwrite: replaces an index that stands at ``out``.
        hash_images: reads whole picture files for their content hash, which also finds those that are cut off.
        progress: told how far it is.

    Raises:
        DataError: the source cannot be read, names an unknown category, none of its pictures is found, or ``out`` is
            taken.
        InputError: the disk is full.
    """
    out = Path(out)
    found = choose(detect(source, format), split, source)
    targets = [out / one.split for one in found] if len(found) > 1 else [out]
    for target in targets:
        check_target(target.absolute(), overwrite=overwrite)
    readings = [_read(one, progress) for one in found]
    space = label_space or _common_space([reading.label_space for reading in readings])
    examined = [
        examine(
            readings.pop(0),
            space,
            format=one.format,
            images_root=images_root,
            images=images,
            hash_images=hash_images,
            progress=progress,
        )
        for one in found
    ]
    summaries = _write_all(examined, targets, overwrite=overwrite)
    if len(summaries) == 1:
        return summaries[0]
    issues: Counter[str] = Counter()
    for summary in summaries:
        issues.update(summary.issues)
    return ImportSummary(
        path=str(out),
        format=found[0].format,
        split="",
        images=sum(summary.images for summary in summaries),
        boxes=sum(summary.boxes for summary in summaries),
        categories=len(space),
        issues=dict(issues),
        splits=tuple(summaries),
    )


def examine(
    reading: Reading,
    label_space: LabelSpace,
    *,
    format: str,
    images_root: str | Path | None = None,
    images: bool = True,
    hash_images: bool = True,
    progress: Progress | None = None,
) -> Examined:
    """Applies everything that import does to one split, and writes nothing. Arguments as in ``import_data``."""
    block = _map_verified(reading, label_space)
    objects = dataclasses.replace(reading.objects, labels=_map_labels(reading, label_space))
    issues: list[Issue | IssueBlock] = list(reading.issues)
    root = Path(images_root).absolute() if images_root is not None else _find_root(reading, images=images)
    if images:
        if images_root is not None:
            _require_some(reading, root)
        kept, objects, block = _with_pictures(block, objects, root, issues, hash_images=hash_images, progress=progress)
        rings = None if reading.rings is None else [reading.rings[k] for k in kept.tolist()]
    else:
        rings = None if reading.rings is None else list(reading.rings)
        if reading.normalised:
            block = dataclasses.replace(block, normalised=np.ones(len(block), np.bool_))
    if reading.normalised:
        objects = _scale(objects, block, rings)
    objects, found = repair(block, objects)
    return Examined(
        format=format,
        split=reading.split,
        label_space=label_space,
        # Where images tell which classes were checked, no class is verified but by their own word.
        source=Source(
            name=reading.name, root=str(root), split=reading.split, labelled=None if block.verified is None else ()
        ),
        images=block,
        objects=objects,
        issues=(*issues, *found),
    )


def _read(found: Found, progress: Progress | None) -> Reading:
    def tell(total: int) -> Callable[[int], None] | None:
        return None if progress is None else lambda done: progress("annotations", done, total)

    if found.format == "coco":
        return read_coco(found.path, split=found.split, progress=tell(found.path.stat().st_size))
    reader = read_voc if found.format == "voc" else read_yolo
    return reader(found.path, split=found.split, progress=tell(0))


def _common_space(spaces: Sequence[LabelSpace]) -> LabelSpace:
    """The first space where all have the same names; else the union, in the order of first mention."""
    first = spaces[0]
    names = {normalise(name): name for space in reversed(spaces) for name in space.names}
    if all({normalise(name) for name in space.names} == names.keys() for space in spaces):
        return first
    ordered = dict.fromkeys(normalise(name) for space in spaces for name in space.names)
    rows = [
        row for space in reversed(spaces) for row in zip(space.names, space.supercategories, space.ids, strict=True)
    ]
    above = {normalise(name): supercategory for name, supercategory, _ in rows}
    ids = {normalise(name): number for name, _, number in rows}
    if len(set(ids.values())) < len(ids):
        log.warning("the splits give different categories one id, so the ids are counted anew")
        ids = {key: number for number, key in enumerate(ordered, start=1)}
    return LabelSpace(
        names=tuple(names[key] for key in ordered),
        supercategories=tuple(above[key] for key in ordered),
        ids=tuple(ids[key] for key in ordered),
    )


def _map_labels(reading: Reading, space: LabelSpace) -> Array:
    if space is reading.label_space:
        return reading.objects.labels
    targets = np.array(reading.label_space.map_to(space).targets, np.int32)
    labels = targets[reading.objects.labels] if len(targets) else reading.objects.labels
    lost = np.flatnonzero(labels < 0)
    if len(lost):
        name = reading.label_space.names[reading.objects.labels[lost[0]]]
        what = f"the category '{name}' ({len(lost)} boxes in all) is not in the label space that was given"
        raise DataError(what, where=reading.name, remedy=nearest(name, space.names))
    return labels


def _map_verified(reading: Reading, space: LabelSpace) -> ImageBlock:
    verified = reading.images.verified
    if verified is None or space is reading.label_space:
        return reading.images
    targets = np.array(reading.label_space.map_to(space).targets, np.int32)
    return dataclasses.replace(reading.images, verified=map_verdicts(verified, targets))


def _find_root(reading: Reading, *, images: bool) -> Path:
    """The likely folder where most of a sample of the pictures stand."""
    names = reading.images.names
    sample = [names[i] for i in np.linspace(0, len(names) - 1, min(len(names), _SAMPLE)).astype(int)]
    counts = {root: sum((root / name).is_file() for name in sample if name) for root in reading.roots}
    best = max(reading.roots, key=lambda root: counts[root])
    if images and sample and not counts[best]:
        raise _no_pictures(sample[0], reading.roots)
    return best


def _require_some(reading: Reading, root: Path) -> None:
    if not root.is_dir():
        raise DataError("the folder of the pictures does not exist", where=root, remedy="Check --images-root.")
    names = reading.images.names
    if len(names) and not any((root / name).is_file() for name in names):
        raise _no_pictures(names[0], (root,))


def _no_pictures(name: str, roots: Iterable[Path]) -> DataError:
    remedy = "Name their folder with --images-root, or import the annotations alone with --no-images."
    places = ", ".join(str(root) for root in roots)
    return DataError(f"none of the pictures was found (such as '{name}') in {places}", remedy=remedy)


def _with_pictures(
    block: ImageBlock,
    objects: ObjectBlock,
    root: Path,
    issues: list[Issue | IssueBlock],
    *,
    hash_images: bool,
    progress: Progress | None,
) -> tuple[Array, ObjectBlock, ImageBlock]:
    """Takes sizes, orientations and hashes from the pictures; leaves out those that cannot be used.

    Returns the positions of the objects that stay, these objects, and the images.
    """
    total = len(block)
    tell = None if progress is None else lambda done: progress("pictures", done, total)
    paths = (root / name for name in block.names)
    stored = np.zeros((total, 2), np.int32)
    orientations, hashes = np.ones(total, np.uint8), np.zeros(total, np.uint64)
    good = np.ones(total, bool)
    counts = np.bincount(objects.rows, minlength=total) if total else np.zeros(0, np.int64)
    turned = np.zeros(total, np.uint8)
    for row, header in enumerate(read_headers(paths, content_hash=hash_images, progress=tell)):
        stored[row] = header.width, header.height
        orientations[row], hashes[row] = header.orientation, header.content_hash
        good[row] = not header.problem
        annotated = (int(block.widths[row]), int(block.heights[row]))
        case, turn = _compare(block.names, row, header, annotated, int(counts[row]))
        issues.extend(case)
        turned[row] = turn
    objects = turn_objects(objects, stored, turned)
    swapped = orientations >= 5
    kept = np.flatnonzero(good)
    block = dataclasses.replace(
        block,
        widths=np.where(swapped, stored[:, 1], stored[:, 0]),
        heights=np.where(swapped, stored[:, 0], stored[:, 1]),
        orientations=orientations,
        hashes=hashes,
    )
    if good.all():
        return np.arange(len(objects)), objects, block
    stay = np.flatnonzero(good[objects.rows])
    new_rows = np.cumsum(good) - 1
    objects = take_objects(objects, stay)
    return stay, dataclasses.replace(objects, rows=new_rows[objects.rows].astype(np.int32)), take_images(block, kept)


def _compare(
    names: Sequence[str], row: int, header: Header, annotated: tuple[int, int], boxes: int
) -> tuple[list[Issue], int]:
    """The issues of one picture, and the orientation by which its boxes must be turned (0 = as they are).

    The loader shows every picture upright (EXIF transposed). Boxes drawn on the stored pixels, which the annotated
    size tells where the two sizes differ, are turned along; all others are taken as drawn on the upright picture. Where
    nothing tells (no annotated size; mirrored, half turned or square pictures), that is an issue of its own.
    """
    if header.problem:
        return [Issue(names[row], None, header.problem, "kept aside", f"{header.detail}; {boxes} boxes")], 0
    stored, upright = (header.width, header.height), header.transposed
    found = []
    turn = 0
    if header.orientation > 1:
        turn = header.orientation if annotated == stored != upright else 0
        action = "picture and boxes turned" if turn else "picture turned, boxes taken as they are"
        told = stored != upright and annotated in (stored, upright)
        what = TURNED if told or not boxes else TURNED_UNTOLD
        found.append(Issue(names[row], None, what, action, f"orientation {header.orientation}"))
    if all(annotated) and annotated not in (stored, upright):
        detail = f"{annotated[0]} x {annotated[1]} in the annotations, {upright[0]} x {upright[1]} in the file"
        found.append(Issue(names[row], None, "picture has another size", "size of the file taken", detail))
    return found, turn


def _scale(objects: ObjectBlock, images: ImageBlock, rings: Sequence[Array | None] | None) -> ObjectBlock:
    """Shares of the size to pixels in float64, then float32; where no size is known, shares stay shares."""
    sizes = np.stack([images.widths, images.heights], 1).astype(np.float64)
    sizes[(sizes <= 0).any(1)] = 1
    xyxy = (objects.xyxy * np.tile(sizes[objects.rows], 2)).astype(np.float32)
    masks = objects.masks
    if rings is not None:
        scaled = (
            None if ring is None else Polygons(((ring * sizes[row]).astype(np.float32),))
            for ring, row in zip(rings, objects.rows.tolist(), strict=True)
        )
        masks = Masks.of(list(scaled))
    return dataclasses.replace(objects, xyxy=xyxy, masks=masks)


def _write_all(examined: list[Examined], targets: Sequence[Path], *, overwrite: bool) -> list[ImportSummary]:
    """Writes every split, or none that was not there before; ``examined`` is emptied on the way, to free memory."""
    summaries = []
    with contextlib.ExitStack() as undo:
        for target in targets:
            existed = target.exists()
            summaries.append(_write(examined.pop(0), target, overwrite=overwrite))
            if not existed:
                undo.callback(shutil.rmtree, target, ignore_errors=True)
        undo.pop_all()
    return summaries


def _write(examined: Examined, out: Path, *, overwrite: bool) -> ImportSummary:
    writer = IndexWriter(out, examined.label_space, sources=[examined.source], overwrite=overwrite)
    writer.add_images(examined.images)
    writer.add_objects(examined.objects)
    writer.add_issues(examined.issues)
    writer.finish()
    return ImportSummary(
        path=str(out),
        format=examined.format,
        split=examined.split,
        images=len(examined.images),
        boxes=len(examined.objects),
        categories=len(examined.label_space),
        issues=examined.count_issues(),
    )
