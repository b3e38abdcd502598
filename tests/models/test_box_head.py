import pytest
import torch
from torchvision.models.detection.roi_heads import fastrcnn_loss

from gesso import boxes as geometry
from gesso.errors import ConfigError
from gesso.models.box_head import BoxHead, BoxHeadConfig, RegionPredictions
from gesso.models.losses import mean_over_batch
from gesso.models.roi import RoISamplingConfig, sample_rois
from tests.models.helpers import NUM_CLASSES, random_batch
from tests.models.test_roi import proposals


def head(**changes):
    torch.manual_seed(0)
    return BoxHead(BoxHeadConfig(width=12, **changes), channels=6, pooled_size=5, num_classes=NUM_CLASSES)


def regions(share=0.5):
    batch, targets = random_batch(2)
    return sample_rois(*proposals(targets), targets, batch.key, RoISamplingConfig(samples=24, positive_share=share))


@pytest.mark.parametrize("weights", [(10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)])
def test_losses_equal_torchvision(weights):
    found = regions()
    assert found.valid.all()
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 24, NUM_CLASSES + 1, generator=g)
    deltas = torch.randn(2, 24, NUM_CLASSES, 4, generator=g)
    terms = head(box_weights=weights).losses(RegionPredictions(logits, deltas), found)
    with_background = torch.cat([torch.zeros(2, 24, 1, 4), deltas], dim=2)
    wanted = geometry.encode(found.boxes, found.truth, weights)
    expected = fastrcnn_loss(
        logits.flatten(0, 1), with_background.view(48, -1), [found.labels.flatten()], [wanted.flatten(0, 1)]
    )
    torch.testing.assert_close(mean_over_batch(terms["box_class"]), expected[0])
    torch.testing.assert_close(mean_over_batch(terms["box_regression"]), expected[1])


def test_class_agnostic_boxes():
    agnostic, found = head(class_agnostic=True), regions()
    out = agnostic(torch.randn(48, 6, 5, 5), 2)
    assert out.logits.shape == (2, 24, NUM_CLASSES + 1) and out.deltas.shape == (2, 24, 1, 4)
    repeated = RegionPredictions(out.logits, out.deltas.expand(-1, -1, NUM_CLASSES, -1))
    torch.testing.assert_close(
        agnostic.losses(out, found)["box_regression"].total, head().losses(repeated, found)["box_regression"].total
    )


def test_scores():
    logits = torch.randn(2, 7, NUM_CLASSES + 1)
    expected = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(head().scores(RegionPredictions(logits, None)), expected[..., 1:])
    sigmoid = head(classifier="sigmoid")
    torch.testing.assert_close(
        sigmoid.scores(RegionPredictions(logits[..., 1:], None)), 1 / (1 + (-logits[..., 1:]).exp())
    )


@pytest.mark.parametrize("agnostic", [False, True])
def test_a_sigmoid_for_each_class(agnostic):
    """Yes or no for each class without a background; summed over the classes, a mean over the regions."""
    one, found = head(classifier="sigmoid", class_agnostic=agnostic), regions()
    out = one(torch.randn(48, 6, 5, 5), 2)
    assert out.logits.shape == (2, 24, NUM_CLASSES) and out.deltas.shape == (2, 24, 1 if agnostic else NUM_CLASSES, 4)
    wanted = torch.zeros(2, 24, NUM_CLASSES)
    for b, r in found.positive.nonzero().tolist():
        wanted[b, r, found.labels[b, r] - 1] = 1
    p = out.logits.sigmoid()
    each = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum(dim=-1)
    terms = one.losses(out, found)
    assert 0 < wanted.sum() < 48
    torch.testing.assert_close(mean_over_batch(terms["box_class"]), each.sum() / 48)
    softmax = head(class_agnostic=agnostic)
    with_background = RegionPredictions(torch.nn.functional.pad(out.logits, (1, 0)), out.deltas)
    torch.testing.assert_close(terms["box_regression"], softmax.losses(with_background, found)["box_regression"])


@pytest.mark.parametrize("classifier", ["softmax", "sigmoid"])
def test_the_loss_of_each_region(classifier):
    """It is the loss of that region alone; regions that are not valid have none."""
    one, found = head(classifier=classifier), regions()
    found = found._replace(valid=torch.arange(24).expand(2, 24) < 20)
    found = found._replace(positive=found.positive & found.valid)
    out = one(torch.randn(48, 6, 5, 5), 2)
    each = one.each_loss(out, found)
    for b, r in ((0, 0), (0, 19), (1, 3)):
        place = slice(b, b + 1), slice(r, r + 1)
        alone = one.losses(RegionPredictions(*(v[place] for v in out)), type(found)(*(v[place] for v in found)))
        for name, term in alone.items():
            torch.testing.assert_close(each[name][b, r], term.total)
    assert all((value[:, 20:] == 0).all() for value in each.values())
    for name, term in one.losses(out, found).items():
        assert term.samples == 40
        torch.testing.assert_close(term.total, each[name].sum())


def test_the_first_layer_reads_cell_after_cell():
    """(row, column, channel), so that channels_last features are read as they lie in memory."""
    one, pooled = head(), torch.randn(4, 6, 5, 5)
    weight = one.fcs[0].weight
    assert weight.shape == (12, 6, 5, 5)
    expected = (torch.einsum("ochw,kchw->ko", weight, pooled) + one.fcs[0].bias).relu()
    torch.testing.assert_close(one.hidden(pooled)["fc1"], expected)
    last = pooled.contiguous(memory_format=torch.channels_last)
    assert torch.equal(one.hidden(last)["fc1"], one.hidden(pooled)["fc1"])
    permuted = last.permute(0, 2, 3, 1).flatten(1)
    assert permuted.data_ptr() == last.data_ptr()


@pytest.mark.parametrize(("convs", "fcs"), [(0, 2), (4, 1)])
def test_layers(convs, fcs):
    one = head(convs=convs, fcs=fcs, conv_width=7)
    pooled = torch.randn(4, 6, 5, 5)
    hidden = one.hidden(pooled)
    assert tuple(hidden) == one.layer_names == ("fc1", "fc2")[:fcs]
    assert all(value.shape == (4, 12) for value in hidden.values())
    assert len(one.convs) == convs and one.fcs[0].weight[0].numel() == 25 * (7 if convs else 6)
    out = one(pooled, 2)
    torch.testing.assert_close(out.logits.view(4, -1), one.classes(hidden[one.layer_names[-1]]))


def test_configuration():
    for change in ({"fcs": 0}, {"width": 0}, {"box_weights": (1.0, 1.0, 0.0, 1.0)}):
        with pytest.raises(ConfigError):
            BoxHeadConfig(**change)
