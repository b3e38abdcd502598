import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as reference

from gesso.data import rle
from gesso.data.records import Rle
from gesso.errors import DataError

MASKS = hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1))


@given(MASKS)
def test_equals_pycocotools(mask):
    ours = rle.encode(mask)
    theirs = reference.encode(np.asfortranarray(mask))
    assert ours.counts == theirs["counts"]
    assert ours.size == tuple(theirs["size"])
    assert np.array_equal(rle.decode(ours), mask)
    assert rle.area(ours) == mask.sum()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_any_counts_survive(counts):
    assert rle.uncompress(rle.compress(np.array(counts))).tolist() == counts


def test_large_runs_equal_pycocotools():
    mask = np.zeros((3000, 2000), np.uint8)
    mask[100:2900, 50:1900] = 1
    mask[200:300, 60:1700:7] = 0
    assert rle.encode(mask).counts == reference.encode(np.asfortranarray(mask))["counts"]


def test_uncompressed_counts():
    mask = rle.from_counts(np.array([2, 3, 1]), (2, 3))
    assert rle.decode(mask).T.ravel().tolist() == [0, 0, 1, 1, 1, 0]
    with pytest.raises(DataError, match="do not fill"):
        rle.from_counts(np.array([2, 3]), (2, 3))


@pytest.mark.parametrize("text", [b"\x01", b"\xff", b"P", b"o" * 14 + b"0"])
def test_broken_text_is_refused(text):
    with pytest.raises(DataError):
        rle.decode(Rle((2, 3), text))
