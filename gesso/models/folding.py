"""A copy of a model for inference alone, whose batch norms are folded into the convolutions before them.

In evaluation a batch norm is a factor and a shift of each channel, which the weights of the convolution can carry: one
pass less over every map. The source is Jacob et al. 2018, section 3.2 (there for quantisation).
"""

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from gesso.models.model import Model
from gesso.structures import ImageBatch

T = TypeVar("T", bound=Model)
_TRIAL = (64, 96)
_TOLERANCE = 1e-3


class _Rest(nn.Module):
    """What stays of a batch norm: timm's carry a drop and an activation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.drop = getattr(norm, "drop", None) or nn.Identity()
        self.act = getattr(norm, "act", None) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(x))
        return out


@torch.inference_mode(False)
@torch.no_grad()
def fold_batch_norm(model: T) -> T:
    """A copy in evaluation mode that gives the same predictions up to rounding, with fewer passes.

    Which convolution stands before which norm is seen in a trial on a small picture of noise. Where its
    maps are no longer the same, as when a convolution's output is read elsewhere too, the copy is not
    folded.
    """
    plain = copy.deepcopy(model).eval()
    batch = _noise(plain)
    pairs = _pairs(plain, batch)
    if not pairs:
        return plain
    folded = copy.deepcopy(plain)
    modules = dict(folded.named_modules())
    for conv_name, norm_name in pairs:
        _replace(folded, conv_name, fuse_conv_bn_eval(modules[conv_name], modules[norm_name]))
        _replace(folded, norm_name, _Rest(modules[norm_name]).eval())
    folded = folded.to(memory_format=torch.channels_last)
    before, after = plain.maps(batch), folded.maps(batch)
    same = all(_close(before[name], after[name]) for name in before)
    return folded if same else plain


def _pairs(model: Model, batch: ImageBatch) -> list[tuple[str, str]]:
    """(convolution, norm) by name, where the norm's input is the convolution's output and both run together only."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: list[tuple[str, str]] = []
    runs: Counter[str] = Counter()

    def after_conv(name: str, output: Tensor) -> None:
        runs[name] += 1
        made[id(output)] = (name, output)  # the tensor is kept, so that no other gets its number

    def before_norm(name: str, given: Tensor) -> None:
        runs[name] += 1
        if id(given) in made:
            found.append((made[id(given)][0], name))

    hooks = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(lambda _, __, out, name=name: after_conv(name, out)))
        elif isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(lambda _, given, name=name: before_norm(name, given[0])))
    model(batch)
    for hook in hooks:
        hook.remove()
    times = Counter(found)
    return [pair for pair in times if runs[pair[0]] == runs[pair[1]] == times[pair]]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(a.abs().max())
    return bool(((a - b).abs() <= _TOLERANCE * max(scale, 1e-6)).all())


def _noise(model: Model) -> ImageBatch:
    """One small picture on the model's device."""
    device = model.mean.device
    height, width = _TRIAL
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[height, width]], device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    images = torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)
    return ImageBatch(
        images=images.to(device),
        sizes=sizes,
        scale=torch.ones(1, 2, device=device),
        original_sizes=sizes,
        image_index=one,
        key=one,
    )
