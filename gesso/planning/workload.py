"""What the scaling model needs to know of a recipe or a run: its step, what travels in it, and how much is to do."""

import statistics
from dataclasses import dataclass

from torch import nn

from gesso.data.demo_scenes import demo_label_space
from gesso.data.index import Index
from gesso.errors import ConfigError, RunError
from gesso.planning.scaling import StepMeasurement
from gesso.run.config import RunConfig
from gesso.run.folder import RunFolder
from gesso.run.models import new_model
from gesso.training.stage import TrainingConfig

CLASSES = 80
"""Of a recipe that names no data: those of COCO."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one step of a module has to tell the other GPUs.

    Attributes:
        gradient_bytes: of all trained parameters.
        norm_layers: batch norms that take statistics of the batch.
        norm_bytes: two float32 for each of their channels.
    """

    gradient_bytes: int
    norm_layers: int
    norm_bytes: int


def detector_traffic(config: RunConfig, num_classes: int, norm_parts: tuple[str, ...] = ()) -> Traffic:
    """What the detector of a recipe sends, built without its trained weights; see ``module_traffic``."""
    return module_traffic(new_model(config, num_classes, pretrained=False), norm_parts)


def module_traffic(module: nn.Module, norm_parts: tuple[str, ...] = ()) -> Traffic:
    """What a module sends in a step.

    Batch norm of frozen stages does not take part, nor does any outside the children ``norm_parts``, where they are
    named.
    """
    module.train()
    norms = [
        part
        for name, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d) and part.training and (not norm_parts or name.split(".")[0] in norm_parts)
    ]
    return Traffic(
        gradient_bytes=sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        norm_layers=len(norms),
        norm_bytes=sum(2 * 4 * norm.num_features for norm in norms),
    )


def stage_of(config: RunConfig, name: str) -> TrainingConfig:
    """The stage of that name. ConfigError where the recipe has none."""
    stages = dict(config.stages())
    if name not in stages:
        raise ConfigError(f"there is no stage '{name}'", remedy="Leave --stage out.")
    return stages[name]


def measured_step(folder: RunFolder, stage: str) -> StepMeasurement:
    """The seconds and pictures of one pass of a GPU: the median step of the later half of a stage's rows.

    Raises:
        RunError: there is no row with a step time, or it was measured on several processes.
    """
    stored = folder.read_config()
    world = stored.get("environment", {}).get("world_size", 1)
    if world > 1:
        raise RunError(
            f"its steps were measured on {world} processes, which waited for each other",
            where=folder.path,
            remedy="Name a run of one process, or measure with gesso plan bench.",
        )
    rows = [row for row in folder.rows() if "step_seconds" in row and row.get("stage") == stage]
    if not rows:
        raise RunError(
            f"no row of metrics.jsonl says how long a step of its stage '{stage}' takes",
            where=folder.path,
            remedy="Name a run that has trained, or give --step-seconds and --images-per-gpu.",
        )
    later = rows[len(rows) // 2 :]
    whole = statistics.median(row["step_seconds"] for row in later)
    data = statistics.median(row["data_share"] for row in later) * whole
    config = stored["config"][stage]
    parts = config.get("accumulate", 1)
    return StepMeasurement(
        seconds=(whole - data) / parts, data_seconds=data / parts, images=config["batch_size"] // parts
    )


def classes_of(config: RunConfig) -> int | None:
    """How many classes the data of a recipe has; None where it names none."""
    if config.data.train is not None:
        return len(Index.open(config.data.train).label_space)
    return None if config.data.embedded is None else len(demo_label_space(config.data.embedded))


def images_of(config: RunConfig) -> int | None:
    """How many pictures the training data of a recipe has; None where it names none."""
    if config.data.train is not None:
        return len(Index.open(config.data.train))
    return None if config.data.embedded is None else config.data.embedded.images


def total_images(config: RunConfig, stage: TrainingConfig, images: int | None, epochs: float | None) -> float:
    """The pictures of a whole stage: images times epochs where one is given, else what the recipe says.

    Raises:
        ConfigError: one of both is given and the other is nowhere to be found.
    """
    if images is None and epochs is None and stage.epochs is None:
        return stage.steps * stage.batch_size if stage.images is None else stage.images
    epochs = stage.epochs if epochs is None else epochs
    images = images_of(config) if images is None else images
    if epochs is None:
        raise ConfigError("the number of epochs is not known", remedy="Add --epochs E.")
    if images is None:
        raise ConfigError("the number of pictures of an epoch is not known", remedy="Add --images N.")
    return images * epochs
