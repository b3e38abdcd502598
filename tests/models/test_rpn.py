import dataclasses

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as ReferenceAnchors
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as Reference
from torchvision.models.detection.rpn import RPNHead as ReferenceHead
from torchvision.ops import box_iou

from gesso.errors import ConfigError
from gesso.models.anchors import AnchorConfig, AnchorGenerator
from gesso.models.rpn import RegionProposalNetwork, RPNConfig, RPNHead, has_extent
from tests.models.helpers import random_batch

SIZES = (8.0, 16.0, 32.0, 64.0, 128.0)
SIDE = 64


def networks(**changes):
    """Ours, and torchvision's with the same weights."""
    torch.manual_seed(0)
    config = RPNConfig(before_nms=60, before_nms_test=4, after_nms=50, after_nms_test=12, **changes)
    anchors = AnchorGenerator(AnchorConfig(sizes=SIZES), (4, 8, 16, 32, 64))
    ours = RegionProposalNetwork(config, channels=8, anchors=anchors)
    for layer in (ours.head.objectness, ours.head.deltas):
        torch.nn.init.normal_(layer.weight, std=0.3)
    reference = Reference(
        ReferenceAnchors(tuple((s,) for s in SIZES), ((0.5, 1.0, 2.0),) * 5),
        ReferenceHead(8, 3, config.convs),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=10**6,
        positive_fraction=1.0,
        pre_nms_top_n={"training": 60, "testing": 4},
        post_nms_top_n={"training": 50, "testing": 12},
        nms_thresh=0.7,
    )
    reference.head.load_state_dict(dict(zip(reference.head.state_dict(), ours.head.state_dict().values(), strict=True)))
    return ours, reference


