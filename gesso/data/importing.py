"""Import: a reader, the pictures' heads, the repair rules and the index writer, joined."""

import contextlib
import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gesso.data.blocks import take_images
from gesso.data.index_writer import IndexWriter, check_target
from gesso.data.joining import find_root, require_some, with_pictures
from gesso.data.maps import draw_maps, sound_maps
from gesso.data.readers.citypersons import read_citypersons
from gesso.data.readers.coco import read_coco
from gesso.data.readers.detect import Format, Found, choose, detect
from gesso.data.readers.flowers102 import read_flowers102
from gesso.data.readers.image_folder import read_image_folder
from gesso.data.readers.lvis import map_verdicts
from gesso.data.readers.masks import read_masks
from gesso.data.readers.sun397 import read_sun397
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


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import made.

    Attributes:
        path: the index; where the source holds several splits, the folder of their indexes.
        format: of the source.
        split: its name, or "".
        images, boxes, categories: counts; of all splits where there are several (the categories are one space).
        labels: image-level labels of classes that are present.
        maps: images with a semantic map.
        issues: number of cases in the report by kind.
        splits: one summary a split where there are several.
    """

    path: str
    format: str
    split: str
    images: int
    boxes: int
    categories: int
    labels: int = 0
    maps: int = 0
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
    draw: Callable[[str], Array] | None = None
    """As in ``Reading``: maps that are drawn beside the index when it is written."""

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
        format: "auto" or one of ``readers.detect.Format``.
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
        labels=sum(summary.labels for summary in summaries),
        maps=sum(summary.maps for summary in summaries),
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
    issues: list[Issue | IssueBlock] = list(reading.issues)
    block = _map_images(reading, label_space, issues)
    objects = dataclasses.replace(reading.objects, labels=_map_labels(reading, label_space))
    root = Path(images_root).absolute() if images_root is not None else find_root(reading, images=images)
    if images:
        if images_root is not None:
            require_some(reading, root)
        tell = _teller(progress, "pictures", len(block))
        kept, objects, block = with_pictures(block, objects, root, issues, hash_images=hash_images, progress=tell)
        rings = None if reading.rings is None else [reading.rings[k] for k in kept.tolist()]
        required = reading.truth == "map" and reading.draw is None
        tell = _teller(progress, "pictures", len(block))
        block, faults = sound_maps(block, root, len(label_space), required=required, progress=tell)
        issues.extend(faults)
        if required:
            block = _with_maps(block)
    else:
        rings = None if reading.rings is None else list(reading.rings)
        if reading.normalised:
            block = dataclasses.replace(block, normalised=np.ones(len(block), np.bool_))
    if reading.normalised:
        objects = _scale(objects, block, rings)
    objects, found = repair(block, objects)
    # Where images tell which classes were checked, no class is verified but by their own word.
    by_image = block.verified is not None and reading.truth != "class"
    return Examined(
        format=format,
        split=reading.split,
        label_space=label_space,
        source=Source(name=reading.name, root=str(root), split=reading.split, labelled=() if by_image else None),
        images=block,
        objects=objects,
        issues=(*issues, *found),
        draw=reading.draw,
    )


def _teller(progress: Progress | None, stage: str, total: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(stage, done, total)


_READERS: Mapping[Format, Callable[..., Reading]] = {
    "coco": read_coco,
    "voc": read_voc,
    "yolo": read_yolo,
    "citypersons": read_citypersons,
    "sun397": read_sun397,
    "flowers102": read_flowers102,
    "masks": read_masks,
    "folder": read_image_folder,
}


def _read(found: Found, progress: Progress | None) -> Reading:
    total = found.path.stat().st_size if found.format == "coco" else 0
    return _READERS[found.format](found.path, split=found.split, progress=_teller(progress, "annotations", total))


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
    _require_all(reading.objects.labels, targets, reading, space, "boxes")
    return targets[reading.objects.labels] if len(targets) else reading.objects.labels


def _require_all(labels: Array, targets: Array, reading: Reading, space: LabelSpace, what: str) -> None:
    """DataError where a label has no place in the label space that was given."""
    lost = np.flatnonzero(targets[labels] < 0) if len(targets) else np.zeros(0, np.int64)
    if len(lost):
        name = reading.label_space.names[labels[lost[0]]]
        told = f"the category '{name}' ({len(lost)} {what} in all) is not in the label space that was given"
        raise DataError(told, where=reading.name, remedy=nearest(name, space.names))


def _map_images(reading: Reading, space: LabelSpace, issues: list[Issue | IssueBlock]) -> ImageBlock:
    """The images with their labels in another space. Maps keep their numbers, so there they lose their meaning."""
    block = reading.images
    if space is reading.label_space:
        return block
    targets = np.array(reading.label_space.map_to(space).targets, np.int32)
    if block.verified is not None:
        if reading.truth == "class":
            _require_all(block.verified.labels, targets, reading, space, "pictures")
        block = dataclasses.replace(block, verified=map_verdicts(block.verified, targets))
    if block.semantic is None or not any(block.semantic) or np.array_equal(targets, np.arange(len(targets))):
        return block
    what = "semantic maps are numbered by other classes"
    if reading.truth == "map":
        remedy = "Import it without another label space."
        raise DataError(f"the {what} than the label space that was given", where=reading.name, remedy=remedy)
    issues.append(Issue("", None, what, "maps left out", "the order of the classes is another than in the source"))
    return dataclasses.replace(block, semantic=None)


def _with_maps(images: ImageBlock) -> ImageBlock:
    """The images that have a semantic map; of the others, the issue is told already."""
    found = [] if images.semantic is None else [row for row, name in enumerate(images.semantic) if name]
    return images if len(found) == len(images) else take_images(images, np.array(found, np.int64))


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
            new = [place for place in (target, _maps_beside(target)) if not place.exists()]
            summaries.append(_write(examined.pop(0), target, overwrite=overwrite))
            for place in new:
                undo.callback(shutil.rmtree, place, ignore_errors=True)
        undo.pop_all()
    return summaries


def _maps_beside(out: Path) -> Path:
    """The folder of the maps that are drawn for the index ``out``."""
    return out.absolute().with_name(f"{out.name}.maps")


def _write(examined: Examined, out: Path, *, overwrite: bool) -> ImportSummary:
    if examined.draw is None:
        return _write_index(examined, out, overwrite=overwrite)
    root, folder, existed = Path(examined.source.root), _maps_beside(out), _maps_beside(out).exists()
    classes = len(examined.label_space)
    block, issues = draw_maps(examined.images, examined.draw, root, folder, classes, overwrite=overwrite)
    try:
        drawn = dataclasses.replace(examined, images=_with_maps(block), issues=(*examined.issues, *issues))
        return _write_index(drawn, out, overwrite=overwrite)
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_index(examined: Examined, out: Path, *, overwrite: bool) -> ImportSummary:
    writer = IndexWriter(out, examined.label_space, sources=[examined.source], overwrite=overwrite)
    writer.add_images(examined.images)
    writer.add_objects(examined.objects)
    writer.add_issues(examined.issues)
    writer.finish()
    verified, semantic = examined.images.verified, examined.images.semantic
    return ImportSummary(
        path=str(out),
        format=examined.format,
        split=examined.split,
        images=len(examined.images),
        boxes=len(examined.objects),
        categories=len(examined.label_space),
        labels=0 if verified is None else int((verified.states == 1).sum()),
        maps=0 if semantic is None else sum(map(bool, semantic)),
        issues=examined.count_issues(),
    )
