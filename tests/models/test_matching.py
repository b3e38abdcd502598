import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from gesso.models import matching
from gesso.models.matching import match, sample, take
from gesso.random_key import stream
from gesso.structures import Targets

STREAM = stream("test")


def targets_of(boxes, valid=None, ignore=None):
    B, M = boxes.shape[:2]
    none = torch.zeros(B, M, dtype=torch.bool)
    return Targets(
        boxes=boxes,
        labels=torch.zeros(B, M, dtype=torch.int64),
        valid=~none if valid is None else valid,
        ignore=none if ignore is None else ignore,
        box_id=torch.zeros(B, M, dtype=torch.int64),
    )


def random_boxes(shape, seed, side=60):
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(*shape, 2, generator=g) * side
    return torch.cat([low, low + 2 + torch.rand(*shape, 2, generator=g) * side / 2], dim=-1)


def options(**changes):
    return {"positive_iou": 0.7, "negative_iou": 0.3, "low_quality": True, "ignore_ioa": 0.5} | changes


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), low_quality=st.booleans(), count=st.integers(1, 5))
def test_equals_torchvision(seed, low_quality, count):
    truth, boxes = random_boxes((2, 6), seed), random_boxes((1, 700), seed + 1)
    valid = (torch.arange(6) < count).expand(2, 6)
    found = match(boxes, targets_of(truth * valid[..., None], valid), **options(low_quality=low_quality))
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=low_quality)
    for b in range(2):
        expected = matcher(box_iou(truth[b, :count], boxes[0]))
        assert torch.equal(found.positive[b], expected >= 0)
        assert torch.equal(found.negative[b], expected == Matcher.BELOW_LOW_THRESHOLD)
        positive = found.positive[b]
        assert torch.equal(found.slot[b][positive], expected[positive])


def test_pieces_give_the_same_as_the_whole(monkeypatch):
    truth, boxes = random_boxes((2, 6), 0), random_boxes((2, 700), 1)
    ignore = torch.zeros(2, 6, dtype=torch.bool)
    ignore[:, 4:] = True
    whole = match(boxes, targets_of(truth, ignore=ignore), **options())
    monkeypatch.setattr(matching, "_chunk", lambda boxes, truth: 100)
    for a, b in zip(whole, match(boxes, targets_of(truth, ignore=ignore), **options()), strict=True):
        assert torch.equal(a, b)


def test_without_objects_everything_is_negative():
    found = match(
        random_boxes((1, 20), 0), targets_of(torch.zeros(3, 4, 4), torch.zeros(3, 4, dtype=torch.bool)), **options()
    )
    assert found.negative.all() and not found.positive.any()
    found = match(random_boxes((1, 20), 0), targets_of(torch.zeros(1, 1, 4)), **options())
    assert found.negative.all(), "an object without extent is no best match of everything"


def test_ignored_objects():
    truth = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 90, 90]]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 90, 90], [55, 55, 60, 60], [40, 55, 59, 60], [20, 20, 30, 30]]])
    found = match(boxes, targets_of(truth, ignore=torch.tensor([[False, True]])), **options())
    assert found.positive.tolist() == [[True, False, False, False, False]]
    # The fourth lies in it with 9 of 19 pixels: a negative.
    assert found.negative.tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize("positives", [0, 3, 200])
@pytest.mark.parametrize("negatives", [0, 10, 500])
def test_sample_counts(positives, negatives):
    place = torch.arange(1000).expand(2, 1000)
    positive, negative = place < positives, (place >= 300) & (place < 300 + negatives)
    got = sample(positive, negative, torch.tensor([5, 6]), STREAM, count=64, positive_share=0.25)
    for b in range(2):
        assert got.positive[b].sum() == min(16, positives)
        assert got.valid[b].sum() == min(16, positives) + min(64 - min(16, positives), negatives)
        assert len(set(got.place[b].tolist())) == 64
        assert positive[b][got.place[b][got.positive[b]]].all()
        assert (positive | negative)[b][got.place[b][got.valid[b]]].all()
    first = got.positive.long().diff(dim=1)
    assert (first <= 0).all(), "positives stand first"


def test_sample_depends_on_the_key_alone():
    positive = torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) > 0.8
    key = torch.tensor([1, 2, 3, 2**60])
    whole = sample(positive, ~positive, key, STREAM, count=32, positive_share=0.5)
    for b in range(4):
        alone = sample(positive[b : b + 1], ~positive[b : b + 1], key[b : b + 1], STREAM, count=32, positive_share=0.5)
        assert torch.equal(alone.place[0], whole.place[b])
    other = sample(positive, ~positive, key + 7, STREAM, count=32, positive_share=0.5)
    assert not torch.equal(other.place, whole.place)


def test_sample_is_even():
    """Every box is drawn about equally often: 2000 draws of 8 of 40, expected 400 each, sigma 18."""
    negative = torch.ones(2000, 40, dtype=torch.bool)
    got = sample(~negative, negative, torch.arange(2000), STREAM, count=8, positive_share=0.5)
    counts = torch.bincount(got.place.flatten(), minlength=40)
    assert counts.min() > 400 - 90 and counts.max() < 400 + 90


def test_take():
    values, index = torch.rand(2, 9, 3), torch.tensor([[8, 0, 8], [1, 1, 2]])
    assert torch.equal(take(values, index)[1, 2], values[1, 2])
    assert torch.equal(take(values, index)[0, 0], values[0, 8])
