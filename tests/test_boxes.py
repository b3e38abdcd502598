import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from gesso import boxes

COORDINATE = st.floats(0, 100, width=32)


SOME = st.integers(1, 6)


def box_tensors(count=SOME):
    one = st.tuples(COORDINATE, COORDINATE, st.floats(0.125, 50, width=32), st.floats(0.125, 50, width=32))
    return count.flatmap(lambda n: st.lists(one, min_size=n, max_size=n)).map(
        lambda rows: torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float64)
    )


@given(box_tensors(), box_tensors())
def test_iou_equals_torchvision(a, b):
    torch.testing.assert_close(boxes.iou(a, b), torchvision.ops.box_iou(a, b))
    torch.testing.assert_close(boxes.area(a), torchvision.ops.box_area(a))


def test_iou_broadcasts_over_a_batch_and_empty_boxes_give_zero():
    a, b = torch.rand(3, 5, 4), torch.rand(3, 2, 4)
    assert boxes.iou(a, b).shape == (3, 5, 2)
    assert boxes.iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0
    assert boxes.iou(torch.tensor([[5.0, 5, 2, 2]]), torch.tensor([[0.0, 0, 9, 9]])).item() == 0


@given(box_tensors(), box_tensors())
def test_ioa_is_intersection_over_the_first_area(a, b):
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    expected = (high - low).clamp(min=0).prod(-1) / (a[:, 2:] - a[:, :2]).prod(-1)[:, None]
    torch.testing.assert_close(boxes.ioa(a, b), expected)


@given(box_tensors(st.just(4)), box_tensors(st.just(4)))
def test_decode_inverts_encode_and_equals_torchvision(reference, target):
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = boxes.encode(reference, target, weights)
    coder = torchvision.models.detection._utils.BoxCoder(weights)
    torch.testing.assert_close(deltas, coder.encode_single(target, reference))
    small = (target[:, 2:] - target[:, :2]) / (reference[:, 2:] - reference[:, :2]) < 60
    keep = small.all(dim=1)
    torch.testing.assert_close(boxes.decode(reference, deltas, weights)[keep], target[keep], rtol=1e-6, atol=1e-6)


def test_decode_clamps_the_growth():
    wide = boxes.decode(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([[0.0, 0, 99, 99]]), (1, 1, 1, 1))
    assert (wide[0, 2] - wide[0, 0]).item() == pytest.approx(1000, rel=1e-5)


def test_clip_uses_height_and_width_of_each_picture():
    raw = torch.tensor([[[-5.0, -5, 50, 50]], [[10.0, 10, 20, 20]]])
    clipped = boxes.clip(raw, torch.tensor([[30, 40], [12, 14]]))
    assert clipped.tolist() == [[[0, 0, 40, 30]], [[10, 10, 14, 12]]]