def pyramid():
    return [torch.randn(2, 8, max(1, SIDE // s), max(1, SIDE // s)) for s in (4, 8, 16, 32, 64)]


@pytest.mark.parametrize(("training", "convs"), [(True, 1), (False, 1), (False, 2)])
def test_proposals_equal_torchvision(training, convs):
    ours, reference = networks(convs=convs)
    ours.train(training)
    reference.train(training)
    maps, sizes = pyramid(), torch.full((2, 2), SIDE)
    found = ours.propose(ours(maps, (SIDE, SIDE), sizes), sizes)
    images = ImageList(torch.zeros(2, 3, SIDE, SIDE), [(SIDE, SIDE)] * 2)
    logits, deltas = reference.head(maps)
    from torchvision.models.detection.rpn import concat_box_prediction_layers

    anchors = reference.anchor_generator(images, maps)
    counts = [level[0].numel() for level in logits]
    logits, deltas = concat_box_prediction_layers(logits, deltas)
    boxes = reference.box_coder.decode(deltas, anchors).view(2, -1, 4)
    expected, scores = reference.filter_proposals(boxes, logits, images.image_sizes, counts)
    for b in range(2):
        torch.testing.assert_close(found.boxes[b][found.valid[b]], expected[b])
        torch.testing.assert_close(found.scores[b][found.valid[b]].sigmoid(), scores[b])


@pytest.mark.parametrize("pictures", [1, 2])
def test_losses_equal_torchvision_when_everything_is_sampled(pictures):
    ours, reference = networks(samples=10**6, positive_share=1.0)
    batch, targets = random_batch(2, SIDE)
    maps = [m[:pictures] for m in pyramid()]
    first = {f.name: getattr(targets, f.name) for f in dataclasses.fields(targets)}
    targets = dataclasses.replace(targets, **{k: v[:pictures] for k, v in first.items() if v is not None})
    sizes = batch.sizes[:pictures]
    terms = ours.losses(ours(maps, (SIDE, SIDE), sizes), targets, batch.key[:pictures])
    images = ImageList(torch.zeros(pictures, 3, SIDE, SIDE), [(SIDE, SIDE)] * pictures)
    truth = [{"boxes": targets.boxes[b][targets.valid[b]]} for b in range(pictures)]
    _, expected = reference(images, dict(enumerate(maps)), truth)
    found = {name: term.total / term.samples for name, term in terms.items()}
    torch.testing.assert_close(found["rpn_objectness"], expected["loss_objectness"])
    torch.testing.assert_close(found["rpn_box"], expected["loss_rpn_box_reg"])


def test_nothing_is_proposed_or_learnt_in_the_padding():
    ours, _ = networks(samples=10**6, positive_share=1.0)
    sizes = torch.tensor([[SIDE, SIDE], [40, 24]])
    predictions = ours(pyramid(), (SIDE, SIDE), sizes)
    found = ours.propose(predictions, sizes)
    assert (found.boxes[1, :, 2] <= 24).all() and (found.boxes[1, :, 3] <= 40).all()
    assert found.valid.any(dim=1).all()
    batch, targets = random_batch(2, SIDE, filled=0)
    logits = predictions.logits.detach().requires_grad_()
    ours.losses(predictions._replace(logits=logits), targets, batch.key)["rpn_objectness"].total.backward()
    centre = (predictions.anchors[:, :2] + predictions.anchors[:, 2:]) / 2
    inside = (centre[:, 0] < 24) & (centre[:, 1] < 40)
    assert torch.equal(logits.grad[1] != 0, inside) and (logits.grad[0] != 0).all()


def test_the_padding_is_used_if_asked_for():
    """Then what the network does in a picture's padding is what it does in a whole picture, but for the clipping."""
    ours, _ = networks(samples=10**6, positive_share=1.0, use_padding=True)
    maps = [m[:1].expand(2, -1, -1, -1) for m in pyramid()]
    predictions = ours(maps, (SIDE, SIDE), torch.tensor([[SIDE, SIDE], [40, 24]]))
    assert predictions.inside.all()
    batch, targets = random_batch(2, SIDE, filled=0)
    logits = predictions.logits.detach().requires_grad_()
    ours.losses(predictions._replace(logits=logits), targets, batch.key)["rpn_objectness"].total.backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_layers(norm):
    head = (
        networks(convs=2, norm=norm)[0].head
        if norm == "none"
        else RPNHead(RPNConfig(convs=2, width=12, norm=norm), 8, 3)
    )
    width = 8 if norm == "none" else 12
    convs = [layer for layer in head.convs.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(8, width), (width, width)]
    assert all((conv.bias is None) == (norm != "none") for conv in convs)
    assert head.objectness.in_channels == head.deltas.in_channels == width
    assert head.objectness.out_channels == 3 and head.deltas.out_channels == 12
    logits, deltas = head([torch.randn(2, 8, 4, 6), torch.randn(2, 8, 2, 3)])
    assert [tuple(level.shape) for level in logits] == [(2, 72), (2, 18)]
    assert [tuple(level.shape) for level in deltas] == [(2, 72, 4), (2, 18, 4)]


def test_an_anchor_that_an_object_matches_from_the_padding_is_not_trained_on():
    ours, _ = networks(samples=10**6, positive_share=1.0, positive_iou=0.2, negative_iou=0.0)
    sizes = torch.tensor([[40, 24], [40, 24]])
    predictions = ours(pyramid(), (SIDE, SIDE), sizes)
    batch, targets = random_batch(2, SIDE, filled=1)
    at_the_edge = torch.tensor([8.0, 24.0, 24.0, 40.0]) * targets.valid[..., None]
    targets = dataclasses.replace(targets, boxes=at_the_edge)
    matching = box_iou(predictions.anchors, at_the_edge[0, :1])[:, 0] >= 0.2
    inside = predictions.inside[0]
    assert (matching & inside).any() and (matching & ~inside).any()
    terms = ours.losses(predictions, targets, batch.key)
    for name, of in (("rpn_objectness", predictions.logits), ("rpn_box", predictions.deltas)):
        (gradient,) = torch.autograd.grad(terms[name].total, of, retain_graph=True)
        learnt = (gradient != 0).view(2, len(inside), -1).any(dim=-1)
        assert torch.equal(learnt, (matching & inside).expand(2, -1)), name


def test_weights_that_are_no_numbers_do_not_crash():
    ours, _ = networks()
    torch.nn.init.constant_(ours.head.deltas.weight, float("nan"))
    sizes = torch.full((2, 2), SIDE)
    found = ours.propose(ours(pyramid(), (SIDE, SIDE), sizes), sizes)
    assert not found.valid.any() and (found.boxes == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"positive_iou": 1.5},
        {"negative_iou": 0.9},
        {"samples": 0},
        {"after_nms_test": 0},
        {"nms_iou": -0.1},
        {"convs": 0},
        {"width": 0},
    ],
)
def test_configuration(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        RPNConfig(**change)


def test_has_extent():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.5, 9], [0, 0, 9, 0.5], [3, 3, 1, 1], [float("nan"), 0, 9, 9]])
    assert has_extent(boxes, 1.0).tolist() == [True, False, False, False, False]
