"""RoIAlign over all levels of a pyramid, as one torch operator.

Shape letters: B images, R RoIs a row of boxes, K = all RoIs, C channels, S output side, Q samples a cell and axis.

On the CPU, the levels lie in one table of [pixels, C]; each output cell is a weighted sum of 4 Q^2 of its rows, which
is what ``embedding_bag`` computes. The backward pass is the same gather the other way round: the reads are sorted by
pixel, and each pixel's gradient is the weighted sum of the cells that read it. That adds in a fixed order. On a CUDA
device two Triton kernels do the work (``triton_roi_align.py``); the backward one adds in no fixed order, so the gather
takes its place under ``torch.use_deterministic_algorithms(True)``, and both ways for float64 or where there is no
Triton. No shape depends on data and the host never waits, whichever runs.

Source: Mask R-CNN, section 3 (RoIAlign); Feature Pyramid Networks, section 4.2, equation 1 (the level of a RoI);
R-FCN, section 2 (position-sensitive cells).
"""

import functools
import importlib
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import boxes as geometry


def roi_levels(
    boxes: Tensor, *, num_levels: int, canonical_level: int, canonical_size: float, first_level: int = 2
) -> Tensor:
    """The pyramid level (...,) int64 of boxes (..., 4), counted from 0 = ``first_level``.

    k = floor(k0 + log2(sqrt(w h) / size)), clamped to the levels that exist; the first where a side is no number.
    """
    side = geometry.area(boxes).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_size) + 1e-6) - first_level
    return torch.where(level > 0, level, 0).clamp(max=num_levels - 1).long()


