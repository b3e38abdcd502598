"""The check against published figures, and that what its text says of other models is true."""

import dataclasses
import re

import numpy as np
import pytest

from gesso.models.backbone import BackboneConfig
from gesso.models.build import build_detector
from gesso.models.faster_rcnn import FasterRCNNConfig
from gesso.planning import published
from gesso.planning.scaling import Network, largest_of, predict
from gesso.planning.workload import module_traffic

TEXT = re.sub(r"\s+", " ", published.__doc__)


def test_megdet_rows_are_the_published_ones():
    assert [(r.gpus, r.published, r.held_out) for r in published.megdet()[1]] == [
        (8, 39.5, False),
        (32, 11.2, False),
        (64, 6.5, True),
        (128, 4.1, True),
    ]


def test_megdet_is_met_where_calibrated_and_within_ten_percent_elsewhere():
    found, rows = published.megdet()
    assert max(map(abs, found.residuals)) < 1e-9
    for row in rows:
        assert abs(row.error) < (0.1 if row.held_out else 1e-9)


def test_megdet_by_hand():
    """The two numbers from two lines in two unknowns, and the held-out rows from these."""
    machines, hours = np.array([1, 4, 8, 16]), np.array([39.5, 11.2, 6.5, 4.1])
    steps = np.ceil(11 * 118_287 / (machines * 16))
    known = 2 * 7 * (5e-6 + 167e6 / 8 / 100e9) + 2 * (machines - 1) / machines * 167e6 / 12.5e9
    unknown = hours * 3600 / steps - known
    slope = (unknown[1] - unknown[0]) / 3
    predicted = steps * (unknown[0] + (machines - 1) * slope + known) / 3600
    found, rows = published.megdet()
    assert [row.predicted for row in rows] == pytest.approx(predicted)
    assert found.step.seconds == pytest.approx(unknown[0])
    assert found.network.between_latency == pytest.approx(slope / 2)
    assert "36 ms" in TEXT and round(1000 * slope / 2) == 36
    assert "0.19 ms for each of 189" in TEXT and round(1000 * slope / 2 / 189, 2) == 0.19


def two_unknowns(second):
    """Hours on 64 and 128 GPUs from a step of a + b * second(GPUs), met on 8 and 32 GPUs; errors in percent."""
    steps = {n: 11 * 118_287 / (2 * n) for n in (8, 32, 64, 128)}
    lines = np.array([[steps[n], steps[n] * second(n)] for n in (8, 32)]) / 3600
    a, b = np.linalg.solve(lines, [39.5, 11.2])
    return [100 * (steps[n] * (a + b * second(n)) / 3600 / hours - 1) for n, hours in ((64, 6.5), (128, 4.1))]


def test_other_second_terms_are_off_as_the_text_says():
    bandwidth = two_unknowns(lambda n: (n / 8 - 1) / (n / 8))
    assert f"{bandwidth[0]:.0f}% and {bandwidth[1]:.0f}% for 64" in TEXT
    scatter = two_unknowns(largest_of)
    assert f"step times alone {scatter[0]:.0f}% and {scatter[1]:.0f}%" in TEXT


def test_a_fixed_cost_a_run_is_not_told_from_a_cost_a_machine():
    hops = two_unknowns(lambda n: n / 8 - 1)
    a, b = np.linalg.solve([[1 / 8, 1], [1 / 32, 1]], [39.5, 11.2])
    fixed = [100 * ((a / n + b) / hours - 1) for n, hours in ((64, 6.5), (128, 4.1))]
    assert hops == pytest.approx(fixed)
    assert f"{b:.1f} hours a run" in TEXT


def test_pfdet_has_its_published_numbers_under_the_first_assumptions():
    first, *others = published.pfdet()
    assert first.prediction.gpus == first.prediction.batch == 512 and first.prediction.machines == 64
    assert first.prediction.hours == pytest.approx(33)
    assert first.prediction.efficiency == pytest.approx(0.83)
    again = predict(first.step, Network(), published.PFDET_WORK, 512)
    assert again == first.prediction
    assert 0 < first.step.jitter < 0.1
    assert first.prediction.gradients == pytest.approx(
        2 * 7 * (5e-6 + 534e6 / 8 / 100e9) + 2 * 63 * (20e-6 + 534e6 / 64 / 12.5e9)
    )
    assert len({round(case.prediction.efficiency, 3) for case in (first, *others)}) == len(others) + 1


def test_published_step_is_the_steps_of_16_epochs_in_33_hours():
    first = published.pfdet()[0]
    whole = first.prediction.step_seconds
    assert whole == pytest.approx(33 * 3600 / (16 * 1_740_000 / 512))
    assert first.step.seconds == pytest.approx(0.83 * whole)


def test_bytes_are_those_of_our_own_detectors():
    def traffic(backbone, classes):
        config = FasterRCNNConfig(backbone=BackboneConfig(name=backbone, pretrained=False))
        return module_traffic(build_detector(config, classes))

    assert traffic("resnet50", 80).gradient_bytes == pytest.approx(published.MEGDET_STEP.gradient_bytes, rel=0.01)


@pytest.mark.slow
def test_bytes_of_pfdets_detector():
    config = FasterRCNNConfig(backbone=BackboneConfig(name="legacy_senet154", pretrained=False))
    found = module_traffic(build_detector(config, 500))
    assert found.gradient_bytes == pytest.approx(published.PFDET_STEP.gradient_bytes, rel=0.01)
    assert (found.norm_layers, found.norm_bytes) == (published.PFDET_STEP.norm_layers, published.PFDET_STEP.norm_bytes)
    assert dataclasses.asdict(published.PFDET_STEP)["norm_images"] == 8
