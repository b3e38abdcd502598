import numpy as np
import pytest

from gesso.data.narrowing import Narrowing
from gesso.data.records import Source
from gesso.errors import DataError
from gesso.label_space import LabelSpace

SPACE = LabelSpace(
    names=("thing", "animal", "dog", "cat", "head"),
    supercategories=(None, "a", "b", "c", None),
    parents=(("animal", "thing"), ("dog", "animal"), ("cat", "animal"), ("dog", "thing")),
    parts=(("dog", "head"), ("animal", "head")),
    synonyms={"hound": "dog", "kitten": "cat"},
    ids=(5, 3, 9, 1, 2),
)


def test_what_stays_keeps_its_ids_names_and_relations():
    found = Narrowing.of(SPACE, ["head", "dog", "thing"])
    assert found.space == LabelSpace(
        names=("thing", "dog", "head"),
        supercategories=(None, "b", None),
        parents=(("dog", "thing"),),
        parts=(("dog", "head"),),
        synonyms={"hound": "dog"},
        ids=(5, 9, 2),
    )
    assert found.targets.tolist() == [0, -1, 1, -1, 2]
    for names in (("thing", "cat"), SPACE.names):
        part = Narrowing.of(SPACE, names).space
        assert all(part.ancestors(name) == SPACE.ancestors(name) & set(names) for name in names)


def test_a_source_labels_what_stays():
    found = Narrowing.of(SPACE, ["dog"])
    assert found.source(Source(name="", root="", labelled=("Dog", "cat"))).labelled == ("Dog",)
    assert found.source(Source(name="", root="")).labelled is None


def test_an_unknown_class():
    with pytest.raises(DataError, match=r"unknown category 'dgo'.*'dog'"):
        Narrowing.of(SPACE, ["dgo"])


def test_labels_are_counted_anew():
    assert Narrowing.of(SPACE, SPACE.names).targets.tolist() == np.arange(5).tolist()
    assert len(Narrowing.of(SPACE, []).space) == 0
