"""Loading weights, with a report in which every name stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gesso.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor of a module and of a state dictionary.

    Attributes:
        loaded: names that were copied.
        missing: names of the module that the state does not have; they keep their values.
        unexpected: names of the state that the module does not have.
        wrong_shape: (name, shape in the module, shape in the state); not copied.
        left_out: names of the state in parts that were not asked for.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    left_out: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Every tensor of the module was loaded, and every tensor of the state was used."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.left_out)

    def lines(self) -> list[str]:
        """The report for the log: a summary, then each kind of trouble with all its names."""
        out = [f"{len(self.loaded)} tensors loaded"]
        for title, names in (
            ("missing, left as they are", self.missing),
            ("unexpected, not used", self.unexpected),
            ("of another shape, not used", [f"{n} {want} <- {got}" for n, want, got in self.wrong_shape]),
            ("left out as asked", self.left_out),
        ):
            if names:
                out.append(f"{len(names)} {title}: {', '.join(names)}")
        return out


@torch.no_grad()
def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, parts: Sequence[str] | None = None) -> LoadReport:
    """Copies what fits of ``state`` into the parameters and buffers of ``module``, and reports the rest.

    Args:
        module: changed in place; dtypes and devices stay as they are.
        state: tensors by name, as of ``module.state_dict()``.
        parts: only these submodules, such as ``("backbone", "fpn")``; None = all.

    Raises:
        ConfigError: a part does not exist.
    """
    own = module.state_dict()
    known = {name.split(".")[0] for name in own}
    for part in parts or ():
        if not any(name == part or name.startswith(part + ".") for name in own):
            raise ConfigError(f"the model has no part '{part}'", remedy=nearest(part, known))

    def wanted(name: str) -> bool:
        return parts is None or any(name == part or name.startswith(part + ".") for part in parts)

    loaded: list[str] = []
    wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name, target in own.items():
        if not wanted(name) or name not in state:
            continue
        if target.shape != state[name].shape:
            wrong.append((name, tuple(target.shape), tuple(state[name].shape)))
            continue
        target.copy_(state[name])
        loaded.append(name)
    return LoadReport(
        loaded=tuple(loaded),
        missing=tuple(name for name in own if wanted(name) and name not in state),
        unexpected=tuple(name for name in state if wanted(name) and name not in own),
        wrong_shape=tuple(wrong),
        left_out=tuple(name for name in state if not wanted(name)),
    )
