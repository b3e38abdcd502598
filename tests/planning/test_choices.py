"""Which settings fit, which are worth a thought, and which one is taken."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.errors import ConfigError
from gesso.planning.choices import Choice, Limits, bytes_of_batches, judged, number_words, take

MB = 10**6
AMOUNTS = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**8)), min_size=1, max_size=5)
BATCHES = st.sets(st.integers(1, 64), min_size=1, max_size=6).map(sorted)


@given(AMOUNTS, BATCHES)
def test_between_two_counts_the_line_is_never_below_the_peak(moments, batches):
    def peak(batch):
        return max(fixed + slope * batch for fixed, slope in moments)

    found = bytes_of_batches(peak, batches)
    assert list(found) == batches
    for batch, (bytes, counted) in found.items():
        assert counted == (batch in (batches[0], batches[-1]))
        assert bytes == peak(batch) if counted else bytes >= peak(batch)
    if len(moments) == 1:
        assert all(bytes == peak(batch) for batch, (bytes, _) in found.items())
    assert bytes_of_batches(peak, batches, every=True) == {batch: (peak(batch), True) for batch in batches}


CHOICES = st.builds(
    Choice,
    resolution=st.integers(1, 4),
    shape=st.just((32, 32)),
    pictures=st.integers(1, 4),
    bytes=st.integers(1, 8),
    days=st.integers(1, 4).map(float),
)


@given(st.lists(CHOICES, max_size=8), st.integers(1, 8))
def test_the_best_are_those_that_no_other_beats(choices, budget):
    found = judged(choices, budget)
    assert [one.fits for one in found] == [one.bytes <= budget for one in choices]
    for one in found:
        beaten = False
        for other in found:
            pairs = [
                (other.resolution, one.resolution),
                (other.pictures, one.pictures),
                (-other.days, -one.days),
            ]
            no_worse, better = all(a >= b for a, b in pairs), any(a > b for a, b in pairs)
            beaten |= other.fits and no_worse and better
        assert one.best == (one.fits and not beaten)


def setting(resolution, pictures, megabytes, days=None):
    return Choice(resolution=resolution, shape=(32, 32), pictures=pictures, bytes=megabytes * MB, days=days)


GRID = [
    setting(224, 4, 100, 3.0),
    setting(224, 8, 200, 2.0),
    setting(448, 4, 400, 9.0),
    setting(448, 8, 800, 8.0),
    setting(640, 4, 850, 16.0),
    setting(640, 8, 1700, 15.0),
]


def taken(budget, choices=GRID, **limits):
    budget *= MB
    return take(judged(choices, budget), Limits(**limits), name="training", budget=budget, unit="GPU days")


@pytest.mark.parametrize(
    ("budget", "limits", "wanted"),
    [
        (2000, {}, (640, 8)),
        (900, {}, (640, 4)),
        (900, {"least": 8}, (448, 8)),
        (2000, {"least": 8, "most": 500}, (448, 8)),
        (2000, {"most": 100}, (640, 8)),  # nothing is as low, so the limit does not count
        (500, {"least": 8}, (224, 8)),
        (150, {"least": 8}, (224, 4)),  # fewer than wanted is better than nothing
    ],
)
def test_the_highest_resolution_within_the_limits_is_taken(budget, limits, wanted):
    one, _ = taken(budget, **limits)
    assert (one.resolution, one.pictures) == wanted


def test_of_one_resolution_the_cheapest_is_taken_and_without_times_the_most_pictures():
    slower = [setting(224, 2, 1, 1.0), setting(224, 4, 1, 5.0)]
    assert taken(10, slower)[0].pictures == 2
    assert taken(10, [setting(224, 2, 1), setting(224, 4, 1)])[0].pictures == 4


def test_the_reason_says_what_more_would_need():
    reason = taken(900, least=8, least_words="for batch norm")[1]
    assert reason == (
        "the highest resolution that fits into 900MB with at least 8 pictures on a device (for batch norm); 640 pixels "
        "with 8 pictures would need 1700MB"
    )
    reason = taken(900, most=500, most_words=" below that of training, 501,")[1]
    assert "below that of training, 501, that fits" in reason and "the cheapest, 8 GPU days" in reason
    assert "640" not in reason
    assert "below" not in taken(900, most=100, most_words=" below that of training, 101,")[1]
    assert "8 pictures on a device (as asked) fit at no" in taken(150, least=8, least_words="as asked")[1]


def test_nothing_fits():
    with pytest.raises(
        ConfigError, match=r"training: nothing fits into 50MB: .* 224 pixels with 4 pictures, needs 100MB"
    ):
        taken(50)


def test_numbers_in_words():
    assert [number_words(v) for v in (None, 0.01234, 12.34, 999.4, 12345.6)] == ["-", "0.0123", "12.3", "999", "12,346"]


def test_images_per_second():
    assert setting(224, 4, 1).images_per_second is None
    one = Choice(resolution=1, shape=(1, 1), pictures=4, bytes=1, seconds=0.5)
    assert math.isclose(one.images_per_second, 8)
