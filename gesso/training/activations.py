"""What the forward pass keeps for the backward pass, measured block by block.

Bytes are those of the storages that autograd saves, each counted once; weights and buffers are none of them.
"""

import contextlib
import time
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import distributed
from gesso.log import get_logger
from gesso.models import segments
from gesso.models.detector import Detector
from gesso.models.norm import PolicyBatchNorm2d
from gesso.models.segments import Unit
from gesso.structures import ImageBatch, Targets, map_tensors

log = get_logger(__name__)

COPIES = "copies of weights"
_LACK_OF_MEMORY = ("you tried to allocate", "out of memory", "ALLOC_FAILED", "could not create a primitive")
"""Of torch on a CPU, of CUDA, of its libraries, and of oneDNN, which has one message for all."""


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """What a unit of ``segments.find_units`` takes; or, without a holder, what is never computed again.

    Attributes:
        name: its module.
        bytes: that are kept inside it, its input and output aside.
        input_bytes: of its input, as far as no unit before has the same.
        largest_bytes: of the largest tensor inside; its gradient is as large.
        seconds: of its forward pass.
        holder: as in ``Unit``; "" for what is never computed again.
        start: as in ``Unit``.
        stop: as in ``Unit``.
        stage: as in ``Unit``.
        whole: the stage is one module that was called, and nothing but its units lies between them.
        starts: a segment may begin here; not where the input is changed in place.
        bound: the input is kept in any case, as a map that the neck or the heads take; no segment goes across it.
    """

    name: str
    bytes: int
    input_bytes: int = 0
    largest_bytes: int = 0
    seconds: float = 0.0
    holder: str = ""
    start: int = 0
    stop: int = 0
    stage: str = ""
    whole: bool = False
    starts: bool = True
    bound: bool = False


def measure_units(detector: Detector, batch: ImageBatch, targets: Targets) -> list[UnitCost]:
    """The costs of all units in the order of the forward pass, and of what is around them.

    An entry named "backbone" is what the backbone keeps outside all units; the last, named "heads", is the most that
    all behind the neck takes, in the forward pass and back to the neck. Call it under the autocast of the step: the
    copies of weights in half precision, which live until its end, are then the first entry, named ``COPIES``.

    Two forward passes are done, without any collective; weights, gradients, running statistics, random states and
    modes are afterwards what they were. Where memory runs out, the fewest pictures that batch norm can take stand for
    all, times their number.

    Args:
        detector: with its norm policy applied; segments that are installed do not count.
        batch: on the device, the pictures of one forward pass of a process.
        targets: their ground truth.
    """
    older = torch.zeros((), requires_grad=True) * 1
    try:
        return _measure(detector, batch, targets)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
    older.backward()  # type: ignore[no-untyped-call]  # drops what a broken backward pass left to do on the CPU
    if batch.images.is_cuda:
        torch.cuda.empty_cache()
    groups = [m.policy.images or 1 for m in detector.modules() if isinstance(m, PolicyBatchNorm2d) and m.group is None]
    few, all = max(groups, default=1), len(batch.images)
    log.info("all %d pictures do not fit in memory without recomputation; measuring with %d", all, few)
    costs = _measure(detector, map_tensors(batch, lambda t: t[:few]), map_tensors(targets, lambda t: t[:few]))
    return [cost if cost.name == COPIES else _times(cost, all / few) for cost in costs]


def _times(cost: UnitCost, factor: float) -> UnitCost:
    return replace(
        cost,
        bytes=round(cost.bytes * factor),
        input_bytes=round(cost.input_bytes * factor),
        largest_bytes=round(cost.largest_bytes * factor),
        seconds=cost.seconds * factor,
    )


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether torch, a library of it or Python says that memory is short."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _LACK_OF_MEMORY
    )


def _measure(detector: Detector, batch: ImageBatch, targets: Targets) -> list[UnitCost]:
    """The first pass also pays for what is made once, such as oneDNN's primitives; the second one is timed."""
    with _undisturbed(detector, batch.images.device):
        most = _most_alive(detector, batch, targets)
        *costs, heads = _Pass(detector).run(batch, targets)
    heads = replace(heads, bytes=max(heads.bytes, most - total_bytes(costs) - heads.input_bytes))
    return [*costs, heads]


def total_bytes(costs: Iterable[UnitCost]) -> int:
    """What units keep altogether."""
    return sum(cost.bytes + cost.input_bytes for cost in costs)


