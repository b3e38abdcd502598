"""The weights that a run starts from: another run's, a checkpoint's, or those in a published file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gesso import files, log
from gesso.errors import ConfigError, RunError
from gesso.label_space import LabelSpace
from gesso.models.backbone import BackboneConfig
from gesso.models.model import Model
from gesso.models.norm import NormPolicy
from gesso.models.published import read_published
from gesso.models.weights import LoadReport, load_weights, part_names
from gesso.run.config import Task, read_run_config, task_of
from gesso.run.folder import RunFolder
from gesso.training import checkpoint as checkpoints

logger = log.get_logger(__name__)

REPORT = "weights.json"
_FORM = ("stride_in_1x1", "norm_eps", "output_stride", "deformable_stages", "deformable_version")
"""What changes the maps of a backbone, but not the names and shapes of its weights."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights with what is known about them.

    Attributes:
        weights: by name, as in our models.
        label_space: the classes of their heads; None where they are not known.
        task: that they were trained for, "detection", "segmentation" or "classification"; None where it is not known.
        where: the file or folder.
        backbone: the configuration that they were trained in; None where it is not known.
        notes: what the log should say of a published file.
    """

    weights: Mapping[str, Tensor]
    label_space: LabelSpace | None
    task: Task | None
    where: Path
    backbone: BackboneConfig | None = None
    notes: tuple[str, ...] = ()


def read_weights(path: Path) -> InitialWeights:
    """The weights of a run (its best ones), of a checkpoint folder, or in a published file, with their classes.

    Raises:
        RunError: nothing of that kind is there.
        InputError, ConfigError: as of ``read_published``.
    """
    if path.is_file():
        return _published(path)
    run = path if (path / "checkpoints").is_dir() else path.parent.parent
    found = checkpoints.best_checkpoint(path / "checkpoints") if run == path else checkpoints.read_checkpoint(path)
    if found is None:
        raise RunError(
            "there is no whole checkpoint to start from", where=path, remedy="Name a run or a checkpoint folder."
        )
    folder = RunFolder(run)
    if not (run / "label_space.json").is_file():  # a checkpoint that was copied out of its run
        return InitialWeights(weights=found.weights(), label_space=None, task=None, where=found.path)
    model = read_run_config(folder).model
    return InitialWeights(
        weights=found.weights(),
        label_space=folder.read_label_space(),
        task=task_of(model),
        where=found.path,
        backbone=model.backbone,
    )


def _published(path: Path) -> InitialWeights:
    found = read_published(path)
    notes = [*found.notes, *([f"{len(found.unused)} tensors have no counterpart here"] if found.unused else [])]
    return InitialWeights(
        weights=found.weights,
        label_space=None if found.classes is None else LabelSpace.from_names(found.classes),
        task="classification" if found.num_classes is None else "detection",
        where=path,
        backbone=None if found.config is None else found.config.backbone,
        notes=(f"weights of {found.origin}", *notes),
    )


def start_from(
    model: Model,
    initial: InitialWeights,
    label_space: LabelSpace,
    norm: NormPolicy,
    parts: Sequence[str] | None,
    backbone: BackboneConfig,
) -> LoadReport:
    """Loads what fits into a new model, and tells what became of every tensor.

    Args:
        model: changed in place.
        initial: of ``read_weights``.
        label_space: the model's classes.
        norm: of the first stage.
        parts: as of ``load_weights``.
        backbone: the configuration of the model's backbone.

    Raises:
        RunError: none of them fits.
        ConfigError: the model has no such part; or ``norm`` uses running statistics, and the weights have none.
    """
    report = load_weights(model, initial.weights, parts=parts, source=initial.label_space, target=label_space)
    lines = report.lines()
    if not report.copied:
        raise RunError(
            f"nothing of it fits this {type(model).__name__}: {'; '.join(lines[1:])}",
            where=initial.where,
            remedy="Name weights of a model with parts in common, such as the same backbone.",
        )
    _check_statistics(report, norm, initial.where)
    logger.info("starting from the weights of %s", initial.where)
    for line in (*initial.notes, *lines):
        logger.info("%s", line)
    for key in _FORM if initial.backbone is not None else ():
        theirs, ours = getattr(initial.backbone, key), getattr(backbone, key)
        if theirs != ours:
            logger.warning("these weights were trained with backbone.%s %s, and are used with %s", key, theirs, ours)
    for part in part_names(model) if parts is None else parts:
        names = [name for name in model.state_dict() if name.split(".")[0] in model.parts[part]]
        if not set(names) & set(report.copied):
            logger.warning("nothing of the part %s is in these weights: it starts anew", part)
    return report


def keep_report(folder: RunFolder, report: LoadReport) -> None:
    """Writes ``weights.json``: every tensor by what became of it."""
    files.write_json(folder.path / REPORT, report.to_dict())


def _check_statistics(report: LoadReport, norm: NormPolicy, where: Path) -> None:
    """Refuses to freeze statistics that nobody took: weights that were trained with group norm have none."""
    copied = {name.rpartition(".")[0] for name in report.copied}
    bare = [name for name in report.missing if name.endswith(".running_mean") and name.rpartition(".")[0] in copied]
    if bare and norm.kind in ("affine", "fixed"):
        raise ConfigError(
            f"norm.kind {norm.kind} uses the running statistics of batch norm, and {len(bare)} layers of these weights "
            f"have none ({bare[0]})",
            where=where,
            remedy="Choose the norm kind group_norm, with which they were trained, or train, or sync.",
        )
