"""The bench in one process and in two, and the fit of links to made-up all-reduces."""

import dataclasses

import pytest
import torch

from gesso import distributed
from gesso.errors import ConfigError
from gesso.models.norm import NormPolicy
from gesso.planning.bench import SIZES, Exchange, bench, fit_link, links
from gesso.planning.scaling import ring_seconds
from gesso.recipes.debug import tiny
from gesso.recipes.demo import direct
from tests.distributed.processes import run

CPU = torch.device("cpu")


def small(**training):
    """``debug:tiny`` with timm's smallest backbone."""
    config = tiny()
    backbone = dataclasses.replace(config.model.backbone, name="test_resnet")
    return dataclasses.replace(
        config,
        device="cpu",
        model=dataclasses.replace(config.model, backbone=backbone),
        training=dataclasses.replace(config.training, **training),
    )


def made(bandwidth, latency, ranks=4):
    return [Exchange(size=s, ranks=ranks, seconds=ring_seconds(s, ranks, bandwidth, latency)) for s in SIZES]


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_link_is_found_again(ranks):
    found = fit_link(made(3e9, 4e-5, ranks))
    assert (found.bandwidth, found.latency) == (pytest.approx(3e9), pytest.approx(4e-5))


def test_a_link_is_never_below_zero():
    steeper = [Exchange(size=s, ranks=2, seconds=1e-12 * s**1.5) for s in SIZES]
    falling = [Exchange(size=s, ranks=2, seconds=1e-3 / s) for s in SIZES]
    for exchanges in (steeper, falling):
        found = fit_link(exchanges)
        assert found.bandwidth > 0 and found.latency >= 0


def test_one_process_is_measured_and_compared_with_none():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = bench(small(), "training", steps=2)
    torch.set_num_threads(threads)
    assert (found.processes, found.machines, found.images, found.shape) == (1, 1, 8, (64, 64))
    assert found.alone == pytest.approx(8 / found.step_seconds)
    assert (found.together, found.efficiency, found.communication, found.waiting) == (None,) * 4
    assert (found.exchanges, found.inside, found.between) == ((), None, None)


def test_one_process_takes_groups_of_the_pictures_that_it_has():
    found = bench(small(batch_size=2, norm=NormPolicy(kind="sync", images=2)), "training", steps=1)
    assert found.images == 2 and found.step_seconds > 0


def test_the_first_stage_has_its_own_shape_and_batch():
    found = bench(dataclasses.replace(direct(), device="cpu"), "pretraining", steps=1)
    assert (found.images, found.shape) == (16, (64, 64))


def _bench(steps):
    return bench(small(norm=NormPolicy(kind="sync", images=8)), "training", steps=steps), distributed.traffic.count


def test_two_processes():
    (found, count), (again, _) = run(_bench, 2, 2)
    assert found == dataclasses.replace(again, device=found.device), "all processes get the same result"
    assert (found.processes, found.machines, found.images) == (2, 1, 4)
    assert 0 < found.efficiency < 2 and found.efficiency == pytest.approx(found.together / found.alone)
    assert found.communication == pytest.approx(1 - found.together / found.at_once)
    assert 0 < found.waiting < 1 and count > 50
    assert [(one.size, one.ranks) for one in found.exchanges] == [(size, 2) for size in SIZES]
    assert found.exchanges[-1].seconds > found.exchanges[0].seconds
    assert found.inside.bandwidth > 0 and found.between is None


def _links(where):
    return links(where, CPU)


def test_links_within_machines_and_between_them():
    for exchanges, inside, between in run(_links, 4, [0, 0, 1, 1], environment={}):
        assert [one.ranks for one in exchanges] == [2] * len(SIZES) + [4] * len(SIZES)
        assert inside.bandwidth > 0 and between.bandwidth > 0
    for exchanges, inside, between in run(_links, 2, [0, 1]):
        assert [one.ranks for one in exchanges] == [2] * len(SIZES)
        assert inside is None and between.bandwidth > 0


def _three():
    with pytest.raises(ConfigError, match="cannot be divided among 3 processes"):
        bench(small(), "training", steps=1)


def test_a_batch_that_cannot_be_divided_is_refused():
    run(_three, 3)
