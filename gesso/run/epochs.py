"""The length of a stage in steps, where it is said in passes over the data or in pictures."""

import dataclasses

from gesso.data.index import Index
from gesso.run.config import DataConfig, RunConfig
from gesso.training.stage import TrainingConfig


def with_steps(config: RunConfig, images: int) -> RunConfig:
    """A copy whose stages with ``epochs`` or ``images`` have the steps that these come to.

    Samples flow from one pass into the next (``data.sampling.BatchStream``), so only the last step is rounded. Other
    stages keep their steps; applied twice, nothing changes.

    Args:
        config: of a run.
        images: pictures in its training data.
    """
    pretraining = None if config.pretraining is None else _stage_with_steps(config.pretraining, images)
    return dataclasses.replace(config, pretraining=pretraining, training=_stage_with_steps(config.training, images))


def training_images(config: DataConfig) -> int:
    """How many pictures the training data has: those of the named index, or of the embedded data set.

    Raises:
        DataError: the index cannot be opened.
    """
    if config.train is not None:
        return len(Index.open(config.train))
    assert config.embedded is not None, "check_data comes first"
    return config.embedded.images


def _stage_with_steps(stage: TrainingConfig, images: int) -> TrainingConfig:
    seen = stage.images if stage.epochs is None else stage.epochs * images
    return stage if seen is None else dataclasses.replace(stage, steps=max(1, round(seen / stage.batch_size)))
