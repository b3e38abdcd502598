"""The repair rules of import, on columns: what cannot be a box is dropped, what leaves the picture is clipped.

Every case becomes a line of the report, one an annotation, by the first rule that takes it:

    box is not finite            a corner is NaN or infinite                               dropped
    box is inverted              x2 < x1 or y2 < y1                                        dropped
    box is empty                 x2 == x1 or y2 == y1                                      dropped
    box outside the picture      nothing is left after clipping                            dropped
    duplicate box                picture, category, flags, mask and all four corners (as   dropped
                                 clipped) equal an earlier one
    box beyond the border        a part is left                                            clipped

and beside these, for the masks of what is kept:

    mask is not of the picture's size    an RLE of another height or width                 mask dropped
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from gesso.data import rle
from gesso.data.blocks import take_objects
from gesso.data.records import (
    NO_MASK,
    Array,
    ImageBlock,
    IssueBlock,
    Mask,
    ObjectBlock,
    Polygons,
    Rle,
    box_areas,
)


class Repaired(NamedTuple):
    """What is left, and what was done."""

    objects: ObjectBlock
    issues: list[IssueBlock]


def repair(images: ImageBlock, objects: ObjectBlock) -> Repaired:
    """Applies the rules above; a picture of unknown size clips nothing, unless its boxes are normalised.

    Areas that the source does not give (NaN) become those of the masks, or of the boxes where there is none.
    """
    xyxy, rows = objects.xyxy, objects.rows
    numbers = objects.annotation_ids if objects.annotation_ids is not None else np.zeros(len(rows), np.int64)
    issues: list[IssueBlock] = []

    def note(what: str, action: str, at: Array) -> None:
        if len(at):
            issues.append(IssueBlock(what=what, action=action, rows=rows[at], annotation_ids=numbers[at]))

    finite = np.isfinite(xyxy).all(1)
    inverted = finite & ((xyxy[:, 2] < xyxy[:, 0]) | (xyxy[:, 3] < xyxy[:, 1]))
    empty = finite & ~inverted & ((xyxy[:, 2] == xyxy[:, 0]) | (xyxy[:, 3] == xyxy[:, 1]))
    note("box is not finite", "dropped", np.flatnonzero(~finite))
    note("box is inverted", "dropped", np.flatnonzero(inverted))
    note("box is empty", "dropped", np.flatnonzero(empty))
    keep = finite & ~inverted & ~empty
    clipped = _clip(images, rows, xyxy)
    outside = keep & ((clipped[:, 2] <= clipped[:, 0]) | (clipped[:, 3] <= clipped[:, 1]))
    note("box outside the picture", "dropped", np.flatnonzero(outside))
    keep &= ~outside
    beyond = (clipped != xyxy).any(1)
    objects = dataclasses.replace(objects, xyxy=clipped)
    copies = duplicates(objects, np.flatnonzero(keep))
    note("duplicate box", "dropped", copies)
    keep[copies] = False
    note("box beyond the border", "clipped", np.flatnonzero(keep & beyond))
    foreign = _foreign_masks(images, objects)
    note("mask is not of the picture's size", "mask dropped", foreign[keep[foreign]])
    if objects.masks is not None and len(foreign):
        objects = dataclasses.replace(objects, masks=objects.masks.without(foreign))
    if not keep.all():
        objects = take_objects(objects, np.flatnonzero(keep))
    return Repaired(dataclasses.replace(objects, areas=_areas(objects)), issues)


def _areas(objects: ObjectBlock) -> Array:
    """The areas (M,) float32 that the source gives; else of the mask, as COCO defines it; else of the box."""
    boxes = box_areas(objects.xyxy)
    areas = boxes if objects.areas is None else np.where(np.isfinite(objects.areas), objects.areas, boxes)
    if objects.masks is not None:
        unknown = np.ones(len(boxes), bool) if objects.areas is None else ~np.isfinite(objects.areas)
        areas = areas.copy()
        for k in np.flatnonzero(unknown & (np.asarray(objects.masks.kinds) != NO_MASK)).tolist():
            areas[k] = mask_area(objects.masks[k])
    return areas.astype(np.float32)


def mask_area(mask: Mask) -> float:
    """The area in pixels: of polygons that of their rings together, which must not overlap; 0 where there is none."""
    if isinstance(mask, Polygons):
        rings = (ring.astype(np.float64) for ring in mask.rings)
        return sum(
            abs(float(np.dot(r[:, 0], np.roll(r[:, 1], -1)) - np.dot(np.roll(r[:, 0], -1), r[:, 1]))) / 2 for r in rings
        )
    return float(rle.area(mask)) if isinstance(mask, Rle) else 0.0


def _foreign_masks(images: ImageBlock, objects: ObjectBlock) -> Array:
    """The objects (K,) int64 whose RLE has not the height and width of their picture, where these are known."""
    if objects.masks is None:
        return np.zeros(0, np.int64)
    at, sizes = objects.masks.rle_sizes()
    pictures = np.stack([images.heights, images.widths], 1)[objects.rows[at]]
    foreign: Array = at[(pictures > 0).all(1) & (pictures != sizes).any(1)]
    return foreign


def duplicates(objects: ObjectBlock, among: Array) -> Array:
    """The positions (ascending) of the objects ``among`` that equal an earlier one in all that repair compares."""
    rows, labels, masks = objects.rows, objects.labels, objects.masks
    flags = np.zeros(len(rows), np.uint16) if objects.flags is None else objects.flags
    words = np.ascontiguousarray(objects.xyxy[among] + np.float32(0)).view(np.uint32)  # + 0 makes -0.0 and 0.0 one
    hashes = _mix(rows[among].astype(np.uint64) << np.uint64(32) | labels[among].astype(np.uint64))
    for corner in range(4):
        hashes = _mix(hashes ^ words[:, corner])
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    del hashes
    groups = np.flatnonzero(ranked[1:] == ranked[:-1])
    if not len(groups):
        return np.zeros(0, np.int64)
    suspects = among[np.unique(order[np.concatenate([groups, groups + 1])])]
    seen = set()
    found = []
    for at in suspects.tolist():
        mask = b"" if masks is None else masks.take(np.array([at])).data.tobytes()
        key = (int(rows[at]), int(labels[at]), int(flags[at]), (objects.xyxy[at] + np.float32(0)).tobytes(), mask)
        if key in seen:
            found.append(at)
        seen.add(key)
    return np.array(found, np.int64)


def _mix(x: Array) -> Array:
    """One round of a 64-bit finaliser (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed


def _clip(images: ImageBlock, rows: Array, xyxy: Array) -> Array:
    """Boxes clipped to their pictures (M, 4)."""
    limits = np.stack([images.widths, images.heights], 1).astype(np.float32)
    limits[(limits <= 0).any(1)] = np.inf
    if images.normalised is not None:
        limits[images.normalised] = 1
    clipped = np.maximum(xyxy, np.float32(0))
    for corner in range(4):
        np.minimum(clipped[:, corner], limits[:, corner % 2][rows], out=clipped[:, corner])
    unknown = np.isinf(limits[:, 0])
    if unknown.any():
        at = unknown[rows]
        clipped[at] = xyxy[at]
    return clipped
