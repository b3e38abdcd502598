"""The head, the losses and the detections of RetinaNet against torchvision's, or against slow and obvious versions."""

import dataclasses
import math

import pytest
import torch
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.losses import BoxLossConfig, mean_over_batch
from gesso.models.postprocess import PostprocessConfig
from gesso.models.retinanet import DensePredictions, RetinaHead, RetinaHeadConfig
from tests.models.helpers import NUM_CLASSES, random_batch, tiny_config, tiny_detector

W = (1.0, 1.0, 1.0, 1.0)


def head(**changes):
    torch.manual_seed(0)
    return RetinaHead(RetinaHeadConfig(**changes), channels=8, anchors_per_cell=3, num_classes=NUM_CLASSES)


def test_the_head_equals_torchvision():
    ours = head(convs=4)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference = RetinaNetHead(8, 3, NUM_CLASSES)
    for theirs, convs, last in (
        (reference.classification_head, ours.class_convs, ours.classes),
        (reference.regression_head, ours.box_convs, ours.deltas),
    ):
        state = [value for block in convs for value in block.state_dict().values()]
        theirs.conv.load_state_dict(dict(zip(theirs.conv.state_dict(), state, strict=True)))
        output = theirs.cls_logits if theirs is reference.classification_head else theirs.bbox_reg
        output.load_state_dict(last.state_dict())
    maps = [torch.randn(2, 8, 6, 9), torch.randn(2, 8, 3, 5)]
    logits, deltas = ours(maps)
    assert [level.shape[1] for level in logits] == [level.shape[1] for level in deltas] == [162, 45]
    expected = reference(maps)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected["cls_logits"])
    torch.testing.assert_close(torch.cat(deltas, dim=1), expected["bbox_regression"])


def test_start():
    """Every class of every anchor starts at the prior; the towers as He et al. 2015, the outputs near zero."""
    one = head(prior=0.02, convs=2, norm="group", width=64)
    assert (one.classes.bias + math.log(49)).abs().max() < 1e-6
    assert all((p == 0).all() for name, p in one.deltas.named_parameters() if name == "bias")
    weights = [m.weight.std() for m in one.modules() if isinstance(m, torch.nn.Conv2d)]
    he = (2 / (64 * 9)) ** 0.5
    assert len(weights) == 6 and all(0.9 < std / he < 1.1 for std in weights[:4])
    assert all(0.008 < std < 0.012 for std in weights[4:])
    assert one.classes.in_channels == 64 and head(convs=0, width=64).classes.in_channels == 8


def detector_and_predictions(**changes):
    """A detector, random pictures of which one does not fill its frame, and random predictions for each anchor."""
    config = tiny_config("retinanet")
    keys = {field.name for field in dataclasses.fields(config)}
    parts = {key: changes.pop(key) for key in list(changes) if key in keys}
    detector = tiny_detector("retinanet", head=dataclasses.replace(config.head, **changes), **parts)
    batch, targets = random_batch(2)
    sizes = torch.tensor([[64, 64], [50, 40]])
    batch = dataclasses.replace(batch, sizes=sizes)
    ignore = targets.ignore.clone()
    ignore[0, 1] = True
    targets = dataclasses.replace(targets, boxes=geometry.clip(targets.boxes, sizes), ignore=ignore)
    found = detector.predictions(detector.maps(batch), batch)
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(level.shape, generator=g).requires_grad_() for level in found.logits]
    deltas = [(0.3 * torch.randn(level.shape, generator=g)).requires_grad_() for level in found.deltas]
    found = DensePredictions(logits, deltas, found.anchors, found.inside)
    detector.predictions = lambda maps, batch: found
    return detector, batch, targets, found


def slow_losses(found, targets, mean):
    """Anchor by anchor."""
    logits, deltas = torch.cat(found.logits, dim=1), torch.cat(found.deltas, dim=1)
    classes, boxes, counts = [], [], []
    for b in range(2):
        usable = [m for m in range(6) if targets.valid[b, m] and not targets.ignore[b, m]]
        ignored = [m for m in range(6) if targets.ignore[b, m]]
        overlaps = box_iou(found.anchors, targets.boxes[b, usable])
        best = overlaps.amax(dim=0)
        focal, box, count = [], [], 0
        for n, anchor in enumerate(found.anchors):
            if not found.inside[b, n]:
                continue
            m = int(overlaps[n].argmax())
            positive = overlaps[n, m] >= 0.5 or any(overlaps[n, k] == best[k] > 0 for k in range(len(usable)))
            wanted = torch.zeros(NUM_CLASSES)
            if positive:
                count += 1
                wanted[targets.labels[b, usable[m]]] = 1
                truth = targets.boxes[b, usable[m]]
                box.append((deltas[b, n] - geometry.encode(anchor, truth, W)).abs().sum())
            elif overlaps[n, m] >= 0.4 or any(
                geometry.ioa(anchor[None], targets.boxes[b, k, None]) >= 0.5 for k in ignored
            ):
                continue
            focal.append(sigmoid_focal_loss(logits[b, n], wanted, 0.25, 2.0).sum())
        classes.append(sum(focal))
        boxes.append(sum(box))
        counts.append(count)
    assert min(counts) > 0 and counts[0] != counts[1]
    if mean == "batch":
        return sum(classes) / sum(counts), sum(boxes) / sum(counts)
    return tuple(sum(v / count for v, count in zip(values, counts, strict=True)) / 2 for values in (classes, boxes))


