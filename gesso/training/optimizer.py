"""SGD and AdamW with parameter groups. Fused kernels throughout: they honour a flag on the device that skips a step.

Momentum is torch's (velocity without the rate, Goyal et al., section 3), so a changing rate needs no correction.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gesso.errors import ConfigError

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_TABLES = {"pos_embed", "absolute_pos_embed", "relative_position_bias_table", "cls_token", "logit_scale"}


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum."""

    rate: float = 0.02
    """The learning rate before the schedule."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 1e-4
    """Weight decay of weights."""
    norm_decay: float = 0.0
    """Weight decay of norm parameters, of other scales (1-dim parameters), and of position tables."""
    bias_decay: float = 0.0
    """Weight decay of biases."""
    backbone_factor: float = 1.0
    """The backbone's learning rate as a multiple of ``rate``."""

    def __post_init__(self) -> None:
        _check_optimizer(self.rate, self.weight_decay, self.norm_decay, self.bias_decay, self.backbone_factor)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer: momentum must lie in [0, 1), found {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter)."""

    rate: float = 1e-4
    """The learning rate before the schedule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    weight_decay: float = 0.05
    """Weight decay of weights."""
    norm_decay: float = 0.0
    """Weight decay of norm parameters, of other scales (1-dim parameters), and of position tables."""
    bias_decay: float = 0.0
    """Weight decay of biases."""
    backbone_factor: float = 1.0
    """The backbone's learning rate as a multiple of ``rate``."""

    def __post_init__(self) -> None:
        _check_optimizer(self.rate, self.weight_decay, self.norm_decay, self.bias_decay, self.backbone_factor)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer: betas must lie in [0, 1), found {self.betas}")


def _check_optimizer(rate: float, *others: float) -> None:
    if not rate > 0:
        raise ConfigError(f"optimizer: rate must be above 0, found {rate}")
    if min(others) < 0:
        raise ConfigError("optimizer: weight decays and factors must not be negative")


def build_optimizer(module: nn.Module, config: SGD | AdamW) -> torch.optim.Optimizer:
    """An optimizer over the parameters of ``module`` that are trained, each once.

    Groups carry ``rate``, their own learning rate before the schedule. Parameters below a child named ``backbone`` get
    ``backbone_factor`` times the rate. Set ``optimizer.found_inf``, a 0-dim float32 tensor on the device, to 1 to make
    ``step`` change nothing, and to 0 otherwise.

    Raises:
        ConfigError: nothing is trained.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        factor = config.backbone_factor if "backbone" in prefix.split(".") else 1.0
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups.setdefault((config.rate * factor, _decay(config, part, name, parameter)), []).append(parameter)
    if not groups:
        raise ConfigError("optimizer: no parameter of the detector is trained", remedy="Freeze less.")
    options = [
        {"params": parameters, "lr": rate, "rate": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if isinstance(config, AdamW):
        return torch.optim.AdamW(options, lr=config.rate, betas=config.betas, fused=True)
    optimizer = torch.optim.SGD(options, lr=config.rate, momentum=config.momentum, fused=True)
    if config.momentum:
        # torch would make the buffers at the first step, uninitialised where that step is skipped
        for parameter in (p for group in groups.values() for p in group):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _decay(config: SGD | AdamW, part: nn.Module, name: str, parameter: nn.Parameter) -> float:
    if isinstance(part, _NORMS) or name in _TABLES:
        return config.norm_decay
    if name == "bias":
        return config.bias_decay
    return config.norm_decay if parameter.ndim <= 1 else config.weight_decay


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores momentum and moments in the memory layout of the parameters.

    Fused kernels read memory as it lies: a moment in another layout than its parameter (a checkpoint from before
    channels_last) would be applied to the wrong weights without any error.

    Raises:
        ValueError: the groups of ``saved`` are not those of ``optimizer``.
    """
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to ``factor`` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
