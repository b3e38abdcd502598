"""What every detector keeps, one test a promise."""

import dataclasses

import pytest
import torch

from gesso import boxes as geometry
from gesso.models import mask_head
from gesso.models.mask_head import MaskHeadConfig
from gesso.structures import ImageBatch, Targets
from tests.models.helpers import KINDS, NUM_CLASSES, Watch, picture, random_batch, step, tiny_config, tiny_detector

FIRST = {"rpn_objectness", "rpn_box"}
SECOND = {*FIRST, "box_class", "box_regression"}
CASCADE = {*FIRST, *(f"{name}{k}" for name in ("box_class", "box_regression") for k in (1, 2, 3))}
LOSSES = {
    "faster_rcnn": SECOND,
    "mask_rcnn": SECOND | {"mask"},
    "mask_rcnn_convs": SECOND | {"mask"},
    "cascade_rcnn": CASCADE,
    "cascade_masks": CASCADE | {"mask"},
    "retinanet": {"focal", "box"},
    "rfcn": SECOND,
    "rfcn_3000": SECOND | {"fine_class"},
    "analysis": SECOND,
    "vit": SECOND,
    "everything": SECOND | {"mask", "segmentation"},
}
OF_BOXES = {"rpn_box", "box_regression", "box_regression1", "box_regression2", "box_regression3", "box", "mask"}
MASKED = ("mask_rcnn", "mask_rcnn_convs", "cascade_masks", "everything")

STAGES = {"C2": (32, 16), "C3": (48, 8), "C4": (192, 4), "C5": (96, 2)}
DILATED = {**STAGES, "C5": (96, 4), "conv_proj": (16, 4)}
PYRAMID = {"P2": (16, 16), "P3": (16, 8), "P4": (16, 4), "P5": (16, 2), "P6": (16, 1)}
HIDDEN = {"fc1": (32,), "fc2": (32,)}
POOLED = {"roi": (16, 7, 7)}
FEATURES = {
    "faster_rcnn": (STAGES | PYRAMID, POOLED | HIDDEN),
    "mask_rcnn": (STAGES | PYRAMID, POOLED | HIDDEN),
    "mask_rcnn_convs": (STAGES | PYRAMID, POOLED | {"fc1": (32,)}),
    "cascade_rcnn": (STAGES | PYRAMID, POOLED | HIDDEN),
    "cascade_masks": (STAGES | PYRAMID, POOLED | HIDDEN),
    "retinanet": (STAGES | {"P3": (16, 8), "P4": (16, 4), "P5": (16, 2), "P6": (16, 1), "P7": (16, 1)}, {}),
    "rfcn": (DILATED, {"roi": (96,)}),
    "rfcn_3000": (DILATED, {"roi": (96,), "fc1": (16,)}),
    "analysis": (DILATED, {"roi": (16, 14, 14)} | HIDDEN),
    "vit": ({"C4": (64, 4)} | PYRAMID, POOLED | HIDDEN),
    "everything": (STAGES | PYRAMID, POOLED | {"fc1": (32,)}),
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_masked = pytest.mark.parametrize("kind", MASKED)


def oblong() -> tuple[ImageBatch, Targets]:
    """Two pictures on 64 x 96 pixels, of which the second covers a part; noise stands in the padding."""
    batch, targets = random_batch(2, 96, masks=True)
    sizes = torch.tensor([[64, 96], [50, 70]])
    batch = dataclasses.replace(batch, images=batch.images[:, :, :64].contiguous(), sizes=sizes)
    return batch, dataclasses.replace(targets, boxes=geometry.clip(targets.boxes, sizes))


def sharpen(detector):
    """Larger weights in the last layers: scores and boxes that are far from each other, and from the start."""
    g = torch.Generator().manual_seed(1)
    for name, parameter in detector.named_parameters():
        if name.split(".")[-2] in ("classes", "boxes", "objectness", "deltas", "masks") and "segm" not in name:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))
    return detector


def some_empty(kind):
    """More detections than there can be, so that slots stay empty."""
    return {"postprocess": dataclasses.replace(tiny_config(kind).postprocess, detections=400, candidates=400)}


def assert_same(found, expected, **tolerance):
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=field.name: f"{name}: {m}")


def first_of_all(wanted, most, fill=True):
    """``mask_head.first`` as a graph has it: never shortened."""
    return (~wanted).to(torch.int8).argsort(stable=True)[:most]


