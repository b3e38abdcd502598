import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gesso.data.writers.numbers import fewest_digits, short, text

floats = st.floats(-1e6, 1e6, width=32)
pixels = st.one_of(st.just(0.0), st.floats(2**-20, 2**20, width=32))


@given(arrays(np.float32, st.integers(0, 20), elements=floats))
def test_short_gives_the_same_float32_again(values):
    assert np.array_equal(short(values).astype(np.float32), values)


def test_short_is_short():
    assert short(np.array([47.6, 0.1, 3.0, 17625.3], np.float32)).tolist() == [47.6, 0.1, 3.0, 17625.3]


@given(arrays(np.float32, (5, 2), elements=pixels))
def test_sums_come_back(values):
    values = np.sort(values, axis=1)  # a box ends behind its beginning
    start, end = values.astype(np.float64).T
    length = fewest_digits(end - start, lambda rounded: start + rounded, values[:, 1])
    assert np.array_equal((start + length).astype(np.float32), values[:, 1])


def test_numbers_as_text():
    assert [text(v) for v in (3.0, 0.25, -7.0, 1e-05)] == ["3", "0.25", "-7", "1e-05"]
