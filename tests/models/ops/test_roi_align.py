import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign, ps_roi_align, roi_align
from torchvision.ops.poolers import LevelMapper

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


def test_average_of_a_roi_equals_torchvision():
    maps, boxes = pyramid()[1:2], random_boxes(count=9)
    expected = roi_align(maps[0], list(boxes), 1, 1 / 8, 7, aligned=True)
    found = multilevel_roi_align(maps, boxes, (8,), output_size=1, sampling_ratio=7, aligned=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("size", "ratio"), [(7, 2), (3, 1)])
def test_position_sensitive_equals_torchvision(dtype, tolerance, size, ratio):
    maps, boxes = torch.randn(2, 4 * size * size, 20, 24, dtype=dtype), random_boxes(dtype, side=80)
    boxes[0, 0] = torch.tensor([30.0, 40.0, 30.0, 40.5])
    maps.requires_grad_()
    theirs = maps.unflatten(1, (size * size, 4)).transpose(1, 2).flatten(1, 2)
    expected = ps_roi_align(theirs, list(boxes), size, 0.25, ratio)
    options = {"output_size": size, "sampling_ratio": ratio, "aligned": True, "position_sensitive": True}
    found = multilevel_roi_align([maps], boxes, (4,), **options)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(expected)
    (wanted,), (got,) = torch.autograd.grad(expected, maps, weight), torch.autograd.grad(found, maps, weight)
    torch.testing.assert_close(got, wanted, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize(("count", "channels"), [(2, 49), (1, 50)])
def test_position_sensitive_takes_one_map_with_channels_for_each_cell(count, channels):
    with pytest.raises(ValueError, match="position-sensitive"):
        multilevel_roi_align(
            [torch.randn(1, channels, 4, 4)] * count, torch.rand(1, 2, 4), STRIDES[:count], position_sensitive=True
        )


def test_any_picture_can_be_read():
    maps, boxes = pyramid(batch=3), random_boxes(batch=2)
    image = torch.randint(0, 3, (2, 40), generator=torch.Generator().manual_seed(2))
    found = multilevel_roi_align(maps, boxes, STRIDES, image=image).unflatten(0, (2, 40))
    every = torch.stack([multilevel_roi_align([m[k : k + 1].expand(2, -1, -1, -1) for m in maps], boxes, STRIDES)
                         for k in range(3)]).unflatten(1, (2, 40))  # fmt: skip
    for b in range(2):
        for r in range(40):
            assert torch.equal(found[b, r], every[image[b, r], b, r])


def test_strides_of_a_vision_transformer():
    strides, sides = (3.5, 7.0, 14.0, 28.0), (32, 16, 8, 4)
    maps = [torch.randn(2, 3, side, side, dtype=torch.float64) for side in sides]
    boxes = random_boxes(side=112)
    found = multilevel_roi_align(maps, boxes, strides, canonical_size=40).unflatten(0, (2, 40))
    level = LevelMapper(2, 5, 40)(list(boxes)).view(2, 40)
    assert level.unique().tolist() == [0, 1, 2, 3]
    for k, stride in enumerate(strides):
        expected = roi_align(maps[k], list(boxes), 7, 1 / stride, 2).unflatten(0, (2, 40))
        torch.testing.assert_close(found[level == k], expected[level == k])


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(-3, 12),
    ulps=st.integers(-40, 40),
    first=st.sampled_from([2, 3]),
    size=st.sampled_from([224.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_levels_equal_torchvision(exponent, ulps, first, size, dtype):
    rough = [2.0**exponent, size * 2 ** round(exponent - 6)]
    sides = torch.tensor(rough, dtype=dtype)
    sides = sides * (1 + ulps * torch.finfo(dtype).eps)
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=-1)
    levels = roi_levels(boxes, num_levels=4, canonical_level=4, canonical_size=size, first_level=first)
    assert torch.equal(levels, LevelMapper(first, first + 3, size)([boxes]))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), aligned=st.booleans())
