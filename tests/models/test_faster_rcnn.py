import dataclasses

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.backbone import BackboneConfig
from gesso.models.box_head import BoxHeadConfig
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.roi import RoISamplingConfig
from gesso.structures import ImageBatch, Targets, map_tensors
from tests.models.helpers import NUM_CLASSES, random_batch, tiny_detector

LOSSES = {"rpn_objectness", "rpn_box", "box_class", "box_regression"}


def step(detector, batch, targets):
    detector.zero_grad()
    losses = detector(batch, targets)
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


def picture(value, b):
    return map_tensors(value, lambda tensor: tensor[b : b + 1])


class Watch(TorchDispatchMode):
    """Fails on every operator that waits for the device, or whose shape depends on data.

    It cannot see into an operator that is not torch's own. Only one such is allowed, and it is no proof of not waiting:
    on a GPU, gesso::batched_nms waits inside (``models/ops/nms.py`` says so) until it is written anew.
    """

    OPAQUE = ("gesso::batched_nms",)

    FORBIDDEN = (
        "nonzero",
        "_local_scalar_dense",
        "masked_select",
        "unique",
        "_unique2",
        "argwhere",
        "is_nonzero",
        "equal",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        assert func.namespace == "aten" or f"{func.namespace}::{name}" in self.OPAQUE, f"{name} cannot be seen into"
        assert name not in self.FORBIDDEN and not name.startswith("unique"), f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            dtypes = {i.dtype for i in args[1] if i is not None}
            assert torch.bool not in dtypes, f"{name} by a mask"
            source = args[0]
            assert not source.is_floating_point(), f"{name} reads values by advanced indexing: its backward races"
        return func(*args, **(kwargs or {}))


def test_losses_and_gradients():
    detector, (batch, targets) = tiny_detector(), random_batch()
    losses, gradients = step(detector, batch, targets)
    assert losses.keys() == LOSSES
    assert all(loss.dim() == 0 and loss > 0 and loss.isfinite() for loss in losses.values())
    missing = {name for name, _ in detector.named_parameters()} - gradients.keys()
    assert not missing
    assert all(g.isfinite().all() for g in gradients.values())


def test_detections():
    detector, (batch, _) = tiny_detector().eval(), random_batch()
    found = detector(batch)
    assert found.boxes.shape == (2, 20, 4) and found.valid.any()
    assert not found.scores.requires_grad
    assert found.labels.max() < NUM_CLASSES and found.boxes.max() <= 64


@pytest.mark.parametrize("training", [True, False])
def test_one_graph(training):
    torch._dynamo.reset()
    detector, (batch, targets) = tiny_detector().train(training), random_batch()
    twin = tiny_detector().train(training)
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")
    if not training:
        found, expected = compiled(batch), twin(batch)
        torch.testing.assert_close(found.boxes, expected.boxes)
        assert torch.equal(found.labels, expected.labels)
        return
    losses, expected = compiled(batch, targets), twin(batch, targets)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name])
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, a), b in zip(detector.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("filled", [0, 3])
def test_no_wait_for_the_device(filled):
    detector, (batch, targets) = tiny_detector(), random_batch(filled=filled)
    with Watch():
        losses = detector(batch, targets)
        sum(losses.values()).backward()
        detector.eval()
        detector(batch)
        detector.features(batch, detector.feature_names(), boxes=targets.boxes)


def test_the_watch_sees_what_it_forbids():
    x = torch.rand(4)
    boxes = torch.rand(4, 4)
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


def test_bit_equal_with_two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batch, targets = random_batch(3, 96)
        first = step(tiny_detector(), batch, targets)
        for _ in range(3):
            again = step(tiny_detector(), batch, targets)
            for a, b in zip(first, again, strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)
    finally:
        torch.set_num_threads(threads)


def test_a_picture_does_not_depend_on_its_batch():
    detector, (batch, targets) = tiny_detector().double(), random_batch(3)
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    detector.train()
    whole = detector(batch, targets)
    parts = [detector(picture(batch, b), picture(targets, b)) for b in range(3)]
    # Every picture has the same number of samples here, so the mean over the batch is the mean of the means.
    for name in ("box_class", "box_regression"):
        torch.testing.assert_close(whole[name], torch.stack([part[name] for part in parts]).mean())
    detector.eval()
    found = detector(batch)
    for b in range(3):
        torch.testing.assert_close(detector(picture(batch, b)).boxes[0], found.boxes[b])


def test_what_stands_in_the_padding_does_not_matter():
    detector, (batch, targets) = tiny_detector(), random_batch()
    sizes = torch.tensor([[40, 64], [64, 33]])
    images = batch.images.clone()
    images[0, :, 40:], images[1, :, :, 33:] = 0, 0
    clean = dataclasses.replace(batch, images=images, sizes=sizes)
    dirty = dataclasses.replace(batch, sizes=sizes)
    for name, loss in detector(clean, targets).items():
        assert torch.equal(loss, detector(dirty, targets)[name])


def test_box_weights_scale_the_deltas_back():
    one = tiny_detector().eval()
    other = tiny_detector(box_head=BoxHeadConfig(width=32, box_weights=(20.0, 30.0, 2.5, 15.0))).eval()
    factors = torch.tensor([2.0, 3.0, 0.5, 3.0]).repeat(NUM_CLASSES)
    with torch.no_grad():
        other.box_head.boxes.weight.mul_(factors[:, None])
        other.box_head.boxes.bias.mul_(factors)
    batch, _ = random_batch()
    found, expected = other(batch), one(batch)
    assert expected.valid.any()
    torch.testing.assert_close(found.boxes, expected.boxes)


def test_normalisation():
    detector, (batch, _) = tiny_detector(), random_batch()
    from torchvision.transforms.v2.functional import normalize

    expected = normalize(batch.images / 255, detector.backbone.mean, detector.backbone.std)
    expected[1, :, 50:] = 0
    values = detector._normalise(dataclasses.replace(batch, sizes=torch.tensor([[64, 64], [50, 64]])))
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    assert values.is_contiguous(memory_format=torch.channels_last)


def test_the_key_decides_the_samples():
    detector, (batch, targets) = tiny_detector(), random_batch()
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    first = detector(batch, targets)
    other = detector(dataclasses.replace(batch, key=batch.key + 1), targets)
    assert any(first[name] != other[name] for name in LOSSES)
    again = detector(dataclasses.replace(batch, image_index=batch.image_index + 5), targets)
    assert all(torch.equal(first[name], again[name]) for name in LOSSES)


def test_pictures_without_objects_teach_the_background():
    detector, (batch, targets) = tiny_detector(), random_batch(filled=0)
    losses, gradients = step(detector, batch, targets)
    assert losses["rpn_box"] == 0 and losses["box_regression"] == 0
    assert losses["rpn_objectness"] > 0 and losses["box_class"] > 0
    assert all(g.isfinite().all() for g in gradients.values())


def test_ignored_objects_are_not_learnt():
    detector, (batch, targets) = tiny_detector(), random_batch(filled=1)
    whole = torch.tensor([0.0, 0, 64, 64]).expand_as(targets.boxes) * targets.valid[..., None]
    targets = dataclasses.replace(targets, boxes=whole, ignore=targets.valid)
    losses = detector(batch, targets)
    assert all(losses[name] == 0 for name in ("rpn_box", "box_class", "box_regression"))
    # Only large anchors, of which less than half lies in the picture, are negatives.
    small = dataclasses.replace(targets, ignore=~targets.valid, valid=~targets.valid)
    assert detector(batch, small)["rpn_objectness"] > 0


def test_float64_end_to_end():
    detector, (batch, targets) = tiny_detector(), random_batch()
    single = detector(batch, targets)
    double = tiny_detector().double()(batch, targets)
    for name in LOSSES:
        assert double[name].dtype == torch.float64
        torch.testing.assert_close(single[name].double(), double[name], rtol=0.05, atol=1e-3)
    found = tiny_detector().double().eval()(batch)
    assert found.boxes.dtype == torch.float32


def test_bfloat16_autocast():
    detector, (batch, targets) = tiny_detector(), random_batch()
    exact = tiny_detector()(batch, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(batch, targets)
        sum(losses.values()).backward()
        detector.eval()
        assert detector(batch).boxes.dtype == torch.float32
    for name in ("rpn_objectness", "box_class"):
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], exact[name], rtol=0.05, atol=0.02)


