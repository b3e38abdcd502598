"""Detections as ``supervision.Detections``. Needs the extra ``supervision``."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import supervision

from gesso.data.records import Array


def to_supervision(
    xyxy: Array,
    scores: Array,
    labels: Array,
    names: Sequence[str],
    masks: npt.NDArray[np.bool_] | None = None,
) -> supervision.Detections:
    """The detections of one picture, for supervision's annotators, trackers and metrics.

    Args:
        xyxy: (n, 4) pixels of the picture.
        scores: (n,) in [0, 1].
        labels: (n,) 0-based.
        names: one a label; each detection's name goes to ``data["class_name"]``.
        masks: (n, H, W) bool over the whole picture, or None.
    """
    labels = np.asarray(labels, np.int64)
    return supervision.Detections(
        xyxy=np.asarray(xyxy, np.float32).reshape(-1, 4),
        confidence=np.asarray(scores, np.float32),
        class_id=labels,
        mask=masks,
        data={"class_name": np.array([names[label] for label in labels], dtype=str)},
    )