def _pick(level: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """values[level] for levels (K,), without copying a table to the device."""
    picked = torch.full_like(level, values[0], dtype=dtype)
    for k, value in enumerate(values[1:], start=1):
        picked = torch.where(level == k, value, picked)
    return picked


def _extent(rois: Tensor, level: Tensor, strides: Sequence[float], size: int, aligned: bool) -> Tensor:
    """Start and length of a cell (K, 4), y x y x, in pixels of the level's map."""
    corners = rois / _pick(level, strides, rois.dtype)[:, None] - (0.5 if aligned else 0.0)
    start, length = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        length = length.clamp(min=1)
    return torch.cat([start.flip(1), length.flip(1) / size], dim=1)


def _axis(start: Tensor, step: Tensor, limit: Tensor, out: int, samples: int) -> tuple[Tensor, Tensor]:
    """Pixels (K, out, 2 Q) that one axis of the output cells reads, and their weights; nothing outside is read."""
    n = torch.arange(out * samples, device=start.device, dtype=limit.dtype)
    cell, part = n.div(samples, rounding_mode="floor"), (n % samples) + 0.5
    at = start[:, None] + cell * step[:, None] + part * step[:, None] / samples
    last = (limit - 1)[:, None]
    inside = (at >= -1) & (at <= limit[:, None])
    at = torch.where(inside, at, 0).clamp(min=0)
    low = torch.minimum(at.to(limit.dtype), last)
    fraction = torch.where(low >= last, 0, at - low)
    high = torch.minimum(low + 1, last)
    weight = torch.stack([1 - fraction, fraction], dim=-1) * (inside / samples).to(at.dtype)[..., None]
    return torch.stack([low, high], dim=-1).view(-1, out, 2 * samples), weight.view(-1, out, 2 * samples)


def _reads(
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    shapes: Sequence[tuple[int, int, int]],
    size: int,
    samples: int,
    position_sensitive: bool,
) -> tuple[Tensor, Tensor]:
    """Table rows (K S S, 4 Q Q) that each cell reads, int32 where that is enough, and their weights.

    ``shapes`` holds images, height and width of each level.
    """
    first = [0]
    for images, height, width in shapes:
        first.append(first[-1] + images * height * width)
    depth = size * size if position_sensitive else 1
    dtype = torch.int32 if first[-1] * depth < 2**31 else torch.int64
    H = _pick(level, [height for _, height, _ in shapes], dtype)
    W = _pick(level, [width for _, _, width in shapes], dtype)
    base = _pick(level, first[:-1], dtype) + image.to(dtype) * H * W
    y, y_weight = _axis(extent[:, 0], extent[:, 2], H, size, samples)
    x, x_weight = _axis(extent[:, 1], extent[:, 3], W, size, samples)
    row = base[:, None, None] + y * W[:, None, None]
    index = row[:, :, None, :, None] + x[:, None, :, None, :]
    if position_sensitive:
        cell = torch.arange(depth, device=index.device, dtype=dtype).view(1, size, size, 1, 1)
        index = index * depth + cell
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    shape = (len(extent) * size * size, 4 * samples * samples)
    return index.view(shape), weight.view(shape)


def _pooled_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, imported when the first CUDA tensor comes; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("gesso.models.ops.triton_roi_align")


@torch.library.custom_op("gesso::roi_align", mutates_args=())
def _roi_align(
    maps: Sequence[Tensor],
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    output_size: int,
    sampling_ratio: int,
    position_sensitive: bool,
) -> Tensor:
    """Cells (K, S, S, C) in float32 or float64 of RoIs with ``extent`` (K, 4), ``level`` (K,), ``image`` (K,)."""
    kernels = _kernels() if extent.is_cuda and extent.dtype == torch.float32 else None
    if kernels is not None:
        tables = [m.permute(0, 2, 3, 1).contiguous() for m in maps]
        cells: Tensor = kernels.forward(tables, extent, level, image, output_size, sampling_ratio, position_sensitive)
        return cells
    depth = output_size * output_size if position_sensitive else 1
    shapes = [(m.shape[0], m.shape[2], m.shape[3]) for m in maps]
    C, dtype = maps[0].shape[1] // depth, _pooled_dtype(maps[0].dtype)
    tables = [m.permute(0, 2, 3, 1).reshape(-1, C).to(dtype) for m in maps]
    if extent.shape[0] == 0:
        return tables[0].new_zeros((0, output_size, output_size, C))
    index, weight = _reads(extent, level, image, shapes, output_size, sampling_ratio, position_sensitive)
    if extent.device.type == "cpu" and sum(map(len, tables)) > len(index):
        pooled = _gather_each_level(tables, level, index, weight)
    else:
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        pooled = F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    return pooled.view(-1, output_size, output_size, C)


def _gather_each_level(tables: Sequence[Tensor], level: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The cells (K S S, C) without one table of all levels: cheaper on the CPU if that is larger than the cells."""
    pooled = tables[0].new_empty((len(level), len(index) // len(level) * tables[0].shape[1]))
    index, weight = index.view(len(level), -1, index.shape[1]), weight.view(len(level), -1, weight.shape[1])
    first = 0
    for here, table in enumerate(tables):
        rois = (level == here).nonzero().flatten()
        if len(rois):
            rows = index[rois].flatten(0, 1) - first
            cells = F.embedding_bag(rows, table, per_sample_weights=weight[rois].flatten(0, 1), mode="sum")
            pooled.index_copy_(0, rois, cells.view(len(rois), -1))
        first += len(table)
    return pooled


@_roi_align.register_fake
def _(
    maps: Sequence[Tensor],
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    output_size: int,
    sampling_ratio: int,
    position_sensitive: bool,
) -> Tensor:
    C = maps[0].shape[1] // (output_size * output_size if position_sensitive else 1)
    dtype = _pooled_dtype(maps[0].dtype)
    return maps[0].new_empty((extent.shape[0], output_size, output_size, C), dtype=dtype)


@torch.library.custom_op("gesso::roi_align_backward", mutates_args=())
def _roi_align_backward(
    gradient: Tensor,
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    sampling_ratio: int,
    position_sensitive: bool,
) -> list[Tensor]:
    """The gradient of each map (B, channels, H, W), channels_last, from that of the cells (K, S, S, C)."""
    _, S, _, C = gradient.shape
    depth = S * S if position_sensitive else 1
    fast = gradient.is_cuda and gradient.dtype == torch.float32 and not torch.are_deterministic_algorithms_enabled()
    kernels = _kernels() if fast else None
    if kernels is not None:
        tables = [gradient.new_zeros((images, h, w, depth * C)) for h, w in zip(heights, widths, strict=True)]
        kernels.backward(tables, extent, level, image, gradient.contiguous(), sampling_ratio, position_sensitive)
        return [table.permute(0, 3, 1, 2) for table in tables]
    shapes = [(images, height, width) for height, width in zip(heights, widths, strict=True)]
    index, weight = _reads(extent, level, image, shapes, S, sampling_ratio, position_sensitive)
    pixel, read = index.flatten().sort(stable=True)
    rows = [images * height * width * depth for height, width in zip(heights, widths, strict=True)]
    bounds = torch.arange(sum(rows) + 1, device=pixel.device, dtype=pixel.dtype)
    start = torch.searchsorted(pixel, bounds, out_int32=pixel.dtype == torch.int32)
    cell = read.to(pixel.dtype).div(index.shape[1], rounding_mode="floor")
    share = weight.flatten().index_select(0, read)
    flat = gradient.reshape(-1, C)
    parts = _sums_on_cpu if gradient.device.type == "cpu" else _sums_without_wait
    tables = parts(flat, cell, share, start, rows)
    return [
        table.view(images, height, width, depth * C).permute(0, 3, 1, 2)
        for table, (images, height, width) in zip(tables, shapes, strict=True)
    ]


@_roi_align_backward.register_fake
def _(
    gradient: Tensor,
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    sampling_ratio: int,
    position_sensitive: bool,
) -> list[Tensor]:
    _, S, _, C = gradient.shape
    channels = C * S * S if position_sensitive else C
    return [
        gradient.new_empty((images, height, width, channels)).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths, strict=True)
    ]


def _sums_on_cpu(gradient: Tensor, cell: Tensor, share: Tensor, start: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """For each level, the weighted sums (rows, C) of gradient rows; the reads of a level are one slice."""
    tables, first = [], 0
    for count in rows:
        low, high = int(start[first]), int(start[first + count])
        table = F.embedding_bag(
            cell[low:high],
            gradient,
            start[first : first + count] - low,
            per_sample_weights=share[low:high],
            mode="sum",
        )
        tables.append(table)
        first += count
    return tables


def _sums_without_wait(
    gradient: Tensor, cell: Tensor, share: Tensor, start: Tensor, rows: Sequence[int]
) -> list[Tensor]:
    """The same in one sum over all levels, since a slice would need to know its bounds; costs a copy."""
    table = F.embedding_bag(cell, gradient, start[:-1], per_sample_weights=share, mode="sum")
    return [part.clone() for part in torch.split(table, list(rows))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, extent, level, image, _, ctx.sampling_ratio, ctx.position_sensitive = inputs
    ctx.save_for_backward(extent, level, image)
    ctx.images = maps[0].shape[0]
    ctx.heights, ctx.widths = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
    ctx.dtypes = [m.dtype for m in maps]


def _backward(ctx: Any, gradient: Tensor) -> tuple[list[Tensor] | None, ...]:
    found = _roi_align_backward(
        gradient,
        *ctx.saved_tensors,
        ctx.images,
        ctx.heights,
        ctx.widths,
        ctx.sampling_ratio,
        ctx.position_sensitive,
    )
    return [g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True)], *[None] * 6


_roi_align.register_autograd(_backward, setup_context=_setup_context)


def multilevel_roi_align(
    maps: Sequence[Tensor],
    boxes: Tensor,
    strides: Sequence[float],
    *,
    image: Tensor | None = None,
    output_size: int = 7,
    sampling_ratio: int = 2,
    canonical_level: int = 4,
    canonical_size: float = 224.0,
    aligned: bool = False,
    position_sensitive: bool = False,
) -> Tensor:
    """Features of each RoI from the level that fits its size; equals ``torchvision.ops.MultiScaleRoIAlign``.

    Keep the maps channels_last, else each is copied. Half-precision maps are read and summed in float32; the gradient
    flows to the maps, not to the boxes. Each stride is twice the one before; the first level is that of the nearest
    power of two, so 3.5, 7, 14, 28 are P2 to P5. On a GPU, float32 gradients add in no fixed order unless
    ``torch.use_deterministic_algorithms(True)``.

    Args:
        maps: P2, P3, ... each (B, C, H, W); one map alone is used for every RoI.
        boxes: (B, R, 4) xyxy in pixels of the padded picture; empty slots may hold anything finite or not.
        strides: pixels of the picture per cell of each map.
        image: int64 (B, R), or of whatever leading shape the boxes have: the picture that each RoI is read from. None:
            row b of the boxes reads picture b.
        output_size: S, cells a side.
        sampling_ratio: Q, samples a cell and axis.
        canonical_level: the level k0 of a RoI of ``canonical_size`` pixels a side.
        canonical_size: see there.
        aligned: shift by half a pixel (the corrected form); False is what torchvision's detectors use, and makes each
            RoI at least one cell of the map wide and high.
        position_sensitive: cell (i, j) reads channels of its own: a map has S * S * C of them, and channel
            (i S + j) C + c of the map is channel c of the cell. One map only. With ``aligned``, equals
            ``torchvision.ops.ps_roi_align``, which orders the channels c, i, j.

    Returns:
        (B * R, C, S, S) in channels_last order, float32, or float64 for float64 maps.
    """
    B, channels = maps[0].shape[:2]
    if position_sensitive and (len(maps) > 1 or channels % output_size**2):
        raise ValueError(f"position-sensitive RoIAlign of {len(maps)} maps of {channels} channels")
    rois = boxes.detach().to(_pooled_dtype(maps[0].dtype)).reshape(-1, 4)
    if image is None:
        image = torch.arange(B, device=rois.device).repeat_interleave(boxes.shape[1])
    level = roi_levels(
        rois,
        num_levels=len(maps),
        canonical_level=canonical_level,
        canonical_size=canonical_size,
        first_level=round(math.log2(strides[0])),
    )
    extent = _extent(rois, level, strides, output_size, aligned)
    image = image.reshape(-1).clamp(0, B - 1)
    cells: Tensor = _roi_align(list(maps), extent, level, image, output_size, sampling_ratio, position_sensitive)
    return cells.permute(0, 3, 1, 2)
