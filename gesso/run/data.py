"""The data of a run: named indexes, or the embedded data set made in the run's folder."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gesso import log
from gesso.data.demo import DemoConfig
from gesso.data.demo_index import demo_index
from gesso.data.index import Index
from gesso.data.records import NO_MASK, PRESENT
from gesso.errors import ConfigError, DataError
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.further import Metric, further_scores
from gesso.models.build import ModelConfig
from gesso.models.classifier import ClassifierConfig
from gesso.models.segmenter import SegmenterConfig
from gesso.run.config import DataConfig

logger = log.get_logger(__name__)

Progress = Callable[[str, int, int], None]
"""(what is made, done, total)"""


def open_data(data: DataConfig, folder: Path, progress: Progress) -> tuple[Index, Index | None]:
    """The training index, and the validation index where there is one; the embedded set is made where it is needed."""
    if data.train is None and data.embedded is not None:
        train = _embedded(folder, data.embedded, progress)
    else:
        assert data.train is not None, "check_data comes first"
        train = Index.open(data.train)
    if data.val is not None:
        val = Index.open(data.val)
        _check_joined(train, val)
        return train, val
    if data.train is None and data.embedded is not None:
        scenes = dataclasses.replace(data.embedded, split="val", images=data.embedded_val)
        return train, _embedded(folder, scenes, progress)
    logger.warning("no validation data is named (--data.val): nothing will be evaluated")
    return train, None


def _embedded(folder: Path, config: DemoConfig, progress: Progress) -> Index:
    def report(done: int, total: int) -> None:
        progress(config.split, done, total)

    return demo_index(folder / "data" / config.split, config, progress=report)


def check_data(data: DataConfig, model: ModelConfig, metrics: Sequence[Metric] = ()) -> None:
    """Finds what is wrong with the named data, also for this model, before a folder is made.

    Raises:
        ConfigError: no training data is named.
        DataError: an index cannot be opened, its pictures have no known size, or it has nothing of what the model
            learns: no box, no mask where masks are learnt, no semantic map, or no picture of exactly one class. Where
            only some objects or pictures lack it, that is fine. Or the validation data cannot be scored by ``metrics``.
    """
    if data.train is None and data.embedded is None:
        raise ConfigError(
            "no training data is named", remedy="Give an index with --data.train (gesso data import makes one)."
        )
    if data.train is None:
        return
    train = Index.open(data.train)
    for index in [train] if data.val is None else [train, Index.open(data.val)]:
        if isinstance(model, SegmenterConfig):
            _check_maps(index)
        elif isinstance(model, ClassifierConfig):
            _check_classes(index)
        elif index is train:
            _check_objects(index, masks=getattr(model, "mask_head", None) is not None)
        unknown = int((index.widths < 1).sum())
        if unknown:
            raise DataError(
                f"the sizes of {unknown} of its {len(index)} pictures are unknown",
                where=index.path,
                remedy="Import the data with its pictures (without --no-images).",
            )
    if data.val is not None:
        for metric in metrics:
            further_scores(Index.open(data.val), DetectionTable.empty(), metric)


def _check_objects(train: Index, *, masks: bool) -> None:
    if train.num_boxes == 0:
        what = f"none of its {len(train)} images has a box: there is nothing to learn"
        raise DataError(what, where=train.path, remedy="Name an index with boxes.")
    if masks and not has_masks(train):
        raise DataError(
            f"none of its {train.num_boxes:,} objects has a mask, and the detector learns masks",
            where=train.path,
            remedy="Name an index with masks, or a recipe whose model.mask_head is None.",
        )


def _check_maps(index: Index) -> None:
    if index.semantic is None or not any(index.semantic):
        what = f"none of its {len(index)} pictures has a semantic map, which a segmenter needs"
        raise DataError(what, where=index.path, remedy="Import a data set with maps (gesso data import --help).")


def _check_classes(index: Index) -> None:
    if len(index.label_space) < 2:
        what = f"it has one class, '{index.label_space.names[0]}': there is nothing to tell apart"
        raise DataError(what, where=index.path, remedy="Name data with two classes or more.")
    if not (picture_labels(index) >= 0).any():
        what = f"none of its {len(index)} pictures has exactly one class, which a classifier needs"
        raise DataError(what, where=index.path, remedy="Import a folder of classes.")


def picture_labels(index: Index) -> npt.NDArray[np.int64]:
    """The one class (N,) that is verified as present in each picture; -1 where there is none, or several."""
    labels = np.full(len(index), -1, np.int64)
    found = index.verified_columns
    if found is None:
        return labels
    present = np.asarray(found.states) == PRESENT
    rows = np.repeat(np.arange(len(index)), np.diff(np.asarray(found.offsets)))[present]
    labels[rows] = np.asarray(found.labels)[present]
    labels[np.bincount(rows, minlength=len(index)) != 1] = -1
    return labels


def has_masks(index: Index) -> bool:
    """Whether any object of an index has a mask."""
    columns = index.mask_columns
    return columns is not None and bool((np.asarray(columns.kinds) != NO_MASK).any())


def _check_joined(train: Index, val: Index) -> None:
    """Finds what is wrong between the two label spaces, which are joined by name."""
    there = train.label_space.map_to(val.label_space)
    if len(there.dropped) == len(train.label_space):
        raise DataError(
            f"it shares no category name with the training data ({', '.join(train.label_space.names[:4])}, ...)",
            where=val.path,
            remedy="Name data with the same categories.",
        )
    if there.dropped or there.unused:
        logger.warning(
            "joined by name: %d categories only in the training data %s, %d only in the validation data %s",
            len(there.dropped),
            list(there.dropped[:5]),
            len(there.unused),
            list(there.unused[:5]),
        )
