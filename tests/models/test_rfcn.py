"""R-FCN and R-FCN-3000 against torchvision's position-sensitive RoIAlign, and against slow and obvious versions."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, ps_roi_align, roi_align

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.losses import mean_over_batch
from gesso.models.postprocess import PostprocessConfig
from gesso.models.rfcn import FineClassifierConfig, PositionSensitiveConfig, PositionSensitiveHead, RFCNConfig
from gesso.models.roi import RoISamplingConfig, hardest, sample_rois
from gesso.models.single_level import SingleLevelConfig
from tests.models.helpers import NUM_CLASSES, random_batch, tiny_detector


def votes(maps, boxes, size, outputs, stride, ratio):
    """torchvision's, which orders the channels by output and then by cell; the mean over the cells."""
    ordered = maps.unflatten(1, (size * size, outputs)).transpose(1, 2).flatten(1, 2)
    return ps_roi_align(ordered, list(boxes), size, 1 / stride, ratio).mean(dim=(2, 3)).unflatten(0, boxes.shape[:2])


@pytest.mark.parametrize(("size", "ratio", "agnostic"), [(7, 2, True), (3, 1, False), (2, 3, True)])
def test_the_vote_equals_torchvision(size, ratio, agnostic):
    torch.manual_seed(0)
    head = PositionSensitiveHead(
        PositionSensitiveConfig(size=size, sampling_ratio=ratio, class_agnostic=agnostic),
        channels=6,
        num_classes=NUM_CLASSES,
        stride=16.0,
    ).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    maps = torch.randn(2, 6, 8, 9, dtype=torch.float64)
    low = torch.rand(2, 10, 2, dtype=torch.float64) * 100 - 10
    boxes = torch.cat([low, low + 5 + 60 * torch.rand(2, 10, 2, dtype=torch.float64)], dim=-1)
    found = head(maps, boxes)
    boxes_each = 1 if agnostic else NUM_CLASSES
    assert found.logits.shape == (2, 10, NUM_CLASSES + 1) and found.deltas.shape == (2, 10, boxes_each, 4)
    torch.testing.assert_close(found.logits, votes(head.classes(maps), boxes, size, NUM_CLASSES + 1, 16, ratio))
    deltas = votes(head.boxes(maps), boxes, size, 4 * boxes_each, 16, ratio)
    torch.testing.assert_close(found.deltas.flatten(2), deltas)
    flipped = head(maps, boxes, torch.tensor([1, 0])[:, None].expand(2, 10))
    torch.testing.assert_close(flipped.logits, head(maps.flip(0), boxes).logits)


def test_start():
    head = tiny_detector("rfcn").head
    for layer in (head.classes, head.boxes):
        assert 0.008 < layer.weight.std() < 0.012 and (layer.bias == 0).all()


def example(kind, **changes):
    """A detector with weights that tell, two pictures, their maps and proposals."""
    detector = tiny_detector(kind, **changes).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name.startswith(("head.", "fine.")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    batch, targets = random_batch(2)
    batch = dataclasses.replace(batch, sizes=torch.tensor([[64, 64], [52, 60]]))
    maps = detector.maps(batch)
    proposals = detector.rpn.propose(detector._first_stage(maps, batch), batch.sizes)
    return detector, batch, targets, maps, proposals


def test_the_hardest_proposals_are_trained_on():
    config = RoISamplingConfig(samples=8, hard_examples=True)
    detector, batch, targets, maps, proposals = example("rfcn", roi=config)
    every = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, config, every=True)
    out = detector.head(maps["conv_proj"], every.boxes)
    parts = detector.head.each_loss(out, every)
    chosen = hardest(every, parts["box_class"] + parts["box_regression"], config)
    assert (chosen.image[0] != chosen.image[0, 0]).any()  # of both pictures, in one row
    terms = detector.region_losses(maps, proposals, batch, targets)
    assert terms["box_class"].samples == chosen.valid.sum() == 16
    for name, each in parts.items():
        picked = torch.zeros(())
        for b, box in zip(chosen.image.flatten(), chosen.boxes.flatten(0, 1), strict=True):
            picked = picked + each[b][(every.boxes[b] == box).all(dim=1)][0]
        torch.testing.assert_close(mean_over_batch(terms[name]), picked / 16)


def averages(maps, boxes, samples):
    """C5 inside of boxes (B, R, 4), as one cell of RoIAlign."""
    return roi_align(maps["C5"], list(boxes), 1, 1 / 16, samples).flatten(1).unflatten(0, boxes.shape[:2])


