import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, nms

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


def torchvision_nms(boxes, scores, valid, groups, threshold):
    """One call of torchvision for each image and group."""
    keep = torch.zeros_like(valid)
    for b in range(len(boxes)):
        for group in groups[b].unique():
            slots = (valid[b] & (groups[b] == group)).nonzero().flatten()
            keep[b, slots[nms(boxes[b, slots], scores[b, slots], threshold)]] = True
    return keep


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 130),
    groups=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_torchvision_on_ties_and_empty_boxes(seed, count, groups, threshold, dtype):
    """Few different corners: equal boxes, boxes without area, IoU exactly at the threshold, and equal scores."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 6, (2, count, 2), generator=g)
    boxes = torch.cat([low, low + torch.randint(0, 6, (2, count, 2), generator=g)], dim=-1).to(dtype)
    scores = torch.randint(-3, 4, (2, count), generator=g).to(dtype)
    valid = torch.rand(2, count, generator=g) > 0.2
    group = torch.randint(0, groups, (2, count), generator=g)
    keep = batched_nms(boxes, scores, valid, group, threshold)
    assert torch.equal(keep, torchvision_nms(boxes, scores, valid, group, threshold))


def test_all_but_the_first_of_the_best_are_dropped():
    boxes = torch.tensor([2.0, 3.0, 8.0, 9.0]).expand(2, 200, 4)
    scores = torch.full((2, 200), 0.25)
    scores[1, 150:] = 0.5
    everything, group = torch.ones(2, 200, dtype=torch.bool), torch.zeros(2, 200, dtype=torch.int64)
    keep = batched_nms(boxes, scores, everything, group, 0.5)
    assert keep.nonzero().tolist() == [[0, 0], [1, 150]]


@pytest.mark.parametrize("shape", [(2, 0), (0, 4)])
def test_no_boxes(shape):
    flags = torch.ones(shape, dtype=torch.bool)
    keep = batched_nms(torch.rand(*shape, 4), torch.rand(shape), flags, flags.long(), 0.5)
    assert keep.shape == shape and keep.dtype == torch.bool


@pytest.mark.parametrize("groups", [1, 365])
def test_hundred_thousand_boxes(groups):
    g = torch.Generator().manual_seed(7)
    place = torch.randint(0, 300, (100_000,), generator=g)
    centre = torch.rand(300, 2, generator=g)[place] * 4000 + torch.randn(100_000, 2, generator=g) * 3
    half = 20 + torch.rand(300, 2, generator=g)[place] * 40
    boxes = torch.cat([centre - half, centre + half], dim=-1)[None]
    scores, group = torch.rand(1, 100_000, generator=g), torch.randint(0, groups, (1, 100_000), generator=g)
    valid = torch.rand(1, 100_000, generator=g) > 0.1
    keep = batched_nms(boxes, scores, valid, group, 0.6)
    assert torch.equal(keep, torchvision_nms(boxes, scores, valid, group, 0.6))


def test_one_graph():
    compiled = torch.compile(batched_nms, fullgraph=True, backend="aot_eager")
    arguments = example(8)
    assert torch.equal(compiled(*arguments, 0.5), batched_nms(*arguments, 0.5))
