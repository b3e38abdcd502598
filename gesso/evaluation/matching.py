"""Which detections overlap which objects: what VOC's AP and the miss rate share. (COCO's metrics have hotcoco.)

D detections and M objects of a whole data set are compared at once, group by group (an image, or an image and class),
and only the pairs that overlap enough are kept: what a metric does with them is then a matter of thousands of numbers.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gesso.data.index import Index
from gesso.data.records import Array
from gesso.errors import DataError
from gesso.evaluation.detection_files import read_detections
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import Details, GroundTruth, load_ground_truth

_PAIRS_AT_ONCE = 1 << 21


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes:
    """Columns of boxes.

    Attributes:
        xyxy: (n, 4) float64 pixels; x2 and y2 lie outside, so an integer pixel's box is one wide.
        areas: (n,) float64.
        groups: (n,) int64: a detection is compared with the objects of its own group.
    """

    xyxy: Array
    areas: Array
    groups: Array


def overlapping(found: Boxes, truth: Boxes, minimum: float, shares: Array | None = None) -> tuple[Array, Array, Array]:
    """The pairs of a detection and an object of the same group that overlap by at least ``minimum`` > 0.

    Args:
        found: D detections.
        truth: M objects.
        minimum: the least overlap.
        shares: (M,) bool: the overlap with these objects is the intersection over the detection's area (IoA);
            with all others it is the IoU.

    Returns:
        Detections (P,) int64, objects (P,) int64 and overlaps (P,) float64, ordered by detection, then object.
    """
    by_group = np.argsort(truth.groups, kind="stable")
    groups = truth.groups[by_group]
    starts = np.searchsorted(groups, found.groups, side="left")
    counts = np.searchsorted(groups, found.groups, side="right") - starts
    shares = np.zeros(len(groups), bool) if shares is None else shares
    kept = []
    for low, high in _blocks(counts):
        rows = np.repeat(np.arange(low, high), counts[low:high])
        first = np.repeat(np.cumsum(counts[low:high]) - counts[low:high], counts[low:high])
        objects = by_group[starts[rows] + np.arange(len(rows)) - first]
        a, b = found.xyxy[rows], truth.xyxy[objects]
        sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        near = np.flatnonzero((sides > 0).all(1))
        rows, objects, inner = rows[near], objects[near], sides[near].prod(1)
        union = found.areas[rows] + truth.areas[objects] - inner
        overlap = inner / np.where(shares[objects], found.areas[rows], union)
        enough = overlap >= minimum
        kept.append((rows[enough], objects[enough], overlap[enough]))
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    detections, matched, overlaps = (np.concatenate(columns) for columns in zip(none, *kept, strict=True))
    return detections, matched, overlaps


def _blocks(counts: Array) -> list[tuple[int, int]]:
    """Ranges of detections with about ``_PAIRS_AT_ONCE`` pairs each, so that the memory does not grow with the data."""
    ends = np.cumsum(counts)
    marks = np.arange(_PAIRS_AT_ONCE, ends[-1] if len(ends) else 0, _PAIRS_AT_ONCE)
    cuts = np.unique(np.concatenate([[0], np.searchsorted(ends, marks), [len(counts)]]))
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


def falling(scores: Array, rows: Array) -> Array:
    """The order (D,) of detections by falling score; among equal scores by image ``rows`` (D,), then as they stand."""
    order: Array = np.lexsort((rows, -scores))
    return order


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A ground truth with its details, and the detections on it.

    Attributes:
        truth: the ground truth.
        details: of ``truth``.
        table: the detections; every label and image is one of ``truth``.
        rows: (D,) int64, the image of each detection as a row of ``truth.image_ids``.
    """

    truth: GroundTruth
    details: Details
    table: DetectionTable
    rows: Array


def load_pair(ground_truth: str | Path | Index | GroundTruth, detections: str | Path | DetectionTable) -> Pair:
    """Reads what a metric compares; see ``load_ground_truth`` and ``read_detections``.

    Raises:
        DataError: a file is wrong, or a detection is on an image that the ground truth does not have, of a label that
            it does not have, or not finite.
    """
    truth = load_ground_truth(ground_truth, details=True)
    assert truth.details is not None, "details were asked for"
    where = "detections" if isinstance(detections, DetectionTable) else str(detections)
    table = detections if isinstance(detections, DetectionTable) else read_detections(detections, truth.category_ids)
    bad = ~np.isfinite(table.score) | ~np.isfinite(table.xyxy).all(1)
    if bad.any():
        what = f"the score or box of result {int(np.argmax(bad))} (counted from 0) is not finite"
        raise DataError(what, where=where, remedy="Leave such detections out.")
    classes = len(truth.names)
    if len(table) and not (table.label.min() >= 0 and table.label.max() < classes):
        what = f"a detection has the label {table.label.max()}, but {truth.where} has {classes} classes"
        raise DataError(what, where=where, remedy="Map the labels by name first (DetectionTable.map_labels).")
    return Pair(truth=truth, details=truth.details, table=table, rows=truth.rows_of(table.image_id, where=where))
