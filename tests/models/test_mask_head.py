"""The mask branch against torchvision's parts."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import maskrcnn_loss, project_masks_on_boxes

from gesso.errors import ConfigError
from gesso.models.losses import mean_over_batch
from gesso.models.mask_head import MaskBranch, MaskHead, MaskHeadConfig, first, mask_targets
from gesso.models.roi import RoIPoolConfig, RoISamplingConfig, sample_rois
from gesso.structures import Detections
from tests.models.helpers import NUM_CLASSES, random_batch
from tests.models.test_roi import proposals

S = 64


def pictures(K=30, seed=0, dtype=torch.float64):
    """Random blobs on a grid of S x S, and regions on it that are rarely whole numbers."""
    g = torch.Generator().manual_seed(seed)
    masks = F.interpolate(torch.rand(K, 1, 8, 8, generator=g), size=(S, S), mode="bilinear")[:, 0] > 0.5
    low = torch.rand(K, 2, generator=g, dtype=dtype) * 40
    size = 1.5 + torch.rand(K, 2, generator=g, dtype=dtype) * 40
    boxes = torch.cat([low, (low + size).clamp(max=S)], dim=1)
    boxes[0] = torch.tensor([0, 0, S, S])
    masks[K // 2 :] = torch.rand(K - K // 2, S, S, generator=g) > 0.5
    boxes[K // 2 : K // 2 + 5, 2] = boxes[K // 2 : K // 2 + 5, 0] + 0.3  # RoIAlign makes them a pixel wide
    return masks.byte(), boxes


@pytest.mark.parametrize("size", [14, 28, 5])
def test_targets_equal_torchvision_on_whole_pictures(size):
    masks, boxes = pictures()
    frames = torch.tensor([[0.0, 0, S, S]], dtype=torch.float64).expand(len(boxes), 4)
    expected = project_masks_on_boxes(masks.double(), boxes, torch.arange(len(boxes)), size)
    assert 0.2 < expected.mean() < 0.8
    torch.testing.assert_close(mask_targets(masks, frames, boxes, size), expected, atol=1e-9, rtol=1e-9)


def test_targets_do_not_depend_on_where_the_frame_lies():
    """A grid over a part of the picture is the whole picture's grid, moved and scaled."""
    masks, boxes = pictures()
    scale, shift = torch.tensor([2.5, 0.75], dtype=torch.float64), torch.tensor([30.0, 11.0], dtype=torch.float64)
    to = lambda value: (value.unflatten(-1, (2, 2)) * scale + shift).flatten(-2)  # noqa: E731
    frame = torch.tensor([[0.0, 0, S, S]], dtype=torch.float64).expand(len(boxes), 4)
    found, expected = (mask_targets(masks, f, b, 14, aligned=True) for f, b in ((to(frame), to(boxes)), (frame, boxes)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", [60.0, 448.0, 896.0])
@pytest.mark.parametrize("aligned", [False, True])
def test_targets_stand_where_the_object_does(side, aligned):
    """From the grid to the target and, pasted, back: the shift is no part of the grid's cells, however large."""
    masks = torch.zeros(1, 112, 112, dtype=torch.uint8)
    masks[:, 28:84, 14:70] = 1
    box = torch.tensor([[10.0, 20, 10 + side, 20 + side]])
    target = mask_targets(masks, box, box, 28, aligned=aligned)[0].double()
    place = (torch.arange(28) + 0.5) / 28
    total = target.sum()
    found = torch.stack([(target.sum(0) * place).sum(), (target.sum(1) * place).sum()]) / total * side
    middle = torch.tensor([42.0, 56.0], dtype=torch.float64) / 112 * side
    torch.testing.assert_close(found, middle - (0 if aligned else 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("factor", [1, 2, 4, 6])
def test_long_regions_see_all_of_the_object(factor):
    masks = torch.ones(1, 112, 112, dtype=torch.uint8)
    frame = torch.tensor([[300.0, 300, 400, 400]])
    half = 50.0 * factor
    box = torch.tensor([[350 - half, 350 - half, 350 + half, 350 + half]])
    target = mask_targets(masks, frame, box, 28, aligned=True)[0].sum(0)
    place = 350 - half + (torch.arange(28) + 0.5) / 28 * 2 * half
    assert float((target * place).sum() / target.sum()) == pytest.approx(350, abs=1)


def test_targets_of_the_frame_itself_are_the_mask():
    """One sample at the middle of each cell of a grid: pixel k of RoIAlign stands at k, its cells at k + 0.5."""
    masks, _ = pictures()
    frames = torch.tensor([[3.0, 5, 3 + S, 5 + S]]).expand(len(masks), 4)
    found = mask_targets(masks, frames, frames, S)
    padded = F.pad(masks.float()[:, None], (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(found, F.avg_pool2d(padded, 2, stride=1)[:, 0])


def test_targets_outside_of_the_frame_are_empty():
    masks = torch.ones(3, 28, 28, dtype=torch.uint8)
    frames = torch.tensor([[10.0, 10, 38, 38]]).expand(3, 4)
    boxes = torch.tensor([[0.0, 10, 28, 38], [10, 10, 38, 66], [10, 10, 38, 38]])
    left, below, whole = mask_targets(masks, frames, boxes, 28)
    assert (left[:, :9] == 0).all() and (left[:, 10:] == 1).all()
    assert (below[15:] == 0).all() and (below[:13] == 1).all() and (whole == 1).all()


def test_targets_without_a_frame_are_finite():
    masks, boxes = pictures(4, dtype=torch.float32)
    assert mask_targets(masks, torch.zeros(4, 4), boxes, 14).isfinite().all()
    assert mask_targets(masks, torch.zeros(4, 4), torch.zeros(4, 4), 14).isfinite().all()


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_first(count):
    """In order, then others; outside a graph as many as there are, at least one, at most as many as asked."""
    wanted = torch.zeros(12, dtype=torch.bool)
    places = torch.randperm(12, generator=torch.Generator().manual_seed(count))[:count]
    wanted[places] = True
    expected = sorted(places.tolist())
    for most in (1, 6, 12):
        found = first(wanted, most)
        assert found.dtype == torch.int64 and len(found) == max(1, min(count, most))
        assert found.tolist()[: min(count, most)] == expected[:most]
        full = first(wanted, most, fill=True)
        assert len(full) == len(set(full.tolist())) == most and full.tolist()[: min(count, most)] == expected[:most]
        compiled = torch.compile(lambda value, most=most: first(value, most), fullgraph=True, backend="eager")
        assert torch.equal(compiled(wanted), full)


@pytest.mark.parametrize("agnostic", [False, True])
def test_the_last_layer_of_one_class_alone(agnostic):
    """It is the whole layer, and then the plane of the class."""
    torch.manual_seed(0)
    head = MaskHead(
        MaskHeadConfig(convs=2, width=6, class_agnostic=agnostic), channels=4, num_classes=NUM_CLASSES
    ).double()
    torch.nn.init.normal_(head.masks.bias)
    pooled, labels = torch.randn(7, 4, 5, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3, 0])
    hidden = head.deconv(head.convs(pooled)).relu()
    planes = head.masks(hidden)
    assert planes.shape == (7, 1 if agnostic else NUM_CLASSES, 10, 10)
    expected = planes[torch.arange(7), labels * (not agnostic)]
    found = head(pooled, labels)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(7, 10, 10, dtype=torch.float64)
    parameters = list(head.parameters())
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def branch(**changes):
    torch.manual_seed(0)
    config = MaskHeadConfig(**({"convs": 1, "width": 6, "pool_size": 7, "samples": 24, "half_pixel": True} | changes))
    made = MaskBranch(config, RoIPoolConfig(canonical_size=32.0), 4, NUM_CLASSES, ("P2", "P3"), {"P2": 4.0, "P3": 8.0})
    return made, {"P2": torch.randn(2, 4, 16, 16), "P3": torch.randn(2, 4, 8, 8)}


def regions(masks=True):
    batch, targets = random_batch(2, masks=masks)
    found = sample_rois(*proposals(targets), targets, batch.key, RoISamplingConfig(samples=24, positive_share=0.5))
    assert found.positive.sum(dim=1).tolist() == [12, 12]
    return found, targets


def expected_loss(made, maps, found, targets, chosen):
    """torchvision's loss of the same logits, on the regions ``chosen`` (places among the 48)."""
    boxes, labels = found.boxes.flatten(0, 1)[chosen], found.labels.flatten()[chosen]
    image, slot = found.image.flatten()[chosen], found.slot.flatten()[chosen]
    pooled = made.pooler(maps, boxes[None], image[None])
    planes = made.head.masks(made.head.deconv(made.head.convs(pooled)).relu())
    if planes.shape[1] == 1:
        labels = torch.ones_like(labels)
    # torchvision reads masks of whole pictures: here a picture for each object, moved and scaled to its frame.
    frames, masks = targets.mask_frames[image, slot], targets.masks[image, slot]
    side = masks.shape[-1]
    # There cell k of a picture stands at k, here cell k of a grid at k + 0.5, and half a pixel is read further on.
    scale = side / (frames[:, 2:] - frames[:, :2])[:, None]
    moved = (boxes.view(-1, 2, 2) - frames[:, None, :2] + 0.5) * scale - 0.5
    each = [
        (torch.nn.functional.pad(planes[k : k + 1], (0, 0, 0, 0, 1, 0)), moved[k].view(1, 4)) for k in range(len(boxes))
    ]
    return torch.stack(
        [
            maskrcnn_loss(plane, [box], [masks[k : k + 1]], [labels[k : k + 1]], [torch.tensor([0])])
            for k, (plane, box) in enumerate(each)
        ]
    ).mean()


@pytest.mark.parametrize("agnostic", [False, True])
def test_the_loss_equals_torchvision(agnostic):
    made, maps = branch(class_agnostic=agnostic)
    found, targets = regions()
    term = made.losses(maps, found, targets)["mask"]
    chosen = found.positive.flatten().nonzero().flatten()
    assert term.samples == 24
    torch.testing.assert_close(mean_over_batch(term), expected_loss(made, maps, found, targets, chosen))


def test_masks_are_learnt_where_they_are_unless_half_a_pixel_off_is_asked_for():
    found, targets = regions()
    (exact, maps), (shifted, _) = branch(half_pixel=False), branch(half_pixel=True)
    assert not MaskHeadConfig().half_pixel
    assert exact.losses(maps, found, targets)["mask"].total != shifted.losses(maps, found, targets)["mask"].total


def test_at_most_so_many_regions():
    made, maps = branch(samples=5, weight=3.0)
    found, targets = regions()
    term = made.losses(maps, found, targets)["mask"]
    chosen = found.positive.flatten().nonzero().flatten()[:10]
    assert term.samples == 10
    torch.testing.assert_close(mean_over_batch(term), 3 * expected_loss(made, maps, found, targets, chosen))


def test_objects_without_a_mask_are_not_counted():
    made, maps = branch()
    found, targets = regions()
    frames = targets.mask_frames.clone()
    frames[0, 1] = frames[1, 0] = 0
    bare = dataclasses.replace(targets, mask_frames=frames)
    term = made.losses(maps, found, bare)["mask"]
    has = (frames.gather(1, found.slot[..., None].expand(-1, -1, 4)) != 0).any(dim=-1)
    chosen = (found.positive & has).flatten().nonzero().flatten()
    assert 0 < term.samples == len(chosen) < 24
    torch.testing.assert_close(mean_over_batch(term), expected_loss(made, maps, found, targets, chosen))


def test_rows_of_any_picture():
    """Regions that ``hardest`` has mixed have the same loss."""
    made, maps = branch()
    found, targets = regions()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    mixed = type(found)(*(value.flatten(0, 1)[order].unflatten(0, (2, 24)) for value in found))
    a, b = (mean_over_batch(made.losses(maps, value, targets)["mask"]) for value in (found, mixed))
    torch.testing.assert_close(a, b)


def test_probabilities_stand_in_their_slots():
    made, maps = branch()
    g = torch.Generator().manual_seed(0)
    low = torch.rand(2, 5, 2, generator=g) * 40
    found = Detections(
        boxes=torch.cat([low, low + 5 + 15 * torch.rand(2, 5, 2, generator=g)], dim=-1),
        scores=torch.rand(2, 5, generator=g),
        labels=torch.randint(0, NUM_CLASSES, (2, 5), generator=g),
        valid=torch.tensor([[True, True, False, False, False], [True, False, True, True, False]]),
    )
    masks = made.probabilities(maps, found)
    assert masks.shape == (2, 5, 14, 14) and masks.dtype == torch.float32 and not masks.requires_grad
    assert (masks[~found.valid] == 0).all()
    for b, d in found.valid.nonzero().tolist():
        pooled = made.pooler(maps, found.boxes[b, d].view(1, 1, 4), torch.tensor([[b]]))
        planes = made.head.masks(made.head.deconv(made.head.convs(pooled)).relu()).sigmoid()
        torch.testing.assert_close(masks[b, d], planes[0, found.labels[b, d]])
    nothing = dataclasses.replace(found, valid=found.valid & False)
    assert (made.probabilities(maps, nothing) == 0).all()


def test_batch_norm_sees_the_same_regions_everywhere():
    """Its statistics would else depend on whether the head runs on a CPU, outside a graph."""
    made, maps = branch(norm="batch")
    found, targets = regions()
    seen = []
    made.head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    made.losses(maps, found, targets)
    made.eval().losses(maps, found, targets)
    assert seen == [48, 24]


def test_configuration():
    for change in ({"convs": 0}, {"width": 0}, {"pool_size": 0}, {"samples": 0}, {"target_side": 0}, {"weight": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            MaskHeadConfig(**change)
    made, maps = branch()
    with pytest.raises(ConfigError, match="the ground truth has none"):
        made.losses(maps, regions()[0], SimpleNamespace(masks=None, mask_frames=None))
