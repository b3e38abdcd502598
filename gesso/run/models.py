"""The model of a run: new, as its stages have it one after the other, and trained."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gesso import distributed
from gesso.errors import RunError
from gesso.label_space import LabelSpace
from gesso.models.build import ModelConfig, build_model
from gesso.models.model import Model
from gesso.models.norm import apply_norm_policy
from gesso.run.classifying import TrainedClassifier
from gesso.run.config import RunConfig, Task, read_run_config, task_of
from gesso.run.folder import RunFolder
from gesso.run.predictor import TrainedDetector
from gesso.run.segmenting import TrainedSegmenter
from gesso.run.trained import TrainedModel
from gesso.training import checkpoint as checkpoints
from gesso.training.stage import TrainingConfig

_KINDS: dict[Task, type[TrainedModel[Any]]] = {
    "detection": TrainedDetector,
    "segmentation": TrainedSegmenter,
    "classification": TrainedClassifier,
}


def new_model(config: RunConfig, num_classes: int, *, pretrained: bool | None) -> Model:
    """The model with new weights; ``pretrained`` None follows the configuration, False spares the download."""
    model = config.model
    if pretrained is False:
        backbone = dataclasses.replace(model.backbone, pretrained=False, pretrained_required=False)
        model = dataclasses.replace(model, backbone=backbone)
    return build_model(model, num_classes)


def follow_stage(model: Model, stage: TrainingConfig, *, pictures: int | None = None) -> None:
    """Freezes and normalises as a stage wants it, in place; stages come one after the other, as in training.

    Args:
        model: the model.
        stage: its stage.
        pictures: of a process in one forward pass of training; None where no training follows.
    """
    model.backbone.freeze(stage.frozen_stages)
    apply_norm_policy(model, stage.norm, pictures=pictures)


def follow_stages(model: Model, config: RunConfig, last: str, *, pictures: int | None = None) -> TrainingConfig:
    """``follow_stage`` for all stages up to the one named ``last``, whose configuration is returned."""
    for name, stage in config.stages():
        if name == last:
            break
        follow_stage(model, stage)
    follow_stage(model, stage, pictures=pictures)
    return stage


def trained_kind(model: ModelConfig) -> type[TrainedModel[Any]]:
    """How a model of this configuration is used and scored."""
    return _KINDS[task_of(model)]


def trained(
    config: RunConfig, stage: TrainingConfig, model: Model, label_space: LabelSpace, device: torch.device
) -> TrainedModel[Any]:
    """A run's model, in or after a stage, as it is used for its task; it stands on ``device``."""
    made = trained_kind(config.model)(
        model=model,
        label_space=label_space,
        input=stage.input,
        device=device,
        batch_size=config.data.inference_batch_size,
        precision=stage.precision,
    )
    return dataclasses.replace(made, metrics=config.metrics) if isinstance(made, TrainedDetector) else made


def load_run(path: Path, *, device: str = "auto") -> TrainedModel[Any]:
    """The model of a run with its best weights (the last ones where nothing was evaluated), ready to predict.

    Raises:
        RunError: there is no such run, or it has no whole checkpoint yet.
    """
    folder = RunFolder.open(path)
    config = read_run_config(folder)
    found = checkpoints.best_checkpoint(folder.checkpoints)
    if found is None:
        raise RunError("this run has no whole checkpoint yet", where=path, remedy="Let it train longer.")
    space = folder.read_label_space()
    model = new_model(config, len(space), pretrained=False)
    stage = follow_stages(model, config, found.state.stage)
    model.load_state_dict(found.weights())
    if stage.precision == "float64":
        model.double()
    place = distributed.choose_device(device)
    return trained(config, stage, model.to(place).eval(), space, place)


def load_detector(path: Path, *, device: str = "auto") -> TrainedDetector:
    """``load_run`` of a run that trained a detector. RunError where it trained something else."""
    found = load_run(path, device=device)
    if not isinstance(found, TrainedDetector):
        raise RunError(
            f"this run trained a {type(found.model).__name__}, no detector", where=path, remedy="Name a detector's run."
        )
    return found
