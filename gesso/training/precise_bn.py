"""Precise batch norm: the running statistics of trained weights, taken anew over many pictures.

A running mean follows weights that have moved on since, and forgets: it is noisy, most of all where batches are small
or the rate is high. Here the mean and the variance of each batch norm's input are those of a whole population of
pictures, with the weights held. Each picture still passes in a batch of training, normalised by that batch.

Sources: Rethinking "Batch" in BatchNorm (Wu and Johnson 2021), section 3; precise batch norm of FAIR.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gesso import distributed
from gesso.models.ops.sync_norm import merge
from gesso.random_key import fold
from gesso.structures import to_device
from gesso.training.ema import swapped
from gesso.training.loop import Batches
from gesso.training.stage import Stage
from gesso.training.step import mixed_precision, parts_of

Population = tuple[Tensor, Tensor, Tensor]
"""Count, mean and summed squared deviations of a channel's values, each (C,) float64."""


def precise_statistics(stage: Stage, batches: Batches) -> dict[str, Tensor]:
    """The running statistics that the weights of a finished stage should have, over ``config.precise_bn`` pictures.

    The weights are the averages, where the stage keeps them. Nothing in the stage changes. All processes take part,
    and get the same.

    Args:
        stage: after a step.
        batches: that go on from ``stage.sample``, as training would; as many whole ones are drawn as hold the pictures.

    Returns:
        Mean and unbiased variance by name (``neck.norm.running_mean``), of the module's types; {} where no batch norm
        takes statistics in training (the policies affine, fixed and group_norm).
    """
    module, was_training = stage.module, stage.module.training
    module.train()
    norms = {name: part for name, part in module.named_modules() if _takes_statistics(part)}
    try:
        found = _populations(stage, norms, batches) if norms else {}
    finally:
        module.train(was_training)
    state = module.state_dict()
    statistics = {}
    for name, (count, mean, deviations) in found.items():
        statistics[f"{name}.running_mean"] = mean
        statistics[f"{name}.running_var"] = deviations / (count - 1).clamp(min=1)
    return {name: value.to(state[name].dtype) for name, value in statistics.items()}


def _takes_statistics(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training and part.running_mean is not None


@torch.no_grad()
def _populations(stage: Stage, norms: dict[str, nn.Module], batches: Batches) -> dict[str, Population]:
    """The inputs of every norm, over all batches and all processes."""
    config, found = stage.config, dict[str, Population]()
    buffers = dict(stage.module.named_buffers())
    held = {name: value for name, value in stage.module.state_dict().items() if name in buffers}
    averages = {} if stage.ema is None else stage.ema.average
    hooks = [norm.register_forward_pre_hook(partial(_add, found, name)) for name, norm in norms.items()]
    try:
        with swapped(stage.module, held | averages):  # passes in training mode move the running statistics
            for number in range(-(-config.precise_bn // config.batch_size)):
                torch.manual_seed(fold(stage.seed, stage.step + number, distributed.rank()))  # as a step does
                batch, targets = next(batches)
                whole = to_device(batch, stage.device), to_device(targets, stage.device)
                for part in parts_of(whole, config.accumulate):
                    with mixed_precision(stage):
                        stage.module(*part)
    finally:
        for hook in hooks:
            hook.remove()
    return _over_processes(found)


def _add(found: dict[str, Population], name: str, norm: nn.Module, given: tuple[Any, ...]) -> None:
    """Adds an input (B, C, ...) of a norm to its population."""
    values = given[0].detach()
    values = values if values.dtype == torch.float64 else values.float()
    var, mean = torch.var_mean(values, [k for k in range(values.ndim) if k != 1], correction=0)
    count = torch.full_like(mean, values.numel() // values.shape[1], dtype=torch.float64)
    new = count, mean.double(), var.double() * count
    found[name] = _merged([found[name], new]) if name in found else new


def _merged(populations: list[Population]) -> Population:
    count, mean, deviations = (torch.stack(values) for values in zip(*populations, strict=True))
    return merge(count, mean, deviations)


def _over_processes(own: dict[str, Population]) -> dict[str, Population]:
    """The populations of all processes together, by one exchange."""
    joined = torch.stack([torch.cat(values) for values in zip(*own.values(), strict=True)])  # (3, all channels)
    every = distributed.all_gather(joined, name="precise batch norm")
    whole = _merged([(one[0], one[1], one[2]) for one in every])
    pieces = [torch.split(values, [len(mean) for _, mean, _ in own.values()]) for values in whole]
    return dict(zip(own, zip(*pieces, strict=True), strict=True))
