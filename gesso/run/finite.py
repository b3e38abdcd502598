"""Finds the module that makes the first number that is not finite, forwards or backwards. Knows torch only.

Forwards it is the first call of a module to end with an output that is not finite after inputs that were: the innermost
one, or the module whose own code joins its parts. Backwards it is the same with gradients: all that come in through the
outputs are finite, and one inside is not.
"""

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where a number that is not finite came from.

    Attributes:
        module: its name; "" is the module that was watched.
        kind: the name of its class.
        what: the values that are not finite, such as "its output" or "the gradient of its input".
        bad: how many of them are not finite.
        values: how many there are.
        input_range: the least and the largest number of its inputs; None where they hold no floating point.
        rows: the rows of the values that hold one which is not finite.
        length: how many rows there are; 0 where the first dimension cannot be that of the batch.
    """

    module: str
    kind: str
    what: str
    bad: int
    values: int
    input_range: tuple[float, float] | None
    rows: tuple[int, ...]
    length: int


@dataclass(eq=False)
class _Call:
    """One call of a module; ``name`` and ``kind`` are its module's, ``above`` is the call that it is in.

    Attributes:
        input_range: as in ``Finding``, with nan or infinities where an input is not finite.
        reached: a gradient came in through an output.
        given_bad: one that came in was not finite.
        first: the first gradient inside that was not finite, and its place in the order of the backward pass.
    """

    name: str
    kind: str
    above: "_Call | None"
    input_range: tuple[float, float] | None
    reached: bool = False
    given_bad: bool = False
    first: tuple[int, Finding] | None = None

    @property
    def depth(self) -> int:
        """How many calls it is in."""
        return 0 if self.above is None else 1 + self.above.depth

    def finding(self, what: str, values: Tensor, *, batched: bool) -> Finding:
        """Describes ``values``, some of which are not finite."""
        bad = ~values.isfinite()
        batched = batched and values.ndim > 0
        rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if batched else []
        return Finding(
            module=self.name,
            kind=self.kind,
            what=what,
            bad=int(bad.sum()),
            values=values.numel(),
            input_range=self.input_range,
            rows=tuple(rows),
            length=len(values) if batched else 0,
        )


@dataclass
class Watch:
    """What is seen of a forward and a backward pass within ``watching``.

    Attributes:
        forward: the first module with an output that is not finite.
    """

    forward: Finding | None = None
    _calls: dict[str, list[_Call]] = field(default_factory=lambda: defaultdict(list))
    _open: list[_Call] = field(default_factory=list)
    _events: int = 0

    @property
    def backward(self) -> Finding | None:
        """The module where gradients ceased to be finite, after the backward pass; None where all of them are."""
        found = [
            (call.first[0], -call.depth, call.first[1])
            for calls in self._calls.values()
            for call in calls
            if call.first is not None and call.reached and not call.given_bad
        ]
        return min(found, key=lambda each: each[:2])[2] if found else None

    def begin(self, name: str, module: nn.Module, given: tuple[Any, Any]) -> tuple[Any, Any]:
        """A call begins. Its inputs get views of their own, so that their gradients are those of this call alone."""
        above = self._open[-1] if self._open else None
        call = _Call(name, type(module).__name__, above, _range(given))
        self._open.append(call)
        self._calls[name].append(call)

        def own(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            view: Tensor = torch.ops.aten.alias.default(tensor)  # view_as changes the strides of a batch of one
            view.register_hook(partial(self._gradient, call, "input"))  # type: ignore[no-untyped-call]
            return view

        return _mapped(given[0], own), _mapped(given[1], own)

    def end(self, output: Any) -> None:
        """The innermost call that is open ends."""
        call = self._open.pop()
        finite_inputs = call.input_range is None or all(map(math.isfinite, call.input_range))

        def look(tensor: Tensor) -> Tensor:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, call, "output"))  # type: ignore[no-untyped-call]
            if self.forward is None and finite_inputs and not _finite(tensor):
                self.forward = call.finding("its output", tensor.detach(), batched=True)
            return tensor

        _mapped(output, look)

    def weight(self, name: str, parameter: str, gradient: Tensor) -> None:
        """The gradient of a module's own parameter is there."""
        calls = [call for call in self._calls[name] if call.reached]
        if calls and not any(call.given_bad for call in calls):
            self._gradient(calls[-1], parameter, gradient)

    def _gradient(self, call: _Call, of: str, gradient: Tensor) -> None:
        """A gradient of a call's output, its input, or a parameter."""
        bad = not _finite(gradient)
        if of == "output":
            call.reached = True
            call.given_bad = call.given_bad or bad
        if not bad:
            return
        self._events += 1
        batched = of in ("input", "output")
        at: _Call | None = call.above if of == "output" else call
        while at is not None:
            if at.first is None:
                what = f"the gradient of its {of}" if at is call else f"the gradient of the {of} of {call.name}"
                at.first = self._events, at.finding(what, gradient, batched=batched)
            at = at.above


@contextlib.contextmanager
def watching(module: nn.Module) -> Iterator[Watch]:
    """Watches every call within ``module`` in the block. Activations there are not computed in place any more.

    It waits for the device at every module.
    """
    watch, hooks = Watch(), []
    for name, inner in module.named_modules():
        if isinstance(getattr(inner, "inplace", None), bool):
            inner.inplace = False  # the gradient of an input that is overwritten is lost
        begin: Callable[..., Any] = partial(_begin, watch, name)
        hooks.append(inner.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(inner.register_forward_hook(partial(_end, watch)))
        for parameter, value in inner.named_parameters(recurse=False):
            if value.requires_grad:
                hooks.append(value.register_hook(partial(watch.weight, name, parameter)))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _begin(watch: Watch, name: str, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return watch.begin(name, module, (args, kwargs))


def _end(watch: Watch, module: nn.Module, args: Any, output: Any) -> None:
    watch.end(output)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to every tensor in tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [_mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_mapped(item, function) for item in value]
    if isinstance(value, Mapping):
        return {key: _mapped(item, function) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _mapped(getattr(value, f.name), function) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _range(value: Any) -> tuple[float, float] | None:
    """The least and the largest number of all floating-point tensors in it; nan where one is nan."""
    ends: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel():
            ends.append(torch.stack(torch.aminmax(tensor.detach())).to("cpu", torch.float64))
        return tensor

    _mapped(value, look)
    if not ends:
        return None
    least, largest = torch.aminmax(torch.stack(ends))
    return float(least), float(largest)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
