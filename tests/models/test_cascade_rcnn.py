"""The cascade stage by stage against slow and obvious versions."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, box_iou

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.box_head import BoxHeadConfig
from gesso.models.cascade_rcnn import CascadeRCNNConfig
from gesso.models.losses import BoxLossConfig, mean_over_batch
from gesso.models.mask_head import MaskHeadConfig
from gesso.models.postprocess import PostprocessConfig
from gesso.models.roi import RoISamplingConfig, sample_rois
from tests.models.helpers import NUM_CLASSES, random_batch, tiny_detector

SETTINGS = {"ious": (0.45, 0.6, 0.7), "sharpness": (1.0, 2.0, 5.0), "stage_weights": (1.0, 0.5, 0.2)}
BETA = BoxLossConfig().beta


def example(kind="cascade_rcnn", **changes):
    """A detector whose heads move their regions, and the proposals of two pictures, one with padding."""
    detector = tiny_detector(kind, **SETTINGS, **changes).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for head in detector.box_heads:
            head.boxes.weight.add_(0.1 * torch.randn(head.boxes.weight.shape, generator=g, dtype=torch.float64))
            head.classes.weight.add_(0.3 * torch.randn(head.classes.weight.shape, generator=g, dtype=torch.float64))
    batch, targets = random_batch(2, masks=True)
    sizes = torch.tensor([[64, 64], [52, 40]])
    batch = dataclasses.replace(batch, sizes=sizes)
    targets = dataclasses.replace(targets, boxes=geometry.clip(targets.boxes, sizes))
    maps = detector.maps(batch)
    proposals = detector.rpn.propose(detector._first_stage(maps, batch), sizes)
    near = targets.boxes.double().gather(1, (torch.arange(20) % 3)[None, :, None].expand(2, 20, 4))
    near = geometry.clip(near + 2 * torch.randn(2, 20, 4, generator=g), sizes)
    valid = ((near[..., 2:] - near[..., :2]) > 1).all(dim=-1)
    boxes = torch.cat([near, proposals.boxes[:, 20:]], dim=1)
    valid = torch.cat([valid, proposals.valid[:, 20:]], dim=1)
    return detector, batch, targets, maps, proposals._replace(boxes=boxes, valid=valid)


def run_head(detector, k, maps, boxes):
    """Scores with the background and the boxes that one head makes of boxes (B, R, 4), not clipped; and its deltas."""
    out = detector.box_heads[k](detector.pooler(maps, boxes), 2)
    weights = tuple(w * SETTINGS["sharpness"][k] for w in (10.0, 10.0, 5.0, 5.0))
    return out.logits, geometry.decode(boxes, out.deltas[:, :, 0], weights), out.deltas[:, :, 0], weights


@pytest.mark.parametrize("classifier", ["softmax", "sigmoid"])
def test_every_stage_learns_on_the_boxes_of_the_one_before(classifier):
    head = BoxHeadConfig(width=32, class_agnostic=True, classifier=classifier)
    detector, batch, targets, maps, proposals = example(
        box_head=head, roi=RoISamplingConfig(samples=30, positive_share=0.5, positive_iou=0.9, negative_iou=0.2)
    )
    terms = detector.region_losses(maps, proposals, batch, targets)
    sampling = RoISamplingConfig(samples=30, positive_share=0.5, positive_iou=0.45, negative_iou=0.45)
    regions = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, sampling)
    boxes, valid = regions.boxes, regions.valid
    assert terms.keys() == {f"{name}{k}" for name in ("box_class", "box_regression") for k in (1, 2, 3)}
    for k in range(3):
        logits, moved, deltas, weights = run_head(detector, k, maps, boxes)
        class_loss, box_loss, positives, counted = 0.0, 0.0, 0, 0
        for b in range(2):
            truth = targets.boxes[b, :3].double()
            overlaps = box_iou(boxes[b], truth)
            for r in range(boxes.shape[1]):
                if not valid[b, r]:
                    continue
                m = int(overlaps[r].argmax())
                positive = float(overlaps[r, m]) >= SETTINGS["ious"][k]
                label = int(targets.labels[b, m]) + 1 if positive else 0
                if classifier == "softmax":
                    class_loss = class_loss + F.cross_entropy(logits[b, r], torch.tensor(label))
                else:
                    wanted = F.one_hot(torch.tensor(label), NUM_CLASSES + 1)[1:].double()
                    class_loss = class_loss + F.binary_cross_entropy_with_logits(logits[b, r], wanted, reduction="sum")
                if positive:
                    wanted = geometry.encode(boxes[b, r], truth[m], weights)
                    box_loss = box_loss + F.smooth_l1_loss(deltas[b, r], wanted, beta=BETA, reduction="sum")
                positives, counted = positives + positive, counted + 1
        assert 0 < positives < counted
        share = SETTINGS["stage_weights"][k] / counted
        torch.testing.assert_close(mean_over_batch(terms[f"box_class{k + 1}"]), share * class_loss)
        torch.testing.assert_close(mean_over_batch(terms[f"box_regression{k + 1}"]), share * box_loss)
        clipped = geometry.clip(moved, batch.sizes).detach()
        valid = valid & ((clipped[..., 2:] - clipped[..., :2]) >= 1e-3).all(dim=-1)
        boxes = torch.where(valid[..., None], clipped, 0)


def test_no_gradient_flows_from_a_stage_into_the_head_before():
    detector, batch, targets, maps, proposals = example()
    terms = detector.region_losses(maps, proposals, batch, targets)
    for k in range(3):
        loss = terms[f"box_class{k + 1}"].total + terms[f"box_regression{k + 1}"].total
        for j, head in enumerate(detector.box_heads):
            gradients = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True, retain_graph=True)
            assert all((gradient is not None) == (j == k) for gradient in gradients)


def test_masks_are_learnt_on_the_regions_of_the_first_stage():
    detector, batch, targets, maps, proposals = example("cascade_masks")
    found = detector.region_losses(maps, proposals, batch, targets)["mask"]
    sampling = dataclasses.replace(detector.config.roi, positive_iou=0.45, negative_iou=0.45)
    regions = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, sampling)
    expected = detector.mask_branch.losses(maps, regions, targets)["mask"]
    assert found.samples == expected.samples == regions.positive.sum() > 0 and torch.equal(found.total, expected.total)


@pytest.mark.parametrize("classifier", ["softmax", "sigmoid"])
def test_detections_equal_a_slow_version(classifier):
    """The scores are the mean over the stages, each on its own regions; the boxes are those of the last."""
    head = BoxHeadConfig(width=32, class_agnostic=True, classifier=classifier)
    config = PostprocessConfig(detections=200, min_score=0.1, nms_iou=0.4)
    detector, batch, _, maps, proposals = example(box_head=head, postprocess=config)
    detector.eval()
    with torch.no_grad():
        found = detector.detect_regions(maps, proposals, batch)
        boxes, valid, scores = proposals.boxes, proposals.valid, []
        for k in range(3):
            logits, moved, *_ = run_head(detector, k, maps, boxes)
            scores.append(logits.sigmoid() if classifier == "sigmoid" else logits.softmax(dim=-1)[..., 1:])
            boxes = geometry.clip(moved, batch.sizes)
            valid = valid & ((boxes[..., 2:] - boxes[..., :2]) >= 1e-3).all(dim=-1)
            boxes = torch.where(valid[..., None], boxes, 0)
    mean = sum(scores) / 3
    assert found.boxes.shape == (2, 200, 4)
    for b in range(2):
        pairs = [
            (float(mean[b, r, c]), boxes[b, r], c)
            for r in range(boxes.shape[1])
            for c in range(NUM_CLASSES)
            if valid[b, r] and mean[b, r, c] > 0.1 and ((boxes[b, r, 2:] - boxes[b, r, :2]) >= 1e-2).all()
        ]
        score = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64)
        box, label = torch.stack([pair[1] for pair in pairs]), torch.tensor([pair[2] for pair in pairs])
        keep = batched_nms(box, score, label, 0.4)[:200]
        kept = found.valid[b]
        assert kept.sum() == len(keep) > 5 and not kept.all()
        torch.testing.assert_close(found.boxes[b][kept], box[keep].float())
        torch.testing.assert_close(found.scores[b][kept], score[keep].float())
        assert torch.equal(found.labels[b][kept], label[keep])


def test_features_are_those_of_the_last_head():
    detector, batch, targets, maps, _ = example()
    found = detector.eval().features(batch, ["fc2"], boxes=targets.boxes)["fc2"]
    pooled = detector.pooler(detector.maps(batch), targets.boxes)
    torch.testing.assert_close(found.flatten(0, 1), detector.box_heads[2].hidden(pooled)["fc2"])
    assert maps.keys() == detector.channels.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ious": (0.5, 0.6)}, "2 ious"),
        ({"ious": (), "sharpness": (), "stage_weights": ()}, "0 ious"),
        ({"ious": (0.5, 0.6, 1.0)}, "ious"),
        ({"box_head": BoxHeadConfig()}, "class_agnostic"),
        ({"roi": RoISamplingConfig(hard_examples=True)}, "hard_examples"),
    ],
)
def test_configuration(change, said):
    with pytest.raises(ConfigError, match=said):
        CascadeRCNNConfig(**change)


def test_any_number_of_stages():
    detector = tiny_detector("cascade_rcnn", ious=(0.5,), sharpness=(1.0,), stage_weights=(1.0,))
    losses = detector(*random_batch())
    assert losses.keys() == {"rpn_objectness", "rpn_box", "box_class1", "box_regression1"}
    assert detector.mask_side == 0
    assert tiny_detector("cascade_masks", mask_head=MaskHeadConfig(target_side=56)).mask_side == 56
