"""Pictures for a report: the ground truth, and beside it what each detector found, right or wrong."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gesso import boxes
from gesso.data.decode import read_picture
from gesso.data.index import Index
from gesso.evaluation.detections import DetectionTable
from gesso.random_key import fold, stream
from gesso.reports.html import Exhibit, Mark, MarkKind

PICK = stream("gallery")
MIN_IOU = 0.5


def exhibits(
    index: Index, found: Sequence[DetectionTable], *, count: int, min_score: float, seed: int = 0
) -> list[Exhibit]:
    """Some pictures of an index with objects, drawn by a hash, each with its marks.

    Args:
        index: the data set.
        found: detections in the index's label space, one table a column.
        count: how many pictures at most.
        min_score: detections below it are not shown.
        seed: another seed, other pictures.

    Returns:
        Exhibits whose first marks are the ground truth; then one tuple of marks for each table.
    """
    order = np.argsort(fold(np.int64(seed), PICK, np.arange(len(index))), kind="stable")
    rows = [row for row in order.tolist() if len(index.objects(row).labels)][:count]
    return [_exhibit(index, row, found, min_score) for row in rows]


def _exhibit(index: Index, row: int, found: Sequence[DetectionTable], min_score: float) -> Exhibit:
    names = index.label_space.names
    objects = index.objects(row)
    truth = tuple(
        Mark(xyxy=_corners(box), label=names[label], kind="truth")
        for box, label in zip(objects.xyxy, objects.labels.tolist(), strict=True)
    )
    columns = [truth]
    for table in found:
        here = table.of_image(int(index.image_ids[row]))
        here = here.take(here.score >= min_score)
        columns.append(_marks(here, objects.xyxy, objects.labels, names))
    return Exhibit(pixels=read_picture(index.image_path(row)), caption=index.name(row), marks=tuple(columns))


def _marks(
    found: DetectionTable, truth: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], names: Sequence[str]
) -> tuple[Mark, ...]:
    """Greedy by falling score: a detection is right where it takes a free object of its class with IoU >= 0.5."""
    overlap = boxes.iou(
        torch.tensor(found.xyxy, dtype=torch.float64), torch.tensor(np.array(truth), dtype=torch.float64)
    )
    free = np.ones(len(truth), bool)
    marks: list[Mark] = []
    for i in np.argsort(-found.score, kind="stable").tolist():
        fits = np.where(free & (np.asarray(labels) == found.label[i]), overlap[i].numpy(), 0.0)
        best = int(fits.argmax()) if len(fits) else -1
        right = best >= 0 and fits[best] >= MIN_IOU
        if right:
            free[best] = False
        kind: MarkKind = "right" if right else "wrong"
        marks.append(
            Mark(xyxy=_corners(found.xyxy[i]), label=names[found.label[i]], score=float(found.score[i]), kind=kind)
        )
    missed = [
        Mark(xyxy=_corners(box), label=names[label], kind="missed")
        for box, label, is_free in zip(truth, labels.tolist(), free.tolist(), strict=True)
        if is_free
    ]
    return (*marks, *missed)


def _corners(box: npt.NDArray[np.floating]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2
