import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.errors import ConfigError
from gesso.planning.scaling import (
    MeasuredHours,
    Network,
    StepMeasurement,
    Work,
    all_reduce_seconds,
    calibrate,
    exposed_seconds,
    largest_of,
    messages_of,
    predict,
    ring_seconds,
)

NETWORK = Network(
    gpus_per_machine=4, inside_bandwidth=10e9, inside_latency=1e-5, between_bandwidth=1e9, between_latency=1e-4
)
STEP = StepMeasurement(
    seconds=0.5, images=2, gradient_bytes=200e6, messages=8, norm_layers=50, norm_bytes=4e5, jitter=0.03
)
WORK = Work(images=1_000_000)


def test_a_ring_by_hand():
    """Four ranks, 400 bytes: 3 hops to add up and 3 to spread, each of 100 bytes at 50 bytes a second and 0.5 s."""
    assert ring_seconds(400, 4, 50, 0.5) == pytest.approx(6 * (0.5 + 2.0))
    assert ring_seconds(400, 1, 50, 0.5) == 0


def simulated_ring(size, ranks, bandwidth, latency):
    """Moves the pieces one hop at a time and adds them up, counting the time of a hop."""
    have = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # [rank][piece] = whose values are in it
    seconds = 0.0
    for phase in range(2):
        for hop in range(ranks - 1):
            sent = [
                (rank, (rank - hop + phase) % ranks, have[rank][(rank - hop + phase) % ranks]) for rank in range(ranks)
            ]
            for rank, piece, whose in sent:
                there = (rank + 1) % ranks
                have[there][piece] = have[there][piece] | whose if phase == 0 else whose
            seconds += latency + size / ranks / bandwidth
    assert all(whose == set(range(ranks)) for rank in have for whose in rank)
    return seconds


@given(st.integers(1, 9), st.floats(1, 1e9), st.floats(1, 1e9), st.floats(0, 1))
def test_a_ring_equals_its_simulation(ranks, size, bandwidth, latency):
    assert ring_seconds(size, ranks, bandwidth, latency) == pytest.approx(
        simulated_ring(size, ranks, bandwidth, latency)
    )


def test_all_reduce_over_machines_by_hand():
    inside = 2 * 3 * (1e-5 + 1e6 / 4 / 10e9)
    between = 2 * 2 * (1e-4 + 1e6 / 3 / 1e9)
    assert all_reduce_seconds(1e6, 12, NETWORK) == pytest.approx(inside + between)
    assert all_reduce_seconds(1e6, 9, NETWORK) == pytest.approx(inside + between), "the last machine is not full"
    assert all_reduce_seconds(1e6, 3, NETWORK) == pytest.approx(2 * 2 * (1e-5 + 1e6 / 3 / 10e9))


@given(st.floats(0, 10), st.integers(1, 40), st.floats(0, 100))
def test_exposed_equals_sending_one_message_after_the_other(message, count, window):
    free = 0.0
    for k in range(1, count + 1):
        free = max(free, k * window / count) + message
    assert exposed_seconds(message, count, window) == pytest.approx(free - window, abs=1e-9 * (1 + window))


def test_the_largest_of_n_is_that_of_the_integral():
    """E[max] = integral of 1 - F^n above 0 minus F^n below, here by the trapezium rule."""
    x = np.linspace(-12, 12, 200_001)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    for count in (1, 2, 8, 64, 512, 1024):
        exact = np.trapezoid(np.where(x > 0, 1 - below**count, -(below**count)), x)
        assert largest_of(count) == pytest.approx(exact, rel=0.05, abs=1e-4)


def test_messages_are_buckets():
    assert [messages_of(size) for size in (0, 1, 25 * 2**20, 25 * 2**20 + 1, 167e6)] == [1, 1, 1, 2, 7]