def test_contiguous_memory_format():
    batch, targets = random_batch()
    expected = tiny_detector()(batch, targets)
    losses = tiny_detector().to(memory_format=torch.contiguous_format)(batch, targets)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=1e-3)


def test_weights_that_are_no_numbers_do_not_crash():
    detector, (batch, targets) = tiny_detector(), random_batch()
    torch.nn.init.constant_(detector.fpn.output[0].weight, float("nan"))
    assert detector(batch, targets)["rpn_objectness"].isnan()
    detector.eval()
    assert detector(batch).boxes.isfinite().all()


@pytest.mark.parametrize(
    "head", [BoxHeadConfig(width=16, class_agnostic=True), BoxHeadConfig(width=16, convs=2, fcs=1)]
)
def test_other_heads(head):
    detector, (batch, targets) = tiny_detector(box_head=head), random_batch()
    losses, _ = step(detector, batch, targets)
    assert all(loss.isfinite() for loss in losses.values())
    detector.eval()
    assert detector(batch).valid.any()


def test_features():
    detector, (batch, targets) = tiny_detector().eval(), random_batch()
    names = ("C2", "C3", "C4", "C5", "P2", "P3", "P4", "P5", "P6", "roi", "fc1", "fc2")
    assert detector.feature_names() == names
    found = detector.features(batch, names, boxes=targets.boxes)
    assert tuple(found) == names
    shapes = {"C2": (2, 64, 16, 16), "P6": (2, 16, 1, 1), "roi": (2, 6, 16, 7, 7), "fc1": (2, 6, 32), "fc2": (2, 6, 32)}
    assert {name: tuple(found[name].shape) for name in shapes} == shapes
    alone = detector.features(batch, ["fc2"], boxes=targets.boxes[:, 2:3])
    torch.testing.assert_close(alone["fc2"][:, 0], found["fc2"][:, 2])
    assert detector.features(batch, ["P3"])["P3"].equal(found["P3"])
    with pytest.raises(ConfigError, match="needs boxes"):
        detector.features(batch, ["fc1"])
    with pytest.raises(ConfigError, match="no feature 'P9'"):
        detector.features(batch, ["P9"])


