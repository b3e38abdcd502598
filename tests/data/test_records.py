import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.data.blocks import lookup
from gesso.data.records import FLAGS, Masks, Polygons, Rle, Strings, take_ragged

TEXTS = st.lists(st.text(max_size=6), max_size=12)
RING = st.lists(st.tuples(st.floats(-9, 9, width=32), st.floats(-9, 9, width=32)), min_size=3, max_size=6)
MASK = st.one_of(
    st.none(),
    st.lists(RING, min_size=1, max_size=3).map(lambda rings: Polygons(tuple(np.array(r, np.float32) for r in rings))),
    st.tuples(st.integers(0, 99), st.integers(0, 99), st.binary(max_size=9)).map(
        lambda v: Rle((v[0], v[1]), v[2].replace(b"\0", b"0"))
    ),
)


def plain(mask):
    return tuple(ring.tolist() for ring in mask.rings) if isinstance(mask, Polygons) else mask


@given(TEXTS, st.data())
def test_strings(texts, data):
    column = Strings.of(texts)
    assert list(column) == texts == [column[i] for i in range(len(texts))] == column[:]
    rows = np.array(data.draw(st.lists(st.integers(0, max(len(texts) - 1, 0)), max_size=9 if texts else 0)), np.int64)
    assert list(column.take(rows)) == [texts[i] for i in rows]
    assert list(Strings.concatenate([column, Strings.of([]), column])) == texts + texts
    with pytest.raises(IndexError):
        column[len(texts)]


def test_names_that_are_not_utf8_survive():
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert Strings.of([name])[0] == name


@given(st.lists(MASK, max_size=8), st.data())
def test_masks(masks, data):
    column = Masks.of(masks)
    assert [plain(column[i]) for i in range(len(column))] == [plain(m) for m in masks]
    rows = np.array(data.draw(st.lists(st.integers(0, max(len(masks) - 1, 0)), max_size=9 if masks else 0)), np.int64)
    taken = column.take(rows)
    assert [plain(taken[i]) for i in range(len(taken))] == [plain(masks[i]) for i in rows]
    joined = Masks.concatenate([column, Masks.none(2), column])
    assert [plain(joined[i]) for i in range(len(joined))] == [plain(m) for m in [*masks, None, None, *masks]]


def test_take_ragged():
    offsets, data = take_ragged(np.array([0, 2, 2, 5]), np.arange(5), np.array([2, 1, 0, 2]))
    assert offsets.tolist() == [0, 3, 3, 5, 8]
    assert data.tolist() == [2, 3, 4, 0, 1, 2, 3, 4]


@given(st.lists(st.integers(-(2**62), 2**62) | st.integers(0, 20)), st.lists(st.integers(-5, 25)))
def test_lookup_finds_the_first(ids, wanted):
    wanted = wanted + ids[::2]
    expected = [ids.index(value) if value in ids else -1 for value in wanted]
    assert lookup(np.array(ids, np.int64), np.array(wanted, np.int64)).tolist() == expected


def test_flags_are_single_bits():
    assert sorted(FLAGS.values()) == [1 << bit for bit in range(len(FLAGS))]
