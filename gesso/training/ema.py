"""The exponential moving average of a module's weights and buffers, updated on the device."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Averages of all floating-point parameters and buffers of a module; other buffers are copied.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that a short run is not held at its first weights.

    Args:
        module: the module that is trained; it is not changed.
        decay: in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, alive: Tensor) -> None:
        """Moves the averages towards the module; ``alive`` is a 0-dim float tensor, 0 leaves them as they are.

        The module's own values must be finite: where a step is skipped, they are those from before it.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        weight = alive.double() * (1 - decay)
        state = module.state_dict()
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name, tensor in state.items():
            by_dtype.setdefault(tensor.dtype, []).append(name)
        for dtype, names in by_dtype.items():
            averages, values = [self.average[name] for name in names], [state[name] for name in names]
            if not dtype.is_floating_point:
                torch._foreach_copy_(averages, values)
                continue
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, weight.to(dtype))
            torch._foreach_add_(averages, steps)

    def swapped_in(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within the block the module has the averages; afterwards its own values, exactly."""
        return swapped(module, self.average)

    def load(self, average: dict[str, Tensor], updates: int) -> None:
        """Restores what a checkpoint holds. KeyError or RuntimeError where it is that of another module."""
        self.updates = updates
        for name, tensor in self.average.items():
            tensor.copy_(average[name])


@contextlib.contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the module has other ``values`` of some parameters and buffers; afterwards its own, exactly."""
    state = module.state_dict()
    own = {name: state[name].detach().clone() for name in values}
    module.load_state_dict(values, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(own, strict=False)
