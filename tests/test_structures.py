import dataclasses

import pytest
import torch

from gesso.structures import Detections, ImageBatch, Targets, map_tensors, to_device


def batch(**changes):
    fields = {
        "images": torch.zeros(1, 3, 50, 100, dtype=torch.uint8),
        "sizes": torch.tensor([[40, 100]]),
        "scale": torch.tensor([[0.5, 0.25]]),
        "original_sizes": torch.tensor([[80, 400]]),
        "image_index": torch.tensor([3]),
        "key": torch.tensor([9]),
    }
    return ImageBatch(**fields | changes)


def test_they_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch().images = torch.zeros(1)


def test_to_original_scales_each_axis_and_clips():
    found = Detections(
        boxes=torch.tensor([[[10.0, 10, 50, 30], [-4, 0, 200, 60]]]),
        scores=torch.tensor([[0.9, 0.8]]),
        labels=torch.zeros(1, 2, dtype=torch.int64),
        valid=torch.ones(1, 2, dtype=torch.bool),
    )
    assert found.to_original(batch()).boxes.tolist() == [[[40, 20, 200, 60], [0, 0, 400, 80]]]


def test_map_tensors_leaves_none_alone():
    targets = Targets(
        boxes=torch.zeros(1, 2, 4),
        labels=torch.zeros(1, 2, dtype=torch.int64),
        valid=torch.zeros(1, 2, dtype=torch.bool),
        ignore=torch.zeros(1, 2, dtype=torch.bool),
        box_id=torch.zeros(1, 2, dtype=torch.int64),
    )
    repeated = map_tensors(targets, lambda t: torch.cat([t, t]))
    assert repeated.boxes.shape == (2, 2, 4) and repeated.masks is None
    assert to_device(targets, "cpu").valid.dtype == torch.bool
