import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from gesso.models.ops.nms import batched_nms


def plain_nms(boxes, scores, valid, groups, threshold):
    """The definition, one box after another."""
    keep = torch.zeros_like(valid)
    for b in range(len(boxes)):
        overlap = box_iou(boxes[b], boxes[b])
        for i in sorted(range(len(boxes[b])), key=lambda i: (-scores[b, i].item(), i)):
            if valid[b, i]:
                rivals = [j for j in range(len(boxes[b])) if keep[b, j] and groups[b, j] == groups[b, i]]
                keep[b, i] = all(overlap[i, j] <= threshold for j in rivals)
    return keep


def example(seed, B=2, N=30, groups=3):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(B, N, 2, generator=g) * 20
    boxes = torch.cat([low, low + 1 + torch.rand(B, N, 2, generator=g) * 15], dim=-1)
    scores = torch.randint(0, 12, (B, N), generator=g) / 12
    valid = torch.rand(B, N, generator=g) > 0.2
    return boxes, scores, valid, torch.randint(-1, groups, (B, N), generator=g)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_equals_the_definition(seed, threshold):
    boxes, scores, valid, groups = example(seed)
    keep = batched_nms(boxes, scores, valid, groups, threshold)
    assert torch.equal(keep, plain_nms(boxes, scores, valid, groups, threshold))


def test_an_image_does_not_depend_on_the_others():
    boxes, scores, valid, groups = example(3, B=4)
    together = batched_nms(boxes, scores, valid, groups, 0.5)
    for b in range(4):
        one = slice(b, b + 1)
        assert torch.equal(batched_nms(boxes[one], scores[one], valid[one], groups[one], 0.5), together[one])


def test_what_invalid_slots_hold_does_not_matter():
    boxes, scores, valid, groups = example(4)
    expected = batched_nms(boxes, scores, valid, groups, 0.5)
    boxes[~valid], scores[~valid] = float("nan"), float("nan")
    assert torch.equal(batched_nms(boxes, scores, valid, groups, 0.5), expected)


def test_nothing_valid():
    boxes, scores, valid, groups = example(5)
    assert not batched_nms(boxes, scores, valid & False, groups, 0.5).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_well_formed_operator(dtype):
    boxes, scores, valid, groups = example(6)
    arguments = (boxes.to(dtype), scores.to(dtype), valid, groups, 0.5)
    torch.library.opcheck(torch.ops.gesso.batched_nms.default, arguments, test_utils=("test_schema", "test_faketensor"))
