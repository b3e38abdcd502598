import numpy as np
import pytest

from gesso.data import demo_sources
from gesso.data.demo_sources import load_glyphs, load_photographs
from gesso.errors import DataError


def test_splits_share_no_digit():
    splits = [np.concatenate(load_glyphs(split)) for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == 1797
    glyphs = [{glyph.tobytes() for glyph in split} for split in splits]
    assert sum(map(len, glyphs)) == len(set.union(*glyphs)) == 1797  # no sample of the source stands twice either


def test_every_split_has_every_digit():
    for split in ("train", "val", "test"):
        counts = [len(samples) for samples in load_glyphs(split)]
        assert len(counts) == 10
        assert min(counts) >= 34


def test_glyphs_are_the_digits_they_are_said_to_be():
    train = np.concatenate(load_glyphs("train")).reshape(-1, 64)
    labels = np.repeat(np.arange(10), [len(samples) for samples in load_glyphs("train")])
    right = total = 0
    for digit, samples in enumerate(load_glyphs("test")):
        for sample in samples.reshape(-1, 64):
            right += labels[((train - sample) ** 2).sum(1).argmin()] == digit
            total += 1
    assert right / total > 0.9


def test_regions_cover_the_photograph_without_overlap():
    names = [{photo.name for photo in load_photographs(split)} for split in ("train", "val", "test")]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) >= 10
    where = np.arange(40 * 50 * 3, dtype=np.uint16).reshape(40, 50, 3)
    parts = [demo_sources._region(where, split).ravel() for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(where.size))


def test_missing_photographs_are_said(monkeypatch):
    monkeypatch.setattr(demo_sources, "_PHOTOGRAPHS", (("skimage", "data/nowhere.png", ""),))
    load_photographs.cache_clear()
    try:
        with pytest.raises(DataError, match="photographs"):
            load_photographs("train")
    finally:
        load_photographs.cache_clear()