def test_degenerate_rois_equal_torchvision(data, aligned):
    """Empty, turned round, outside, on the border, and far too large."""
    number = st.sampled_from([-500.0, -4.0, -0.5, 0.0, 1e-3, 3.0, 64.0, 127.5, 128.0, 132.0, 5000.0])
    boxes = torch.tensor(data.draw(st.lists(st.tuples(*[number] * 4), min_size=1, max_size=6)), dtype=torch.float64)
    maps = [m.detach() for m in pyramid(batch=1, channels=3)[:1]]
    expected = roi_align(maps[0], [boxes], 3, 0.25, 2, aligned=aligned)
    found = multilevel_roi_align(maps, boxes[None], (4,), output_size=3, aligned=aligned)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("batch", [1, 2])
def test_no_rois(batch):
    maps = pyramid(torch.float32, batch=batch)
    pooled = multilevel_roi_align(maps, torch.zeros(batch, 0, 4), STRIDES)
    assert pooled.shape == (0, 6, 7, 7)
    pooled.sum().backward()
    assert all((m.grad == 0).all() for m in maps)


@pytest.mark.parametrize("count", [3, 60])
@pytest.mark.parametrize("side", [3.0, 120.0, 1000.0])
def test_levels_without_a_roi(count, side):
    maps, boxes = pyramid(), random_boxes(count=count)
    boxes[..., 2:] = boxes[..., :2] + side
    expected, found = reference(maps, boxes), multilevel_roi_align(maps, boxes, STRIDES)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    wanted = torch.autograd.grad(expected.square().sum(), maps, allow_unused=True)
    for a, b in zip(torch.autograd.grad(found.square().sum(), maps), wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_boxes_that_are_no_numbers_give_no_gradient_but_zeros(value):
    maps, boxes = pyramid(torch.float32), torch.full((2, 3, 4), value)
    pooled = multilevel_roi_align(maps, boxes, STRIDES)
    assert pooled.isfinite().all()
    pooled.sum().backward()
    assert all(m.grad.isfinite().all() for m in maps)


def test_maps_in_any_layout():
    maps, boxes = pyramid(), random_boxes()
    expected = multilevel_roi_align(maps, boxes, STRIDES)
    slices = [torch.randn(2, 6, 2 * m.shape[2], m.shape[3] + 3, dtype=m.dtype)[:, :, ::2, 3:] for m in maps]
    for part, m in zip(slices, maps, strict=True):
        part.copy_(m)
    assert torch.equal(multilevel_roi_align(slices, boxes, STRIDES), expected)


def test_under_autocast():
    maps, boxes = pyramid(torch.float32), random_boxes(torch.float32)
    kernel = torch.randn(6, 6, 1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = [torch.nn.functional.conv2d(m, kernel) for m in maps]
        pooled = multilevel_roi_align(half, boxes, STRIDES)
    assert half[0].dtype == torch.bfloat16 and pooled.dtype == torch.float32
    pooled.sum().backward()
    assert kernel.grad.isfinite().all() and maps[0].grad.dtype == torch.float32


def test_one_graph():
    torch._dynamo.reset()
    maps, boxes = pyramid(torch.float32), random_boxes(torch.float32)
    twins = [m.detach().clone().requires_grad_() for m in maps]
    compiled = torch.compile(multilevel_roi_align, fullgraph=True, backend="aot_eager")
    found, expected = compiled(maps, boxes, STRIDES), multilevel_roi_align(twins, boxes, STRIDES)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward(), expected.square().sum().backward()
    for a, b in zip(maps, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bit_equal_twice():
    boxes = random_boxes(torch.float32)
    gradients = []
    for _ in range(2):
        maps = pyramid(torch.float32)
        multilevel_roi_align(maps, boxes, STRIDES).square().sum().backward()
        gradients.append([m.grad for m in maps])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sensitive", [False, True])
def test_are_well_formed_operators(dtype, sensitive):
    maps = [torch.randn(2, 9 if sensitive else 3, s, s, dtype=dtype, requires_grad=True) for s in (8, 4)]
    maps = maps[:1] if sensitive else maps
    extent = torch.rand(5, 4, dtype=dtype) * 3
    level, image = torch.arange(5) % len(maps), torch.arange(5) % 2
    torch.library.opcheck(torch.ops.gesso.roi_align.default, (maps, extent, level, image, 3, 2, sensitive))
    sides = [m.shape[2] for m in maps]
    gradient = torch.rand(5, 3, 3, 1 if sensitive else 3, dtype=dtype)
    arguments = (gradient, extent, level, image, 2, sides, sides, 2, sensitive)
    torch.library.opcheck(torch.ops.gesso.roi_align_backward.default, arguments)
