# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"
"""Non-maximum suppression on a CUDA device, in two Triton kernels: fixed shapes, and the host never waits.

The boxes of an image are sorted by score. The first kernel notes, for each box, which later boxes of its group overlap
it too much, one bit each; the second goes through these words in the order of the scores, 64 boxes at a time.
``nms.py`` imports this file when the first CUDA tensor comes, so Triton is needed there only.

The bits take B * N * ceil(N / 64) * 8 bytes: 10 MB for an image of 8,819 boxes, 1.25 GB for one of 100,000. If those
of a whole batch would take more than ``MASK_BYTES``, the images go in parts, one at a time at the least.

Shape letters: B images, N box slots, W = ceil(N / 64) words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gesso.models.ops.nms import largest_not_above

MASK_BYTES = 1 << 30
"""The bits of as many images as fit in this are made at once."""
_TILE_WORDS = 4096


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["N", "W"])
def _overlap_kernel(boxes, groups, threshold, mask, N, W, DOUBLE: tl.constexpr):
    """Words (B, N, W) int64: bit j of word w in row i says that box 64 w + j is after i, of its group, and too near.

    One program makes 64 rows of one word. Words before that of the row itself are left as they are.
    """
    word = tl.program_id(0)
    block = tl.program_id(1)
    first = tl.program_id(2).to(tl.int64) * N
    if word >= block:
        lanes = tl.arange(0, 64)
        row = block * 64 + lanes
        column = word * 64 + lanes
        row_in = row < N
        column_in = column < N
        one = boxes + (first + row) * 4
        other = boxes + (first + column) * 4
        ax1 = tl.load(one, mask=row_in, other=0.0)
        ay1 = tl.load(one + 1, mask=row_in, other=0.0)
        ax2 = tl.load(one + 2, mask=row_in, other=0.0)
        ay2 = tl.load(one + 3, mask=row_in, other=0.0)
        bx1 = tl.load(other, mask=column_in, other=0.0)
        by1 = tl.load(other + 1, mask=column_in, other=0.0)
        bx2 = tl.load(other + 2, mask=column_in, other=0.0)
        by2 = tl.load(other + 3, mask=column_in, other=0.0)
        a_group = tl.load(groups + first + row, mask=row_in, other=0)
        b_group = tl.load(groups + first + column, mask=column_in, other=0)
        a_area = (ax2 - ax1) * (ay2 - ay1)
        b_area = (bx2 - bx1) * (by2 - by1)
        width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
        height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
        common = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        union = a_area[:, None] + b_area[None, :] - common
        # In float32 a plain / is not rounded to the nearest number, and a decision could differ from the CPU's.
        if DOUBLE:  # noqa: SIM108
            iou = common / union
        else:
            iou = tl.math.div_rn(common, union)
        near = iou > tl.load(threshold)
        near = near & (a_group[:, None] == b_group[None, :])
        near = near & (column[None, :] > row[:, None]) & column_in[None, :]
        bits = near.to(tl.int64) << lanes.to(tl.int64)[None, :]
        tl.store(mask + (first + row) * W + word, tl.sum(bits, axis=1), mask=row_in)


@triton.jit(do_not_specialize=["N", "W"])
def _scan_kernel(mask, order, valid, keep, N, W, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Keeps or drops the boxes of one image by falling score; writes ``keep`` (B, N) uint8 in the order of the slots.

    Inside a block of 64 boxes the answer is the one set that equals the candidates less all that its own members
    suppress. Going from any set to what it leaves over reaches that set after as many rounds as suppressions follow
    upon each other, a few, since each is by an earlier box.
    """
    first = tl.program_id(0).to(tl.int64) * N
    lanes = tl.arange(0, 64)
    shifts = lanes.to(tl.int64)
    words = tl.arange(0, WORDS)
    dropped = tl.zeros((WORDS,), tl.int64)
    block = 0
    while block < W:
        row = block * 64 + lanes
        inside = row < N
        slot = tl.load(order + first + row, mask=inside, other=0)
        good = tl.load(valid + first + slot, mask=inside, other=0)
        here = tl.sum(tl.where(words == block, dropped, 0), axis=0)
        candidates = tl.sum((good != 0).to(tl.int64) << shifts, axis=0) & ~here
        diagonal = tl.load(mask + (first + row) * W + block, mask=inside, other=0)
        kept = candidates
        before = ~candidates
        while before != kept:
            before = kept
            members = ((kept >> shifts) & 1) != 0
            kept = candidates & ~tl.reduce(tl.where(members, diagonal, 0), 0, _either)
        tl.store(keep + first + slot, ((kept >> shifts) & 1).to(tl.uint8), mask=inside)
        for part in range(0, 64, ROWS):
            lane = part + tl.arange(0, ROWS)
            taken = ((kept >> lane.to(tl.int64)) & 1) != 0
            at = (first + block * 64 + lane)[:, None] * W + words[None, :]
            wanted = taken[:, None] & ((words > block) & (words < W))[None, :]
            dropped = dropped | tl.reduce(tl.load(mask + at, mask=wanted, other=0), 0, _either)
        block += 1


def batched_nms(boxes: Tensor, scores: Tensor, valid: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Arguments and result as in ``nms.batched_nms``; the decisions are those of ``torchvision.ops.nms`` on the CPU.

    Every operation rounds for itself (no fused multiply-add), and the threshold is compared as a double.
    """
    B, N = scores.shape
    keep = torch.zeros((B, N), dtype=torch.uint8, device=boxes.device)
    if B == 0 or N == 0:
        return keep.view(torch.bool)
    # + 0.0 turns -0.0 into 0.0: a sort by bits would tell them apart.
    ranked = scores.masked_fill(~valid, -torch.inf) + 0.0
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).contiguous()
    groups = groups.gather(1, order)
    flags = valid.contiguous().view(torch.uint8)
    limit = largest_not_above(iou_threshold, boxes.dtype)
    threshold = torch.full((1,), limit, dtype=boxes.dtype, device=boxes.device)
    W = triton.cdiv(N, 64)
    words = triton.next_power_of_2(W)
    rows = min(64, max(1, _TILE_WORDS // words))
    step = max(1, min(B, MASK_BYTES // (N * W * 8)))
    mask = torch.empty((step, N, W), dtype=torch.int64, device=boxes.device)
    with torch.cuda.device_of(boxes):
        for at in range(0, B, step):
            part = slice(at, min(at + step, B))
            images = part.stop - part.start
            _overlap_kernel[(W, W, images)](
                boxes[part],
                groups[part],
                threshold,
                mask,
                N,
                W,
                DOUBLE=boxes.dtype == torch.float64,
                num_warps=8,
                enable_fp_fusion=False,
            )
            _scan_kernel[(images,)](
                mask,
                order[part],
                flags[part],
                keep[part],
                N,
                W,
                WORDS=words,
                ROWS=rows,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return keep.view(torch.bool)
