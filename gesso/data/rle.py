"""COCO's run-length masks: runs of 0 and 1 in turn, column by column, and their compressed text form.

A compressed count is the difference to the count two before (from the fourth on), in groups of five bits, the lowest
first, with a sixth bit for "more follows", each group a printable character from 48 on (cocoapi, common/maskApi.c).
"""

import numpy as np

from gesso.data.records import Array, Rle
from gesso.errors import DataError


def compress(counts: Array) -> bytes:
    """The compressed form of run lengths (n,) int64; the first run is of zeros."""
    rest = np.asarray(counts, np.int64).copy()
    rest[3:] -= np.asarray(counts, np.int64)[1:-2]
    groups: list[Array] = []
    used: list[Array] = []
    active = np.ones(len(rest), bool)
    while active.any():
        low = rest & 31
        rest = rest >> 5
        more = np.where(low & 16, rest != -1, rest != 0)
        groups.append((low | np.where(more, 32, 0)) + 48)
        used.append(active)
        active = active & more
    if not groups:
        return b""
    text: bytes = np.stack(groups, 1)[np.stack(used, 1)].astype(np.uint8).tobytes()
    return text


def uncompress(text: bytes) -> Array:
    """The run lengths (n,) int64 of a compressed form. DataError where it is none."""
    values = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if len(values) and (values.min() < 0 or values.max() > 63 or values[-1] & 32):
        raise DataError("a mask's run lengths are not in COCO's compressed form")
    last = (values & 32) == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
    shift = np.arange(len(values)) - np.repeat(starts, ends - starts + 1)
    if len(shift) and shift.max() > 11:
        raise DataError("a mask's run lengths are not in COCO's compressed form")
    counts: Array = np.add.reduceat((values & 31) << (5 * shift), starts) if len(starts) else np.zeros(0, np.int64)
    counts = np.where(values[ends] & 16, counts - (np.int64(1) << (5 * (shift[ends] + 1))), counts)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    if len(counts) and counts.min() < 0:
        raise DataError("a mask has a negative run length")
    return counts


def from_counts(counts: Array, size: tuple[int, int]) -> Rle:
    """An RLE of ``size`` (height, width) from run lengths. DataError where they do not fill the picture."""
    counts = np.asarray(counts, np.int64)
    if counts.ndim != 1 or (len(counts) and counts.min() < 0) or counts.sum() != size[0] * size[1]:
        raise DataError(f"a mask's run lengths do not fill a picture of {size[1]} x {size[0]}")
    return Rle(size, compress(counts))


def decode(mask: Rle) -> Array:
    """The mask as uint8 (height, width) of 0 and 1."""
    height, width = mask.size
    counts = uncompress(mask.counts)
    if counts.sum() != height * width:
        raise DataError(f"a mask's run lengths do not fill a picture of {width} x {height}")
    values = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
    picture: Array = values.reshape(width, height).T
    return picture


def encode(mask: Array) -> Rle:
    """The RLE of a mask (height, width), whatever is not 0 being inside."""
    flat = np.asarray(mask).astype(bool).T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], changes, [len(flat)]])) if len(flat) else np.zeros(0, np.int64)
    if len(flat) and flat[0]:
        counts = np.concatenate([[0], counts])
    return Rle((int(mask.shape[0]), int(mask.shape[1])), compress(counts))


def area(mask: Rle) -> int:
    """The number of pixels inside."""
    return int(uncompress(mask.counts)[1::2].sum())
