"""The configuration of a run: the tree that a recipe returns."""

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gesso import config as configs
from gesso.data.demo import DemoConfig
from gesso.data.transforms import ImageNetCrop
from gesso.errors import ConfigError, nearest
from gesso.evaluation.further import Metric
from gesso.models.build import ModelConfig
from gesso.models.classifier import ClassifierConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.norm import check_images
from gesso.models.segmenter import SegmenterConfig
from gesso.run.folder import RunFolder
from gesso.training.stage import TrainingConfig

FREE_KEYS = ("device", "tensorboard", "timeout_seconds", "metrics", "data.workers", "data.inference_batch_size")
FREE_STAGE_KEYS = ("log_every", "checkpoint_every", "evaluate_every", "keep_checkpoints")
"""What a resume may change without being asked twice: it does not change the result."""
Task = Literal["detection", "segmentation", "classification"]
Part = Literal["backbone", "neck", "rpn", "box_head", "mask_head", "head"]
"""Of ``models.weights.PARTS``."""
Changes = dict[str, tuple[Any, Any]]
"""(before, now) by key."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data a run learns from and is measured on."""

    train: Path | None = None
    """Index to train on; without it the embedded data set, where the recipe has one."""
    val: Path | None = None
    """Index to evaluate on, joined by category name; without it nothing is evaluated (the embedded set has its own)."""
    embedded: DemoConfig | None = None
    """The embedded training set of the recipe, made inside the run folder where no index is named."""
    embedded_val: int = 200
    """Scenes of the embedded validation set."""
    workers: int = 1
    """Processes that load pictures; 0 loads in the training process. The result does not depend on it."""
    max_boxes: int = 100
    """Ground-truth slots per picture; further boxes are left out (ignored ones first) and counted."""
    inference_batch_size: int = 8
    """Pictures per batch in evaluation and prediction."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.max_boxes < 1 or self.inference_batch_size < 1 or self.embedded_val < 1:
            raise ConfigError(
                "data: workers must be at least 0; max_boxes, inference_batch_size, embedded_val at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result; a recipe returns one."""

    seed: int = 0
    """Decides the first weights, the order of samples and every random choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    model: ModelConfig = field(default_factory=FasterRCNNConfig)
    """The detector, segmenter or classifier."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    pretraining: TrainingConfig | None = None
    """The first stage of direct pre-training, on the same data; None = no such stage."""
    training: TrainingConfig
    """The (last) stage."""
    metrics: tuple[Metric, ...] = ()
    """Scores of other benchmarks that a detector's evaluations tell beside COCO's: voc (AP at IoU 0.5 and 0.7) and
    miss_rate (of CityPersons' subsets)."""
    init_parts: tuple[Part, ...] | None = None
    """The parts of the weights named by --init that are loaded, such as backbone and neck; None = all that the model
    has."""
    timeout_seconds: float = 600.0
    """How long a process waits for another one before it says so and ends, with several processes. Longer than process
    0 takes for the scores of an evaluation."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder (needs the extra 'tensorboard')."""

    def __post_init__(self) -> None:
        if not self.timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds must be above 0, found {self.timeout_seconds}")
        if self.metrics and task_of(self.model) != "detection":
            raise ConfigError("metrics are of detections, and this model makes none", remedy="Leave metrics out.")
        for name, stage in self.stages():
            if stage.memory != "none" and task_of(self.model) != "detection":
                raise ConfigError(f"{name}.memory is for detectors", remedy="Choose none.")
            resize = stage.input.resize
            if (
                isinstance(resize, ImageNetCrop)
                and resize.inference == "centre"
                and task_of(self.model) != "classification"
            ):
                raise ConfigError(
                    f"{name}.input.resize.inference is centre, which cuts pictures: only a classifier may look away",
                    remedy="Choose whole.",
                )

    def stages(self) -> list[tuple[str, TrainingConfig]]:
        """The stages in order, by the name of their key."""
        first = [] if self.pretraining is None else [("pretraining", self.pretraining)]
        return [*first, ("training", self.training)]


def task_of(model: ModelConfig) -> Task:
    """What a model of this configuration learns."""
    if isinstance(model, SegmenterConfig):
        return "segmentation"
    return "classification" if isinstance(model, ClassifierConfig) else "detection"


def read_run_config(folder: RunFolder) -> RunConfig:
    """The configuration of an existing run. ConfigError where it cannot be read by this version."""
    return configs.from_dict(RunConfig, folder.read_config()["config"])


def check_same(folder: RunFolder, config: RunConfig, allowed: Sequence[str] = ()) -> Changes:
    """Refuses a resume whose configuration would change the result.

    Args:
        folder: the run.
        config: the configuration to go on with.
        allowed: keys that may differ; ``training.optimizer`` allows all below it. ``FREE_KEYS`` always may.

    Returns:
        The allowed differences: (before, now) by key.

    Raises:
        ConfigError: another key differs (all of them are listed), or an allowed one does not exist.
    """
    stored = read_run_config(folder)
    allowed = [key.replace("-", "_").strip(".") for key in allowed]
    _check_known(allowed, configs.flatten(stored).keys() | configs.flatten(config).keys())
    free = {*FREE_KEYS, *(f"{stage}.{key}" for stage in ("pretraining", "training") for key in FREE_STAGE_KEYS)}
    found = {key: values for key, values in configs.differences(stored, config).items() if key not in free}
    refused = [key for key in found if not any(f"{key}.".startswith(f"{parent}.") for parent in allowed)]
    if refused:
        shown = "; ".join(f"{key} was {found[key][0]}, is {found[key][1]}" for key in refused)
        raise ConfigError(
            f"the configuration is not that of the run: {shown}",
            where=folder.path,
            remedy=f"Resume without these options, or insist with --allow-changed {' '.join(refused)}",
        )
    return found


def _check_known(allowed: Sequence[str], keys: Set[str]) -> None:
    parents = {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}
    for key in allowed:
        if key not in keys | parents:
            raise ConfigError(f"--allow-changed: there is no key '{key}'", remedy=nearest(key, keys | parents))


def check_processes(config: RunConfig, processes: int) -> None:
    """ConfigError where a stage's batch, or its groups of batch norm, do not fit the processes; it names what does."""
    for name, stage in config.stages():
        unit = stage.batch_size // stage.accumulate
        if unit % processes:
            fitting = ", ".join(str(n) for n in range(1, unit + 1) if unit % n == 0)
            parts = "" if stage.accumulate == 1 else f", in {stage.accumulate} parts,"
            raise ConfigError(
                f"{name}: {stage.batch_size} pictures a step{parts} cannot be divided among {processes} processes",
                remedy=f"Start {fitting} processes, or choose another --{name}.batch-size.",
            )
        check_images(stage.norm, pictures=unit // processes, processes=processes)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A copy whose paths do not depend on the working directory."""
    data = config.data
    paths = {name: path.absolute() for name in ("train", "val") if (path := getattr(data, name)) is not None}
    return dataclasses.replace(config, data=dataclasses.replace(data, **paths))
