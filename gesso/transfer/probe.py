"""Linear probes: how well a linear classifier tells whole pictures apart by the frozen features of a trained model.

A layer is named as in ``Model.feature_names``; a map may say to how many cells a side it is averaged, as in
``conv_proj@4``; without that to one. What needs regions gets one, the whole picture.

The classifier is multinomial logistic regression with an L2 penalty, on features of mean 0 and variance 1 (over the
training pictures). Its strength is scikit-learn's C, the inverse of the penalty.

Source: An Analysis of Pre-Training on Object Detection (Li et al. 2019), Tables 5 to 7. How the maps are averaged and
how the classifier is trained is ours.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from gesso.data.index import Index
from gesso.data.loading import inference_batches
from gesso.data.records import Array
from gesso.data.transforms import InputConfig
from gesso.errors import ConfigError, DataError, nearest
from gesso.evaluation.classification import ranks_of_truth
from gesso.evaluation.predict import Precision, outputs
from gesso.log import get_logger
from gesso.models.classifier import pool_valid
from gesso.models.model import Model
from gesso.random_key import fold, stream
from gesso.run.data import picture_labels
from gesso.run.trained import refuse_broken
from gesso.structures import ImageBatch

log = get_logger(__name__)

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""What is tried where no strength is given."""

_CELLS = (14, 4, 2, 1)
_HELD_OUT = stream("probe.held_out")
_MOST_STEPS = 1000

Progress = Callable[[str, int, int], None]
"""(what is done, done, total)"""


class Layer(NamedTuple):
    """What is probed.

    Attributes:
        name: as it was asked for.
        feature: of ``Model.feature_names``.
        cells: a side, of a map; 0 where the feature is no map.
    """

    name: str
    feature: str
    cells: int


