"""The stream of batches: pure in (seed, first sample), the same for any number of processes, fair to every picture."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.sampling import SPARES, BatchStream
from gesso.errors import ConfigError, DataError
from gesso.random_key import fold

SHAPES = np.random.default_rng(0).choice([0, 2, 3], 57, p=[0.6, 0.35, 0.05])


def take(stream, count):
    return list(itertools.islice(stream, count))


def same(a, b):
    return (a.number, a.shape, a.scale) == (b.number, b.shape, b.scale) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("rows", "spares", "keys")
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**62), batch=st.integers(1, 12), cut=st.integers(0, 40))
def test_a_restart_goes_on_where_it_was(seed, batch, cut):
    whole = take(BatchStream(SHAPES, seed=seed, batch_size=batch, num_scales=3), cut + 10)
    rest = BatchStream(SHAPES, seed=seed, batch_size=batch, num_scales=3, first_sample=cut * batch)
    assert rest.sample == cut * batch
    assert all(same(a, b) for a, b in zip(whole[cut:], take(rest, 10), strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(world):
    alone = take(BatchStream(SHAPES, seed=5, batch_size=8, num_scales=2), 30)
    ranks = [
        take(BatchStream(SHAPES, seed=5, batch_size=8, num_scales=2, rank=rank, world=world), 30)
        for rank in range(world)
    ]
    for step, plan in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert {(part.shape, part.scale) for part in parts} == {(plan.shape, plan.scale)}
        for name in ("rows", "spares", "keys"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(plan, name))


def test_a_batch_has_one_shape_and_the_keys_of_its_samples():
    for plan in take(BatchStream(SHAPES, seed=9, batch_size=6), 50):
        assert set(SHAPES[plan.rows]) == {plan.shape} == set(SHAPES[plan.spares].ravel())
        assert plan.keys.tolist() == [fold(9, plan.number * 6 + i) for i in range(6)]


def test_every_epoch_of_a_shape_holds_each_of_its_pictures_once_in_a_new_order():
    rows = {shape: [] for shape in (0, 2, 3)}
    for plan in take(BatchStream(SHAPES, seed=1, batch_size=4), 400):
        rows[plan.shape].extend(plan.rows.tolist())
    for shape, seen in rows.items():
        members = np.flatnonzero(shape == SHAPES).tolist()
        epochs = [seen[i : i + len(members)] for i in range(0, len(seen) - len(members) + 1, len(members))]
        assert len(epochs) > 2
        assert all(sorted(epoch) == members for epoch in epochs)
        if len(members) > 5:
            assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_all_pictures_are_seen_equally_often():
    shapes = np.random.default_rng(1).choice(5, 1000, p=[0.1, 0.5, 0.2, 0.15, 0.05])
    plans = take(BatchStream(shapes, seed=3, batch_size=8), 1250)
    seen = np.bincount(np.concatenate([plan.rows for plan in plans]), minlength=1000)
    assert seen.min() >= 8 and seen.max() <= 12


def test_spares_are_the_next_in_order():
    plans = take(BatchStream(np.zeros(40, int), seed=2, batch_size=4), 30)
    stream = np.concatenate([plan.rows for plan in plans])
    for plan in plans[:20]:
        for i in range(4):
            at = plan.number * 4 + i
            assert plan.spares[i].tolist() == stream[at + 1 : at + 1 + SPARES].tolist()


def test_scales_are_drawn_evenly_and_seeds_differ():
    scales = [plan.scale for plan in take(BatchStream([0] * 10, seed=4, batch_size=2, num_scales=3), 900)]
    assert np.bincount(scales).min() > 250
    a, b = (next(BatchStream([0] * 100, seed=seed, batch_size=50)).rows.tolist() for seed in (1, 2))
    assert a != b


def test_a_large_set_opens_at_once():
    shapes = np.random.default_rng(0).choice(5, 600_000).astype(np.int64)
    start = time.process_time()
    next(BatchStream(shapes, seed=0, batch_size=64, first_sample=64 * 500_000))
    assert time.process_time() - start < 1.0


def test_bad_numbers_are_refused():
    with pytest.raises(DataError, match="no picture"):
        BatchStream([], seed=0, batch_size=2)
    with pytest.raises(ConfigError, match="divided among 3"):
        BatchStream([0], seed=0, batch_size=8, world=3)
    with pytest.raises(ConfigError, match="not a multiple"):
        BatchStream([0], seed=0, batch_size=8, first_sample=4)
