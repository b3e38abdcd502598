"""Gathering and joining blocks of columns."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gesso.data.records import (
    Array,
    Column,
    ImageBlock,
    Masks,
    ObjectBlock,
    Strings,
    Verified,
    take_column,
    take_ragged,
)


def no_objects() -> ObjectBlock:
    """A block without objects."""
    return ObjectBlock(rows=np.zeros(0, np.int32), xyxy=np.zeros((0, 4), np.float32), labels=np.zeros(0, np.int32))


def one_label_each(labels: Sequence[int] | Array) -> Verified:
    """Image-level labels that say of each of N images which class it shows; ``labels`` are N integers."""
    count = len(labels)
    return Verified(
        offsets=np.arange(count + 1, dtype=np.int64),
        labels=np.asarray(labels, np.int32),
        states=np.ones(count, np.int8),
    )


def take_objects(block: ObjectBlock, at: Array) -> ObjectBlock:
    """The objects at ``at`` (int64 positions)."""
    return dataclasses.replace(
        block,
        rows=block.rows[at],
        xyxy=block.xyxy[at],
        labels=block.labels[at],
        flags=_take(block.flags, at),
        known_flags=_take(block.known_flags, at),
        areas=_take(block.areas, at),
        annotation_ids=_take(block.annotation_ids, at),
        masks=None if block.masks is None else block.masks.take(at),
        columns={name: take_column(column, at) for name, column in block.columns.items()},
    )


def take_images(block: ImageBlock, at: Array) -> ImageBlock:
    """The images at ``at`` (int64 positions)."""
    verified = block.verified
    if verified is not None:
        offsets, labels = take_ragged(verified.offsets, verified.labels, at)
        verified = Verified(
            offsets=offsets, labels=labels, states=take_ragged(verified.offsets, verified.states, at)[1]
        )
    return dataclasses.replace(
        block,
        ids=block.ids[at],
        names=block.names.take(at),
        widths=block.widths[at],
        heights=block.heights[at],
        sources=_take(block.sources, at),
        normalised=_take(block.normalised, at),
        orientations=_take(block.orientations, at),
        hashes=_take(block.hashes, at),
        semantic=None if block.semantic is None else block.semantic.take(at),
        verified=verified,
        columns={name: take_column(column, at) for name, column in block.columns.items()},
    )


def _take(column: Array | None, at: Array) -> Array | None:
    return None if column is None else column[at]


def join_columns(parts: Sequence[tuple[Column | None, int]]) -> Column:
    """Joins a further column over blocks of given lengths; a block without it gives "" or NaN (0 for integers)."""
    first = next(column for column, _ in parts if column is not None)
    if isinstance(first, Strings):
        texts = [column if isinstance(column, Strings) else Strings.of([""] * count) for column, count in parts]
        return Strings.concatenate(texts)
    empty: Any = np.nan if np.issubdtype(first.dtype, np.floating) else 0
    shape = first.shape[1:]
    filled = [np.full((count, *shape), empty, first.dtype) if c is None else np.asarray(c) for c, count in parts]
    return np.concatenate(filled)


def join_texts(parts: Sequence[tuple[Strings | None, int]]) -> Strings | None:
    """Joins texts over blocks of given lengths, "" where a block has none; None where no block has any."""
    if all(texts is None for texts, _ in parts):
        return None
    return Strings.concatenate([Strings.of([""] * count) if texts is None else texts for texts, count in parts])


def join_masks(parts: Sequence[tuple[Masks | None, int]]) -> Masks | None:
    """Joins the masks of blocks of given lengths; None where no block has any."""
    if all(masks is None for masks, _ in parts):
        return None
    return Masks.concatenate([Masks.none(count) if masks is None else masks for masks, count in parts])


def lookup(ids: Array, wanted: Array) -> Array:
    """The position of each of ``wanted`` (K,) in ``ids`` (N,), the first where one stands twice; -1 where it is not.

    A table is used where the ids lie close together, a binary search otherwise.
    """
    if not len(ids) or not len(wanted):
        return np.full(len(wanted), -1, np.int64)
    low, high = int(ids.min()), int(ids.max())
    if high - low < 8 * len(ids) + 1024:
        table = np.full(high - low + 1, -1, np.int64)
        table[ids[::-1] - low] = np.arange(len(ids) - 1, -1, -1)
        inside = (wanted >= low) & (wanted <= high)
        return np.where(inside, table[np.where(inside, wanted, low) - low], -1)
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    at = np.minimum(np.searchsorted(ranked, wanted), len(ids) - 1)
    return np.where(ranked[at] == wanted, order[at], -1)