@every_kind
def test_losses_and_gradients(kind):
    detector, (batch, targets) = sharpen(tiny_detector(kind)), random_batch(masks=True)
    losses, gradients = step(detector, batch, targets)
    assert losses.keys() == LOSSES[kind]
    assert all(loss.dim() == 0 and loss > 0 and loss.isfinite() for loss in losses.values())
    assert gradients.keys() == {name for name, _ in detector.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() and gradient.any(), name


@every_kind
def test_detections(kind):
    batch, _ = oblong()
    found = sharpen(tiny_detector(kind)).eval()(batch)
    assert_sound(found, kind, batch, 20)
    more = sharpen(tiny_detector(kind, **some_empty(kind))).eval()(batch)
    assert_sound(more, kind, batch, 400)
    assert not more.valid[:, -1].any()
    for field in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(more, field)[:, :20][found.valid], getattr(found, field)[found.valid])


def assert_sound(found, kind, batch, D):
    assert found.boxes.shape == (2, D, 4) and found.scores.shape == found.labels.shape == found.valid.shape == (2, D)
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and found.labels.dtype == torch.int64
    assert not found.scores.requires_grad and found.valid.any(dim=1).all()
    assert (found.scores.diff(dim=1) <= 0).all() and (found.scores >= 0).all() and (found.scores <= 1).all()
    assert ((found.scores > 0) == found.valid).all() and (found.boxes[~found.valid] == 0).all()
    assert (found.labels >= 0).all() and (found.labels < NUM_CLASSES).all()
    x1, y1, x2, y2 = found.boxes.unbind(-1)
    assert (x1 >= 0).all() and (y1 >= 0).all() and ((x1 < x2) & (y1 < y2))[found.valid].all()
    assert (x2 <= batch.sizes[:, 1:]).all() and (y2 <= batch.sizes[:, :1]).all()
    assert (found.masks is not None) == (kind in MASKED)
    if found.masks is not None:
        assert found.masks.shape == (2, D, 14, 14) and found.masks.dtype == torch.float32
        assert (found.masks >= 0).all() and (found.masks <= 1).all() and not found.masks.requires_grad
        assert (found.masks[~found.valid] == 0).all() and (found.masks[found.valid] > 0).flatten(1).any(dim=1).all()


SLOW_TO_COMPILE = [kind for kind in KINDS if kind not in ("faster_rcnn", "retinanet")]
some_slow = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW_TO_COMPILE else ()) for kind in KINDS]
)


@some_slow
def test_a_training_step_in_one_graph(kind):
    """Losses, gradients and running statistics as in eager mode; there the mask head computes fewer regions."""
    torch._dynamo.reset()
    one, other = (sharpen(tiny_detector(kind)).double() for _ in range(2))
    batch, targets = random_batch(masks=True)
    losses, gradients = step(one, batch, targets)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    found = compiled(batch, targets)
    sum(found.values()).backward()
    assert found.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8)
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@some_slow
def test_inference_in_one_graph(kind):
    torch._dynamo.reset()
    detector, (batch, _) = sharpen(tiny_detector(kind, **some_empty(kind))).double().eval(), random_batch()
    expected = detector(batch)
    assert expected.valid.any() and not expected.valid.all()
    assert_same(torch.compile(detector, fullgraph=True, backend="aot_eager")(batch), expected)


@every_masked
def test_the_mask_head_may_compute_fewer_regions(kind, monkeypatch):
    batch, targets = random_batch(masks=True)
    short, full = (sharpen(tiny_detector(kind, **some_empty(kind))).double() for _ in range(2))
    losses, gradients = step(short, batch, targets)
    detections = short.eval()(batch)
    assert detections.valid.any() and not detections.valid.all()
    monkeypatch.setattr(mask_head, "first", first_of_all)
    losses_of_all, gradients_of_all = step(full, batch, targets)
    assert losses.keys() == losses_of_all.keys()
    for one, other in ((losses, losses_of_all), (gradients, gradients_of_all)):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert_same(full.eval()(batch), detections)


@every_kind
@pytest.mark.parametrize("filled", [0, 3])
def test_no_wait_for_the_device(kind, filled):
    detector, (batch, targets) = tiny_detector(kind), random_batch(filled=filled, masks=True)
    with Watch() as watch:
        losses = detector(batch, targets)
        sum(losses.values()).backward()
        detector.eval()
        detector(batch)
        detector.features(batch, detector.feature_names(), boxes=targets.boxes)
    pools = {f"gesso::{name}" in watch.seen for name in ("roi_align", "roi_align_backward")}
    assert pools == {kind != "retinanet"} and "gesso::batched_nms" in watch.seen


def test_the_watch_sees_what_it_forbids():
    import torchvision

    x, boxes = torch.rand(4), torch.rand(4, 4)
    for wrong in (
        lambda: x.nonzero(),
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.unique(),
        lambda: x[[0, 1]],
        lambda: torchvision.ops.nms(boxes, x, 0.5),
    ):
        with pytest.raises(AssertionError), Watch():
            wrong()


