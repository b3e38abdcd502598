import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from gesso.data.rle import decode
from gesso.evaluation.masks import areas_and_boxes, paste
from gesso.evaluation.predict import predict
from gesso.structures import Detections, ImageBatch


class Lookup(nn.Module):
    """Gives the boxes that stand in the first pixels of each picture; looks like a detector from outside."""

    def __init__(self, masks=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 3)
        self.masks = masks
        self.seen = []

    def forward(self, batch):
        count = len(batch.images)
        self.seen.append((self.training, torch.is_grad_enabled(), self.linear(torch.ones(1, 3)).dtype))
        boxes = torch.tensor([[8.0, 4.0, 16.0, 12.0], [0.0, 0.0, 999.0, 999.0], [0.0, 0.0, 1.0, 1.0]]).repeat(
            count, 1, 1
        )
        scores = torch.tensor([0.9, 0.25, 0.0]).repeat(count, 1) - batch.image_index[:, None] / 64
        labels = torch.tensor([2, 700, 0]).repeat(count, 1)
        valid = torch.tensor([True, True, False]).repeat(count, 1)
        masks = torch.ones(count, 3, 4, 4) if self.masks else None
        return Detections(boxes=boxes, scores=scores, labels=labels, valid=valid, masks=masks)


def batch(rows):
    count = len(rows)
    return ImageBatch(
        images=torch.zeros(count, 3, 32, 32, dtype=torch.uint8),
        sizes=torch.full((count, 2), 32),
        scale=torch.tensor([[0.5, 0.25]]).repeat(count, 1),
        original_sizes=torch.tensor([[64, 128]]).repeat(count, 1),
        image_index=torch.tensor(rows),
        key=torch.zeros(count, dtype=torch.int64),
    )


def test_detections_are_gathered_in_original_pixels():
    seen = []
    found = predict(Lookup(), [batch([1, 0]), batch([2, -1])], device="cpu", progress=seen.append)
    assert found.image_id.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.label.tolist() == [2, 700] * 3
    assert found.score.tolist() == [float(np.float32(s) - np.float32(i / 64)) for i in range(3) for s in (0.9, 0.25)]
    assert found.xyxy[:2].tolist() == [[32, 8, 64, 24], [0, 0, 128, 64]]
    assert found.masks is None
    assert seen == [2, 1]


def test_ids_come_from_the_index():
    found = predict(Lookup(), [batch([1, 0])], device="cpu", image_ids=np.array([70, 7]))
    assert found.image_id.tolist() == [7, 7, 70, 70]
    assert found.score[0] < found.score[2]


def test_the_detector_is_left_as_it_was():
    detector = Lookup().train()
    detector.norm.eval()
    predict(detector, [batch([0])], device="cpu")
    assert detector.training and detector.linear.training and not detector.norm.training
    assert detector.seen == [(False, False, torch.float32)]


def test_precision_bfloat16_runs_under_autocast():
    detector = Lookup()
    predict(detector, [batch([0])], device="cpu", precision="bfloat16")
    assert detector.seen[0][2] == torch.bfloat16


def test_the_detector_is_restored_after_an_error():
    class Broken(Lookup):
        def forward(self, batch):
            raise FloatingPointError("no")

    detector = Broken().train()
    with pytest.raises(FloatingPointError):
        predict(detector, [batch([0])], device="cpu")
    assert detector.training


def test_nothing_found_and_no_batches():
    class Blind(Lookup):
        def forward(self, batch):
            found = super().forward(batch)
            return Detections(
                boxes=found.boxes, scores=found.scores, labels=found.labels, valid=torch.zeros_like(found.valid)
            )

    assert len(predict(Blind(), [batch([0])], device="cpu")) == 0
    assert len(predict(Lookup(), [], device="cpu")) == 0


def test_a_detector_of_masks_that_finds_nothing_still_makes_masks():
    class Blind(Lookup):
        def forward(self, batch):
            found = super().forward(batch)
            return dataclasses.replace(found, valid=torch.zeros_like(found.valid))

    masks = predict(Blind(masks=True), [batch([0]), batch([1])], device="cpu").masks
    assert masks is not None and len(masks) == 0
    assert predict(Blind(), [batch([0])], device="cpu").masks is None


def test_masks_are_pasted_on_their_pictures():
    found = predict(Lookup(masks=True), [batch([0])], device="cpu")
    picture = decode(found.masks[0])
    assert picture.shape == (64, 128)
    assert np.array_equal(picture, slow_paste(np.ones((4, 4)), [32, 8, 64, 24], (64, 128)))
    assert picture[9:23, 34:62].all()
    areas, boxes = areas_and_boxes([found.masks[0]])
    assert areas.tolist() == [picture.sum()] and boxes.tolist() == [[32, 8, 32, 16]]


def slow_paste(grid, box, size):
    """Every pixel for itself, bilinear, zero outside the grid."""
    side = len(grid)
    picture = np.zeros(size, np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            u = (x + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
            v = (y + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
            total = 0.0
            for row in (math.floor(v), math.floor(v) + 1):
                for column in (math.floor(u), math.floor(u) + 1):
                    if 0 <= row < side and 0 <= column < side:
                        total += grid[row, column] * (1 - abs(v - row)) * (1 - abs(u - column))
            inside = box[0] - 0.5 < x + 0.5 < box[2] + 0.5 and box[1] - 0.5 < y + 0.5 < box[3] + 0.5
            picture[y, x] = inside and total >= 0.5
    return picture


@pytest.mark.parametrize("seed", range(6))
def test_paste_against_the_slow_way(seed):
    rng = np.random.default_rng(seed)
    low = rng.uniform(-4, 12, 2)
    box = np.concatenate([low, low + rng.uniform(4, 20, 2)])
    grid = rng.random((5, 5))
    pasted = decode(paste(grid, box, (20, 25)))
    assert np.array_equal(pasted, slow_paste(grid, box, (20, 25)))
    assert pasted.any()


def test_paste_of_an_empty_box_is_an_empty_mask():
    assert not decode(paste(np.ones((4, 4)), np.array([3.0, 3.0, 3.0, 3.0]), (8, 8))).any()
