"""Repeats a step that was not finite, in one process, and finds where it stopped being finite."""

import contextlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gesso import distributed
from gesso.data.index import Index
from gesso.errors import GessoError, InputError, RunError
from gesso.models.losses import BatchLosses
from gesso.models.model import Model
from gesso.models.norm import statistics_held
from gesso.random_key import fold
from gesso.run.config import RunConfig, read_run_config
from gesso.run.failure import Failure, read_failure
from gesso.run.finite import Finding, watching
from gesso.run.folder import RunFolder
from gesso.run.models import follow_stages, new_model
from gesso.structures import ImageBatch, Targets, map_tensors
from gesso.training.stage import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the global batch.

    Attributes:
        place: in the global batch, from 0.
        row: in the training index.
        name: its file, relative to its root; None where the index cannot be opened.
    """

    place: int
    row: int
    name: str | None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What repeating a failed step came to.

    Attributes:
        stage, step, stage_step: of the step, as in ``Failure``.
        processes: that made the step in training.
        pictures: of the global batch.
        device: where it was repeated.
        losses: by name, means over the global batch; ``loss`` is their sum.
        gradient_norm: of all gradients together; None where the loss is not finite already.
        finding: the module where numbers ceased to be finite; None where there is none (all is finite, or numbers are
            not finite already in ``state`` or ``broken_pictures``, or only the norm of the gradients is too large).
        backward: the finding is of the backward pass.
        bad_pictures: whose rows of the finding's values are not finite; empty where this cannot be told.
        broken_pictures: whose pixels or boxes are not finite in the batch itself.
        bad_weights: names of parameters and buffers with numbers that are not finite.
        bad_gradients: names of parameters whose gradient is not finite.
        largest_weight: the name of the weight matrix with the largest magnitude, and that.
        weight_ratio: this magnitude over the median of those of all weight matrices; None where that is 0.
        inexact: why the step may differ from the one in training, a sentence each.
    """

    stage: str
    step: int
    stage_step: int
    processes: int
    pictures: int
    device: str
    losses: Mapping[str, float]
    gradient_norm: float | None
    finding: Finding | None
    backward: bool
    bad_pictures: tuple[Picture, ...]
    broken_pictures: tuple[Picture, ...]
    bad_weights: tuple[str, ...]
    bad_gradients: tuple[str, ...]
    largest_weight: tuple[str, float]
    weight_ratio: float | None
    inexact: tuple[str, ...]

    @property
    def repeated(self) -> bool:
        """Whether the loss or the gradient is not finite again."""
        return self.gradient_norm is None or not math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass over ``rows`` of the global batch, and what was seen of it."""

    rows: Tensor
    losses: dict[str, float]
    forward: Finding | None
    backward: Finding | None

    @property
    def loss(self) -> float:
        """The sum of the losses."""
        return self.losses["loss"]


def replay(path: Path, *, device: str = "auto") -> Replay:
    """Repeats the step in ``path``, a file that ``save_failure`` wrote into the folder of its run.

    The pictures go through the detector in the runs that the processes had, one after the other, and each run in the
    parts of ``accumulate``; where batch norm takes statistics over processes, these do their parts together. So every
    picture meets the same statistics as in training.

    Raises:
        InputError: there is no such file, or it is no failed step of the run in whose folder it lies.
        RunError: the weights are not those of the run's detector, or the memory does not suffice.
        ConfigError: the device is not there.
    """
    failure = read_failure(path)
    folder = _run_folder(path)
    config = read_run_config(folder)
    stage = dict(config.stages()).get(failure.stage)
    pictures = len(failure.batch.images)
    if stage is None or pictures % (failure.world_size * stage.accumulate):
        raise InputError(f"this is no step of the run {folder.path}", where=path, remedy="Put it back to its own run.")
    place = distributed.choose_device(device)
    together = _statistics_over_processes(stage, failure)
    rows = torch.arange(pictures).view(failure.world_size, stage.accumulate, -1)
    runs = rows.transpose(0, 1).reshape(stage.accumulate, -1) if together else rows.flatten(0, 1)
    detector = _detector(folder, config, failure, path, pictures=runs.shape[1]).to(place)
    _seed(failure)
    try:
        passes = _repeat(detector, failure, list(runs), stage)
        bad = next((p for p in passes if not math.isfinite(p.loss) or p.backward), None)
        bad = bad or next((p for p in passes if p.forward), None)
        finding = None if bad is None else bad.forward or bad.backward
        places = [] if bad is None or finding is None else _places(detector, failure, bad, finding, stage)
    except torch.OutOfMemoryError as error:
        what = f"the memory of {place} does not suffice for the step"
        raise RunError(what, where=path, remedy="Replay it with --device cpu.") from error
    losses = {name: sum(p.losses[name] for p in passes) for name in passes[0].losses}
    gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
    finite = math.isfinite(losses["loss"])
    largest, ratio = _largest_weight(failure.weights)
    named = _names(folder, config, failure)
    return Replay(
        stage=failure.stage,
        step=failure.step,
        stage_step=failure.stage_step,
        processes=failure.world_size,
        pictures=pictures,
        device=place.type,
        losses=losses,
        gradient_norm=float(torch.nn.utils.get_total_norm(gradients.values())) if finite else None,
        finding=finding,
        backward=finding is not None and bad is not None and bad.forward is None,
        bad_pictures=tuple(named[k] for k in places),
        broken_pictures=tuple(named[k] for k in _broken(failure)),
        bad_weights=_not_finite(failure.weights),
        bad_gradients=_not_finite(gradients) if finite else (),
        largest_weight=largest,
        weight_ratio=ratio,
        inexact=_inexact(config, stage, failure, place, together=together),
    )


def _run_folder(path: Path) -> RunFolder:
    """The run in whose folder ``failures`` the file lies."""
    try:
        return RunFolder.open(path.absolute().parent.parent)
    except RunError as error:
        raise InputError(
            "this file lies in no run's folder, where its detector's configuration would be",
            where=path,
            remedy="Put it back to RUN/failures.",
        ) from error


def _statistics_over_processes(stage: TrainingConfig, failure: Failure) -> bool:
    """Whether batch norm took statistics over pictures of several processes."""
    own = len(failure.batch.images) // (failure.world_size * stage.accumulate)
    images = stage.norm.images
    return stage.norm.kind == "sync" and failure.world_size > 1 and (images is None or images > own)


def _detector(folder: RunFolder, config: RunConfig, failure: Failure, path: Path, *, pictures: int) -> Model:
    """The detector as it was before the step, in training mode."""
    detector = new_model(config, len(folder.read_label_space()), pretrained=False)
    stage = follow_stages(detector, config, failure.stage, pictures=pictures)
    if stage.precision == "float64":
        detector.double()
    try:
        detector.load_state_dict(failure.weights)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        raise RunError(f"its weights are not those of the detector of {folder.path}: {what}", where=path) from error
    return detector.train()


def _seed(failure: Failure) -> None:
    """As the step did: drop path of one process."""
    torch.manual_seed(fold(failure.seed, failure.stage_step - 1, 0))


def _repeat(detector: Model, failure: Failure, runs: list[Tensor], stage: TrainingConfig) -> list[_Pass]:
    """Forward and backward passes over all runs of pictures; gradients add up in the parameters.

    There is no backward pass where the loss is not finite.
    """
    counts = None
    if len(runs) > 1:  # no mean is one of means
        with torch.no_grad(), statistics_held():
            counts = torch.stack([_losses(detector, failure, rows, stage).counts for rows in runs]).sum(0)
        _seed(failure)
    return [_pass(detector, failure, rows, stage, counts) for rows in runs]


def _pass(detector: Model, failure: Failure, rows: Tensor, stage: TrainingConfig, counts: Tensor | None) -> _Pass:
    with watching(detector) as watch:
        found = _losses(detector, failure, rows, stage, counts)
        total = torch.stack(list(found.losses.values())).sum()
        if total.isfinite():
            total.backward()  # type: ignore[no-untyped-call]
    losses = {name: float(value.detach()) for name, value in found.losses.items()}
    return _Pass(rows, {"loss": float(total.detach()), **losses}, watch.forward, watch.backward)


def _losses(
    detector: Model, failure: Failure, rows: Tensor, stage: TrainingConfig, counts: Tensor | None = None
) -> BatchLosses:
    batch, targets = _part(detector, failure, rows)
    with _precision(detector, stage):
        found: BatchLosses = detector(batch, targets, counts=counts, counted=True)
    return found


def _part(detector: Model, failure: Failure, rows: Tensor) -> tuple[ImageBatch, Targets]:
    """Some pictures of the global batch, on the detector's device."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[rows].to(detector.mean.device)

    return map_tensors(failure.batch, cut), map_tensors(failure.targets, cut)


