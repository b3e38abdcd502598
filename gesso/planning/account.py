"""The bytes that a training step holds at its worst moment, counted without computing the step.

The step is the loop's own: forward pass, backward pass and update of the largest batch, in the recipe's precision, with
its ``accumulate`` and ``memory``. It runs on tensors without values (torch's fake ones), which have shapes, strides and
lifetimes like real ones. So every tensor that autograd keeps for the backward pass is counted from the operator that
makes it until it is freed, beside weights, gradients, the optimizer's state, buffers and averages. What an operator
takes for itself while it runs is not seen, neither here nor where a real step is counted the same way.

On a CPU some modules read values: how many places are in use. They are told the shares that a real step had
(``SharesRead``), or that all are.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from gesso.data.transforms import Shape
from gesso.errors import ConfigError
from gesso.models.detector import Detector
from gesso.planning.stages import in_one_process, new_planned_model, number_type, prepare_model, stage_for, worst_pair
from gesso.planning.workload import module_traffic
from gesso.run.config import RunConfig
from gesso.training.activations import bytes_alive, measure_units
from gesso.training.memory import Plan, apply_memory, held_bytes, parse_memory, plan_memory
from gesso.training.stage import Stage
from gesso.training.step import mixed_precision, parts_of, train_step
from gesso.training.worst_case import Pair


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What a step holds at its worst moment, and the parts of it that are there in every step, in bytes.

    Attributes:
        weights: of all parameters.
        gradients: of those that are trained.
        optimizer: its state.
        buffers: running statistics and other buffers, and averages of the weights.
        peak: everything at the worst moment.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    peak: int

    @property
    def activations(self) -> int:
        """What the peak has beside the other parts: kept for the backward pass or at work, and the batch itself."""
        return self.peak - self.weights - self.gradients - self.optimizer - self.buffers

    @property
    def checkpoint(self) -> int:
        """Of a checkpoint on disk."""
        return self.weights + self.optimizer + self.buffers


class StepAccount:
    """Counts steps of one stage of a recipe; the same step once.

    Attributes:
        trains_norm: the model has batch norms that take statistics of the pictures; after a count.

    Args:
        config: the recipe.
        name: of the stage.
        device: that it would train on; the CPU, or a GPU that is there.
    """

    def __init__(self, config: RunConfig, name: str, *, device: torch.device) -> None:
        self.config, self.name, self.device = config, name, device
        self.model = new_planned_model(config)
        self.trains_norm = False
        self._shares: tuple[float, ...] = ()
        self._seconds: Mapping[str, float] = {}
        self._found: dict[tuple[Shape, int], StepBytes] = {}

    def learn(self, shares: Sequence[float], seconds: Mapping[str, float]) -> None:
        """Takes over what a real step tells, for all counts from now on.

        Args:
            shares: of ``SharesRead``; before, everything is taken as in use.
            seconds: of the forward pass of each unit that can be computed again, by name, for a ``memory`` that is a
                budget; before, bytes stand for seconds.
        """
        self._shares, self._seconds, self._found = tuple(shares), seconds, {}

    def count(self, shape: Shape, pictures: int) -> StepBytes:
        """The bytes of a step of ``pictures`` pictures of one process, padded to ``shape``.

        Raises:
            ConfigError: the stage cannot be trained on so many pictures of that shape, its memory budget is too small,
                or the model reads values.
        """
        if (shape, pictures) not in self._found:
            self._found[shape, pictures] = self._count(shape, pictures)
        return self._found[shape, pictures]

    def _count(self, shape: Shape, pictures: int) -> StepBytes:
        config = in_one_process(self.config, self.name, pictures)
        settings = prepare_model(self.model, config, self.name, pictures)
        self.trains_norm = module_traffic(self.model, settings.norm.parts).norm_layers > 0
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = _without_values(self.model, mode, self.device, number_type(settings))
        with _refused(shape, pictures), mode, _SharesTold(self._shares):
            stage = stage_for(model, config, settings, self.device)
            pair = worst_pair(model, pictures, shape, config.data.max_boxes, self.device)
            _make_moments(stage.optimizer)
            choose_memory(stage, pair, self._seconds)
            return count_step(stage, pair)


def count_step(stage: Stage, pair: Pair) -> StepBytes:
    """The bytes of a step of a stage, which takes it; with or without values. Everything is on the stage's device.

    On a GPU, real tensors are counted by the allocator.
    """
    module, optimizer = stage.module, stage.optimizer
    optimizer.zero_grad(set_to_none=True)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    averages = [] if stage.ema is None else list(stage.ema.average.values())
    weights, buffers = list(module.parameters()), [*module.buffers(), *averages]
    batch = [value for part in pair for value in vars(part).values() if value is not None]
    with bytes_alive(stage.device, [*weights, *buffers, *state, *batch]) as alive:
        numbers = train_step(stage, *pair)
        most = alive.most()
    del numbers
    return StepBytes(
        weights=_bytes(weights),
        gradients=_bytes(trained),
        optimizer=_bytes(state),
        buffers=_bytes(buffers),
        peak=_bytes([*weights, *buffers, *state, *batch]) + most,
    )


def choose_memory(stage: Stage, pair: Pair, seconds: Mapping[str, float] | None = None) -> dict[str, float]:
    """Lets the stage's detector compute again what its ``memory`` says, as a run does before its first step.

    Args:
        stage: of a detector; others compute nothing again.
        pair: of a step.
        seconds: of each unit by its name, instead of those that are measured here; an empty one takes bytes for them.

    Returns:
        The seconds that were measured.

    Raises:
        ConfigError: the budget is too small.
    """
    memory = parse_memory(stage.config.memory)
    if not isinstance(stage.module, Detector):
        return {}
    if memory.kind == "none":
        apply_memory(stage.module, Plan(memory=memory))
        return {}
    first = parts_of(pair, stage.config.accumulate)[0]
    fixed = held_bytes(stage.module, stage.optimizer, stage.ema)
    with mixed_precision(stage):
        costs = measure_units(stage.module, *first)
    if seconds is not None:
        costs = [replace(cost, seconds=seconds.get(cost.name, 1e-12 * cost.bytes)) for cost in costs]
    apply_memory(stage.module, plan_memory(memory, costs, fixed))
    return {cost.name: cost.seconds for cost in costs}


class SharesRead(TorchFunctionMode):
    """Within the block, writes down which share is True of every row of truth values that a module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shares: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function."""
        found = func(*args, **(kwargs or {}))
        if _reads(func, args):
            self.shares.append(float(found.mean()) if found.size else 1.0)
        return found


class _SharesTold(TorchFunctionMode):
    """Within the block, answers these reads of tensors without values, in the order of ``SharesRead``."""

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__()
        self.shares = itertools.cycle(shares or (1.0,))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _reads(func, args):
            return func(*args, **(kwargs or {}))
        count = args[0].numel()
        return (np.arange(count) < round(next(self.shares) * count)).reshape(args[0].shape)


def _reads(func: Any, args: Any) -> bool:
    return func is Tensor.numpy and args[0].dtype == torch.bool


def _without_values(model: nn.Module, mode: FakeTensorMode, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy of a model whose parameters and buffers have no values; floating-point ones are of ``dtype``."""
    made: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            empty: Any = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
    return copy.deepcopy(model, made)


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """The state that torch makes at the first step, which a real step finds there; weights have no values to lose."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _refused(shape: Shape, pictures: int) -> Iterator[None]:
    """Turns torch's words for a step that cannot be done into ours."""
    try:
        yield
    except DataDependentOutputException as error:
        raise ConfigError(
            f"the memory of this model cannot be counted without a real step: it reads values ({error.func})",
            remedy="Train a few steps and read 'memory_gib' in metrics.jsonl.",
        ) from error
    except (RuntimeError, ValueError) as error:  # such as batch norm of one value
        raise ConfigError(
            f"{pictures} pictures of {shape[0]} x {shape[1]} cannot be trained on: {str(error).splitlines()[0]}",
            remedy="Choose other --resolutions or --batches.",
        ) from error


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of storages, each counted once."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())
