"""From rows of the index to the arrays of one batch: read, place, draw, and the targets with it.

Runs in the loader's workers. A picture that cannot be read never raises here: it is replaced by the next in order and
reported beside the batch. B pictures, H x W padded pixels, M object slots, S mask side, C classes of the run.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gesso.data.decode import Pixels, check_size, colour, draw, read_picture
from gesso.data.index import Index
from gesso.data.mask_grid import rasterise
from gesso.data.placement import Placement, Shape
from gesso.data.records import IGNORED
from gesso.data.sampling import BatchPlan
from gesso.data.semantic import VOID, Map, SemanticMaps, draw_semantic
from gesso.data.transforms import InputConfig, colour_factors, inference_placement, training_placement
from gesso.errors import DataError
from gesso.label_space import LabelMap
from gesso.structures import ImageBatch, Targets

Tensors = dict[str, Tensor]


class Broken(NamedTuple):
    """A picture that could not be read, or its semantic map.

    Attributes:
        row: its row in the index, or its place among the given pictures.
        error: what is wrong; the message names the file.
    """

    row: int
    error: DataError


@dataclass
class Built:
    """One batch as it leaves a worker, with what happened on the way.

    Attributes:
        images: the fields of an ImageBatch, the pictures as (B, H, W, 3); empty where no picture could be read.
        targets: the fields of Targets; empty at inference.
        broken: the pictures that could not be read, in the order of the samples.
        surplus: how many pictures had more than M objects.
        left_out: how many objects of these found no slot.
    """

    images: Tensors = field(default_factory=dict)
    targets: Tensors = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    surplus: int = 0
    left_out: int = 0

    def image_batch(self) -> ImageBatch:
        """The pictures as the detector takes them: (B, 3, H, W) in channels-last memory."""
        return ImageBatch(**{**self.images, "images": self.images["images"].permute(0, 3, 1, 2)})

    def pin_memory(self) -> "Built":
        """The same in page-locked memory; the loader's pinning thread calls it."""
        pinned = [{name: t.pin_memory() for name, t in part.items()} for part in (self.images, self.targets)]
        return dataclasses.replace(self, images=pinned[0], targets=pinned[1])

    def as_targets(self) -> Targets:
        """The ground truth."""
        return Targets(**self.targets)


class ImageSlots:
    """The arrays of an ImageBatch, filled slot by slot; an unfilled slot is black and has image_index -1."""

    def __init__(self, count: int, canvas: Shape) -> None:
        self.images = torch.zeros((count, *canvas, 3), dtype=torch.uint8)
        self._pixels: Pixels = self.images.numpy()
        self._sizes = np.tile(np.array(canvas, np.int64), (count, 1))
        self._original = self._sizes.copy()
        self._scale = np.ones((count, 2), np.float32)
        self._rows = np.full(count, -1, np.int64)
        self._keys = np.zeros(count, np.int64)

    def fill(self, slot: int, picture: Pixels, placement: Placement, *, row: int, key: int = 0) -> Pixels:
        """Draws a picture (H, W, 3) in a slot, as ``draw`` takes it, and returns the valid part of its canvas."""
        draw(picture, placement, self._pixels[slot])
        self._sizes[slot], self._original[slot] = placement.size, placement.original
        self._scale[slot] = placement.scale
        self._rows[slot], self._keys[slot] = row, key
        return self._pixels[slot, : placement.size[0], : placement.size[1]]

    def tensors(self) -> Tensors:
        """The fields of an ImageBatch, with the pictures as (B, H, W, 3)."""
        return {
            "images": self.images,
            "sizes": torch.from_numpy(self._sizes),
            "scale": torch.from_numpy(self._scale),
            "original_sizes": torch.from_numpy(self._original),
            "image_index": torch.from_numpy(self._rows),
            "key": torch.from_numpy(self._keys),
        }


