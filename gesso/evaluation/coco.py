"""COCO detection metrics. The one file that knows which library counts (hotcoco), so that it can be exchanged.

Definitions: pycocotools' cocoeval.py (COCO detection challenge, section "Metrics"), to whose results these are equal
bit for bit. Images and categories are handed over under dense ids that keep the order of their own ids, because that
order decides between equal scores and the order of summation.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import hotcoco
import numpy as np

from gesso.data.index import Index
from gesso.data.records import Array, Rle
from gesso.errors import ConfigError, DataError, nearest
from gesso.evaluation.detection_files import read_detections
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.ground_truth import GroundTruth, from_index, load_ground_truth
from gesso.evaluation.masks import areas_and_boxes, check, to_coco

IouType = Literal["bbox", "segm"]
KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_KEYS = ("mask_AP", "mask_AP50", "mask_AP75", "mask_APs", "mask_APm", "mask_APl")
"""What ``score_masks`` gives, beside ``KEYS`` of the boxes."""
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_MAX_1, _MAX_10, _MAX_100 = range(3)
_IOU_50, _IOU_75 = slice(0, 1), slice(5, 6)


def score_coco(
    ground_truth: str | Path | Index | GroundTruth,
    detections: str | Path | DetectionTable,
    iou_type: IouType = "bbox",
) -> dict[str, Any]:
    """COCO's AP and AR.

    Args:
        ground_truth: a COCO file, an index (its folder, or open), or columns; see ``load_ground_truth``.
        detections: a COCO results file, Parquet, or a table whose labels are in the ground truth's order.
        iou_type: compare boxes or masks. Masks need RLE masks in the detections.

    Returns:
        The floats AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl in [0, 1], or -1 where there is no ground truth
        to measure them on; and ``by_class``, name -> AP in the order of the labels (-1 for a class without ground
        truth, which counts for no mean). Names that stand twice carry their category id.

    Raises:
        DataError: a file is wrong, or a detection is on an image that the ground truth does not have.
        ConfigError: the ``iou_type`` is unknown.
    """
    if iou_type not in ("bbox", "segm"):
        raise ConfigError(f"unknown IoU type '{iou_type}'", remedy=nearest(iou_type, ("bbox", "segm")))
    masks = iou_type == "segm"
    truth = load_ground_truth(ground_truth, masks=masks)
    where = "detections"
    if not isinstance(detections, DetectionTable):
        where = str(detections)
        detections = read_detections(detections, truth.category_ids, masks=masks)
    precision, recall, order = _count(truth, detections, where, iou_type)
    return _summary(truth, precision, recall, order)


def score_masks(index: Index, detections: DetectionTable) -> dict[str, float]:
    """COCO's AP of the masks of a detector on an index.

    Two things differ from ``score_coco(index, detections, "segm")``. An object without a mask counts as a crowd that
    fills its box: nothing has to find it, and what lies in it is no false positive. And the size of a detection, which
    decides for APs, APm and APl whether an unmatched one counts, is the area of its mask, not that of its box beside it
    (so do detectron2 and mmdetection, which leave the boxes out of the results).

    Args:
        index: has a mask of at least one object.
        detections: have masks; their labels are in the index's order.

    Returns:
        ``MASK_KEYS``, as the keys without ``mask_`` are in ``score_coco``.

    Raises:
        DataError: a mask is broken, or a detection is on an image that the index does not have.
    """
    truth = from_index(index)
    columns, sizes = index.mask_columns, truth.sizes[truth.rows].tolist()
    masks = [None if columns is None else columns[k] for k in range(index.num_boxes)]
    segmentations = []
    for k, (mask, (height, width)) in enumerate(zip(masks, sizes, strict=True)):
        try:
            segmentations.append(_box_ring(truth.xywh[k]) if mask is None else check(to_coco(mask), (height, width)))
        except DataError as error:
            what = f"annotation {k} (counted from 0): {error.what}"
            raise DataError(
                what, where=index.path, remedy="Mend or drop the mask, and import the data again."
            ) from error
    crowd = truth.crowd | np.array([mask is None for mask in masks], bool)
    truth = dataclasses.replace(truth, crowd=crowd, segmentations=segmentations)
    if detections.masks is not None:
        areas, _ = areas_and_boxes([m for i in range(len(detections)) if isinstance(m := detections.masks[i], Rle)])
        detections = dataclasses.replace(detections, areas=areas)
    scores = score_coco(truth, detections, "segm")
    return {key: scores[key.removeprefix("mask_")] for key in MASK_KEYS}


def _box_ring(xywh: Array) -> list[list[float]]:
    x, y, width, height = xywh.tolist()
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _count(truth: GroundTruth, table: DetectionTable, where: str, iou_type: IouType) -> tuple[Array, Array, Array]:
    """Precision (T, R, K, A, M), recall (T, K, A, M) and the label of each k."""
    rows = truth.rows_of(table.image_id, where=where)
    order = np.argsort(np.asarray(truth.category_ids, np.int64), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    _check_table(truth, table, rows, where, iou_type)
    segmentations = truth.segmentations if iou_type == "segm" else None
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(truth.sizes.tolist(), 1)]
    reference = hotcoco.COCO.from_arrays(
        images,
        [{"id": k + 1, "name": str(k)} for k in range(len(order))],
        truth.rows + 1,
        rank[truth.labels] + 1,
        truth.xywh,
        area=truth.areas,
        iscrowd=truth.crowd.astype(np.int64),
        segmentation=segmentations,
    )
    columns = [rows + 1, table.boxes_xywh(), table.score, rank[table.label] + 1]
    found = None
    if iou_type == "segm" and table.masks is not None:
        found = [to_coco(table.masks[i]) for i in range(len(table))]
    results = reference.load_res(np.column_stack(columns), segmentation=found)
    if table.areas is not None:
        results.update_anns(ids=np.arange(1, len(table) + 1), area=table.areas)
    evaluation = hotcoco.COCOeval(reference, results, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    counts = evaluation.eval
    assert counts is not None, "evaluated, but no counts"
    return counts["precision"], counts["recall"], order


def _check_table(truth: GroundTruth, table: DetectionTable, rows: Array, where: str, iou_type: IouType) -> None:
    bad = ~np.isfinite(table.score) | ~np.isfinite(table.xyxy).all(1)
    if bad.any():
        row = int(np.argmax(bad))
        what = f"the score or box of result {row} (counted from 0) is not finite"
        raise DataError(what, where=where, remedy="Leave such detections out.")
    classes = len(truth.names)
    if len(table) and not (table.label.min() >= 0 and table.label.max() < classes):
        what = f"a detection has the label {table.label.max()}, but {truth.where} has {classes} classes"
        raise DataError(what, where=where, remedy="Map the labels by name first (DetectionTable.map_labels).")
    if iou_type != "segm":
        return
    if table.masks is None:
        if len(table):
            raise DataError("the detections have no masks", where=where, remedy="Score their boxes instead: bbox.")
        return
    for row, (height, width) in enumerate(truth.sizes[rows].tolist()):
        mask = table.masks[row]
        if not isinstance(mask, Rle) or (height and mask.size != (height, width)):
            size = "no RLE" if not isinstance(mask, Rle) else "of " + " x ".join(map(str, mask.size)) + " pixels"
            what = f"the mask of result {row} (counted from 0) is {size}, its image has {height} x {width}"
            raise DataError(what, where=where, remedy="Masks are as high and wide as the stored picture.")


def _summary(truth: GroundTruth, precision: Array, recall: Array, order: Array) -> dict[str, Any]:
    values = (
        precision[..., _ALL, _MAX_100],
        precision[_IOU_50][..., _ALL, _MAX_100],
        precision[_IOU_75][..., _ALL, _MAX_100],
        precision[..., _SMALL, _MAX_100],
        precision[..., _MEDIUM, _MAX_100],
        precision[..., _LARGE, _MAX_100],
        recall[..., _ALL, _MAX_1],
        recall[..., _ALL, _MAX_10],
        recall[..., _ALL, _MAX_100],
        recall[..., _SMALL, _MAX_100],
        recall[..., _MEDIUM, _MAX_100],
        recall[..., _LARGE, _MAX_100],
    )
    scores: dict[str, Any] = {key: _mean(part) for key, part in zip(KEYS, values, strict=True)}
    by_label = {int(label): _mean(precision[:, :, k, _ALL, _MAX_100]) for k, label in enumerate(order)}
    scores["by_class"] = {name: by_label[label] for label, name in enumerate(truth.unique_names())}
    return scores


def _mean(values: Array) -> float:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0
