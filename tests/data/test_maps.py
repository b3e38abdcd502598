import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gesso.data.maps import draw_maps, look, look_at, look_through, sound_maps
from gesso.data.records import ImageBlock, Strings
from gesso.data.semantic import VOID, read_semantic
from gesso.errors import DataError


def images(names, semantic=None, size=(6, 4)):
    count = len(names)
    return ImageBlock(
        ids=np.arange(count),
        names=Strings.of(names),
        widths=np.full(count, size[0], np.int32),
        heights=np.full(count, size[1], np.int32),
        semantic=None if semantic is None else Strings.of(semantic),
    )


def save(path, pixels):
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("pixels", [np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint16)])
def test_other_pixels_are_a_fault(tmp_path, pixels):
    save(tmp_path / "a.png", pixels)
    found = look(tmp_path / "a.png", (6, 4), 3)
    assert found.what == "semantic map cannot be read" and "a.png: the semantic map has pixels of mode" in found.detail
    assert look(tmp_path / "b.png", (6, 4), 3).what == "semantic map is missing"


@given(st.lists(st.integers(0, 255), min_size=1, max_size=24), st.integers(1, 254))
def test_unknown_values_against_a_slow_form(values, classes):
    pixels = np.array([values], np.uint8)
    wrong = sorted(v for v in set(values) if classes < v < VOID)
    found = look_at(pixels, "a.png", (0, 0), classes)
    assert set(np.flatnonzero(found.values).tolist()) == set(values)
    assert found.what == ("semantic map has an unknown value" if wrong else "")
    assert found.detail == (f"a.png: {wrong[0]}, but there are {classes} classes" if wrong else "")


def test_sizes(tmp_path):
    pixels = np.ones((4, 6), np.uint8)
    assert not look_at(pixels, "a.png", (6, 4), 1).what and not look_at(pixels, "a.png", (0, 0), 1).what
    assert look_at(pixels, "a.png", (4, 6), 1).detail == "a.png: 6 x 4, the picture 4 x 6"


def test_looks_come_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("gesso.data.maps._AT_ONCE", 3)
    paths = [tmp_path / f"{i}.png" if i % 3 else None for i in range(10)]
    for i, path in enumerate(paths):
        if path is not None:
            save(path, np.full((4, 6), i, np.uint8))
    told = []
    looks = list(look_through(paths, [(6, 4)] * 10, 9, progress=told.append))
    assert [np.flatnonzero(found.values).tolist() for found in looks] == [[i] if i % 3 else [] for i in range(10)]
    assert told == [3, 6, 9, 10]


def test_maps_that_are_required(tmp_path):
    save(tmp_path / "a.png", np.full((4, 6), 9, np.uint8))
    block = images(["a.jpg", "b.jpg"], ["a.png", ""])
    kept, issues = sound_maps(block, tmp_path, 3, required=False)
    assert list(kept.semantic) == ["", ""] and [issue.image for issue in issues] == ["a.jpg"]
    with pytest.raises(DataError, match=r"no semantic map can be used; .* unknown value: .*a\.png: 9, but there are 3"):
        sound_maps(block, tmp_path, 3, required=True)
    save(tmp_path / "a.png", np.full((4, 6), VOID, np.uint8))
    assert list(sound_maps(block, tmp_path, 3, required=False)[0].semantic) == ["a.png", ""]
    with pytest.raises(DataError, match="no semantic map shows a class"):
        sound_maps(block, tmp_path, 3, required=True)
    bare = images(["a.jpg"])
    assert sound_maps(bare, tmp_path, 3, required=True) == (bare, [])


def test_drawn_maps(tmp_path):
    maps = {"x/a.jpg": np.full((4, 6), 2, np.uint8), "b.jpg": np.full((4, 6), 7, np.uint8)}

    def draw(name):
        if name not in maps:
            raise DataError("no such map", where=name)
        return maps[name]

    block = images(["x/a.jpg", "b.jpg", "c.jpg", "d.jpg"], ["", "", "", "own.png"])
    root = tmp_path / "pictures"
    root.mkdir()
    made, issues = draw_maps(block, draw, root, tmp_path / "i.maps", 3, overwrite=False)
    assert list(made.semantic) == ["../i.maps/a.png", "", "", "own.png"]
    assert np.array_equal(read_semantic(root / made.semantic[0]), maps["x/a.jpg"])
    assert [(issue.image, issue.what) for issue in issues] == [
        ("b.jpg", "semantic map has an unknown value"),
        ("c.jpg", "semantic map cannot be read"),
    ]
