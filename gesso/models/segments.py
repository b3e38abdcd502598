"""Parts of a detector whose activations can be thrown away and computed again: where they lie, and how they then run.

A unit is a block of the backbone, its stem, or the neck. A segment is what is computed again at once: one unit, several
in a row, or a whole stage. Within a segment only its input is kept until the backward pass.

Sources: Training Deep Nets with Sublinear Memory Cost (Chen et al. 2016); torch's checkpointing without re-entry.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models import FeatureListNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gesso.models.detector import Detector
from gesso.models.model import Model
from gesso.models.norm import PolicyBatchNorm2d
from gesso.models.plain_transformer import PlainTransformer

_BODY = "backbone.body"
NECK = "neck"
_MARK = "_segments"


class _Mark(NamedTuple):
    """What a changed module knows: where its segments lie, and whether batch norms in it share their statistics."""

    pieces: tuple[tuple[int, int, bool], ...]
    shared: bool


@dataclass(frozen=True)
class Unit:
    """The smallest part that is computed again by itself.

    Attributes:
        name: its module in the detector; of the stem the first one.
        holder: a chain of modules (an ``nn.Sequential``, or timm's list of the network's parts) of which the children
            ``start`` to ``stop`` are the unit; or the unit's own name, with 0 and 0.
        start: of the first child.
        stop: behind the last child.
        stage: the backbone's stage that it lies in; for what lies in none, such as the stem, what is around it.
    """

    name: str
    holder: str
    start: int
    stop: int
    stage: str


@dataclass(frozen=True)
class Segment:
    """What is computed again at once: the children ``start`` to ``stop`` of a chain; all of ``holder`` with 0 and 0."""

    holder: str
    start: int
    stop: int


def find_units(detector: Model) -> list[Unit]:
    """The units in the order of the forward pass. What lies in none (a norm between stages) is never computed again."""
    body, name = detector.backbone.body, _BODY
    if isinstance(body, PlainTransformer):
        body, name = body.model, f"{_BODY}.model"
    found = _of_parts(name, body) if type(body) is FeatureListNet else _of_network(name, body)
    return [*found, *([_alone(NECK)] if isinstance(detector, Detector) else [])]


def _of_parts(name: str, body: Any) -> Iterator[Unit]:
    """timm's list of a network's parts: stages, and between them units of a block or of some layers, as in the stem.

    Those end where a map is taken.
    """
    children = list(body.named_children())
    start = 0
    for k, (child_name, child) in enumerate(children):
        inside = list(_inside(f"{name}.{child_name}", child, f"{name}.{child_name}")) if _holds_blocks(child) else []
        if (inside or _is_composed(child)) and start < k:
            yield _layers(name, children, start, k)
            start = k
        if inside:
            yield from inside
            start = k + 1
        elif child_name in body.return_layers or k + 1 == len(children):
            yield _layers(name, children, start, k + 1)
            start = k + 1


def _layers(name: str, children: list[tuple[str, nn.Module]], start: int, stop: int) -> Unit:
    return Unit(f"{name}.{children[start][0]}", name, start, stop, name)


def _of_network(name: str, body: nn.Module) -> Iterator[Unit]:
    """Any other network: whatever of it is made of layers."""
    for child_name, child in body.named_children():
        yield from _inside(f"{name}.{child_name}", child, None)


def _inside(name: str, module: nn.Module, stage: str | None) -> Iterator[Unit]:
    """The units of a part of the network; none where it is a single layer, or layers without a block."""
    if not _is_composed(module):
        return
    children = list(module.named_children())
    if not _holds_blocks(module):
        yield _alone(name, stage)
        return
    nested = all(_holds_blocks(child) for _, child in children)
    stage = stage if stage is not None or nested else name
    for k, (child_name, child) in enumerate(children):
        inner = f"{name}.{child_name}"
        if _holds_blocks(child):
            yield from _inside(inner, child, stage)
        elif type(module) is nn.Sequential:
            yield Unit(inner, name, k, k + 1, stage or inner)
        elif _is_composed(child):
            yield _alone(inner, stage)


def _alone(name: str, stage: str | None = None) -> Unit:
    return Unit(name, name, 0, 0, stage or name)


def _is_composed(module: nn.Module) -> bool:
    """Whether a module is made of others that have weights."""
    return any(True for child in module.children() for _ in child.parameters())


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a stage or a list of blocks rather than a block."""
    children = list(module.children())
    if isinstance(module, nn.ModuleList) or type(module) is nn.Sequential:
        return any(_is_composed(child) for child in children)
    inner = getattr(module, "blocks", None)
    if isinstance(inner, nn.Module):
        return _holds_blocks(inner)
    alike = len({type(child) for child in children}) == 1 and all(_is_composed(child) for child in children)
    return len(children) > 1 and alike


