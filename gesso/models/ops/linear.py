"""Linear layers by oneDNN on a CPU.

In float32 torch gives matrix products on a CPU to MKL, which uses half the width of the vector units on processors that
it does not favour; convolutions, and products in bfloat16, go to oneDNN. So do these layers: on an AVX-512 processor of
AMD's all three products of a training step take half the time. Elsewhere (a GPU, other dtypes, autocast, a compiled
graph, a torch without oneDNN) they are plain linear layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AVAILABLE = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., outputs) of (..., inputs)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``torch.nn.functional.linear``: (..., outputs) of x (..., inputs), weight (outputs, inputs) and a bias."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32
    if plain or not _AVAILABLE or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not x.numel():
        return F.linear(x, weight, bias)
    rows: Tensor = _Product.apply(x.flatten(0, -2), weight, bias)
    return rows.view(*x.shape[:-1], -1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        gradient = gradients[0].contiguous()
        return (
            _product(gradient, weight.t(), None) if for_x else None,
            _product(gradient.t(), x.t(), None) if for_weight else None,
            gradient.sum(dim=0) if for_bias else None,
        )