def test_one_gpu_computes_and_waits_for_data_only():
    step = dataclasses.replace(STEP, data_seconds=0.1)
    found = predict(step, NETWORK, Work(images=1000, accumulate=3), 1)
    assert (found.gradients, found.norm, found.stragglers) == (0, 0, 0)
    assert found.step_seconds == pytest.approx(3 * 0.6)
    assert (found.batch, found.steps, found.efficiency, found.machines) == (6, 167, 1, 1)
    assert found.hours == pytest.approx(167 * 1.8 / 3600)
    assert found.images_per_second == pytest.approx(6 / 1.8)


def test_the_parts_of_a_step_by_hand():
    found = predict(dataclasses.replace(STEP, norm_images=8), NETWORK, WORK, 8)
    message = all_reduce_seconds(25e6, 8, NETWORK)
    assert found.gradients == pytest.approx(max(message, 8 * message - 0.6 * 0.5 * 7 / 8))
    assert found.norm == pytest.approx(2 * 50 * all_reduce_seconds(8000, 4, NETWORK))
    assert found.stragglers == pytest.approx(0.03 * 0.5 * largest_of(8))
    assert found.step_seconds == pytest.approx(0.5 + found.gradients + found.norm + found.stragglers)


@pytest.mark.parametrize(("images", "ranks"), [(2, 1), (4, 2), (8, 4), (16, 8), (None, 64)])
def test_batch_norm_goes_over_its_group(images, ranks):
    found = predict(dataclasses.replace(STEP, norm_images=images), NETWORK, WORK, 64)
    assert found.norm == pytest.approx(100 * all_reduce_seconds(8000, ranks, NETWORK))


def test_accumulation_sends_gradients_once_and_statistics_each_time():
    one, four = (predict(STEP, NETWORK, Work(images=1e6, accumulate=k), 16) for k in (1, 4))
    assert four.gradients == one.gradients and four.norm == pytest.approx(4 * one.norm)
    assert four.compute == pytest.approx(4 * one.compute) and four.stragglers == pytest.approx(2 * one.stragglers)
    assert four.batch == 4 * one.batch and four.efficiency > one.efficiency


steps = st.builds(
    StepMeasurement,
    seconds=st.floats(1e-3, 10),
    images=st.integers(1, 16),
    gradient_bytes=st.floats(0, 1e10),
    messages=st.integers(1, 100),
    backward_share=st.floats(0, 1),
    norm_layers=st.integers(0, 200),
    norm_bytes=st.floats(0, 1e7),
    data_seconds=st.floats(0, 1),
    jitter=st.floats(0, 1),
)
networks = st.builds(
    Network,
    gpus_per_machine=st.integers(1, 16),
    inside_bandwidth=st.floats(1e8, 1e12),
    inside_latency=st.floats(0, 1e-2),
    between_bandwidth=st.floats(1e8, 1e12),
    between_latency=st.floats(0, 1e-2),
)


@given(steps, networks, st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 8))
def test_more_gpus_make_a_step_longer_and_less_efficient(step, network, a, b, accumulate):
    few, many = (predict(step, network, Work(images=1e9, accumulate=accumulate), n) for n in sorted((a, b)))
    assert 0 < many.efficiency <= few.efficiency * (1 + 1e-9) <= 1 + 1e-9
    assert many.step_seconds >= few.step_seconds * (1 - 1e-9)
    assert few.hours >= 1e9 / few.batch * few.step_seconds / 3600 * (1 - 1e-9)


@given(steps, networks, st.integers(1, 1024), st.floats(1, 10))
def test_a_better_network_is_never_slower(step, network, gpus, factor):
    better = dataclasses.replace(
        network,
        inside_bandwidth=network.inside_bandwidth * factor,
        between_bandwidth=network.between_bandwidth * factor,
        inside_latency=network.inside_latency / factor,
        between_latency=network.between_latency / factor,
    )
    before, after = (predict(step, n, WORK, gpus).step_seconds for n in (network, better))
    assert after <= before * (1 + 1e-12)