@pytest.mark.parametrize("hard", [False, True])
def test_an_object_and_its_class_are_learnt_apart(hard):
    config = RoISamplingConfig(samples=12, positive_share=0.5, hard_examples=hard)
    fine = FineClassifierConfig(width=16, samples=3, weight=2.5)
    detector, batch, targets, maps, proposals = example("rfcn_3000", roi=config, fine=fine)
    terms = detector.region_losses(maps, proposals, batch, targets)
    regions = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, config, every=hard)
    coarse = regions._replace(labels=regions.positive.long())
    if hard:
        parts = detector.head.each_loss(detector.head(maps["conv_proj"], regions.boxes), coarse)
        regions = hardest(regions, parts["box_class"] + parts["box_regression"], config)
    out = detector.head(maps["conv_proj"], regions.boxes, regions.image)
    assert out.logits.shape == (2, 12, 2) and out.deltas.shape == (2, 12, 1, 4)
    wanted = regions.positive.long().flatten()
    expected = F.cross_entropy(out.logits.flatten(0, 1), wanted, reduction="none")[regions.valid.flatten()].mean()
    torch.testing.assert_close(mean_over_batch(terms["box_class"]), expected)
    losses = []
    for b, r in regions.positive.nonzero().tolist():
        one = {"C5": maps["C5"][regions.image[b, r]][None]}
        hidden = detector.fine.fc(averages(one, regions.boxes[b, r].view(1, 1, 4), 3)[0, 0]).relu()
        losses.append(F.cross_entropy(detector.fine.classes(hidden), regions.labels[b, r] - 1))
    assert 3 < len(losses) < 24 and terms["fine_class"].samples == len(losses)
    torch.testing.assert_close(mean_over_batch(terms["fine_class"]), 2.5 * torch.stack(losses).mean())


@pytest.mark.parametrize("kind", ["rfcn", "rfcn_3000"])
def test_detections_equal_a_slow_version(kind):
    """The scores of R-FCN-3000 are the product of objectness and class."""
    config = PostprocessConfig(detections=60, min_score=0.12, nms_iou=0.3)
    detector, batch, _, maps, proposals = example(kind, postprocess=config)
    with torch.no_grad():
        found = detector.detect_regions(maps, proposals, batch)
        head = detector.head
        outputs = 2 if kind == "rfcn_3000" else NUM_CLASSES + 1
        logits = votes(head.classes(maps["conv_proj"]), proposals.boxes, 3, outputs, 16, 2)
        deltas = votes(head.boxes(maps["conv_proj"]), proposals.boxes, 3, 4, 16, 2)
        scores = logits.softmax(dim=-1)[..., 1:]
        if kind == "rfcn_3000":
            classes = detector.fine(averages(maps, proposals.boxes, 3)).softmax(dim=-1)
            assert classes.shape == (2, 32, NUM_CLASSES)
            scores = scores * classes
    boxes = geometry.clip(geometry.decode(proposals.boxes, deltas, (10.0, 10.0, 5.0, 5.0)), batch.sizes)
    for b in range(2):
        pairs = [
            (float(scores[b, r, c]), boxes[b, r], c)
            for r in range(32)
            for c in range(NUM_CLASSES)
            if proposals.valid[b, r] and scores[b, r, c] > 0.12 and ((boxes[b, r, 2:] - boxes[b, r, :2]) >= 1e-2).all()
        ]
        score = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64)
        box, label = torch.stack([pair[1] for pair in pairs]), torch.tensor([pair[2] for pair in pairs])
        keep = batched_nms(box, score, label, 0.3)[:60]
        kept = found.valid[b]
        assert kept.sum() == len(keep) > 5 and len(label[keep].unique()) > 1
        torch.testing.assert_close(found.boxes[b][kept], box[keep].float())
        torch.testing.assert_close(found.scores[b][kept], score[keep].float())
        assert torch.equal(found.labels[b][kept], label[keep])


def test_features_of_regions():
    """C5 averaged, and the hidden layer of the fine classifier."""
    detector, batch, targets, *_ = example("rfcn_3000")
    found = detector.eval().features(batch, ["roi", "fc1"], boxes=targets.boxes)
    expected = averages(detector.maps(batch), targets.boxes.double(), 3)
    torch.testing.assert_close(found["roi"], expected)
    torch.testing.assert_close(found["fc1"], detector.fine.fc(expected).relu())
    assert (found["fc1"] == 0).any()


@pytest.mark.parametrize("level", ["C4", "C5", "conv_proj"])
def test_where_the_anchors_stand(level):
    detector = tiny_detector("rfcn", neck=SingleLevelConfig(width=24, rpn_level=level))
    assert detector.rpn.head.convs[0][0].in_channels == {"C4": 192, "C5": 96, "conv_proj": 24}[level]
    assert detector.rpn.anchors.strides == (16.0,)
    assert all(loss.isfinite() for loss in detector(*random_batch()).values())


def test_configuration():
    for change in ({"size": 0}, {"sampling_ratio": 0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            PositionSensitiveConfig(**change)
    for change in ({"width": 0}, {"samples": 0}, {"weight": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            FineClassifierConfig(**change)
    assert RFCNConfig().backbone.output_stride == 16 and RFCNConfig().fine is None
