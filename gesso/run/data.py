"""The data of a run: named indexes, or the embedded data set made in the run's folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gesso import log
from gesso.data.demo import DemoConfig
from gesso.data.demo_index import demo_index
from gesso.data.index import Index
from gesso.data.records import NO_MASK
from gesso.errors import ConfigError, DataError
from gesso.models.build import DetectorConfig
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


def check_data(data: DataConfig, model: DetectorConfig) -> None:
    """Finds what is wrong with the named data, also for this detector, before a folder is made.

    Raises:
        ConfigError: no training data is named.
        DataError: an index cannot be opened, its pictures have no known size, or it has no box, or no mask where the
            detector learns masks. Some objects without masks are fine.
    """
    if data.train is None and data.embedded is None:
        raise ConfigError(
            "no training data is named", remedy="Give an index with --data.train (gesso data import makes one)."
        )
    if data.train is None:
        return
    train = Index.open(data.train)
    if train.num_boxes == 0:
        what = f"none of its {len(train)} images has a box: there is nothing to learn"
        raise DataError(what, where=data.train, remedy="Name an index with boxes.")
    if getattr(model, "mask_head", None) is not None and not has_masks(train):
        raise DataError(
            f"none of its {train.num_boxes:,} objects has a mask, and the detector learns masks",
            where=data.train,
            remedy="Name an index with masks, or a recipe whose model.mask_head is None.",
        )
    for index in [train] if data.val is None else [train, Index.open(data.val)]:
        unknown = int((index.widths < 1).sum())
        if unknown:
            raise DataError(
                f"the sizes of {unknown} of its {len(index)} pictures are unknown",
                where=index.path,
                remedy="Import the data with its pictures (without --no-images).",
            )


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
