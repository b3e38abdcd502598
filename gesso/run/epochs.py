"""Epochs as steps: what a stage's passes over the data come to, once the data is known."""

import dataclasses

from gesso.data.index import Index
from gesso.run.config import DataConfig, RunConfig
from gesso.training.stage import TrainingConfig


def with_steps(config: RunConfig, images: int) -> RunConfig:
    """A copy whose stages with ``epochs`` have the steps that these come to on ``images`` pictures.

    Samples flow from one pass into the next (``data.sampling.BatchStream``), so only the last step is rounded. Stages
    without ``epochs`` keep their steps; applied twice, nothing changes.
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
    if stage.epochs is None:
        return stage
    return dataclasses.replace(stage, steps=max(1, round(stage.epochs * images / stage.batch_size)))
