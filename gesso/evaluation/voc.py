"""PASCAL VOC's average precision.

Definition: the VOC2012 development kit, section 3.4.1 (all points) and The PASCAL Visual Object Classes Challenge,
IJCV 2010, section 4.2 (11 points), as the kit's MATLAB code does it: a box is x, y, x + w, y + h in inclusive pixels,
so its width is w + 1; a detection takes the object of its class with the highest IoU, difficult ones included, and no
second best; it is right where that IoU is at least the threshold and no detection with a higher score took the object.
(Boxes that end behind their last pixel, as those of an index do, count as one pixel wider and higher than in the kit.)
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from gesso.data.index import Index
from gesso.data.records import Array
from gesso.errors import ConfigError, nearest
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import GroundTruth
from gesso.evaluation.matching import Boxes, Pair, falling, load_pair, overlapping

Points = Literal["all", "11"]
_RIGHT, _WRONG, _NEITHER = 1, 0, -1


def score_voc(
    ground_truth: str | Path | Index | GroundTruth,
    detections: str | Path | DetectionTable,
    *,
    iou: float = 0.5,
    points: Points = "all",
    inclusive: bool = True,
) -> dict[str, Any]:
    """VOC's AP of each class and their mean.

    Objects with the field ``difficult`` need not be found, and a detection that takes one counts for nothing;
    ``iscrowd`` and ``ignore`` count for nothing. Among equal scores the image with the lower id goes first, then the
    place in the file.

    Args:
        ground_truth: a COCO file, an index (its folder, or open), or columns with details.
        detections: a COCO results file, Parquet, or a table whose labels are in the ground truth's order.
        iou: the least IoU of a right detection, in (0, 1].
        points: "all", the area under the curve made falling (VOC2010 and later), or "11", the mean of the highest
            precision at recalls of at least 0, 0.1, ..., 1 (VOC2007).
        inclusive: both corners of a box are the numbers of pixels in it, as in VOC's own files, so that it is one pixel
            wider than x2 - x1. False where boxes end behind their last pixel, as those of an index and of our
            detectors do: with these the IoU is that of VOC's kit.

    Returns:
        ``mAP``, the mean over the classes with an object that is not difficult, in [0, 1]; None where there is no such
        class. ``by_class``: name -> AP in the order of the labels, or None. Names that stand twice carry their
        category id.

    Raises:
        DataError: a file is wrong, or a detection is on an image that the ground truth does not have.
        ConfigError: ``iou`` or ``points`` is none that is known.
    """
    if not 0 < iou <= 1:
        raise ConfigError(f"the IoU must lie above 0 and be at most 1, found {iou}")
    if points not in ("all", "11"):
        raise ConfigError(f"unknown points '{points}'", remedy=nearest(str(points), ("all", "11")))
    pair = load_pair(ground_truth, detections)
    order = falling(pair.table.score, pair.rows)
    order = order[np.argsort(pair.table.label[order], kind="stable")]
    outcomes = _outcomes(pair, order, iou, inclusive)[order]
    positives = np.bincount(pair.truth.labels[~pair.details.difficult], minlength=len(pair.truth.names))
    ends = np.cumsum(np.bincount(pair.table.label, minlength=len(pair.truth.names)))
    average = _all_points if points == "all" else _eleven_points
    by_class: dict[str, float | None] = {}
    for label, name in enumerate(pair.truth.unique_names()):
        of_class = outcomes[ends[label - 1] if label else 0 : ends[label]]
        by_class[name] = average(*_curve(of_class, positives[label])) if positives[label] else None
    known = [value for value in by_class.values() if value is not None]
    return {"mAP": float(np.mean(known)) if known else None, "by_class": by_class}


def _outcomes(pair: Pair, order: Array, iou: float, inclusive: bool) -> Array:
    """(D,) whether each detection is right, wrong, or neither; in ``order`` scores fall within each class."""
    truth, table, classes = pair.truth, pair.table, len(pair.truth.names)
    xywh = truth.xywh
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    found = _boxes(table.xyxy, pair.rows * classes + table.label, inclusive)
    wanted = _boxes(corners, truth.rows * classes + truth.labels, inclusive)
    detections, objects, overlaps = overlapping(found, wanted, iou)
    best = np.lexsort((objects, -overlaps, detections))
    detections, first = np.unique(detections[best], return_index=True)
    objects = objects[best][first]
    outcomes = np.full(len(table), _WRONG, np.int8)
    difficult = pair.details.difficult[objects]
    outcomes[detections[difficult]] = _NEITHER
    places = np.empty(len(table), np.int64)
    places[order] = np.arange(len(table))
    detections, objects = detections[~difficult], objects[~difficult]
    by_place = np.argsort(places[detections])
    _, first = np.unique(objects[by_place], return_index=True)
    outcomes[detections[by_place[first]]] = _RIGHT
    return outcomes


def _boxes(xyxy: Array, groups: Array, inclusive: bool) -> Boxes:
    outer = xyxy + np.array([0.0, 0.0, 1.0, 1.0]) if inclusive else xyxy
    return Boxes(xyxy=outer, areas=(outer[:, 2:] - outer[:, :2]).prod(1), groups=groups)


def _curve(outcomes: Array, positives: int) -> tuple[Array, Array]:
    """Recall and precision (k,) after each detection that is right or wrong, by falling score."""
    right = np.cumsum(outcomes[outcomes != _NEITHER] == _RIGHT)
    return right / positives, right / np.arange(1, len(right) + 1)


def _all_points(recall: Array, precision: Array) -> float:
    if not len(recall):
        return 0.0
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * highest))


def _eleven_points(recall: Array, precision: Array) -> float:
    # The kit's thresholds are these floats: a recall of exactly 0.3 does not reach 0.30000000000000004.
    return float(np.mean([precision[recall >= t].max(initial=0.0) for t in np.arange(0.0, 1.1, 0.1)]))
