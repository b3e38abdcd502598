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


@pytest.mark.parametrize(("convs", "fcs"), [(0, 2), (4, 1)])
def test_layers(convs, fcs):
    one = head(convs=convs, fcs=fcs, conv_width=7)
    pooled = torch.randn(4, 6, 5, 5)
    hidden = one.hidden(pooled)
    assert tuple(hidden) == one.layer_names == ("fc1", "fc2")[:fcs]
    assert all(value.shape == (4, 12) for value in hidden.values())
    assert len(one.convs) == convs and one.fcs[0].in_features == 25 * (7 if convs else 6)
    out = one(pooled, 2)
    torch.testing.assert_close(out.logits.view(4, -1), one.classes(hidden[one.layer_names[-1]]))


def test_configuration():
    for change in ({"fcs": 0}, {"width": 0}, {"box_weights": (1.0, 1.0, 0.0, 1.0)}):
        with pytest.raises(ConfigError):
            BoxHeadConfig(**change)