def squares(seed: int, count: int) -> tuple[ImageBatch, Targets]:
    """Noise with one bright square in one of three colours, which is its class."""
    batch, targets = random_batch(count, filled=1, seed=seed)
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 1, 2, generator=g) * 32
    boxes, labels, images = targets.boxes.clone(), targets.labels % 3, batch.images // 3
    boxes[:, :1] = torch.cat([low, low + 16 + 16 * torch.rand(count, 1, 2, generator=g)], dim=-1).round()
    for b in range(count):
        x1, y1, x2, y2 = boxes[b, 0].int().tolist()
        images[b, labels[b, 0], y1:y2, x1:x2] = 255
    return dataclasses.replace(batch, images=images), dataclasses.replace(targets, boxes=boxes, labels=labels)


@pytest.mark.slow
def test_it_learns_a_batch_by_heart():
    """After 120 steps on eight pictures the best detection of most is their square; untrained, it is of none."""
    detector = tiny_detector(
        roi=RoISamplingConfig(samples=32),
        backbone=BackboneConfig(name="resnet18", pretrained=False, zero_init_residual=False),
    )
    batch, targets = squares(0, 8)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for step_ in range(120):
        optimizer.zero_grad()
        sum(detector(dataclasses.replace(batch, key=batch.key + step_), targets).values()).backward()
        optimizer.step()
        schedule.step()
    found = detector.eval()(batch)
    overlap = geometry.iou(found.boxes[:, :1], targets.boxes[:, :1])[:, 0, 0]
    hits = (overlap > 0.5) & (found.labels[:, 0] == targets.labels[:, 0])
    assert hits.sum() >= 6
