import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gesso.random_key import fold, integer, stream, uniform

WORDS = st.lists(st.integers(0, 2**62), min_size=1, max_size=4)


@given(st.integers(0, 2**62), WORDS)
def test_python_numpy_and_torch_agree(key, words):
    plain = fold(key, *words)
    assert 0 <= plain < 2**32
    assert int(fold(np.int64(key), *[np.array(w) for w in words])) == plain
    assert int(fold(torch.tensor(key), *[torch.tensor(w) for w in words])) == plain
    assert float(uniform(torch.tensor(key), *words)) == uniform(key, *words) == float(uniform(np.array(key), *words))


def test_broadcasts_and_stays_exact_when_compiled():
    key, index = torch.arange(5)[:, None] * 2**33, torch.arange(1000)[None]
    eager = uniform(key, 7, index)
    assert eager.shape == (5, 1000)
    assert torch.equal(torch.compile(uniform, backend="aot_eager", fullgraph=True)(key, 7, index), eager)


def test_uniform_is_uniform_and_streams_are_independent():
    a = uniform(np.arange(200_000), stream("a"))
    b = uniform(np.arange(200_000), stream("b"))
    assert a.min() >= 0 and a.max() < 1
    counts = np.histogram(a, bins=64, range=(0, 1))[0]
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 120  # 63 degrees of freedom: p < 1e-4 beyond
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.01


def test_every_bit_of_a_word_counts():
    base = fold(12345, 678)
    flipped = {fold(12345, 678 ^ (1 << bit)) for bit in range(62)}
    assert base not in flipped and len(flipped) == 62


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integer_stays_in_range(high):
    values = integer(np.arange(20_000), 3, high=high)
    assert values.min() == 0 and values.max() == high - 1
    assert np.bincount(values, minlength=high).min() > 0


def test_known_values_never_change():
    """A changed hash would change every run that has ever been recorded."""
    assert [fold(0), fold(0, 0), fold(1, 2, 3)] == [0, 4165125857, 2420912359]
