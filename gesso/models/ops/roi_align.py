"""RoIAlign over all levels of a pyramid as one weighted gather.

Shape letters: B images, R RoIs an image, K = B * R, C channels, S output side, Q samples a cell and axis.

All levels lie in one flat table of [pixels, C]; each output cell is a weighted sum of 4 Q^2 of its rows, which is what
``embedding_bag`` computes. So there is no loop that selects the RoIs of a level, and no shape that depends on data.

Source: Mask R-CNN, section 3 (RoIAlign); Feature Pyramid Networks, section 4.2, equation 1 (the level of a RoI).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import boxes as geometry


def roi_levels(boxes: Tensor, *, num_levels: int, canonical_level: int, canonical_size: float) -> Tensor:
    """The pyramid level (...,) int64 of boxes (..., 4), counted from 0 = P2.

    k = floor(k0 + log2(sqrt(w h) / size)), clamped to the levels that exist.
    """
    side = geometry.area(boxes).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_size) + 1e-6)
    return level.clamp(2, num_levels + 1).long().sub(2).clamp(0, num_levels - 1)


def _pick(level: Tensor, values: Sequence[int]) -> Tensor:
    """values[level] for int64 levels (K,), without copying a table to the device."""
    picked = torch.full_like(level, values[0])
    for k, value in enumerate(values[1:], start=1):
        picked = torch.where(level == k, value, picked)
    return picked


def _axis(start: Tensor, length: Tensor, limit: Tensor, out: int, samples: int) -> tuple[Tensor, Tensor]:
    """Pixels (K, out, 2 Q) int64 that one axis of the output cells reads, and their weights."""
    n = torch.arange(out * samples, device=start.device)
    cell, part = n.div(samples, rounding_mode="floor"), (n % samples) + 0.5
    step = (length / out)[:, None]
    at = start[:, None] + cell * step + part * step / samples
    last = (limit - 1)[:, None]
    inside = (at >= -1) & (at <= limit[:, None])
    at = at.clamp(min=0)
    low = torch.minimum(at.long().clamp(min=0), last)
    fraction = torch.where(low >= last, 0.0, at - low)
    high = torch.minimum(low + 1, last)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * (inside / samples)[..., None]
    return torch.stack([low, high], dim=-1).view(-1, out, 2 * samples), weight.view(-1, out, 2 * samples)


class _WeightedGather(torch.autograd.Function):
    """sum_k weight[n, k] * table[index[n, k]], with a gradient for the table alone.

    The backward pass is the same gather the other way round: the reads are sorted by pixel, and each pixel's gradient
    is the weighted sum of the cells that read it. That adds in a fixed order, and takes less than half the time of
    torch's own.
    """

    @staticmethod
    def forward(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        table, index, weight = inputs
        ctx.save_for_backward(index, weight)
        ctx.pixels = table.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        pixel, read = index.flatten().int().sort(stable=True)  # 32-bit keys sort in half the time
        start = torch.searchsorted(pixel, torch.arange(ctx.pixels, device=pixel.device, dtype=torch.int32))
        cell = read.div(index.shape[1], rounding_mode="floor")
        shares = weight.flatten().index_select(0, read)
        out = F.embedding_bag(cell, gradients[0].contiguous(), start, per_sample_weights=shares, mode="sum")
        return out, None, None


def multilevel_roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[int],
    *,
    output_size: int = 7,
    sampling_ratio: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
    aligned: bool = False,
) -> Tensor:
    """Features of each RoI from the level that fits its size; equals ``torchvision.ops.MultiScaleRoIAlign``.

    Keep the maps channels_last, then the table needs no transposition. Half-precision maps are read in float32; the
    gradient flows to the maps, not to the boxes.

    Args:
        maps: P2, P3, ... each (B, C, H, W); one map alone is used for every RoI.
        boxes: (B, R, 4) xyxy in pixels of the padded picture; empty slots may hold anything finite or not.
        strides: pixels of the picture per cell of each map.
        output_size: S, cells a side.
        sampling_ratio: Q, samples a cell and axis.
        canonical_level: the level k0 of a RoI of ``canonical_size`` pixels a side.
        canonical_size: see there.
        aligned: shift by half a pixel (the corrected form); False is what torchvision's detectors use.

    Returns:
        (B * R, C, S, S) in channels_last order, float32, or float64 for float64 maps.
    """
    B, C = maps[0].shape[:2]
    heights, widths = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
    first = [0]
    for m in maps[:-1]:
        first.append(first[-1] + B * m.shape[2] * m.shape[3])
    dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    rois = boxes.detach().to(dtype).reshape(-1, 4)
    image = torch.arange(B, device=rois.device).repeat_interleave(boxes.shape[1])
    level = roi_levels(rois, num_levels=len(maps), canonical_level=canonical_level, canonical_size=canonical_size)
    height, width, base = _pick(level, heights), _pick(level, widths), _pick(level, first)
    corners = rois / _pick(level, strides)[:, None] - (0.5 if aligned else 0.0)
    start, size = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    y, wy = _axis(start[:, 1], size[:, 1], height, output_size, sampling_ratio)
    x, wx = _axis(start[:, 0], size[:, 0], width, output_size, sampling_ratio)
    row = (base + image * height * width)[:, None, None] + y * width[:, None, None]
    cells, reads = rois.shape[0] * output_size * output_size, 4 * sampling_ratio * sampling_ratio
    index = (row[:, :, None, :, None] + x[:, None, :, None, :]).view(cells, reads)
    weight = (wy[:, :, None, :, None] * wx[:, None, :, None, :]).view(cells, reads)
    table = torch.cat([m.permute(0, 2, 3, 1).reshape(-1, C).to(dtype) for m in maps])
    pooled: Tensor = _WeightedGather.apply(table, index, weight)
    return pooled.view(-1, output_size, output_size, C).permute(0, 3, 1, 2)
