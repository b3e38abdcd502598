"""Pictures for a report: the ground truth, and beside it what each detector found, right or wrong; with masks."""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gesso import boxes
from gesso.data.index import Index, Objects
from gesso.data.records import IGNORED, Mask
from gesso.data.samples import read_indexed
from gesso.errors import DataError
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.masks import outline
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
        found: detections in the index's label space, one table a column; masks are shown where any of them has some.
        count: how many pictures at most.
        min_score: detections below it are not shown.
        seed: another seed, other pictures.

    Returns:
        Exhibits whose first marks are the ground truth; then one tuple of marks for each table.
    """
    order = np.argsort(fold(np.int64(seed), PICK, np.arange(len(index))), kind="stable")
    rows = (row for row in order.tolist() if len(index.objects(row).labels))
    shown = (exhibit for row in rows if (exhibit := _exhibit(index, row, found, min_score)) is not None)
    return list(itertools.islice(shown, count))


def _exhibit(index: Index, row: int, found: Sequence[DetectionTable], min_score: float) -> Exhibit | None:
    """One picture; None where it cannot be read any more, which the evaluation has said already."""
    try:
        pixels = read_indexed(index, row)
    except DataError:
        return None
    names = index.label_space.names
    objects = index.objects(row)
    ignored = (objects.flags & IGNORED) != 0
    masks = index.masks(row) if any(table.masks is not None for table in found) else [None] * len(ignored)
    truth = tuple(
        Mark(xyxy=_corners(box), label=names[label], kind="ignored" if is_ignored else "truth", outline=_rings(mask))
        for box, label, is_ignored, mask in zip(
            objects.xyxy, objects.labels.tolist(), ignored.tolist(), masks, strict=True
        )
    )
    columns = [truth]
    for table in found:
        here = table.of_image(int(index.image_ids[row]))
        here = here.take(here.score >= min_score)
        columns.append(_marks(here, objects, ignored, names))
    return Exhibit(pixels=pixels, caption=index.name(row), marks=tuple(columns))


def _marks(
    found: DetectionTable, objects: Objects, ignored: npt.NDArray[np.bool_], names: Sequence[str]
) -> tuple[Mark, ...]:
    """Greedy by falling score: a detection is right where it takes a free object of its class with IoU >= 0.5.

    Objects to ignore (crowd, ignore, difficult) are never missed, and what lies in one by half is not judged.
    """
    detected = torch.tensor(found.xyxy, dtype=torch.float64)
    truth = torch.tensor(np.array(objects.xyxy), dtype=torch.float64)
    overlap = boxes.iou(detected, truth).numpy()
    inside = (boxes.ioa(detected, truth).numpy() * ignored).max(axis=1, initial=0.0) >= MIN_IOU
    labels, free = np.asarray(objects.labels), ~ignored
    marks: list[Mark] = []
    for i in np.argsort(-found.score, kind="stable").tolist():
        fits = np.where(free & (labels == found.label[i]), overlap[i], 0.0)
        best = int(fits.argmax()) if len(fits) else -1
        kind: MarkKind = "ignored" if inside[i] else "wrong"
        if best >= 0 and fits[best] >= MIN_IOU:
            kind, free[best] = "right", False
        marks.append(
            Mark(
                xyxy=_corners(found.xyxy[i]),
                label=names[found.label[i]],
                score=float(found.score[i]),
                kind=kind,
                outline=_rings(None if found.masks is None else found.masks[i]),
            )
        )
    missed = [
        Mark(xyxy=_corners(box), label=names[label], kind="missed")
        for box, label, is_free in zip(objects.xyxy, labels.tolist(), free.tolist(), strict=True)
        if is_free
    ]
    return (*marks, *missed)


def _rings(mask: Mask) -> tuple[tuple[tuple[float, float], ...], ...]:
    return tuple(tuple((float(x), float(y)) for x, y in ring) for ring in outline(mask))


def _corners(box: npt.NDArray[np.floating]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return x1, y1, x2, y2