@every_kind
def test_float64(kind):
    batch, targets = random_batch(masks=True)
    single = sharpen(tiny_detector(kind))(batch, targets)
    detector = sharpen(tiny_detector(kind)).double()
    double, gradients = step(detector, batch, targets)
    for name, loss in single.items():
        assert double[name].dtype == torch.float64
        torch.testing.assert_close(loss.double(), double[name], rtol=0.05, atol=1e-3)
    assert all(gradient.dtype == torch.float64 for gradient in gradients.values())
    found = detector.eval()(batch)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.masks is None or found.masks.dtype == torch.float32


@every_kind
def test_bfloat16_autocast(kind):
    # 96 pixels: of a map of one cell, oneDNN leaves the weight gradient of a convolution of stride 2 unset.
    batch, targets = random_batch(side=96, masks=True)
    exact = tiny_detector(kind)(batch, targets)
    detector = tiny_detector(kind)
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = step(detector, batch, targets)
        detector.eval()
        found = detector(batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite()
        if name not in OF_BOXES:  # the sample of the boxes may be another
            torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.03)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and found.boxes.isfinite().all()
    assert found.masks is None or found.masks.dtype == torch.float32


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "rfcn" else pytest.mark.slow) for kind in KINDS]
)
def test_bit_equal_with_two_threads(kind):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batch, targets = random_batch(3, masks=True)
        first = step(tiny_detector(kind), batch, targets)
        for a, b in zip(first, step(tiny_detector(kind), batch, targets), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
    finally:
        torch.set_num_threads(threads)


@every_kind
def test_pictures_without_objects_teach_the_background(kind):
    detector, (batch, targets) = tiny_detector(kind), random_batch(filled=0, masks=True)
    losses, gradients = step(detector, batch, targets)
    assert losses.keys() == LOSSES[kind]
    for name, loss in losses.items():
        assert (loss == 0) == (name in OF_BOXES | {"fine_class"}), name
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_kind
def test_ignored_objects_are_not_learnt(kind):
    """What lies in a region that is ignored is neither an object nor background."""
    detector, (batch, targets) = tiny_detector(kind), random_batch(filled=1, masks=True)
    whole = torch.tensor([-500.0, -500, 600, 600]).expand_as(targets.boxes) * targets.valid[..., None]
    everywhere = {"boxes": whole, "mask_frames": whole, "masks": torch.ones_like(targets.masks)}
    losses = detector(batch, dataclasses.replace(targets, **everywhere, ignore=targets.valid))
    assert all(loss == 0 for loss in losses.values()), losses


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_do_not_crash(kind, value):
    """In any part of the detector; the loss says so."""
    batch, targets = random_batch(masks=True)
    parts = [name for name, part in tiny_detector(kind).named_children() if any(True for _ in part.parameters())]
    assert len(parts) > 2
    for part in parts:
        detector = tiny_detector(kind)
        for parameter in getattr(detector, part).parameters():
            torch.nn.init.constant_(parameter, value)
        assert not sum(detector(batch, targets).values()).isfinite(), part
        found = detector.eval()(batch)
        assert found.boxes.isfinite().all() and found.scores.isfinite().all(), part
        assert (found.labels >= 0).all() and (found.labels < NUM_CLASSES).all(), part


@every_kind
def test_features(kind):
    detector, (batch, targets) = tiny_detector(kind).eval(), random_batch()
    maps, regional = FEATURES[kind]
    names = (*maps, *regional)
    assert detector.feature_names() == names
    found = detector.features(batch, names, boxes=targets.boxes)
    assert tuple(found) == names and not any(value.requires_grad for value in found.values())
    expected = {name: (2, channels, side, side) for name, (channels, side) in maps.items()}
    expected |= {name: (2, 6, *shape) for name, shape in regional.items()}
    assert {name: tuple(value.shape) for name, value in found.items()} == expected
    for name, (channels, side) in maps.items():
        assert detector.channels[name] == channels and -(-64 // detector.strides[name]) == side
    for name in regional:
        alone = detector.features(batch, [name], boxes=targets.boxes[:, 2:3])
        assert tuple(alone) == (name,)
        torch.testing.assert_close(alone[name][:, 0], found[name][:, 2])
    assert torch.equal(detector.features(batch, [names[0]])[names[0]], found[names[0]])


@every_kind
def test_what_stands_in_the_padding_does_not_matter(kind):
    dirty, targets = oblong()
    images = dirty.images.clone()
    images[1, :, 50:], images[1, :, :, 70:] = 0, 0
    clean = dataclasses.replace(dirty, images=images)
    one, other = tiny_detector(kind), tiny_detector(kind)
    losses = one(clean, targets)
    assert all(torch.equal(loss, losses[name]) for name, loss in other(dirty, targets).items())
    assert_same(one.eval()(clean), other.eval()(dirty), rtol=0, atol=0)


@every_kind
def test_a_picture_does_not_depend_on_its_batch(kind):
    detector, (batch, targets) = sharpen(tiny_detector(kind)).double().eval(), random_batch(3)
    found = detector(batch)
    names = detector.feature_names()
    features = detector.features(batch, names, boxes=targets.boxes)
    assert found.valid.any(dim=1).all() and not torch.equal(found.boxes[0], found.boxes[1])
    for b in range(3):
        assert_same(detector(picture(batch, b)), picture(found, b))
        alone = detector.features(picture(batch, b), names, boxes=targets.boxes[b : b + 1])
        for name in names:
            torch.testing.assert_close(alone[name][0], features[name][b])


def pick_one_box(config):
    """Its head with one box for each region where it has one for each class, and the other way round."""
    name = "head" if hasattr(config, "head") else "box_head"
    head = getattr(config, name)
    return {name: dataclasses.replace(head, class_agnostic=not head.class_agnostic)}


@pytest.mark.parametrize("kind", ["faster_rcnn", "rfcn", "analysis", "everything"])
def test_class_agnostic_boxes_and_others(kind):
    changes = pick_one_box(tiny_config(kind))
    ((name, head),) = changes.items()
    detector, (batch, targets) = sharpen(tiny_detector(kind, **changes)), random_batch(masks=True)
    assert getattr(detector, name).num_boxes == (1 if head.class_agnostic else NUM_CLASSES)
    losses, gradients = step(detector, batch, targets)
    assert losses.keys() == LOSSES[kind] and all(loss > 0 and loss.isfinite() for loss in losses.values())
    assert all(gradient.any() for gradient in gradients.values())
    assert detector.eval()(batch).valid.any(dim=1).all()


@every_masked
def test_class_agnostic_masks_and_others(kind):
    config = tiny_config(kind).mask_head
    config = dataclasses.replace(config, class_agnostic=not config.class_agnostic)
    detector, (batch, targets) = tiny_detector(kind, mask_head=config), random_batch(masks=True)
    assert detector.mask_branch.head.masks.out_channels == (1 if config.class_agnostic else NUM_CLASSES)
    losses, gradients = step(detector, batch, targets)
    assert losses["mask"] > 0 and all(gradient.isfinite().all() for gradient in gradients.values())
    assert detector.eval()(batch).masks.any()


def squares(seed: int, count: int) -> tuple[ImageBatch, Targets]:
    """Noise with one bright square in one of three colours, which is its class; its mask is the upper half."""
    batch, targets = random_batch(count, filled=1, seed=seed, masks=True)
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 1, 2, generator=g) * 32
    boxes, labels, images = targets.boxes.clone(), targets.labels % 3, batch.images // 3
    boxes[:, :1] = torch.cat([low, low + 16 + 16 * torch.rand(count, 1, 2, generator=g)], dim=-1).round()
    for b in range(count):
        x1, y1, x2, y2 = boxes[b, 0].int().tolist()
        images[b, labels[b, 0], y1:y2, x1:x2] = 255
    masks = torch.zeros_like(targets.masks)
    masks[:, 0, :14] = 1
    targets = dataclasses.replace(targets, boxes=boxes, labels=labels, masks=masks, mask_frames=boxes.clone())
    return dataclasses.replace(batch, images=images), targets


@pytest.mark.slow
@every_kind
def test_it_learns_a_batch_by_heart(kind):
    """After some steps on eight pictures the best detection of most is their square; untrained, it is of none."""
    changes = {} if kind not in MASKED else {"mask_head": MaskHeadConfig(convs=1, width=16, target_side=28)}
    detector = tiny_detector(kind, **changes)
    batch, targets = squares(0, 8)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    steps = 200
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for k in range(steps):
        optimizer.zero_grad()
        sum(detector(dataclasses.replace(batch, key=batch.key + k), targets).values()).backward()
        optimizer.step()
        schedule.step()
    found = detector.eval()(batch)
    overlap = geometry.iou(found.boxes[:, :1], targets.boxes[:, :1])[:, 0, 0]
    hits = (overlap > 0.5) & (found.labels[:, 0] == targets.labels[:, 0])
    assert hits.sum() >= 6
    if found.masks is not None:
        side = found.masks.shape[-1] // 2
        upper, lower = (half[hits].mean() for half in found.masks[:, 0].split(side, dim=1))
        assert upper > 0.8 and lower < 0.2
