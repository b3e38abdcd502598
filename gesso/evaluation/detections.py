"""Detections of a whole data set as columns: what prediction makes, files hold and scores read.

D detections in any order of images. Boxes are (D, 4) xyxy in absolute pixels of the stored picture. Labels are numbers
of one label space; ``map_labels`` carries them, by name, to another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gesso.data.records import Array, Masks
from gesso.label_space import LabelMap


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionTable:
    """Columns of D detections.

    Attributes:
        image_id: (D,) int64, the ids of the index or the ground-truth file.
        label: (D,) int64, 0-based in a label space.
        score: (D,) float64, finite.
        xyxy: (D, 4) float64 pixels.
        masks: RLE masks of the whole picture, or None.
        xywh: (D, 4) float64, the boxes just as a file gives them (x2 - x1 is not always w in floating point);
            None = computed from ``xyxy``.
        areas: (D,) float64 of the masks, where a file has masks and no boxes; None = those of the boxes. COCO's area
            ranges look at it.
    """

    image_id: Array
    label: Array
    score: Array
    xyxy: Array
    masks: Masks | None = None
    xywh: Array | None = None
    areas: Array | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("image_id", np.int64), ("label", np.int64), ("score", np.float64), ("xyxy", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
        count = len(self.image_id)
        assert self.label.shape == self.score.shape == (count,), "columns differ in length"
        assert self.xyxy.shape == (count, 4), f"xyxy has the shape {self.xyxy.shape}"
        for extra in (self.masks, self.xywh, self.areas):
            assert extra is None or len(extra) == count, "columns differ in length"

    def __len__(self) -> int:
        return len(self.image_id)

    @classmethod
    def empty(cls) -> "DetectionTable":
        """A table of no detections."""
        return cls(image_id=np.zeros(0), label=np.zeros(0), score=np.zeros(0), xyxy=np.zeros((0, 4)))

    @classmethod
    def concatenate(cls, tables: Sequence["DetectionTable"]) -> "DetectionTable":
        """One table after the other. Either all of them have masks, or none; tables without rows may differ."""
        bare = [table for table in tables if not len(table) and table.masks is not None]
        tables = [table for table in tables if len(table)]
        if not tables:
            return bare[0] if bare else cls.empty()
        masks = [t.masks for t in tables if t.masks is not None]
        assert len(masks) in (0, len(tables)), "some tables have masks and some have none"
        exact = any(t.xywh is not None for t in tables)
        sized = any(t.areas is not None for t in tables)
        return cls(
            image_id=np.concatenate([t.image_id for t in tables]),
            label=np.concatenate([t.label for t in tables]),
            score=np.concatenate([t.score for t in tables]),
            xyxy=np.concatenate([t.xyxy for t in tables]),
            masks=Masks.concatenate(masks) if masks else None,
            xywh=np.concatenate([t.boxes_xywh() for t in tables]) if exact else None,
            areas=np.concatenate([t.sizes() for t in tables]) if sized else None,
        )

    def boxes_xywh(self) -> Array:
        """(D, 4) float64 x, y, width and height, as COCO files have them."""
        if self.xywh is not None:
            return self.xywh
        return np.concatenate([self.xyxy[:, :2], self.xyxy[:, 2:] - self.xyxy[:, :2]], axis=1)

    def sizes(self) -> Array:
        """(D,) float64, the area of each detection that COCO's area ranges look at."""
        if self.areas is not None:
            return self.areas
        xywh = self.boxes_xywh()
        sizes: Array = xywh[:, 2] * xywh[:, 3]
        return sizes

    def take(self, rows: Array) -> "DetectionTable":
        """The detections at ``rows``: int64 numbers, or a (D,) bool column."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return DetectionTable(
            image_id=self.image_id[rows],
            label=self.label[rows],
            score=self.score[rows],
            xyxy=self.xyxy[rows],
            masks=None if self.masks is None else self.masks.take(rows),
            xywh=None if self.xywh is None else self.xywh[rows],
            areas=None if self.areas is None else self.areas[rows],
        )

    def ordered(self) -> "DetectionTable":
        """The same detections by rising image id and, within an image, falling score; ties keep their order."""
        return self.take(np.lexsort((-self.score, self.image_id)))

    def of_image(self, image_id: int) -> "DetectionTable":
        """The detections on one image, in the table's order."""
        return self.take(self.image_id == image_id)

    def map_labels(self, labels: LabelMap) -> "DetectionTable":
        """The detections in another label space; those of classes that have no counterpart there are left out."""
        targets = np.asarray(labels.targets, np.int64)[self.label]
        kept = self.take(targets >= 0)
        return DetectionTable(
            image_id=kept.image_id,
            label=targets[targets >= 0],
            score=kept.score,
            xyxy=kept.xyxy,
            masks=kept.masks,
            xywh=kept.xywh,
            areas=kept.areas,
        )