def _precision(detector: Model, stage: TrainingConfig) -> torch.autocast:
    return torch.autocast(detector.mean.device.type, torch.bfloat16, enabled=stage.precision == "bfloat16")


def _places(detector: Model, failure: Failure, bad: _Pass, finding: Finding, stage: TrainingConfig) -> list[int]:
    """The places in the global batch of the pictures whose numbers in a finding are not finite, where this can be told.

    Rows of maps are pictures; in the forward pass rows of regions are too, the same number of each picture. Where the
    detector's own code makes a loss that is not finite, the losses of each picture are computed by themselves.
    """
    if finding is bad.forward and not finding.module:
        return _pictures_with_bad_losses(detector, failure, bad.rows, stage)
    each, rest = divmod(finding.length, len(bad.rows))
    if each == 0 or rest or (each > 1 and finding is bad.backward):  # hard examples lie in another order there
        return []
    return [int(bad.rows[k]) for k in sorted({row // each for row in finding.rows})]


@torch.no_grad()
def _pictures_with_bad_losses(detector: Model, failure: Failure, rows: Tensor, stage: TrainingConfig) -> list[int]:
    """The places of pictures of a pass whose own losses, from the maps of the whole pass, are not finite."""
    found = []
    with statistics_held(), _precision(detector, stage):
        maps = detector.maps(_part(detector, failure, rows)[0])
        for k, row in enumerate(rows.tolist()):
            alone = {name: of[k : k + 1] for name, of in maps.items()}
            try:
                terms = detector.losses(alone, *_part(detector, failure, rows[k : k + 1]))
            except ValueError:  # batch norm in a head refuses a map of one value
                return []
            if not all(term.total.isfinite() for term in terms.values()):
                found.append(row)
    return found


def _broken(failure: Failure) -> list[int]:
    """The places of pictures whose own pixels, boxes or ranges are not finite."""
    found: set[int] = set()

    def look(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found.update((~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist())
        return tensor

    map_tensors(failure.batch, look)
    map_tensors(failure.targets, look)
    return sorted(found)


def _not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name, value in tensors.items() if not value.isfinite().all())


def _largest_weight(weights: Mapping[str, Tensor]) -> tuple[tuple[str, float], float | None]:
    """The weight matrix with the largest finite magnitude, and this over the median of all of them."""
    sizes = {
        name: float(value[value.isfinite()].abs().max())
        for name, value in weights.items()
        if value.ndim > 1 and value.is_floating_point() and value.isfinite().any()
    }
    largest = max(sizes, key=lambda name: sizes[name])
    median = statistics.median(sizes.values())
    return (largest, sizes[largest]), sizes[largest] / median if median > 0 else None


def _names(folder: RunFolder, config: RunConfig, failure: Failure) -> list[Picture]:
    """Every picture of the global batch, by its place."""
    data = config.data
    embedded = "train" if data.embedded is None else data.embedded.split
    index = None
    with contextlib.suppress(GessoError):
        index = Index.open(data.train or folder.path / "data" / embedded / "index")
    rows = failure.batch.image_index.tolist()
    return [
        Picture(place=k, row=row, name=None if index is None or not 0 <= row < len(index) else index.name(row))
        for k, row in enumerate(rows)
    ]


def _inexact(
    config: RunConfig, stage: TrainingConfig, failure: Failure, place: torch.device, *, together: bool
) -> tuple[str, ...]:
    found = []
    if place.type != failure.device:
        found.append(f"The step was made on {failure.device}, which rounds otherwise than {place.type}.")
    elif stage.compile or (stage.compile is None and place.type == "cuda"):
        found.append("The step was compiled in training, and rounded otherwise.")
    if config.model.backbone.drop_path and (failure.world_size > 1 or place.type != failure.device):
        found.append("Drop path leaves out other samples than in training.")
    if together and getattr(getattr(config.model, "roi", None), "hard_examples", False):
        found.append("In training each process took the hardest regions of its own pictures.")
    return tuple(found)