class TargetSlots:
    """The arrays of Targets, filled slot by slot; those of masks, classes and semantic maps where asked for."""

    def __init__(
        self, count: int, max_boxes: int, mask_side: int, classes: int | None, semantic: Shape | None = None
    ) -> None:
        self.boxes = np.zeros((count, max_boxes, 4), np.float32)
        self.labels = np.zeros((count, max_boxes), np.int64)
        self.valid = np.zeros((count, max_boxes), bool)
        self.ignore = np.zeros((count, max_boxes), bool)
        self.box_id = np.zeros((count, max_boxes), np.int64)
        self.verified = None if classes is None else np.zeros((count, classes), np.int8)
        self.masks = np.zeros((count, max_boxes, mask_side, mask_side), np.uint8) if mask_side else None
        self.mask_frames = np.zeros((count, max_boxes, 4), np.float32) if mask_side else None
        self.semantic = None if semantic is None else np.full((count, *semantic), VOID, np.uint8)

    def tensors(self) -> Tensors:
        """The fields of Targets that are there."""
        return {name: torch.from_numpy(array) for name, array in vars(self).items() if array is not None}


class _Objects(NamedTuple):
    xyxy: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    ignore: npt.NDArray[np.bool_]
    box_ids: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


class _Sample(NamedTuple):
    row: int
    picture: Pixels
    placement: Placement
    objects: _Objects
    semantic: Map | None


