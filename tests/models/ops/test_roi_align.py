import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from gesso.models.ops.roi_align import multilevel_roi_align, roi_levels

STRIDES = (4, 8, 16, 32)


def pyramid(dtype=torch.float64, batch=2, channels=6, side=128):
    torch.manual_seed(0)
    return [torch.randn(batch, channels, side // s, side // s, dtype=dtype).requires_grad_() for s in STRIDES]


def random_boxes(dtype=torch.float64, batch=2, count=40, side=128):
    g = torch.Generator().manual_seed(1)
    centre = torch.rand(batch, count, 2, generator=g, dtype=dtype) * side
    half = torch.exp(torch.rand(batch, count, 2, generator=g, dtype=dtype) * 5) / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def reference(maps, boxes, size=7, ratio=2):
    pooler = MultiScaleRoIAlign(list("0123"), size, ratio)
    side = maps[0].shape[-1] * 4
    return pooler(dict(zip("0123", maps, strict=True)), list(boxes), [(side, side)] * len(boxes))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("size", "ratio"), [(7, 2), (3, 1), (14, 2)])
def test_equals_torchvision_forward_and_backward(dtype, tolerance, channels_last, size, ratio):
    maps, boxes = pyramid(dtype), random_boxes(dtype)
    expected = reference(maps, boxes, size, ratio)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, maps, weight)
    used = [m.contiguous(memory_format=torch.channels_last) for m in maps] if channels_last else maps
    pooled = multilevel_roi_align(used, boxes, STRIDES, output_size=size, sampling_ratio=ratio)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pooled, expected, atol=tolerance, rtol=tolerance)
    found = torch.autograd.grad(pooled, maps, weight)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=tolerance)


def test_aligned_equals_torchvision():
    from torchvision.ops import roi_align

    maps, boxes = pyramid()[:1], random_boxes()
    expected = roi_align(maps[0], list(boxes), 7, 0.25, 2, aligned=True)
    torch.testing.assert_close(multilevel_roi_align(maps, boxes, (4,), aligned=True), expected)


def test_levels_by_size():
    sides = torch.tensor([20.0, 111.9, 112.1, 223.9, 224.1, 447.9, 448.1, 5000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=-1)
    levels = roi_levels(boxes, num_levels=4, canonical_level=4, canonical_size=224)
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_bfloat16_maps_are_pooled_in_float32():
    maps, boxes = pyramid(torch.float32), random_boxes(torch.float32)
    half = [m.detach().bfloat16().requires_grad_() for m in maps]
    pooled = multilevel_roi_align(half, boxes, STRIDES)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, multilevel_roi_align([m.float() for m in half], boxes, STRIDES))
    pooled.sum().backward()
    assert half[0].grad is not None and half[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_boxes_that_are_no_numbers_do_not_read_outside(value):
    maps, boxes = pyramid(torch.float32), random_boxes(torch.float32)
    expected = multilevel_roi_align(maps, boxes, STRIDES)[1:]
    boxes[0, 0] = value
    torch.testing.assert_close(multilevel_roi_align(maps, boxes, STRIDES)[1:], expected)


def test_gradient_passes_gradcheck():
    maps, boxes = pyramid(batch=1, channels=2, side=32), random_boxes(batch=1, count=3, side=32)
    assert torch.autograd.gradcheck(
        lambda *m: multilevel_roi_align(m, boxes, STRIDES, output_size=2), maps, check_batched_grad=False
    )
