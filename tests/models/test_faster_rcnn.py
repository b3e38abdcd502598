"""What Faster R-CNN does beyond what every detector does (test_detectors.py)."""

import dataclasses

import pytest
import torch

from gesso.errors import ConfigError
from gesso.models.box_head import BoxHeadConfig
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.models.losses import mean_over_batch
from gesso.models.norm import NormPolicy, apply_norm_policy
from gesso.models.roi import RoISamplingConfig, hardest, sample_rois
from tests.models.helpers import NUM_CLASSES, picture, random_batch, step, tiny_detector

LOSSES = {"rpn_objectness", "rpn_box", "box_class", "box_regression"}


def test_a_picture_does_not_depend_on_its_batch_in_training():
    detector, (batch, targets) = tiny_detector("mask_rcnn").double(), random_batch(3, masks=True)
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    detector.train()
    whole = detector(batch, targets)
    parts = [detector(picture(batch, b), picture(targets, b)) for b in range(3)]
    # Every picture has the same number of samples here, so the mean over the batch is the mean of the means.
    for name in ("box_class", "box_regression"):
        torch.testing.assert_close(whole[name], torch.stack([part[name] for part in parts]).mean())


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


def test_the_key_decides_the_samples():
    detector, (batch, targets) = tiny_detector(), random_batch()
    apply_norm_policy(detector, NormPolicy(kind="fixed"))
    first = detector(batch, targets)
    other = detector(dataclasses.replace(batch, key=batch.key + 1), targets)
    assert any(first[name] != other[name] for name in LOSSES)
    again = detector(dataclasses.replace(batch, image_index=batch.image_index + 5), targets)
    assert all(torch.equal(first[name], again[name]) for name in LOSSES)


def test_contiguous_memory_format():
    batch, targets = random_batch()
    expected = tiny_detector()(batch, targets)
    losses = tiny_detector().to(memory_format=torch.contiguous_format)(batch, targets)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("head", [BoxHeadConfig(width=16), BoxHeadConfig(width=16, convs=2, conv_width=8, fcs=1)])
def test_the_hardest_of_all_proposals_are_trained_on(head):
    """The losses are those of the regions that ``hardest`` picks by the loss of each, one by one."""
    config = RoISamplingConfig(samples=8, hard_examples=True)
    detector, (batch, targets) = tiny_detector(box_head=head, roi=config).double(), random_batch(masks=True)
    maps = detector.maps(batch)
    proposals = detector.rpn.propose(detector._first_stage(maps, batch), batch.sizes)
    every = sample_rois(proposals.boxes, proposals.valid, targets, batch.key, config, every=True)
    assert every.boxes.shape[1] == 32 + 6 and (every.valid.sum(dim=1) == proposals.valid.sum(dim=1) + 3).all()
    parts = detector.box_head.each_loss(detector.box_head(detector.pooler(maps, every.boxes), 2), every)
    expected = hardest(every, parts["box_class"] + parts["box_regression"], config)
    chosen = detector.choose(maps, proposals, batch, targets)
    assert all(torch.equal(a, b) for a, b in zip(chosen, expected, strict=True))
    assert (chosen.image[0] != chosen.image[0, 0]).any()  # of both pictures, in one row
    terms = detector.region_losses(maps, proposals, batch, targets)
    for name, each in parts.items():
        picked = torch.zeros(())
        for b, box in zip(chosen.image[chosen.valid], chosen.boxes[chosen.valid], strict=True):
            picked = picked + each[b][(every.boxes[b] == box).all(dim=1)][0]
        torch.testing.assert_close(mean_over_batch(terms[name]), picked / chosen.valid.sum())


def test_hard_examples_teach_more_than_others():
    batch, targets = random_batch(masks=True)
    hard = step(tiny_detector(roi=RoISamplingConfig(samples=8, hard_examples=True)), batch, targets)[0]
    easy = step(tiny_detector(roi=RoISamplingConfig(samples=8, positive_share=0.5)), batch, targets)[0]
    assert hard["box_class"] + hard["box_regression"] > easy["box_class"] + easy["box_regression"]
    assert hard["rpn_objectness"] == easy["rpn_objectness"]


def test_hard_examples_refuse_batch_norm_in_the_box_head():
    with pytest.raises(ConfigError, match="would count all proposals"):
        FasterRCNNConfig(roi=RoISamplingConfig(hard_examples=True), box_head=BoxHeadConfig(norm="batch"))
