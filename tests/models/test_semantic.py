"""The auxiliary head: labels against a slow version with loops, its loss against torch's on the cells that count."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gesso.errors import ConfigError
from gesso.models import semantic
from gesso.models.losses import mean_over_batch
from gesso.models.semantic import SegmentationConfig, SegmentationHead, cell_labels
from gesso.structures import Targets

IMAGE, CELLS = (64, 96), (8, 12)
SIZES = torch.tensor([[64, 96], [40, 81], [64, 30]])


def random_targets(*, masks, B=3, M=9, S=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(B, M, 2, generator=g) * torch.tensor([80.0, 50.0])
    boxes = torch.cat([low, low + 2 + torch.rand(B, M, 2, generator=g) * 50], dim=-1)
    boxes[:, 4] = boxes[:, 2]  # equal areas: the first wins
    valid = torch.rand(B, M, generator=g) > 0.2
    frames = boxes.clone()
    frames[:, ::3] = 0  # no mask
    frames[:, 1] += 3  # a frame that is not the box
    return Targets(
        boxes=boxes,
        labels=torch.randint(0, 7, (B, M), generator=g),
        valid=valid,
        ignore=(torch.rand(B, M, generator=g) > 0.8) & valid,
        box_id=torch.zeros(B, M, dtype=torch.int64),
        masks=torch.randint(0, 2, (B, M, S, S), generator=g, dtype=torch.uint8) if masks else None,
        mask_frames=frames if masks else None,
    )


def covers(targets, b, m, y, x):
    frame, mask = targets.boxes[b, m].tolist(), None
    if targets.masks is not None and targets.mask_frames[b, m].any():
        frame, mask = targets.mask_frames[b, m].tolist(), targets.masks[b, m]
    x1, y1, x2, y2 = frame
    if not (x1 <= x < x2 and y1 <= y < y2):
        return False
    if mask is None:
        return True
    side = len(mask)
    return bool(mask[int((y - y1) / (y2 - y1) * side), int((x - x1) / (x2 - x1) * side)])


def slow_labels(targets, shape, image_shape, sizes):
    B, M = targets.valid.shape
    labels = torch.zeros(B, *shape, dtype=torch.int64)
    counted = torch.zeros(B, *shape, dtype=torch.bool)
    for b in range(B):
        for i in range(shape[0]):
            for j in range(shape[1]):
                y, x = (i + 0.5) * image_shape[0] / shape[0], (j + 0.5) * image_shape[1] / shape[1]
                there = [m for m in range(M) if targets.valid[b, m] and covers(targets, b, m, y, x)]
                counted[b, i, j] = y < sizes[b, 0] and x < sizes[b, 1] and not targets.ignore[b, there].any()
                best = None
                for m in there:
                    x1, y1, x2, y2 = targets.boxes[b, m]
                    area = (x2 - x1) * (y2 - y1)
                    if not targets.ignore[b, m] and (best is None or area < best):
                        best, labels[b, i, j] = area, targets.labels[b, m] + 1
    return labels, counted


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 22])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_labels_are_those_of_the_smallest_object(masks, seed, at_once, monkeypatch):
    monkeypatch.setattr(semantic, "_AT_ONCE", at_once)
    targets = random_targets(masks=masks, seed=seed)
    labels, counted = cell_labels(targets, CELLS, IMAGE, SIZES)
    wanted, wanted_counted = slow_labels(targets, CELLS, IMAGE, SIZES)
    assert torch.equal(counted, wanted_counted) and counted.any() and not counted.all()
    assert torch.equal(labels[counted], wanted[counted])
    assert labels.dtype == torch.int64 and len(labels[counted].unique()) > 4


def test_empty_slots_and_ignored_objects_are_no_classes():
    none = dataclasses.replace(random_targets(masks=True), valid=torch.zeros(3, 9, dtype=torch.bool))
    labels, counted = cell_labels(none, CELLS, IMAGE, SIZES)
    assert not labels.any() and counted[0].all() and counted[1].sum() == 5 * 10
    targets = random_targets(masks=False)
    whole = torch.tensor([0.0, 0.0, 96.0, 64.0]).expand(3, 9, 4)
    ignored = dataclasses.replace(
        targets, boxes=whole, valid=torch.ones(3, 9, dtype=torch.bool), ignore=torch.arange(9).expand(3, 9) == 8
    )
    assert not cell_labels(ignored, CELLS, IMAGE, SIZES)[1].any()


def test_the_loss_is_the_mean_over_the_cells_that_count():
    torch.manual_seed(0)
    head = SegmentationHead(SegmentationConfig(weight=0.3, convs=1, width=8), channels=6, num_classes=7)
    targets = random_targets(masks=True)
    level = torch.randn(3, 6, *CELLS, requires_grad=True)
    logits = head(level)
    assert logits.shape == (3, 8, *CELLS)
    terms = head.losses(logits, targets, IMAGE, SIZES)
    assert list(terms) == ["segmentation"]
    labels, counted = slow_labels(targets, CELLS, IMAGE, SIZES)
    wanted = 0.3 * F.cross_entropy(logits.permute(0, 2, 3, 1)[counted], labels[counted])
    torch.testing.assert_close(mean_over_batch(terms["segmentation"]), wanted)
    assert terms["segmentation"].samples == counted.sum()
    terms["segmentation"].total.backward()
    assert level.grad.abs().sum() > 0


def test_padding_has_no_influence_and_no_cell_gives_zero():
    head = SegmentationHead(SegmentationConfig(convs=0), channels=4, num_classes=7)
    targets = random_targets(masks=False)
    logits = torch.randn(3, 8, *CELLS, requires_grad=True)
    term = head.losses(logits, targets, IMAGE, torch.zeros(3, 2, dtype=torch.int64))["segmentation"]
    term.total.backward()
    assert mean_over_batch(term) == 0 and not logits.grad.any()


@pytest.mark.parametrize("masks", [False, True])
def test_head_and_labels_stand_in_one_static_graph(masks):
    torch.manual_seed(0)
    head = SegmentationHead(SegmentationConfig(width=8), channels=4, num_classes=7)
    head = head.to(memory_format=torch.channels_last)
    targets = random_targets(masks=masks)
    level = torch.randn(3, 4, *CELLS).to(memory_format=torch.channels_last)

    def loss(level):
        return mean_over_batch(head.losses(head(level), targets, IMAGE, SIZES)["segmentation"])

    runs = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")):
        x = level.clone().requires_grad_()
        value = function(x)
        value.backward()
        runs.append((value.detach(), x.grad))
    torch.testing.assert_close(runs[0], runs[1])


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"convs": -1}, {"width": 0}, {"level": ""}])
def test_configuration(wrong):
    with pytest.raises(ConfigError, match=f"segmentation.*{next(iter(wrong))}"):
        SegmentationConfig(**wrong)