def install(detector: Model, segments: Iterable[Segment]) -> None:
    """Lets the segments run so that their activations are computed again, and no others, until the next call.

    They do so in training mode with gradients. Names of weights stay, and so do all values: running statistics are
    updated once a step, random states are set back for the second time, and no collective is repeated. The norm policy
    has to be applied before.
    """
    chosen: dict[str, list[Segment]] = {}
    for segment in segments:
        chosen.setdefault(segment.holder, []).append(segment)
    remove(detector)
    for holder, parts in chosen.items():
        module: Any = detector.get_submodule(holder)
        forward = _whole
        if parts[0].stop:
            forward = _collecting if type(module) is FeatureListNet else _chain
        shared = any(isinstance(m, PolicyBatchNorm2d) and m.group is not None for m in module.modules())
        setattr(module, _MARK, _Mark(_pieces(parts, len(list(module.children()))), shared))
        module.forward = types.MethodType(forward, module)


def remove(detector: Model) -> None:
    """Lets everything run as it is built again."""
    restore(detector, {name: {} for name, module in detector.named_modules() if _MARK in vars(module)})


def installed(detector: Model) -> dict[str, dict[str, Any]]:
    """What ``install`` changed, by the names of modules."""
    return {
        name: {key: vars(module)[key] for key in (_MARK, "forward")}
        for name, module in detector.named_modules()
        if _MARK in vars(module)
    }


def restore(detector: Model, state: dict[str, dict[str, Any]]) -> None:
    """Brings back what ``installed`` told."""
    for name, changes in state.items():
        own = vars(detector.get_submodule(name))
        for key in (_MARK, "forward"):
            own.pop(key, None)
        own.update(changes)


def _pieces(parts: list[Segment], count: int) -> tuple[tuple[int, int, bool], ...]:
    """(start, stop, whether it is computed again) over all ``count`` children."""
    found, at = [], 0
    for part in sorted(parts, key=lambda part: part.start):
        found += [(at, part.start, False), (part.start, part.stop, True)]
        at = part.stop
    return tuple(piece for piece in (*found, (at, count, False)) if piece[0] < piece[1])


def _whole(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a module that is a segment."""
    run = functools.partial(type(self).forward, self)
    return _twice(self, [self], run, *args, **kwargs) if _is_due(self) else run(*args, **kwargs)


def _chain(self: Any, value: Any) -> Any:
    """The forward pass of an ``nn.Sequential`` with segments in it."""
    layers, due = list(self), _is_due(self)
    for start, stop, again in self._segments.pieces:
        piece = layers[start:stop]
        run = functools.partial(_through, piece)
        value = _twice(self, piece, run, value) if again and due else run(value)
    return value


def _through(layers: Sequence[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


def _collecting(self: Any, value: Any) -> list[Tensor]:
    """The forward pass of timm's list of a network's parts with segments among the parts."""
    names, due = list(self), _is_due(self)
    maps: list[Tensor] = []
    for start, stop, again in self._segments.pieces:
        piece = names[start:stop]
        run = functools.partial(_collect, self, piece)
        value, found = _twice(self, [self[name] for name in piece], run, value) if again and due else run(value)
        maps += found
    return maps


def _collect(net: Any, names: Sequence[str], value: Any) -> tuple[Any, list[Tensor]]:
    """Runs the parts of these names; gives the last value and the maps that are taken on the way."""
    found = []
    for name in names:
        value = net[name](value)
        if name in net.return_layers:
            several = isinstance(value, tuple | list)
            found.append((torch.cat(value, 1) if net.concat else value[0]) if several else value)
    return value, found


def _is_due(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _twice(holder: Any, modules: Sequence[nn.Module], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)``, made of ``modules``, whose activations are computed again in the backward pass.

    A compiled graph has no second time: torch marks the operators, and its partitioner repeats them in the backward
    graph, without what changes buffers.
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    options: dict[str, Any] = {"use_reentrant": False}
    if not torch.compiler.is_compiling():
        options["context_fn"] = functools.partial(_contexts, modules, holder._segments.shared)
    elif holder._segments.shared:
        options["context_fn"] = _selective
    return checkpoint(functools.partial(_with_arguments, run, form), *leaves, **options)


def _with_arguments(run: Callable[..., Any], form: Any, *leaves: Any) -> Any:
    """``run`` with lists and dictionaries of its own: some networks change the list they are given."""
    args, kwargs = pytree.tree_unflatten(leaves, form)
    return run(*args, **kwargs)


def _contexts(modules: Sequence[nn.Module], shared: bool) -> tuple[Any, Any]:
    """What stands around the first and the second time."""
    first, second = _selective() if shared else (contextlib.nullcontext(), contextlib.nullcontext())
    return first, _statistics_kept(modules, second)


@contextlib.contextmanager
def _statistics_kept(modules: Sequence[nn.Module], other: Any) -> Iterator[None]:
    """Within the block batch norms in training move copies of their running statistics, and ``other`` holds.

    ``norm.statistics_held`` would not do: autograd then saves fewer tensors than the first time, and it does not reach
    batch norms that follow no policy.
    """
    norms = [m for part in modules for m in part.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({key: None if value is None else value.clone() for key, value in norm._buffers.items()})
    try:
        with other:
            yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What a collective gave is kept for the second time, everything else is computed again."""
    if operator is torch.ops.gesso.batch_statistics.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_selective: Callable[[], tuple[Any, Any]] = functools.partial(create_selective_checkpoint_contexts, _policy)