class TrainingBuilder(torch.utils.data.Dataset[Built]):
    """Builds the training batch of a plan: ``builder[plan]``.

    Args:
        index: the data set.
        config: resize, crop, flip, colour.
        max_boxes: M. Where a picture has more, the ones to ignore go first, then the smallest on the canvas.
        mask_side: S; 0 leaves masks out.
        label_map: from the index's labels to the run's; None keeps them. Objects that map to -1 are dropped.
        semantic: with the semantic maps; 255 where a picture has none.
    """

    def __init__(
        self,
        index: Index,
        config: InputConfig,
        *,
        max_boxes: int,
        mask_side: int,
        label_map: LabelMap | None,
        semantic: bool = False,
    ) -> None:
        self.index, self.config = index, config
        self.max_boxes, self.mask_side = max_boxes, mask_side
        count = len(index.label_space)
        self.labels = np.array(range(count) if label_map is None else label_map.targets, np.int64)
        known = set(self.labels.tolist()) - {-1}
        self.num_classes = count if label_map is None else len(known) + len(label_map.unused)
        self.verified = any(source.labelled is not None for source in index.sources) or (
            index.verified_columns is not None
        )
        self.semantic = SemanticMaps(index, self.labels) if semantic else None

    def __getitem__(self, plan: BatchPlan) -> Built:
        canvas = self.config.resize.shapes(plan.scale)[plan.shape]
        images = ImageSlots(len(plan.rows), canvas)
        targets = TargetSlots(
            len(plan.rows),
            self.max_boxes,
            self.mask_side,
            self.num_classes if self.verified else None,
            semantic=None if self.semantic is None else canvas,
        )
        built = Built()
        for slot, key in enumerate(plan.keys.tolist()):
            rows = [int(plan.rows[slot]), *plan.spares[slot].tolist()]
            sample = self._first_readable(rows, plan, key, built)
            if sample is None:
                return built
            picture = images.fill(slot, sample.picture, sample.placement, row=sample.row, key=key)
            colour(picture, colour_factors(self.config, key))
            left_out = self._fill_targets(targets, slot, sample)
            built.surplus += left_out > 0
            built.left_out += left_out
        built.images, built.targets = images.tensors(), targets.tensors()
        return built

    def _first_readable(self, rows: Sequence[int], plan: BatchPlan, key: int, built: Built) -> _Sample | None:
        for row in rows:
            try:
                return self._read(row, plan, key)
            except DataError as error:
                built.broken.append(Broken(row, error))
        return None

    def _read(self, row: int, plan: BatchPlan, key: int) -> _Sample:
        objects = self._objects(row)
        height, width = int(self.index.heights[row]), int(self.index.widths[row])
        placement = training_placement(
            self.config, height, width, objects.xyxy, shape=plan.shape, scale=plan.scale, key=key
        )
        picture = read_indexed(self.index, row, placement)
        return _Sample(row, picture, placement, objects, self.semantic.read(row) if self.semantic else None)

    def _objects(self, row: int) -> _Objects:
        objects = self.index.objects(row)
        labels = self.labels[objects.labels]
        places = np.flatnonzero(labels >= 0)
        ignore = (objects.flags[places] & IGNORED) != 0
        return _Objects(objects.xyxy[places], labels[places], ignore, objects.box_ids[places], places)

    def _fill_targets(self, targets: TargetSlots, slot: int, sample: _Sample) -> int:
        """Fills one slot and returns how many objects found no room: those to ignore first, then the smallest."""
        row, objects, placement = sample.row, sample.objects, sample.placement
        boxes, kept = placement.move(objects.xyxy)
        chosen = np.flatnonzero(kept)
        left_out = max(len(chosen) - self.max_boxes, 0)
        if left_out:
            width, height = (boxes[chosen, 2:] - boxes[chosen, :2]).astype(np.float64).T
            order = np.lexsort((-width * height, objects.ignore[chosen]))  # stable: equal ones by position
            chosen = np.sort(chosen[order[: self.max_boxes]])
        count = len(chosen)
        targets.boxes[slot, :count] = boxes[chosen]
        targets.labels[slot, :count] = objects.labels[chosen]
        targets.valid[slot, :count] = True
        targets.ignore[slot, :count] = objects.ignore[chosen]
        targets.box_id[slot, :count] = objects.box_ids[chosen]
        if targets.masks is not None and targets.mask_frames is not None:
            masks = self.index.masks(row)
            frames = placement.frames(boxes[chosen])
            for at, (place, frame) in enumerate(zip(objects.places[chosen].tolist(), frames, strict=True)):
                if masks[place] is not None:
                    targets.masks[slot, at] = rasterise(masks[place], frame, self.mask_side)
                    targets.mask_frames[slot, at] = boxes[chosen[at]]
        if targets.verified is not None:
            targets.verified[slot] = self._verified(row, objects.labels)
        if targets.semantic is not None and sample.semantic is not None:
            draw_semantic(sample.semantic, placement, targets.semantic[slot])
        return left_out

    def _verified(self, row: int, present: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """(C,) in the run's classes: 0 unverified, 1 present, 2 absent, as from ``Index.verified``.

        Asked only where some image or source of the index tells what was verified; else ``Targets.verified`` is None,
        and all classes count as verified, those too that the index lacks. Here such a class is unverified. Where
        several classes of the index map to one of the run, it is verified if all of them are, present if one is.
        """
        states = self.index.verified(row)
        known = self.labels >= 0
        mapped = np.zeros(self.num_classes, np.int8)
        mapped[self.labels[known]] = 2
        if states is None:
            mapped[present] = 1
        else:
            np.minimum.at(mapped, self.labels[known], states[known])
        return mapped


class InferenceBuilder(torch.utils.data.Dataset[Built]):
    """Builds the batch of some rows of the index: ``builder[shape number, rows]``; row -1 leaves a slot black."""

    def __init__(self, index: Index, config: InputConfig) -> None:
        self.index, self.config = index, config

    def __getitem__(self, plan: tuple[int, npt.NDArray[np.int64]]) -> Built:
        shape, rows = plan
        resize = self.config.resize
        images = ImageSlots(len(rows), resize.shapes(resize.inference_scale)[shape])
        built = Built()
        for slot, row in enumerate(rows.tolist()):
            if row < 0:
                continue
            placement = inference_placement(self.config, int(self.index.heights[row]), int(self.index.widths[row]))[1]
            try:
                picture = read_indexed(self.index, row, placement)
            except DataError as error:
                built.broken.append(Broken(row, error))
                continue
            images.fill(slot, picture, placement, row=row)
        built.images = images.tensors()
        return built


def read_indexed(index: Index, row: int, placement: Placement | None = None) -> Pixels:
    """Reads a picture of the index, with ``placement`` to be drawn there (``read_picture``).

    DataError also where its size is not the one in the index.
    """
    path: Path = index.image_path(row)
    if placement is not None:
        return read_picture(path, placement)
    picture = read_picture(path)
    check_size(picture.shape[:2], (int(index.heights[row]), int(index.widths[row])), path)
    return picture
