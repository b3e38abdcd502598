"""Weights that torchvision, timm, detectron2 and mmdetection published, as ours.

Which of them a file is from is seen by the names of its weights. Nothing in it is run (``weight_files.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gesso.errors import ConfigError, InputError
from gesso.models import classifier_weights, detectron2_weights, mmdetection_weights, torchvision_files
from gesso.models.build import DetectorConfig, build_detector
from gesso.models.pickles import Value
from gesso.models.torchvision_files import COCO
from gesso.models.translation import BODY, Translation, some
from gesso.models.weight_files import read_arrays

Origin: TypeAlias = Literal["torchvision", "timm", "detectron2", "mmdetection"]
_STATES = ("model", "state_dict")
_DISTRIBUTED = "module."
_KNOWN = (
    "Known are detectors of torchvision, detectron2 and mmdetection on a ResNet with a feature pyramid, and ResNets "
    "and Swin transformers of torchvision and timm."
)


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """What a published file holds.

    Attributes:
        weights: by our names, with our order of classes, anchors and colours.
        classes: the names of the classes, in the order of our labels; None where they are not known.
        origin: the toolkit that published them. Residual networks are named alike in torchvision and timm, and are
            taken for timm's.
        config: the detector that they belong to, which fetches no other weights; None where there is none here.
        problem: why there is none, in one line.
        num_classes: of that detector.
        notes: what was assumed or left out, and what is not the same here; one line each.
        unused: names in the file that have no counterpart here.
    """

    weights: dict[str, Tensor]
    classes: tuple[str, ...] | None
    origin: Origin
    config: DetectorConfig | None
    problem: str | None
    num_classes: int | None
    notes: tuple[str, ...]
    unused: tuple[str, ...]


def read_published(path: str | Path) -> PublishedWeights:
    """The weights in a published file, of a detector or of a classifier.

    Raises:
        InputError: the file cannot be read, is broken, holds code, or no weights.
        ConfigError: the weights are named as nobody does who is known here, or by a version that is not read.
    """
    path = Path(path)
    state, others, meta = _parts(read_arrays(path), path)
    try:
        origin, found = _translated(state, meta)
        problem = found.problem or _misfit(found)
    except ConfigError as error:
        raise ConfigError(error.what, where=path, remedy=error.remedy) from error
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        what = f"the weights have other shapes than their names promise ({type(error).__name__})"
        raise InputError(what, where=path, remedy="Fetch it once more.") from error
    classes, note = _classes(origin, found.num_classes, meta)
    return PublishedWeights(
        weights=found.weights,
        classes=classes,
        origin=origin,
        config=found.config if problem is None else None,
        problem=problem,
        num_classes=found.num_classes,
        notes=found.notes + note,
        unused=found.unused + others,
    )


def published_config(path: str | Path) -> DetectorConfig:
    """The detector that a published file belongs to, with which its weights can be run and trained on.

    Raises:
        InputError, ConfigError: as of ``read_published``; or there is no such detector here.
    """
    found = read_published(path)
    if found.config is None:
        raise ConfigError(
            f"there is no detector here for these weights: {found.problem}",
            where=path,
            remedy="Name a detector with the same backbone, and load the part backbone alone.",
        )
    return found.config


def _parts(value: Value, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], Mapping[Any, Any]]:
    """The tensors of the model by name, the names of what is no tensor, and what stands beside."""
    state = value
    if isinstance(value, Mapping):
        state = next((value[key] for key in _STATES if isinstance(value.get(key), Mapping)), value)
    if not isinstance(state, Mapping) or not any(isinstance(part, Tensor) for part in state.values()):
        raise InputError("the file holds no weights by name", where=path, remedy="Save module.state_dict().")
    named = {str(name): part for name, part in state.items()}
    if all(name.startswith(_DISTRIBUTED) for name in named):
        named = {name.removeprefix(_DISTRIBUTED): part for name, part in named.items()}
    tensors = {name: part for name, part in named.items() if isinstance(part, Tensor)}
    meta = value.get("meta") if state is not value else None
    return tensors, tuple(name for name in named if name not in tensors), meta if isinstance(meta, Mapping) else {}


def _translated(state: Mapping[str, Tensor], meta: Mapping[Any, Any]) -> tuple[Origin, Translation]:
    """Who named the weights so, and the weights as ours."""
    if any(name.startswith(detectron2_weights.PREFIX) for name in state):
        return "detectron2", detectron2_weights.translate(state)
    if any(name.startswith(BODY) for name in state):
        return "torchvision", torchvision_files.translate(state)
    if any(name.startswith(mmdetection_weights.PREFIXES) for name in state):
        return "mmdetection", mmdetection_weights.translate(state, meta)
    if classifier_weights.is_torchvision_swin(state):
        return "torchvision", classifier_weights.translate(state)
    if classifier_weights.is_resnet(state) or classifier_weights.is_swin(state):
        return "timm", classifier_weights.translate(state)
    raise ConfigError(f"the weights are named in a way that is not known here: {some(state)}", remedy=_KNOWN)


def _classes(
    origin: Origin, count: int | None, meta: Mapping[Any, Any]
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The names of the classes, and a note where they were not read but assumed."""
    if count is None:
        return None, ()
    if origin == "mmdetection":
        names = mmdetection_weights.class_names(meta)
        if names is None or len(names) != count:
            return None, (f"the file does not name its {count} classes",)
        return names, ()
    if count == len(COCO):
        return COCO, ("its 80 classes are taken for COCO's",)
    return None, (f"the file does not name its {count} classes",)


def _misfit(found: Translation) -> str | None:
    """What of the weights does not fit the detector; None where all does."""
    if found.config is None or found.num_classes is None:
        return None
    weights = found.weights
    with torch.device("meta"):
        own = build_detector(found.config, found.num_classes).state_dict()
    wrong = [name for name in own if name not in weights] + [name for name in weights if name not in own]
    wrong += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    return f"its tensors do not make up the detector: {some(wrong)}" if wrong else None
