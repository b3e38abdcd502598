"""Batch norm whose statistics are taken over the pictures of a group of processes, as two torch operators.

MegDet (Peng et al. 2018), section 3.2, Algorithm 1. ``batch_statistics`` gathers count, mean and summed squared
deviations of every process in one collective and merges them by Chan's formula, which equals the two reductions of
Algorithm 1 and, unlike E[x^2] - mean^2, does not cancel. ``normalise_batch`` applies the statistics; its backward
pass is that of batch norm over all the pictures of the group, with one collective. A process without pictures has
weight 0, and takes part. Both operators look at the group when they run: within ``distributed.alone`` they are plain
batch norm.

On a CUDA device they are torch's kernels for synchronised batch norm, and the host never waits. On the CPU, where
torch has no such module, they are torch's kernels for plain batch norm with the sums exchanged in between. Compiled
graphs hold them whole, and all processes of a group must run the same graph, so that their collectives meet in order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import distributed

_ROWS = 1024
"""Positions whose statistics one kernel call takes on the CPU: it adds up in the dtype of the input, one position after
the other, so that long sums lose digits (1e-4 of the variance after 3e5 positions of mean 5 and deviation 1)."""
_TINY = 1e-12
"""Added to local variances on a CUDA device, where their inverse roots are exchanged; taken off again after merging."""


def merge(count: Tensor, mean: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of k sets together, from those of each (Chan, Golub and LeVeque 1983, for k sets at once).

    Args:
        count: (k, 1) numbers of values.
        mean: (k, C) means; of an empty set anything finite.
        deviations: (k, C) sums of squared deviations from the set's own mean; 0 of an empty set.

    Returns:
        Count (1,), mean (C,) and deviations (C,) of all values; zeros where there is none.
    """
    total = count.sum(0)
    merged = (count * mean).sum(0) / total.clamp(min=1)
    return total, merged, (deviations + count * (mean - merged).square()).sum(0)


