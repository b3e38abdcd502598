"""The tensors that flow between loader, detector and evaluation: frozen dataclasses of static shapes.

Shape letters: B images of the batch, H x W padded pixels, M ground-truth slots, D detection slots, C classes (without
background), S mask side. Boxes are float32 ``(..., 4)`` xyxy in absolute pixels of the padded image they stand on.
Empty slots are padded with zeros and have ``valid`` False; no shape here depends on the data.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="ImageBatch | Targets | Detections")


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Pictures of one padded shape.

    Attributes:
        images: (B, 3, H, W) RGB 0..255, uint8, or floating point where it was resized without rounding; padded right
            and below with zeros.
        sizes: (B, 2) int64, the valid height and width in the padded picture.
        scale: (B, 2) float32, pixels here per original pixel, for height and width.
        original_sizes: (B, 2) int64, height and width of the stored picture (after EXIF transposition).
        image_index: (B,) int64, the row in the index; -1 for a padded repeat.
        key: (B,) int64, the sample's random key (``random_key.py``).
    """

    images: Tensor
    sizes: Tensor
    scale: Tensor
    original_sizes: Tensor
    image_index: Tensor
    key: Tensor


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Ground truth of a batch.

    Attributes:
        boxes: (B, M, 4) float32.
        labels: (B, M) int64, one class each; 0 in empty slots.
        valid: (B, M) bool, the slot holds an object (ignored ones included).
        ignore: (B, M) bool, crowd, difficult, ignore, or out of range: never positive, and what lies in it is no
            negative.
        box_id: (B, M) int64, the annotation's id in the index, 0 in empty slots.
        verified: (B, C) int8, 0 unverified, 1 present, 2 absent; None = all verified.
        masks: (B, M, S, S) uint8 0 or 1, or None.
        mask_frames: (B, M, 4) float32, the region that each mask covers; None without masks.
        semantic: (B, H, W) uint8, or None.
        valid_range: (B, 2) float32, the side lengths (sqrt of area) a chip is responsible for; or None.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    ignore: Tensor
    box_id: Tensor
    verified: Tensor | None = None
    masks: Tensor | None = None
    mask_frames: Tensor | None = None
    semantic: Tensor | None = None
    valid_range: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Detections of a batch, sorted by falling score within each image.

    Attributes:
        boxes: (B, D, 4) float32, on the padded picture; ``to_original`` maps them back.
        scores: (B, D) float32 in [0, 1]; 0 in empty slots.
        labels: (B, D) int64.
        valid: (B, D) bool.
        masks: (B, D, S, S) float32 probabilities inside the box, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    masks: Tensor | None = None

    def to_original(self, batch: ImageBatch) -> "Detections":
        """Maps the boxes to pixels of the original pictures and clips them there."""
        scale = batch.scale.flip(1).repeat(1, 2)[:, None]
        limit = batch.original_sizes.flip(1).repeat(1, 2)[:, None].to(self.boxes.dtype)
        boxes = torch.minimum((self.boxes / scale).clamp(min=0), limit)
        return dataclasses.replace(self, boxes=boxes)


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """A copy of ``value`` with ``function`` applied to every tensor field; None stays None."""
    changed: dict[str, Any] = {
        f.name: function(tensor) for f in dataclasses.fields(value) if (tensor := getattr(value, f.name)) is not None
    }
    return dataclasses.replace(value, **changed)


def to_device(value: T, device: torch.device | str) -> T:
    """A copy of ``value`` with all tensors on ``device``, copied without waiting where the memory is pinned."""
    return map_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))
