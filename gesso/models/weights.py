"""Loading weights by parts and by class names, with a report in which every name stands."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gesso.errors import ConfigError, nearest
from gesso.label_space import LabelMap, LabelSpace
from gesso.models.class_rows import ClassRows, HasClassRows
from gesso.models.model import Model

PARTS = ("backbone", "neck", "rpn", "box_head", "mask_head", "head")
"""The parts of all models, in the order of direct pre-training, Table 5; each model has some of them (``Model.parts``).
``head`` is that of segmenters and classifiers."""
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor of a model and of a state dictionary.

    Attributes:
        loaded: names that were copied as they are.
        remapped: names whose rows were copied class by class, by name.
        classes_kept, classes_new: the model's classes whose rows were copied, and which stay at their new values; empty
            where nothing was remapped.
        classes_unused: classes of the state that the model does not have.
        missing: names of the model that the state does not have; they keep their new values.
        wrong_shape: (name, shape in the model, shape in the state); they keep their new values.
        unnamed: names whose rows stand for classes that the state does not name; they keep their new values.
        unexpected: names of the state that the model does not have; ignored.
        left_out: names of the state in parts that were not asked for; ignored.
    """

    loaded: tuple[str, ...]
    remapped: tuple[str, ...] = ()
    classes_kept: tuple[str, ...] = ()
    classes_new: tuple[str, ...] = ()
    classes_unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    unnamed: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every tensor of the model was loaded, and every tensor of the state was used."""
        return not (self.classes_new or self.missing or self.wrong_shape or self.unnamed or self.unexpected) and not (
            self.classes_unused or self.left_out
        )

    @property
    def copied(self) -> tuple[str, ...]:
        """All names that hold something of the state now."""
        return self.loaded + self.remapped

    def lines(self) -> list[str]:
        """The report for the log: a line for each thing that happened, with the first names; ``to_dict`` has all."""
        out = [f"{len(self.loaded)} tensors loaded"]
        if self.remapped:
            out.append(
                f"{len(self.remapped)} tensors carried over by class name: {_some(self.classes_kept)}; "
                f"new: {_some(self.classes_new)}; left behind: {_some(self.classes_unused)}"
            )
        for title, names in (
            ("new, not in the file", self.missing),
            ("new, of another shape in the file", [f"{n} {want} <- {got}" for n, want, got in self.wrong_shape]),
            ("new, because the file does not name its classes", self.unnamed),
            ("of the file ignored, not in this model", self.unexpected),
            ("of the file left out as asked", self.left_out),
        ):
            if names:
                out.append(f"{len(names)} tensors {title}: {_some(names)}")
        return out

    def to_dict(self) -> dict[str, Any]:
        """All of it for a JSON file."""
        return asdict(self)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


@torch.no_grad()
def load_weights(
    model: Model,
    state: Mapping[str, Tensor],
    *,
    parts: Sequence[str] | None = None,
    source: LabelSpace | None = None,
    target: LabelSpace | None = None,
) -> LoadReport:
    """Copies what fits of ``state`` into the parameters and buffers of ``model``, and reports the rest.

    A tensor is copied where name and shape agree. Rows that stand for classes (``HasClassRows``) are copied by the
    names of the classes, never by their place; rows of new classes keep the values that the model has.

    Args:
        model: changed in place; dtypes and devices stay as they are.
        state: tensors by name, as of ``model.state_dict()``.
        parts: only these of ``PARTS``; None = all.
        source: the classes of ``state``; None = unknown, and no class row is copied.
        target: the classes of ``model``; needed beside ``source``.

    Raises:
        ConfigError: the model has no such part.
    """
    own = model.state_dict()
    where = {name: _part_of(model, name) for name in (*own, *state)}
    _check_parts(parts, {where[name] for name in own})
    chosen = set(PARTS if parts is None else parts) | ({""} if parts is None else set())
    names = None if source is None or target is None else target.map_to(source)
    rows = find_class_rows(model)
    loaded, remapped, unnamed, wrong = [], [], [], []
    for name, values in own.items():
        if where[name] not in chosen or name not in state:
            continue
        new, layout = state[name], rows.get(name)
        fits = values.shape == new.shape
        if layout is not None:
            length = values.shape[0] if source is None else layout.length(len(source))
            fits = new.ndim > 0 and new.shape == (length, *values.shape[1:])
        if not fits:
            wrong.append((name, tuple(values.shape), tuple(new.shape)))
        elif layout is None or (source is not None and target is not None and source.names == target.names):
            values.copy_(new)
            loaded.append(name)
        elif names is None:
            unnamed.append(name)
        else:
            _copy_rows(values, new.to(values.dtype), layout, names)
            remapped.append(name)
    return LoadReport(
        loaded=tuple(loaded),
        remapped=tuple(remapped),
        **_class_names(remapped, source, target, names),
        missing=tuple(name for name in own if where[name] in chosen and name not in state),
        wrong_shape=tuple(wrong),
        unnamed=tuple(unnamed),
        unexpected=tuple(name for name in state if where[name] in chosen and name not in own),
        left_out=tuple(name for name in state if where[name] not in chosen),
    )


def find_class_rows(model: Model) -> dict[str, ClassRows]:
    """The tensors of a model with rows for each class, by their names in ``model.state_dict()``."""
    found: dict[str, ClassRows] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HasClassRows):
            found |= {f"{prefix}.{name}" if prefix else name: rows for name, rows in module.class_rows().items()}
    return found


def part_names(model: Model) -> tuple[str, ...]:
    """Those of ``PARTS`` that a model has weights of."""
    there = {_part_of(model, name) for name in model.state_dict()}
    return tuple(part for part in PARTS if part in there)


def _part_of(model: Model, name: str) -> str:
    """The part that a tensor belongs to; "" for a name that no part of this model explains."""
    child = name.split(".")[0]
    return next((part for part, children in model.parts.items() if child in children), "")


def _check_parts(parts: Sequence[str] | None, there: set[str]) -> None:
    for part in parts or ():
        if part not in there:
            known = [known for known in PARTS if known in there]
            raise ConfigError(f"the model has no part '{part}'", remedy=nearest(part, known))


def _copy_rows(values: Tensor, new: Tensor, layout: ClassRows, names: LabelMap) -> None:
    """Copies the background's rows, and those of every class that is there under its name."""
    # A view cannot be taken of every memory format; so the rows are changed in a copy.
    mine, theirs = layout.by_class(values.clone()), layout.by_class(new)
    first = int(layout.background)
    if first:
        mine[:, 0] = theirs[:, 0]
    for label, there in enumerate(names.targets):
        if there >= 0:
            mine[:, first + label] = theirs[:, first + there]
    values.copy_(mine.reshape(values.shape))


def _class_names(
    remapped: Sequence[str], source: LabelSpace | None, target: LabelSpace | None, names: LabelMap | None
) -> dict[str, tuple[str, ...]]:
    """The names of a report, where anything was remapped."""
    if not remapped or source is None or target is None or names is None:
        return {}
    kept = tuple(name for name, there in zip(target.names, names.targets, strict=True) if there >= 0)
    return {"classes_kept": kept, "classes_new": names.dropped, "classes_unused": names.unused}