def _memory_format(input: Tensor) -> torch.memory_format:
    """The format that outputs have: channels_last where the input has it."""
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _local_statistics(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (1,), mean (C,) and summed squared deviations (C,) of (B, C, H, W) on the CPU, in float64."""
    rows = input.permute(0, 2, 3, 1).reshape(-1, input.shape[1])
    if len(rows) == 0:
        nothing = rows.new_zeros(input.shape[1], dtype=torch.float64)
        return nothing[:1], nothing, nothing
    parts = torch.split(rows, _ROWS)
    unused = rows.new_zeros(input.shape[1], dtype=_statistics_dtype(input))  # its dtype is that of the results
    found = [torch.batch_norm_update_stats(part, unused, unused, 0.0) for part in parts]
    mean, var = (torch.stack(values).double() for values in zip(*found, strict=True))
    count = torch.tensor([[len(part)] for part in parts], dtype=torch.float64)
    return merge(count, mean, var * count) if len(parts) > 1 else (count[0], mean[0], var[0] * count[0])


def _merged_on_cpu(input: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    gathered = distributed.all_gather(torch.cat(_local_statistics(input)), group, name="batch norm")
    C = input.shape[1]
    count, mean, deviations = merge(*torch.split(gathered, [1, C, C], dim=1))
    return mean, deviations / count.clamp(min=1), count[0]


def _merged_on_cuda(input: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's module drops the processes without pictures by a mask, which waits for the host; here they come last."""
    C, dtype = input.shape[1], _statistics_dtype(input)
    if input.numel() == 0:
        mean, inverse = input.new_zeros(C, dtype=dtype), input.new_ones(C, dtype=dtype)
    else:
        mean, inverse = torch.batch_norm_stats(input.contiguous(memory_format=_memory_format(input)), _TINY)
    own = torch.full((1,), input.numel() // C, dtype=dtype, device=input.device)
    gathered = distributed.all_gather(torch.cat([own, mean, inverse]), group, name="batch norm")
    gathered = gathered.index_select(0, gathered[:, 0].argsort(descending=True, stable=True))
    counts, means, inverses = (part.contiguous() for part in torch.split(gathered, [1, C, C], dim=1))
    # The first argument says only which dtype the counts have.
    mean, inverse = torch.batch_norm_gather_stats_with_counts(
        means, means, inverses, None, None, 0.0, _TINY, counts.flatten()
    )
    count = counts.sum()
    var = (inverse.pow(-2) - _TINY).clamp(min=0)
    return torch.where(count > 0, mean, 0), torch.where(count > 0, var, 0), count


@torch.library.custom_op("gesso::batch_statistics", mutates_args=())
def batch_statistics(input: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of each channel over the pictures of all processes of a group; one collective, no gradient.

    Args:
        input: (B, C, H, W) floating point, detached; B may differ from process to process and may be 0.
        group: a handle of ``distributed.group``.

    Returns:
        Mean (C,), biased variance (C,) and the number of values of a channel (), equal in all processes of the group;
        float64 for float64, else float32. All 0 where no process has a picture.
    """
    found = _merged_on_cuda(input, group) if input.is_cuda else _merged_on_cpu(input, group)
    mean, var, count = (value.to(_statistics_dtype(input)) for value in found)
    return mean, var, count


@batch_statistics.register_fake
def _(input: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype, C = _statistics_dtype(input), input.shape[1]
    return input.new_empty(C, dtype=dtype), input.new_empty(C, dtype=dtype), input.new_empty((), dtype=dtype)


@torch.library.custom_op("gesso::normalise_batch", mutates_args=())
def normalise_batch(
    input: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor, group: int, eps: float
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, as batch norm over the pictures of a group.

    The gradient of ``input`` takes in that mean and var depend on the pictures of all processes of the group, at the
    cost of one collective. Those of weight and bias are of this process's pictures alone, as those of other
    parameters are. A second derivative is not defined.

    Args:
        input: (B, C, H, W) floating point; B may be 0.
        weight: (C,) of any floating-point dtype.
        bias: (C,) of the same dtype.
        mean: (C,), var (C,) and count () as ``batch_statistics`` of this input gives them.
        var: (C,)
        count: ()
        group: a handle of ``distributed.group``.
        eps: added to the variance.

    Returns:
        (B, C, H, W) of the dtype of ``input``, in its memory format.
    """
    form = _memory_format(input)
    if input.numel() == 0:
        return torch.empty_like(input, memory_format=form)
    input = input.contiguous(memory_format=form)
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    if input.is_cuda:
        out = torch.batch_norm_elemt(input, weight, bias, mean, (var + eps).rsqrt(), eps)
    else:
        out = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
    return out.contiguous(memory_format=form)


@normalise_batch.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor, group: int, eps: float
) -> Tensor:
    return torch.empty_like(input, memory_format=_memory_format(input))


@torch.library.custom_op("gesso::normalise_batch_backward", mutates_args=())
def _normalise_batch_backward(
    gradient: Tensor, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor, count: Tensor, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input (B, C, H, W), weight (C,) and bias (C,) from that of the output.

    With xhat the normalised input, s = weight / sqrt(var + eps) and both sums over the group's n values of a channel:
    s * (gradient - sum(gradient) / n - xhat * sum(gradient * xhat) / n).
    """
    form = _memory_format(input)
    C, dtype = input.shape[1], weight.dtype
    weight, inverse = weight.to(mean.dtype), (var + eps).rsqrt()
    if input.numel() == 0:
        distributed.all_reduce_sum(mean.new_zeros(2 * C), group, name="batch norm")
        nothing = torch.zeros_like(weight, dtype=dtype)
        return torch.empty_like(input, memory_format=form), nothing, nothing.clone()
    input, gradient = (value.contiguous(memory_format=form) for value in (input, gradient))
    if input.is_cuda:
        of_bias, products, d_weight, d_bias = torch.batch_norm_backward_reduce(
            gradient, input, mean, inverse, weight, True, True, True
        )
        sums = distributed.all_reduce_sum(torch.cat([of_bias, products]), group, name="batch norm")
        of_bias, products = torch.split(sums, C)
        d_input = torch.batch_norm_backward_elemt(
            gradient, input, mean, inverse, weight, of_bias, products, count.to(torch.int32).view(1)
        )
    else:
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, var, None, None, False, eps, [False, True, True]
        )
        sums = distributed.all_reduce_sum(torch.cat([d_bias, d_weight]), group, name="batch norm")
        scale = weight * inverse
        shift, slope = (scale * part / count for part in torch.split(sums, C))
        mean, slope, shift, scale = (value.view(C, 1, 1) for value in (mean, slope * inverse, shift, scale))
        d_input = (input - mean).mul_(-slope).sub_(shift).addcmul_(gradient, scale)
    return d_input.to(input.dtype).contiguous(memory_format=form), d_weight.to(dtype), d_bias.to(dtype)


@_normalise_batch_backward.register_fake
def _(
    gradient: Tensor, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor, count: Tensor, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_input = torch.empty_like(input, memory_format=_memory_format(input))
    return d_input, torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, mean, var, count, ctx.group, ctx.eps = inputs
    ctx.save_for_backward(input, weight, mean, var, count)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = _normalise_batch_backward(gradient, *ctx.saved_tensors, ctx.group, ctx.eps)
    return (*found, None, None, None, None, None)


normalise_batch.register_autograd(_backward, setup_context=_setup_context)
