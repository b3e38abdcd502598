import pytest
import torch
from torchvision.models.detection.roi_heads import RoIHeads

from gesso.errors import ConfigError
from gesso.models.postprocess import PostprocessConfig, detect_regions

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
C, R = 4, 60


def example(seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(2, R, 2, generator=g) * 50
    boxes = torch.cat([low, low + 4 + torch.rand(2, R, 2, generator=g) * 30], dim=-1)
    boxes[:, -6:] += 200  # beyond the picture: nothing is left of them
    logits = 2 * torch.randn(2, R, C + 1, generator=g)
    return boxes, logits, torch.randn(2, R, C, 4, generator=g), torch.tensor([[60, 70], [64, 64]])


@pytest.mark.parametrize("agnostic", [False, True])
def test_equals_torchvision(agnostic):
    boxes, logits, deltas, sizes = example()
    if agnostic:
        deltas = deltas[:, :, :1]
    valid = torch.ones(2, R, dtype=torch.bool)
    scores = logits.softmax(dim=-1)[..., 1:]
    found = detect_regions(boxes, valid, scores, deltas, sizes, WEIGHTS, PostprocessConfig(detections=40))
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.05, 0.5, 40)
    every = torch.cat([torch.zeros(2, R, 1, 4), deltas.expand(-1, -1, C, -1)], dim=2)
    expected = heads.postprocess_detections(
        logits.flatten(0, 1), every.reshape(2 * R, -1), list(boxes), [tuple(s) for s in sizes.tolist()]
    )
    for b, (box, score, label) in enumerate(zip(*expected, strict=True)):
        kept = found.valid[b]
        assert kept.sum() == len(box) > 10
        torch.testing.assert_close(found.boxes[b][kept], box)
        torch.testing.assert_close(found.scores[b][kept], score)
        assert torch.equal(found.labels[b][kept], label - 1)
        assert (found.boxes[b][kept][:, 2:] > found.boxes[b][kept][:, :2]).all()


def test_fixed_count_and_zeros_in_empty_slots():
    boxes, logits, deltas, sizes = example()
    valid = torch.arange(R).expand(2, R) < 3
    scores = logits.softmax(dim=-1)[..., 1:]
    out = detect_regions(boxes, valid, scores, deltas, sizes, WEIGHTS, PostprocessConfig(detections=300))
    assert out.boxes.shape == (2, 300, 4) and out.boxes.dtype == out.scores.dtype == torch.float32
    assert 0 < out.valid.sum() <= 2 * 3 * C
    for value in (out.boxes, out.scores, out.labels):
        assert (value[~out.valid] == 0).all()
    assert (out.scores.diff(dim=1) <= 0).all()
    assert (out.boxes[0, :, 2] <= 70).all() and (out.boxes[0, :, 3] <= 60).all()


def test_only_the_best_candidates_enter():
    """With as many candidates as detections, the candidates are the best (region, class) pairs by score."""
    boxes, logits, deltas, sizes = example()
    boxes[:, -6:] -= 200
    scores = logits.sigmoid()[..., 1:]
    config = PostprocessConfig(detections=7, candidates=7, nms_iou=1.0)
    found = detect_regions(
        boxes, torch.ones(2, R, dtype=torch.bool), scores, deltas[:, :, :1] * 0, sizes, WEIGHTS, config
    )
    for b in range(2):
        best = sorted(((scores[b, r, c].item(), r, c) for r in range(R) for c in range(C)), reverse=True)[:7]
        assert found.scores[b].tolist() == [score for score, _, _ in best]
        assert found.labels[b].tolist() == [c for _, _, c in best]
        expected = torch.stack([boxes[b, r] for _, r, _ in best])
        torch.testing.assert_close(found.boxes[b, :, :2], expected[:, :2])


def test_configuration():
    with pytest.raises(ConfigError, match="candidates"):
        PostprocessConfig(detections=100, candidates=50)
    with pytest.raises(ConfigError, match="min_score"):
        PostprocessConfig(min_score=2)
