"""The public names, sorted. ``import gesso`` gives each of them on first use."""

from collections.abc import Sequence
from pathlib import Path

from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.errors import GessoError
from gesso.evaluation.coco import score_coco
from gesso.evaluation.detections import DetectionTable
from gesso.label_space import LabelSpace
from gesso.recipes.catalog import make_config
from gesso.run.config import RunConfig
from gesso.run.from_torchvision import from_torchvision, to_torchvision
from gesso.run.models import load_detector
from gesso.run.predictor import Predictions, TrainedDetector
from gesso.run.session import RunResult
from gesso.run.train import train as train_config

__all__ = [
    "DetectionTable",
    "GessoError",
    "Index",
    "LabelSpace",
    "Predictions",
    "RunConfig",
    "RunResult",
    "TrainedDetector",
    "from_torchvision",
    "import_data",
    "load",
    "recipe",
    "score_coco",
    "to_torchvision",
    "train",
]


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe, for example ``"demo:direct"``; change it with ``dataclasses.replace``.

    Raises:
        ConfigError: there is no such recipe.
    """
    return make_config(name)


def train(
    config: RunConfig | str,
    out: str | Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    allow_changed: Sequence[str] = (),
) -> RunResult:
    """Trains a detector; ``config`` is a configuration or a recipe's name, ``out`` the run's folder.

    As ``gesso train``: see ``gesso.run.train.train`` for the arguments and the errors.
    """
    name = config if isinstance(config, str) else ""
    chosen = recipe(config) if isinstance(config, str) else config
    start = None if init is None else Path(init)
    return train_config(chosen, Path(out), recipe=name, resume=resume, init=start, allow_changed=allow_changed)


def load(run: str | Path, *, device: str = "auto") -> TrainedDetector:
    """A run's detector, ready for ``.predict(pictures)``. RunError where there is no such run or checkpoint."""
    return load_detector(Path(run), device=device)
