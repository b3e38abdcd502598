import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.partition import Holdings, assign, quota
from gesso.errors import ConfigError


def world(seed, groups, num_classes=12, alone=False):
    rng = np.random.default_rng(seed)
    sizes = np.ones(groups, np.int64) if alone else rng.choice([1, 1, 1, 1, 2, 5], groups)
    weight = 1 / np.arange(1, num_classes + 1)
    pairs = [
        (group, label)
        for group in range(groups)
        for _ in range(sizes[group])
        for label in np.flatnonzero(rng.random(num_classes) < 0.8 * weight)
    ]
    held = np.array(pairs, np.int64).reshape(-1, 2)
    return rng.random(groups), Holdings(sizes, held[:, 0], held[:, 1], num_classes)


def free(positions):
    return np.full(len(positions), -1, np.int64)


def test_quota_reads_shares_numbers_and_the_rest():
    both = quota({"train": 0.8, "val": 0.2}, 100)
    assert (both.names, both.shares.tolist(), both.exact.tolist()) == (("train", "val"), [0.8, 0.2], [False, False])
    rest = quota({"val": 25}, 100)
    assert (rest.names, rest.shares.tolist(), rest.exact.tolist()) == (("train", "val"), [0.75, 0.25], [True, True])
    mixed = quota({"val": 0.25, "test": 25}, 100)
    assert (mixed.names, mixed.exact.tolist()) == (("train", "val", "test"), [False, False, True])
    rounded = quota({"train": 147, "val": 0.2, "test": 30}, 221)
    assert rounded.shares.tolist() == pytest.approx([147 / 221, 44 / 221, 30 / 221])
    some = quota({"train": 10, "val": 5}, 100)
    assert (some.names, some.shares.tolist()) == (("train", "val"), [0.1, 0.05])


@pytest.mark.parametrize(
    "parts",
    [{}, {"train": 0.8, "val": 0.3}, {"val": 101}, {"val": 0}, {"val": 0.0}, {"val": -3}, {"val": 1.5}, {"a/b": 0.5},
     {"": 0.5}, {"..": 0.5}, {"val": True}, {"val": float("nan")}],
)  # fmt: skip
def test_quota_refuses(parts):
    with pytest.raises(ConfigError) as error:
        quota(parts, 100)
    assert "\n" not in str(error.value)


def test_holdings_count_pictures():
    held = Holdings(np.array([2, 1]), np.array([0, 0, 0, 1]), np.array([1, 1, 0, 1]), 2)
    assert held.counts(np.array([0, 1]), 2).tolist() == [[1, 0], [2, 1], [2, 1]]
    assert held.groups[held.of_class(1)].tolist() == [0, 1]
    assert held.weights[held.of_class(2)].tolist() == [2, 1]


def test_without_balance_the_position_alone_decides():
    positions, held = world(0, 300)
    part = assign(
        quota({"train": 0.7, "val": 0.2, "test": 0.1}, 300), positions, held, pinned=free(positions), balance=False
    )
    assert part.tolist() == [0 if u < 0.7 else 1 if u < 0.9 - 1e-12 else 2 for u in positions]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200))
def test_balancing_never_makes_a_class_worse_and_is_deterministic(seed, groups):
    positions, held = world(seed, groups)
    due = quota({"train": 0.8, "val": 0.2}, int(held.sizes.sum()))
    plain = assign(due, positions, held, pinned=free(positions), balance=False)
    part = assign(due, positions, held, pinned=free(positions))
    assert ((part >= 0) & (part < 2)).all()
    assert (part == assign(due, positions, held, pinned=free(positions))).all()
    rarest = int(np.argmin(np.where((n := held.counts(plain, 3).sum(1)[:-1]) > 0, n, 10**9)))
    due_here = due.shares * n[rarest]
    off = [np.abs(held.counts(p, 3)[rarest, :2] - due_here).max() for p in (plain, part)]
    assert off[1] <= max(off[0], 5 + 0.1 * due_here.max())


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_within_bounds(seed):
    """Single pictures leave the balancer free, so each class comes out within ten percent, or one picture."""
    positions, held = world(seed, 600, alone=True)
    due = quota({"train": 0.7, "val": 0.2, "test": 0.1}, 600)
    counts = held.counts(assign(due, positions, held, pinned=free(positions)), 4)
    wanted = counts.sum(1, keepdims=True)[:-1] * due.shares
    off = np.abs(counts[:-1, :3] - wanted)
    assert (off <= np.maximum(0.1 * wanted + 1, 1)).mean() >= 0.97
    assert (counts[:-1, :3][counts.sum(1)[:-1] >= 3] >= 1).all()
    assert counts[:-1, 3].sum() == 0


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_met_exactly(seed):
    positions, held = world(seed, 400, alone=True)
    counts = held.counts(assign(quota({"val": 50, "test": 37}, 400), positions, held, pinned=free(positions)), 4)
    assert counts[-1].tolist() == [313, 50, 37, 0]


def test_numbers_are_met_where_rare_classes_pull_the_other_way():
    """Forty classes of three pictures each want a picture in every part; the numbers asked for win."""
    positions = np.random.default_rng(0).random(130)
    held = Holdings(np.ones(130, np.int64), np.arange(120), np.arange(120) // 3, 40)
    part = assign(quota({"val": 10, "test": 5}, 130), positions, held, pinned=free(positions))
    assert np.bincount(part, minlength=3).tolist() == [115, 10, 5]


def test_a_rare_class_stands_in_both_parts():
    """Two pictures of 1000 hold the class, both placed in train by the hash."""
    positions = np.random.default_rng(1).random(1000)
    rare = np.flatnonzero(positions < 0.5)[:2]
    held = Holdings(np.ones(1000, np.int64), rare, np.zeros(2, np.int64), 1)
    part = assign(quota({"val": 0.2}, 1000), positions, held, pinned=free(positions))
    assert sorted(part[rare].tolist()) == [0, 1]


def test_pinned_groups_stay():
    positions, held = world(3, 200)
    pinned = free(positions)
    pinned[:60] = np.arange(60) % 2
    part = assign(quota({"val": 0.2}, int(held.sizes.sum())), positions, held, pinned=pinned)
    assert (part[:60] == pinned[:60]).all()


def test_few_pictures_move_when_pictures_are_added():
    positions, held = world(4, 2000, alone=True)
    due = {"train": 0.8, "val": 0.2}
    before = assign(quota(due, 2000), positions, held, pinned=free(positions))
    keep = held.groups < 1900
    any_picture = held.classes == held.num_classes
    rows = keep & ~any_picture
    fewer = Holdings(held.sizes[:1900], held.groups[rows], held.classes[rows], held.num_classes)
    after = assign(quota(due, 1900), positions[:1900], fewer, pinned=free(positions[:1900]))
    assert (before[:1900] != after).mean() < 0.04