def probe(
    model: Model,
    input: InputConfig,
    train: Index,
    val: Index,
    layers: Sequence[str] | None = None,
    *,
    precision: Precision = "float32",
    batch_size: int = 32,
    workers: int = 0,
    strength: float | None = None,
    memory_gib: float = 16.0,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Trains a linear classifier on each of some layers of a model, and scores it.

    Of both indexes the pictures count that have exactly one class verified as present. Classes are joined by name: a
    validation picture of a class that the training index does not name is left out, and one of a class without a
    training picture is never the first guess. The model runs where it is, in evaluation mode, and is left as it was.
    One process does everything.

    Args:
        model: trained; it does not change.
        input: how the pictures come before it, without chance. What is padding does not count in a layer's averages.
        train: pictures with image-level labels.
        val: others, for the scores.
        layers: what is probed; None = ``default_layers``.
        precision: "bfloat16" runs the model in mixed precision.
        batch_size: pictures at a time.
        workers: loader processes.
        strength: of the classifiers; None = for each layer the one of ``STRENGTHS`` with the highest top-1 on the
            pictures that ``held_out`` takes from the training pictures (of equal ones the smallest). The classifier is
            then trained on all of them.
        memory_gib: the most that the features of all layers may take, with what the classifier copies of them.
        progress: called after each batch and each layer.

    Returns:
        By layer ``top1`` and ``top5`` in [0, 1], ``dim`` (of the features), ``strength``, and ``images``, how many
        validation pictures were counted.

    Raises:
        ConfigError: the model has no such layer, a number is out of range, or the features need too much memory.
        DataError: no picture of an index counts, the training pictures are of one class or too few to hold some out,
            too many pictures cannot be read, or a layer is not finite.
    """
    if strength is not None and not strength > 0:
        raise ConfigError(f"the strength of a probe is {strength}", remedy="Give a number above 0.")
    wanted = [parse_layer(model, name) for name in (default_layers(model) if layers is None else layers)]
    if not wanted or not memory_gib > 0:
        raise ConfigError(
            f"a probe of {len(wanted)} layers in {memory_gib:g} GiB", remedy="Give at least one, and room."
        )
    learnt, tested = _labels(train, train), _labels(val, train)
    if len(set(learnt[learnt >= 0].tolist())) < 2:
        raise DataError("all its pictures are of one class: nothing can be told apart", where=train.path)
    reader = _Reader(
        features=_Features(model, wanted),
        input=input,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        memory_gib=memory_gib,
        pictures=(int((learnt >= 0).sum()), int((tested >= 0).sum())),
        progress=progress,
    )
    x, y = reader.read(train, learnt, "training pictures")
    x_val, y_val = reader.read(val, tested, "validation pictures")
    if strength is None and not held_out(y).any():
        what = "no class has two pictures, so none can be held out to choose the strength of a probe by"
        raise DataError(what, where=train.path, remedy="Give the strength, or more pictures.")
    found: dict[str, dict[str, float]] = {}
    for done, name in enumerate(x, 1):
        chosen = _best_strength(x[name], y, name) if strength is None else strength
        ranks = _ranks(_fit(x[name], y, chosen, name), x_val[name], y_val, len(train.label_space))
        shares = {"top1": float((ranks == 0).mean()), "top5": float((ranks < 5).mean())}
        found[name] = {**shares, "dim": x[name].shape[1], "strength": chosen, "images": len(ranks)}
        if progress is not None:
            progress("classifiers", done, len(x))
    return found


def default_layers(model: Model) -> tuple[str, ...]:
    """The last map of the backbone; and, where the model has them, conv_proj at 14, 4, 2 and 1 cells, fc1, fc2, ..."""
    names = model.feature_names()
    layers = [next(reversed(model.backbone.channels))]
    layers += [f"conv_proj@{cells}" for cells in _CELLS if "conv_proj" in names]
    return (*layers, *(name for name in names if name.startswith("fc")))


def parse_layer(model: Model, name: str) -> Layer:
    """What ``name`` means in this model, such as C5, conv_proj@4 or fc1.

    Raises:
        ConfigError: the model has no such feature, it is no map and has no cells, or these are no number above 0.
    """
    feature, at, cells = name.partition("@")
    known = model.feature_names()
    if feature not in known:
        raise ConfigError(f"the model has no feature '{feature}'", remedy=nearest(feature, known))
    is_map = feature in model.channels
    if at and not is_map:
        raise ConfigError(f"the layer '{name}': {feature} has no cells", remedy=f"Write {feature}.")
    if at and not (cells.isascii() and cells.isdigit() and int(cells) > 0):
        raise ConfigError(f"the layer '{name}' has no number of cells", remedy=f"Write {feature}@4, for example.")
    return Layer(name, feature, int(cells or 1) if is_map else 0)


def held_out(classes: Array) -> Array:
    """Which (n,) pictures of the classes (n,) are held out: of each class a fifth, rounded down, but at least one of
    two or more; those whose places have the lowest hashes.
    """
    places = np.arange(len(classes), dtype=np.int64)
    order = np.lexsort((fold(places, _HELD_OUT), classes))
    counts = np.bincount(classes)
    rank = np.empty_like(places)
    rank[order] = places - np.repeat(np.cumsum(counts) - counts, counts)
    taken = np.where(counts > 1, np.maximum(counts // 5, 1), 0)
    held: Array = rank < taken[classes]
    return held


def _labels(index: Index, train: Index) -> Array:
    """The label (N,) in the training index of each picture; -1 where it has none, or not exactly one."""
    labels = picture_labels(index)
    into_train = np.array([*index.label_space.map_to(train.label_space).targets, -1], np.int64)
    joined: Array = into_train[labels]  # the last place is that of -1
    if not (labels >= 0).any():
        raise DataError(
            "no picture has exactly one class that is verified as present",
            where=index.path,
            remedy="Name data with one class a picture, such as an imported folder of class folders.",
        )
    if not (joined >= 0).any():
        what = f"none of its pictures is of a class that {train.path} names"
        raise DataError(what, where=index.path, remedy="Name data with the same classes.")
    lost = int(((labels >= 0) & (joined < 0)).sum())
    if lost:
        log.warning("%s: %d pictures are left out: their classes are not in %s", index.path, lost, train.path)
    return joined


class _Features(nn.Module):
    """ImageBatch -> what the layers say of each picture: (B, dim) float32 by the layer's name."""

    def __init__(self, model: Model, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        sizes = batch.sizes
        whole = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], dim=1)[:, None].float()
        found = self.model.features(batch, list({layer.feature for layer in self.layers}), boxes=whole)
        vectors = {}
        for name, feature, cells in self.layers:
            values = found[feature]
            if cells:
                values = pool_valid(values, sizes, self.model.strides[feature], cells)
            vectors[name] = values.flatten(1).float()
        return vectors


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Runs the model over an index. ``pictures`` are those that count for training and validation; see ``probe``."""

    features: _Features
    input: InputConfig
    precision: Precision
    batch_size: int
    workers: int
    memory_gib: float
    pictures: tuple[int, int]
    progress: Progress | None

    def read(self, index: Index, labels: Array, what: str) -> tuple[dict[str, Array], Array]:
        """The features (n, dim) of each layer, by its name, and the labels (n,), of the pictures whose label (N,) is
        not negative and that can be read; in an order of the loader's.
        """
        room, filled, through = int((labels >= 0).sum()), 0, 0
        columns: dict[str, Array] = {}
        classes = np.zeros(room, np.int64)
        device = self.features.model.mean.device
        batches = inference_batches(index, self.input, batch_size=self.batch_size, workers=self.workers)
        try:
            for batch, _, found in outputs(self.features, batches, device=device, precision=self.precision):
                rows = batch.image_index.numpy()
                kept = np.flatnonzero((rows >= 0) & (labels[rows] >= 0))
                if not columns:
                    self._check_memory({name: values.shape[1] for name, values in found.items()})
                    columns = {name: np.zeros((room, values.shape[1]), np.float32) for name, values in found.items()}
                here = slice(filled, filled + len(kept))
                for name, values in found.items():
                    columns[name][here] = values.cpu().numpy()[kept]
                classes[here] = labels[rows[kept]]
                filled, through = here.stop, through + int((rows >= 0).sum())
                if self.progress is not None:
                    self.progress(what, through, len(index))
        finally:
            batches.close()
        refuse_broken(batches.broken, index)
        for name, column in columns.items():
            if not np.isfinite(column).all():
                raise DataError(f"the layer {name} is not finite", where=index.path, remedy="The model has diverged.")
        return {name: column[:filled] for name, column in columns.items()}, classes[:filled]

    def _check_memory(self, dims: dict[str, int]) -> None:
        """ConfigError where the features, and two copies of the largest layer while its classifier learns, are many."""
        numbers = sum(dims.values()) * sum(self.pictures) + 2 * max(dims.values()) * self.pictures[0]
        gib = 4 * numbers / 2**30
        if gib > self.memory_gib:
            largest = max(dims, key=lambda name: dims[name])
            raise ConfigError(
                f"the features of {sum(self.pictures)} pictures take {gib:.1f} GiB, more than {self.memory_gib:g}; the "
                f"largest layer is {largest} with {dims[largest]} numbers a picture",
                remedy="Leave out large layers, name fewer pictures (gesso data select), or allow more memory.",
            )


def _best_strength(x: Array, y: Array, name: str) -> float:
    """The strength with the highest top-1 on the pictures that are held out, trained on the others."""
    held = held_out(y)
    right = [
        float((_ranks(_fit(x[~held], y[~held], strength, name), x[held], y[held], int(y.max()) + 1) == 0).mean())
        for strength in STRENGTHS
    ]
    return STRENGTHS[int(np.argmax(right))]  # the first of equal ones


def _fit(x: Array, y: Array, strength: float, name: str) -> Any:
    """A classifier of features (n, dim), trained on the labels (n,)."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_MOST_STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(x, y)
    if int(classifier[-1].n_iter_.max()) >= _MOST_STEPS:
        log.warning("the classifier of %s with strength %g has not converged in %d steps", name, strength, _MOST_STEPS)
    return classifier


def _ranks(classifier: Any, x: Array, y: Array, classes: int) -> Array:
    """The place (n,) of each picture's label among the classes; those that were not trained come last."""
    scores = np.full((len(x), classes), -1.0)
    scores[:, classifier[-1].classes_] = classifier.predict_proba(x)
    return ranks_of_truth(scores, y)
