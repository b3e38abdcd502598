# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"
"""RoIAlign on a CUDA device, in two Triton kernels: fixed shapes, and the host never waits.

A kernel runs once for each level, over all RoIs; a program whose RoI lies on another level ends at once. So no level's
RoIs are selected, and the maps are read where they lie. ``roi_align.py`` imports this file when the first CUDA tensor
comes, so Triton is needed there only.

Shape letters: B images, K RoIs, C channels of the output, S output side, Q samples a cell and axis.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_CELLS, _CHANNELS = 8, 128


@triton.jit
def _axis(start, step, cell, sample, limit, RATIO: tl.constexpr):
    """The two pixels of one axis that a sample lies between, and their weights; nothing far outside is read."""
    at = start + cell * step + (sample + 0.5) * step / RATIO
    inside = (at >= -1.0) & (at <= limit)
    at = tl.maximum(tl.where(inside, at, 0.0), 0.0)
    low = tl.minimum(at.to(tl.int32), limit - 1)
    fraction = tl.where(low >= limit - 1, 0.0, at - low.to(tl.float32))
    high = tl.minimum(low + 1, limit - 1)
    share = tl.where(inside, 1.0 / RATIO, 0.0)
    return low, high, (1.0 - fraction) * share, fraction * share


@triton.jit(do_not_specialize=["here", "H", "W"])
def _forward_kernel(
    rows,
    extent,
    level,
    image,
    pooled,
    here,
    H,
    W,
    C,
    SIZE: tl.constexpr,
    RATIO: tl.constexpr,
    POSITION_SENSITIVE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Cells (K, S, S, C) float32 of the RoIs on level ``here``, from its map (B, H, W, channels)."""
    roi = tl.program_id(0).to(tl.int64)
    if tl.load(level + roi) == here:
        cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        live = (cell < SIZE * SIZE)[:, None] & (channel < C)[None, :]
        y = tl.load(extent + roi * 4)
        x = tl.load(extent + roi * 4 + 1)
        y_step = tl.load(extent + roi * 4 + 2)
        x_step = tl.load(extent + roi * 4 + 3)
        picture = tl.load(image + roi) * H
        channels = C
        inner = channel[None, :]
        if POSITION_SENSITIVE:
            channels = C * SIZE * SIZE
            inner = cell[:, None] * C + channel[None, :]
        total = tl.zeros((CELLS, CHANNELS), tl.float32)
        for n in range(0, RATIO * RATIO):
            top, bottom, w_top, w_bottom = _axis(y, y_step, cell // SIZE, n // RATIO, H, RATIO)
            left, right, w_left, w_right = _axis(x, x_step, cell % SIZE, n % RATIO, W, RATIO)
            above = (picture + top) * W
            below = (picture + bottom) * W
            a = tl.load(rows + ((above + left) * channels)[:, None] + inner, mask=live, other=0.0).to(tl.float32)
            b = tl.load(rows + ((above + right) * channels)[:, None] + inner, mask=live, other=0.0).to(tl.float32)
            c = tl.load(rows + ((below + left) * channels)[:, None] + inner, mask=live, other=0.0).to(tl.float32)
            d = tl.load(rows + ((below + right) * channels)[:, None] + inner, mask=live, other=0.0).to(tl.float32)
            total += a * (w_top * w_left)[:, None] + b * (w_top * w_right)[:, None]
            total += c * (w_bottom * w_left)[:, None] + d * (w_bottom * w_right)[:, None]
        at = ((roi * (SIZE * SIZE) + cell) * C)[:, None] + channel[None, :]
        tl.store(pooled + at, total, mask=live)


@triton.jit(do_not_specialize=["here", "H", "W"])
def _backward_kernel(
    rows,
    extent,
    level,
    image,
    gradient,
    here,
    H,
    W,
    C,
    SIZE: tl.constexpr,
    RATIO: tl.constexpr,
    POSITION_SENSITIVE: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Adds the gradient (K, S, S, C) of the RoIs on level ``here`` to that of its map (B, H, W, channels) float32."""
    roi = tl.program_id(0).to(tl.int64)
    if tl.load(level + roi) == here:
        cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        live = (cell < SIZE * SIZE)[:, None] & (channel < C)[None, :]
        y = tl.load(extent + roi * 4)
        x = tl.load(extent + roi * 4 + 1)
        y_step = tl.load(extent + roi * 4 + 2)
        x_step = tl.load(extent + roi * 4 + 3)
        picture = tl.load(image + roi) * H
        channels = C
        inner = channel[None, :]
        if POSITION_SENSITIVE:
            channels = C * SIZE * SIZE
            inner = cell[:, None] * C + channel[None, :]
        at = ((roi * (SIZE * SIZE) + cell) * C)[:, None] + channel[None, :]
        given = tl.load(gradient + at, mask=live, other=0.0)
        for n in range(0, RATIO * RATIO):
            top, bottom, w_top, w_bottom = _axis(y, y_step, cell // SIZE, n // RATIO, H, RATIO)
            left, right, w_left, w_right = _axis(x, x_step, cell % SIZE, n % RATIO, W, RATIO)
            above = (picture + top) * W
            below = (picture + bottom) * W
            a = (w_top * w_left)[:, None]
            b = (w_top * w_right)[:, None]
            c = (w_bottom * w_left)[:, None]
            d = (w_bottom * w_right)[:, None]
            tl.atomic_add(
                rows + ((above + left) * channels)[:, None] + inner, given * a, mask=live & (a != 0), sem="relaxed"
            )
            tl.atomic_add(
                rows + ((above + right) * channels)[:, None] + inner, given * b, mask=live & (b != 0), sem="relaxed"
            )
            tl.atomic_add(
                rows + ((below + left) * channels)[:, None] + inner, given * c, mask=live & (c != 0), sem="relaxed"
            )
            tl.atomic_add(
                rows + ((below + right) * channels)[:, None] + inner, given * d, mask=live & (d != 0), sem="relaxed"
            )


def _launch(
    kernel,
    tables: Sequence[Tensor],
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    cells: Tensor,
    sampling_ratio: int,
    position_sensitive: bool,
) -> None:
    """Runs ``kernel`` on each level's table (B, H, W, channels) and the cells (K, S, S, C)."""
    K, S, _, C = cells.shape
    if cells.numel() == 0:
        return
    tile = min(_CELLS, triton.next_power_of_2(S * S))
    channels = min(_CHANNELS, triton.next_power_of_2(C))
    grid = (K, triton.cdiv(S * S, tile), triton.cdiv(C, channels))
    with torch.cuda.device_of(cells):
        for here, table in enumerate(tables):
            kernel[grid](
                table,
                extent,
                level,
                image,
                cells,
                here,
                table.shape[1],
                table.shape[2],
                C,
                SIZE=S,
                RATIO=sampling_ratio,
                POSITION_SENSITIVE=position_sensitive,
                CELLS=tile,
                CHANNELS=channels,
                num_warps=4,
                enable_fp_fusion=False,
            )


def forward(
    tables: Sequence[Tensor],
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    output_size: int,
    sampling_ratio: int,
    position_sensitive: bool,
) -> Tensor:
    """Cells (K, S, S, C) float32, contiguous, of RoIs on the levels of a pyramid.

    Args:
        tables: each level's map (B, H, W, C), contiguous, of any dtype up to float32; C * S * S channels in the order
            (cell, channel) if ``position_sensitive``.
        extent: (K, 4) float32, the RoI's start and the length of a cell, y x y x, in cells of its level's map.
        level: (K,) int64, the table of each RoI.
        image: (K,) int64, the row of the table.
        output_size: S.
        sampling_ratio: Q.
        position_sensitive: each cell reads channels of its own.
    """
    S, C = output_size, tables[0].shape[3]
    C = C // (S * S) if position_sensitive else C
    cells = torch.empty((len(extent), S, S, C), dtype=torch.float32, device=extent.device)
    _launch(_forward_kernel, tables, extent, level, image, cells, sampling_ratio, position_sensitive)
    return cells


def backward(
    tables: Sequence[Tensor],
    extent: Tensor,
    level: Tensor,
    image: Tensor,
    gradient: Tensor,
    sampling_ratio: int,
    position_sensitive: bool,
) -> None:
    """Adds the gradient of cells (K, S, S, C) float32 to that of each table float32, in no fixed order (atomics)."""
    _launch(_backward_kernel, tables, extent, level, image, gradient, sampling_ratio, position_sensitive)