@pytest.mark.parametrize("use_padding", [False, True])
@pytest.mark.parametrize("mean", ["batch", "image"])
def test_losses_equal_a_slow_version(mean, use_padding):
    detector, batch, targets, found = detector_and_predictions(mean=mean, use_padding=use_padding)
    assert found.inside.all() == use_padding
    terms = detector.losses({}, batch, targets)
    expected = slow_losses(found, targets, mean)
    assert terms.keys() == {"focal", "box"}
    leaves = [*found.logits, *found.deltas]
    for name, wanted in zip(("focal", "box"), expected, strict=True):
        loss = mean_over_batch(terms[name])
        torch.testing.assert_close(loss, wanted)
        ours = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        theirs = torch.autograd.grad(wanted, leaves, allow_unused=True, materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mean", ["batch", "image"])
def test_no_positive_anchor(mean):
    """A picture without objects has a loss and no division by zero."""
    detector, batch, targets, _ = detector_and_predictions(mean=mean)
    nothing = dataclasses.replace(targets, valid=targets.valid & False)
    terms = detector.losses({}, batch, nothing)
    assert mean_over_batch(terms["focal"]) > 0 and mean_over_batch(terms["box"]) == 0
    one = dataclasses.replace(targets, valid=targets.valid & torch.tensor([[True], [False]]))
    term = detector.losses({}, batch, one)["focal"]
    assert mean_over_batch(term).isfinite() and mean_over_batch(term) > 0
    if mean == "image":
        assert term.samples == 2  # the picture without objects counts too


def test_other_box_losses():
    detector, batch, targets, _ = detector_and_predictions(box_loss=BoxLossConfig(kind="giou", weight=3.0))
    other, *_ = detector_and_predictions(box_loss=BoxLossConfig(kind="giou"))
    found, single = (mean_over_batch(d.losses({}, batch, targets)["box"]) for d in (detector, other))
    torch.testing.assert_close(found, 3 * single)
    assert 0 < single < 2


def slow_detections(found, sizes, candidates, detections, min_score, nms_iou):
    """Picture by picture and level by level, as torchvision's postprocess_detections goes."""
    pictures = []
    for b in range(2):
        boxes, scores, labels, first = [], [], [], 0
        for logits, deltas in zip(found.logits, found.deltas, strict=True):
            n = logits.shape[1]
            pairs = [
                (float(logits[b, k, c].sigmoid()), k, c)
                for k in range(n)
                for c in range(NUM_CLASSES)
                if found.inside[b, first + k] and float(logits[b, k, c].sigmoid()) > min_score
            ]
            for score, k, c in sorted(pairs, reverse=True)[:candidates]:
                boxes.append(geometry.decode(found.anchors[first + k], deltas[b, k], W))
                scores.append(score)
                labels.append(c)
            first += n
        box = clip_boxes_to_image(torch.stack(boxes), tuple(sizes[b].tolist()))
        score, label = torch.tensor(scores), torch.tensor(labels)
        large = ((box[:, 2:] - box[:, :2]) >= 1e-2).all(dim=1)
        box, score, label = box[large], score[large], label[large]
        keep = batched_nms(box, score, label, nms_iou)[:detections]
        pictures.append((box[keep], score[keep], label[keep]))
    return pictures


@pytest.mark.parametrize(("candidates", "detections"), [(40, 20), (7, 100), (100000, 30)])
def test_detections_equal_a_slow_version(candidates, detections):
    config = PostprocessConfig(detections=detections, min_score=0.6, nms_iou=0.4)
    detector, batch, _, found = detector_and_predictions(candidates=candidates, postprocess=config)
    got = detector.infer({}, batch)
    assert got.boxes.shape == (2, detections, 4)
    with torch.no_grad():
        expected = slow_detections(found, batch.sizes, candidates, detections, 0.6, 0.4)
    for b, (box, score, label) in enumerate(expected):
        kept = got.valid[b]
        assert kept.sum() == len(box) > 5 and len(label.unique()) > 2
        torch.testing.assert_close(got.boxes[b][kept], box)
        torch.testing.assert_close(got.scores[b][kept], score)
        assert torch.equal(got.labels[b][kept], label)


def test_predictions_belong_to_their_anchors():
    """A peak in one cell of one level raises the logits of the anchors of that cell, wherever the levels lie."""
    detector, (batch, _) = tiny_detector("retinanet"), random_batch()
    maps = {name: value * 0 for name, value in detector.maps(batch).items()}
    with torch.no_grad():
        for parameter in detector.head.parameters():
            parameter.fill_(0.01)
    calm = detector.predictions(maps, batch)
    maps["P4"] = maps["P4"].clone()
    maps["P4"][1, :, 2, 1] = 100
    stirred = detector.predictions(maps, batch)
    rise = (torch.cat(stirred.logits, dim=1) - torch.cat(calm.logits, dim=1)).sum(dim=2)
    assert (rise[0] == 0).all()
    box = stirred.anchors[int(rise[1].argmax())]
    assert rise[1].max() > 0 and ((box[:2] + box[2:]) / 2).tolist() == [16.0, 32.0]


@pytest.mark.parametrize(
    "change",
    [
        {"positive_iou": 1.5},
        {"negative_iou": 0.9},
        {"prior": 0.0},
        {"gamma": -1.0},
        {"convs": -1},
        {"candidates": 0},
        {"width": 0},
    ],
)
def test_configuration(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        RetinaHeadConfig(**change)
