import dataclasses

import pytest
import torch
from torchvision.ops import box_iou

from gesso.errors import ConfigError
from gesso.models.roi import RoIPoolConfig, RoISamplingConfig, sample_rois
from tests.models.helpers import random_batch


def proposals(targets, count=80, seed=3):
    """Jittered objects, and boxes anywhere."""
    g = torch.Generator().manual_seed(seed)
    B = len(targets.boxes)
    slot = torch.randint(0, 3, (B, count // 2), generator=g)
    near = targets.boxes.gather(1, slot[..., None].expand(-1, -1, 4))
    near = near + 2 * torch.randn(near.shape, generator=g)
    low = torch.rand(B, count // 2, 2, generator=g) * 40
    far = torch.cat([low, low + 3 + torch.rand(low.shape, generator=g) * 20], dim=-1)
    return torch.cat([near, far], dim=1), torch.rand(B, count, generator=g) > 0.1


def test_every_sample_is_what_it_says():
    batch, targets = random_batch(3)
    boxes, valid = proposals(targets)
    got = sample_rois(boxes, valid, targets, batch.key, RoISamplingConfig(samples=32, positive_share=0.25))
    assert got.boxes.shape == (3, 32, 4)
    for b in range(3):
        truth = targets.boxes[b][targets.valid[b]]
        best, slot = box_iou(got.boxes[b], truth).max(dim=1)
        assert torch.equal(got.positive[b], (best >= 0.5) & got.valid[b])
        assert got.positive[b].sum() == 8 and got.valid[b].all()
        where = got.positive[b]
        assert torch.equal(got.slot[b][where], slot[where])
        assert torch.equal(got.truth[b][where], truth[slot[where]])
        assert torch.equal(got.labels[b][where], targets.labels[b][slot[where]] + 1)
        assert (got.labels[b][~where] == 0).all()


def test_truth_is_appended_or_not():
    batch, targets = random_batch(2)
    nothing = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    got = sample_rois(*nothing, targets, batch.key, RoISamplingConfig(samples=8, positive_share=1.0))
    assert got.positive.sum(dim=1).tolist() == [3, 3] and torch.equal(got.valid, got.positive)
    assert torch.equal(got.boxes[got.positive], got.truth[got.positive])
    got = sample_rois(*nothing, targets, batch.key, RoISamplingConfig(samples=8, append_truth=False))
    assert not got.valid.any() and (got.boxes == 0).all()


def test_ignored_objects_are_neither_positive_nor_background():
    batch, targets = random_batch(2)
    targets = dataclasses.replace(targets, ignore=targets.valid)
    boxes = targets.boxes[:, :3]
    got = sample_rois(boxes, torch.ones(2, 3, dtype=torch.bool), targets, batch.key, RoISamplingConfig(samples=8))
    assert not got.valid.any()


def test_configuration():
    with pytest.raises(ConfigError, match="negative_iou"):
        RoISamplingConfig(negative_iou=0.6)
    with pytest.raises(ConfigError, match="size"):
        RoIPoolConfig(size=0)
