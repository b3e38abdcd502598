import dataclasses

import pytest
import torch
from torchvision.ops import box_iou

from gesso.errors import ConfigError
from gesso.models.roi import RoIPoolConfig, RoIPooler, RoISamplingConfig, hardest, match_rois, sample_rois
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
        assert (got.labels[b][~where] == 0).all() and (got.image[b] == b).all()


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


def test_every_proposal_at_once():
    """Positives first, then negatives, then what is neither or not valid."""
    batch, targets = random_batch(3)
    boxes, valid = proposals(targets)
    config = RoISamplingConfig(samples=8, positive_iou=0.6, negative_iou=0.4)
    got = sample_rois(boxes, valid, targets, batch.key, config, every=True)
    assert got.boxes.shape == (3, 80 + 6, 4)
    for b in range(3):
        best = box_iou(boxes[b][valid[b]], targets.boxes[b][targets.valid[b]]).amax(dim=1)
        assert got.positive[b].sum() == (best >= 0.6).sum() + 3 and got.valid[b].sum() == (
            (best >= 0.6).sum() + 3 + (best < 0.4).sum()
        )
        assert (got.positive[b].int().diff() <= 0).all() and (got.valid[b].int().diff() <= 0).all()
        assert (best >= 0.4).logical_and(best < 0.6).any()


def test_regions_as_they_are_with_their_targets():
    _, targets = random_batch(3)
    targets = dataclasses.replace(targets, ignore=torch.arange(6).expand(3, 6) == 1)
    boxes, valid = proposals(targets)
    got = match_rois(boxes, valid, targets, RoISamplingConfig(positive_iou=0.6, negative_iou=0.4))
    assert torch.equal(got.boxes, boxes) and got.image.tolist() == [[b] * 80 for b in range(3)]
    usable = [0, 2]
    for b in range(3):
        overlaps = box_iou(boxes[b], targets.boxes[b, usable])
        ignored = box_iou(boxes[b], targets.boxes[b, 1:2])[:, 0]
        for r in range(80):
            best = int(overlaps[r].argmax())
            positive = bool(valid[b, r]) and float(overlaps[r, best]) >= 0.6
            assert bool(got.positive[b, r]) == positive
            assert got.labels[b, r] == (targets.labels[b, usable[best]] + 1 if positive else 0)
            if positive:
                assert got.slot[b, r] == usable[best]
                assert torch.equal(got.truth[b, r], targets.boxes[b, usable[best]])
            elif not valid[b, r] or overlaps[r, best] >= 0.4 or ignored[r] > 0.6:
                assert not got.valid[b, r]
            elif ignored[r] == 0:
                assert got.valid[b, r]
    assert got.positive.any(dim=1).all() and (got.valid & ~got.positive).any(dim=1).all()


def slow_hardest(regions, difficulty, count, threshold):
    """(picture, place) of the regions that are kept by NMS of each picture, by falling difficulty."""
    kept = []
    for b in range(len(difficulty)):
        chosen = []
        for r in sorted(range(difficulty.shape[1]), key=lambda r: -difficulty[b, r].item()):
            if regions.valid[b, r] and all(
                box_iou(regions.boxes[b, r, None], regions.boxes[b, other, None]) <= threshold for other in chosen
            ):
                chosen.append(r)
        kept += [(difficulty[b, r].item(), b, r) for r in chosen]
    return [(b, r) for _, b, r in sorted(kept, reverse=True)[: count * len(difficulty)]]


@pytest.mark.parametrize("count", [6, 500])
def test_the_hardest_equal_a_slow_version(count):
    batch, targets = random_batch(3)
    config = RoISamplingConfig(samples=count, hard_nms_iou=0.6)
    regions = sample_rois(*proposals(targets), targets, batch.key, config, every=True)
    g = torch.Generator().manual_seed(0)
    difficulty = torch.rand(3, 86, generator=g) + torch.tensor([0.5, 0, 0])[:, None]
    expected = slow_hardest(regions, difficulty, count, 0.6)
    got = hardest(regions, difficulty, config)
    rows = min(count, 86)
    assert got.boxes.shape == (3, rows, 4) and got.valid.sum() == len(expected) < 3 * 86
    flat = type(got)(*(value.flatten(0, 1) for value in got))
    for k, (b, r) in enumerate(expected):
        assert flat.image[k] == b
        for name in ("boxes", "labels", "slot", "truth", "positive"):
            assert torch.equal(getattr(flat, name)[k], getattr(regions, name)[b, r]), name
    rest = slice(len(expected), None)
    assert not flat.valid[rest].any() and not flat.positive[rest].any() and (flat.labels[rest] == 0).all()
    assert flat.valid[: len(expected)].all()


def test_pooling_by_name_level_and_picture():
    """Regions of any picture in one row, read from the maps that are named, at their strides."""
    from torchvision.ops import roi_align

    torch.manual_seed(0)
    maps = {name: torch.randn(2, 3, side, side) for name, side in (("C5", 4), ("P3", 16), ("P4", 8), ("P9", 1))}
    strides = {"P3": 4.0, "P4": 8.0, "C5": 16.0}
    pooler = RoIPooler(RoIPoolConfig(size=3, canonical_level=3, canonical_size=32.0), ("P3", "P4"), strides)
    boxes = torch.tensor([[[0.0, 0, 10, 9], [5, 5, 60, 62]], [[8, 8, 20, 24], [0, 0, 64, 64]]])
    image = torch.tensor([[1, 0], [1, 1]])
    found = pooler(maps, boxes, image)
    for k, (level, b) in enumerate((("P3", 1), ("P4", 0), ("P3", 1), ("P4", 1))):
        rois = torch.cat([torch.tensor([[float(b)]]), boxes.view(4, 4)[k : k + 1]], dim=1)
        expected = roi_align(maps[level], rois, 3, 1 / strides[level], 2)
        torch.testing.assert_close(found[k], expected[0])
    aligned = RoIPooler(RoIPoolConfig(size=2, sampling_ratio=3, aligned=True), ("C5",), strides)(maps, boxes)
    torch.testing.assert_close(aligned, roi_align(maps["C5"], list(boxes), 2, 1 / 16, 3, aligned=True))


def test_configuration():
    with pytest.raises(ConfigError, match="hard_nms_iou"):
        RoISamplingConfig(hard_nms_iou=1.5)
    with pytest.raises(ConfigError, match="negative_iou"):
        RoISamplingConfig(negative_iou=0.6)
    with pytest.raises(ConfigError, match="size"):
        RoIPoolConfig(size=0)