@contextlib.contextmanager
def _undisturbed(detector: Detector, device: torch.device) -> Iterator[None]:
    """Within the block the detector trains as it is built; afterwards all is as it was."""
    modes = [(module, module.training) for module in detector.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in detector.buffers()]
    chosen = segments.installed(detector)
    with distributed.alone(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            segments.remove(detector)
            detector.train()
            yield
        finally:
            segments.restore(detector, chosen)
            for buffer, value in buffers:
                buffer.copy_(value)
            for module, training in modes:
                module.training = training


class _Call(NamedTuple):
    """A unit at work: its input with the versions that it had, and the clock."""

    unit: int
    inputs: list[tuple[Tensor, int]]
    began: Any


class _Pass:
    """One forward pass under observation."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.units = segments.find_units(detector)
        self.owned = {_key(tensor) for tensor in (*detector.parameters(), *detector.buffers())}
        self.weights = {(p.dtype, *sorted(p.shape)) for p in detector.parameters() if p.dim() > 1}
        self.copies: dict[int, int] = {}  # of weights up to the neck, by storage: bytes
        self.saved: dict[int, tuple[int, int | None]] = {}  # by storage: bytes, the unit or None
        self.calls: list[_Call] = []
        self.ends: dict[int, Any] = {}
        self.inside: int | None = None
        self.called: dict[str, int] = {}
        self.maps: set[int] = set()  # of the backbone
        self.outputs: list[Tensor] = []  # of the neck
        self.behind: set[int] = set()  # storages saved behind the neck

    def run(self, batch: ImageBatch, targets: Targets) -> list[UnitCost]:
        """The costs; everything that the pass kept is free again when it is gone."""
        with contextlib.ExitStack() as hooks, torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t):
            for handle in self._watch():
                hooks.callback(handle.remove)
            self.detector(batch, targets)
        return self._costs()

    def _watch(self) -> Iterator[Any]:
        """Hooks around every unit, and on the modules whose calls have to be known."""
        modules = dict(self.detector.named_modules())
        for number, unit in enumerate(self.units):
            first, last = _ends(unit, modules[unit.holder])

            def begin(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                self._begin(number, (args, kwargs))

            def end(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                self._end(number, output)

            yield first.register_forward_pre_hook(begin, with_kwargs=True)
            yield last.register_forward_hook(end)
        for name in {name for unit in self.units for name in (unit.holder, unit.stage)}:

            def count(module: nn.Module, args: Any, name: str = name) -> None:
                self.called[name] = self.called.get(name, 0) + 1

            yield modules[name].register_forward_pre_hook(count)
        yield self.detector.backbone.register_forward_hook(
            lambda module, args, output: self.maps.update(_key(tensor) for tensor in _tensors(output))
        )

    def _begin(self, number: int, arguments: Any) -> None:
        self.inside = number
        self.calls.append(_Call(number, [(t, t._version) for t in _tensors(arguments)], _now(arguments)))

    def _end(self, number: int, output: Any) -> None:
        self.inside = None
        self.ends[number] = _now(output)
        if self.units[number].name == segments.NECK:
            self.outputs = _tensors(output)

    def _save(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        size = tensor.untyped_storage().nbytes()
        if not self.outputs and self._is_copy(tensor):
            self.copies[key] = size
        elif key not in self.owned:
            self.saved.setdefault(key, (size, self.inside))
            if self.outputs:
                self.behind.add(key)
        return tensor

    def _is_copy(self, tensor: Tensor) -> bool:
        """Whether this is a weight in another precision; linear layers save it transposed."""
        return tensor.dtype in (torch.bfloat16, torch.float16) and any(
            (dtype, *sorted(tensor.shape)) in self.weights for dtype in (torch.float32, torch.float64)
        )

    def _costs(self) -> list[UnitCost]:
        once = [call for call in self.calls if [c.unit for c in self.calls].count(call.unit) == 1]
        borders = {_key(tensor) for call in once for tensor, _ in call.inputs} | {_key(t) for t in self.outputs}
        known = {call.unit for call in once}
        inner: dict[int | None, list[int]] = {None: [0]} | {number: [0] for number in known}
        heads = 0
        for key, (size, unit) in self.saved.items():
            if key in borders:
                continue
            if unit is None and key in self.behind:
                heads += size
            else:
                inner[unit if unit in known else None].append(size)
        seen: set[int] = set()
        units = [self._cost(call, inner[call.unit], seen) for call in once]
        outputs = self._size([t for t in self.outputs if _key(t) in self.saved], seen)
        copies = sum(self.copies.values())
        return [
            *([UnitCost(name=COPIES, bytes=copies)] if copies else []),
            UnitCost(name="backbone", bytes=sum(inner[None])),
            *_with_stages(units, self.called),
            UnitCost(name="heads", bytes=heads, input_bytes=outputs),
        ]

    def _cost(self, call: _Call, inside: list[int], seen: set[int]) -> UnitCost:
        unit = self.units[call.unit]
        kept = [tensor for tensor, _ in call.inputs if sum(inside) or _key(tensor) in self.saved]
        alone = unit.stop and not self.called.get(unit.holder)  # a chain whose children are called one by one
        holder, start, stop = (unit.name, 0, 0) if alone else (unit.holder, unit.start, unit.stop)
        return UnitCost(
            name=unit.name,
            bytes=sum(inside),
            input_bytes=self._size(kept, seen),
            largest_bytes=max(inside),
            seconds=_seconds(call.began, self.ends[call.unit]),
            holder=holder,
            start=start,
            stop=stop,
            stage=unit.stage,
            starts=all(tensor._version == version for tensor, version in call.inputs),
            bound=any(_key(tensor) in self.maps for tensor, _ in call.inputs),
        )

    def _size(self, tensors: list[Tensor], seen: set[int]) -> int:
        """The bytes of these storages that are not in ``seen`` yet."""
        sizes = {_key(t): t.untyped_storage().nbytes() for t in tensors if _key(t) not in seen | self.owned}
        seen.update(sizes)
        return sum(sizes.values())


@contextlib.contextmanager
def bytes_alive(device: torch.device, known: Collection[Tensor]) -> "Iterator[AliveOnCpu | AliveOnGpu]":
    """Counts within the block the bytes of tensors that are made and not freed; ``known`` are there before.

    Tensors without values (torch's fake ones) are counted as on the CPU: no allocator knows them.
    """
    if device.type == "cuda" and not any(isinstance(tensor, FakeTensor) for tensor in known):
        yield AliveOnGpu(device)
        return
    with AliveOnCpu(known) as alive:
        yield alive


class AliveOnCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Storages from the operator that makes them until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self.there = {tensor.untyped_storage()._cdata for tensor in known}

    def now(self) -> int:
        """The bytes that are alive."""
        return self.bytes

    def most(self) -> int:
        """The most that were alive at a time."""
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it made."""
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.there:
            return
        self.there.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.there.discard(key)
        self.bytes -= size


class AliveOnGpu:
    """The allocator's own numbers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def now(self) -> int:
        """The bytes that are alive."""
        return int(torch.cuda.memory_allocated(self.device)) - self.before

    def most(self) -> int:
        """The most that were alive at a time."""
        return int(torch.cuda.max_memory_allocated(self.device)) - self.before


def _most_alive(detector: Detector, batch: ImageBatch, targets: Targets) -> int:
    """The most bytes of a forward pass and of the backward pass up to the neck's maps."""
    maps: list[Tensor] = []
    handle = detector.neck.register_forward_hook(lambda module, args, output: maps.extend(_tensors(output)))
    given = _tensors([vars(batch), vars(targets)])
    with bytes_alive(batch.images.device, (*detector.parameters(), *detector.buffers(), *given)) as alive:
        losses = detector(batch, targets)
        handle.remove()
        trained = [tensor for tensor in maps if tensor.requires_grad]
        if trained:
            torch.autograd.grad(torch.stack(list(losses.values())).sum(), trained, allow_unused=True)
        return alive.most()


def _with_stages(costs: list[UnitCost], called: dict[str, int]) -> list[UnitCost]:
    """The same with ``whole`` filled in."""
    begun = [cost.stage for k, cost in enumerate(costs) if k == 0 or costs[k - 1].stage != cost.stage]
    return [replace(c, whole=called.get(c.stage) == 1 and begun.count(c.stage) == 1) for c in costs]


def _ends(unit: Unit, holder: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The first and the last module of a unit."""
    if not unit.stop:
        return holder, holder
    children = list(holder.children())
    return children[unit.start], children[unit.stop - 1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # tensors without values have no address of data


def _now(tree: Any) -> Any:
    """The moment, on the device that the tensors are on."""
    if not any(tensor.is_cuda for tensor in _tensors(tree)):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