@given(steps, st.integers(1, 1024))
def test_without_costs_hours_fall_as_gpus_rise(step, gpus):
    free = Network(inside_latency=0, between_latency=0, inside_bandwidth=math.inf, between_bandwidth=math.inf)
    found = predict(dataclasses.replace(step, jitter=0), free, WORK, gpus)
    assert found.efficiency == 1
    assert found.images_per_second == pytest.approx(gpus * step.images / (step.seconds + step.data_seconds))


@given(st.floats(0.01, 10), st.floats(0, 0.1), st.lists(st.integers(1, 1024), min_size=2, max_size=6))
def test_calibration_finds_what_made_the_rows(seconds, latency, counts):
    true = dataclasses.replace(STEP, seconds=seconds, backward_share=0.0)
    there = dataclasses.replace(NETWORK, between_latency=latency)
    rows = [MeasuredHours(gpus=n, hours=predict(true, there, WORK, n).hours) for n in counts]
    if len({math.ceil(n / 4) for n in counts}) < 2:
        return  # jitter aside, one number of machines does not tell the two apart
    found = calibrate(rows, dataclasses.replace(STEP, backward_share=0.9), NETWORK, WORK)
    assert found.step.seconds == pytest.approx(seconds, rel=1e-5, abs=1e-6)
    assert found.network.between_latency == pytest.approx(latency, rel=1e-4, abs=1e-6)
    assert max(map(abs, found.residuals)) < 1e-6
    assert found.step.backward_share == 0


def test_more_rows_than_numbers_leave_residuals():
    rows = [MeasuredHours(gpus=8, hours=40), MeasuredHours(gpus=32, hours=16), MeasuredHours(gpus=128, hours=5)]
    plain = StepMeasurement(seconds=0, images=2)
    found = calibrate(rows, plain, NETWORK, WORK)
    best = sum(r**2 for r in found.residuals)
    assert best > 1e-6
    for change in (0.999, 1.001):
        for step, network in (
            (dataclasses.replace(found.step, seconds=found.step.seconds * change), found.network),
            (
                found.step,
                dataclasses.replace(found.network, between_latency=found.network.between_latency * change),
            ),
        ):
            worse = sum((predict(step, network, WORK, row.gpus).hours / row.hours - 1) ** 2 for row in rows)
            assert worse > best


def test_rows_that_settle_nothing_are_refused():
    with pytest.raises(ConfigError, match="two numbers of machines"):
        calibrate(
            [MeasuredHours(gpus=2, hours=4), MeasuredHours(gpus=4, hours=2)],
            StepMeasurement(seconds=0, images=2),
            NETWORK,
            WORK,
        )
    with pytest.raises(ConfigError, match="no time"):
        calibrate(
            [MeasuredHours(gpus=8, hours=9), MeasuredHours(gpus=32, hours=1)],
            StepMeasurement(seconds=0, images=2),
            NETWORK,
            WORK,
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Network(gpus_per_machine=0),
        lambda: Network(inside_bandwidth=0),
        lambda: Network(between_latency=-1),
        lambda: Network(between_latency=math.nan),
        lambda: StepMeasurement(seconds=-1, images=1),
        lambda: StepMeasurement(seconds=math.nan, images=1),
        lambda: StepMeasurement(seconds=1, images=0),
        lambda: StepMeasurement(seconds=1, images=1, messages=0),
        lambda: StepMeasurement(seconds=1, images=1, backward_share=1.1),
        lambda: StepMeasurement(seconds=1, images=1, jitter=math.nan),
        lambda: StepMeasurement(seconds=1, images=1, gradient_bytes=-1),
        lambda: StepMeasurement(seconds=1, images=2, norm_images=3),
        lambda: Work(images=0),
        lambda: Work(images=math.nan),
        lambda: Work(images=1, accumulate=0),
        lambda: predict(STEP, NETWORK, WORK, 0),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ConfigError):
        make()
