"""The log-average miss rate of pedestrian detectors (CityPersons, Caltech).

Definition: Dollar et al., Pedestrian Detection: An Evaluation of the State of the Art, PAMI 2012, section 4, with the
subsets and details of CityPersons' evaluation code (eval_MR_multisetup.py): the mean of the logarithm of the miss rate
at nine numbers of false positives per image (FPPI) between 0.01 and 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gesso.data.index import Index
from gesso.data.records import Array
from gesso.errors import ConfigError, DataError, nearest
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import Details, GroundTruth
from gesso.evaluation.matching import Boxes, Pair, falling, load_pair, overlapping
from gesso.label_space import normalise

Subset = Literal["reasonable", "reasonable_small", "heavy", "all"]
FPPI = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)
"""The nine points, with the four digits of the evaluation code."""
CATEGORIES = ("pedestrian", "person")
"""The names of the category that is scored, the first that the ground truth has."""
_IOU = 0.5
_MAX_DETECTIONS = 1000
_EXPANSION = 1.25
_LEAST_MISS = 1e-10


class Ranges(NamedTuple):
    """The objects of a subset: heights in pixels and visible shares, both ends included."""

    heights: tuple[float, float]
    vis_ratios: tuple[float, float]


SUBSETS: Mapping[str, Ranges] = {
    "reasonable": Ranges((50.0, np.inf), (0.65, np.inf)),
    "reasonable_small": Ranges((50.0, 75.0), (0.65, np.inf)),
    "heavy": Ranges((50.0, np.inf), (0.2, 0.65)),
    "all": Ranges((20.0, np.inf), (0.2, np.inf)),
}


def score_miss_rate(
    ground_truth: str | Path | Index | GroundTruth,
    detections: str | Path | DetectionTable,
    *,
    subset: Subset = "reasonable",
    citypersons_compat: bool = False,
) -> dict[str, Any]:
    """The log-average miss rate and the recall at each of the nine points, as fractions, not in percent.

    Only the category ``pedestrian`` (else ``person``, else the only one) is scored. Objects with ``ignore`` or
    ``iscrowd`` and objects outside the subset are ignored: they need not be found, and a detection of which half lies
    in one counts for nothing, unless it finds another object. Detections of a height outside the subset's range
    widened by 1.25 are left out, after the 1,000 best of each image are taken.

    Args:
        ground_truth: a COCO file, an index (its folder, or open), or columns with details. ``height`` is that of the
            whole body (the box's where missing); every object that is not ignored needs its ``vis_ratio``.
        detections: a COCO results file, Parquet, or a table whose labels are in the ground truth's order.
        subset: which objects count, see ``SUBSETS``.
        citypersons_compat: follow CityPersons' code where it differs from Caltech's: at a point with fewer FPPI than
            the first detection has, it takes the recall of all detections instead of 0, and a recall of 1 at any point
            makes the miss rate 0 instead of counting as a miss of 1e-10.

    Returns:
        ``MR`` in [0, 1], and ``recall_at_fppi``, nine floats in the order of ``FPPI``; all -1 where the subset has no
        object.

    Raises:
        DataError: a file is wrong, a detection is on an image that the ground truth does not have, there is no such
            category, or a ``vis_ratio`` is missing.
        ConfigError: the ``subset`` is unknown.
    """
    if subset not in SUBSETS:
        raise ConfigError(f"unknown subset '{subset}'", remedy=nearest(str(subset), SUBSETS))
    ranges = SUBSETS[subset]
    pair = load_pair(ground_truth, detections)
    label = _category(pair.truth)
    mine = np.flatnonzero(pair.truth.labels == label)
    ignored = _ignored(pair.truth, pair.details, mine, ranges)
    positives = int(np.count_nonzero(~ignored))
    if not positives:
        return {"MR": -1.0, "recall_at_fppi": [-1.0] * len(FPPI)}
    right, wrong = _counts(pair, _kept(pair, label, ranges.heights), mine, ignored)
    recall = right / positives
    last = np.searchsorted(wrong / len(pair.truth), FPPI, side="right") - 1
    at_points = recall[last] if len(recall) else np.zeros(len(FPPI))
    if not citypersons_compat:
        at_points = np.where(last < 0, 0.0, at_points)
    misses = 1 - at_points
    with np.errstate(divide="ignore"):
        logarithms = np.log(misses if citypersons_compat else np.maximum(misses, _LEAST_MISS))
    return {"MR": float(np.exp(logarithms.mean())), "recall_at_fppi": at_points.tolist()}


def _category(truth: GroundTruth) -> int:
    names = [normalise(name) for name in truth.names]
    for name in CATEGORIES:
        if name in names:
            return names.index(name)
    if len(names) == 1:
        return 0
    known = ", ".join(f"'{name}'" for name in truth.names[:8]) + (", ..." if len(names) > 8 else "")
    what = f"it has no category 'pedestrian' or 'person', but {known or 'none'}"
    raise DataError(what, where=truth.where, remedy="Rename the category to be scored.")


def _ignored(truth: GroundTruth, details: Details, mine: Array, ranges: Ranges) -> Array:
    """(m,) bool of the objects ``mine`` (m,): neither to be found nor wrong to be found."""
    heights, visible, ignore = (column[mine] for column in (details.heights, details.vis_ratios, details.ignore))
    missing = np.isnan(visible) & ~ignore
    if missing.any():
        row = int(mine[np.argmax(missing)])
        what = f"annotation {row} (counted from 0) has no vis_ratio"
        raise DataError(what, where=truth.where, remedy="Add the visible share of each object: 1 where all is seen.")
    (low, high), (least, most) = ranges
    inside = (heights >= low) & (heights <= high) & (visible >= least) & (visible <= most)
    ignored: Array = ignore | ~inside
    return ignored


def _kept(pair: Pair, label: int, heights: tuple[float, float]) -> Array:
    """The detections (d,) that count, by falling score."""
    order = falling(pair.table.score, pair.rows)
    order = order[pair.table.label[order] == label]
    by_image = order[np.argsort(pair.rows[order], kind="stable")]
    rows = pair.rows[by_image]
    number = np.empty(len(pair.table), np.int64)
    number[by_image] = np.arange(len(rows)) - np.searchsorted(rows, rows)
    height = pair.table.boxes_xywh()[order, 3]
    low, high = heights[0] / _EXPANSION, heights[1] * _EXPANSION
    kept: Array = order[(number[order] < _MAX_DETECTIONS) & (height >= low) & (height < high)]
    return kept


def _counts(pair: Pair, kept: Array, mine: Array, ignored: Array) -> tuple[Array, Array]:
    """How many detections are right and how many wrong, after each that is either, by falling score."""
    found_xywh, xywh = pair.table.boxes_xywh()[kept], pair.truth.xywh[mine]
    truth_rows = pair.truth.rows[mine]
    found, objects, overlaps = overlapping(
        _boxes(found_xywh, pair.rows[kept]), _boxes(xywh, truth_rows), _IOU, shares=ignored
    )
    in_ignored = np.zeros(len(kept), bool)
    in_ignored[found[ignored[objects]]] = True
    to_find = np.flatnonzero(~ignored[objects])
    best = to_find[np.lexsort((-objects[to_find], -overlaps[to_find], found[to_find]))]  # of equal ones, the later
    right, taken = np.zeros(len(kept), bool), np.zeros(len(mine), bool)
    for detection, thing in zip(found[best].tolist(), objects[best].tolist(), strict=True):
        if not right[detection] and not taken[thing]:
            right[detection] = taken[thing] = True
    judged = right | ~in_ignored
    return np.cumsum(right[judged]), np.cumsum(~right[judged])


def _boxes(xywh: Array, groups: Array) -> Boxes:
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return Boxes(xyxy=xyxy, areas=xywh[:, 2] * xywh[:, 3], groups=groups)
