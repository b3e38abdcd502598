import pytest

from gesso.errors import DataError
from gesso.label_space import LabelSpace

ANIMALS = LabelSpace(
    names=("animal", "dog", "cat", "puppy", "tail"),
    parents=(("dog", "animal"), ("cat", "animal"), ("puppy", "dog")),
    parts=(("dog", "tail"),),
    synonyms={"hound": "dog"},
    ids=(10, 0, 30, 40, 50),
)


def test_names_are_compared_stripped_and_lower_case():
    assert ANIMALS.find("  Dog ") == 1 == ANIMALS.find("HOUND")
    assert ANIMALS.find("wolf") is None
    with pytest.raises(DataError, match="'dog'"):
        ANIMALS.index("dgo")


def test_map_is_by_name_and_says_what_was_dropped():
    other = LabelSpace.from_names(["Cat", "hound", "wolf"])
    there = ANIMALS.map_to(other)
    assert there.targets == (-1, 1, 0, -1, -1)
    assert there.dropped == ("animal", "puppy", "tail") and there.unused == ("wolf",)
    assert other.map_to(ANIMALS).targets == (2, 1, -1)


def test_every_synonym_maps():
    source = LabelSpace(names=("sofa",), synonyms={"couch": "sofa", "settee": "sofa"})
    assert source.map_to(LabelSpace.from_names(["couch"])).targets == (0,)
    assert source.map_to(LabelSpace.from_names(["settee"])).targets == (0,)


def test_hierarchy():
    assert ANIMALS.ancestors("puppy") == {"dog", "animal"}
    assert ANIMALS.descendants("animal") == {"dog", "cat", "puppy"}
    assert ANIMALS.ancestors("animal") == frozenset()


def test_round_trip():
    back = LabelSpace.from_dict(ANIMALS.to_dict())
    assert back == ANIMALS and back.ids == (10, 0, 30, 40, 50)
    assert LabelSpace.from_names(["a", "b"]).ids == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": ("a", "A ")}, "stands twice"),
        ({"names": ("a", " ")}, "empty"),
        ({"names": ("a",), "ids": (1, 2)}, "2 category ids"),
        ({"names": ("a",), "parents": (("a", "b"),)}, "unknown category 'b'"),
        ({"names": ("a",), "synonyms": {"x": "b"}}, "unknown category 'b'"),
        ({"names": ("a", "b"), "parents": (("a", "b"), ("b", "a"))}, "circle"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(DataError, match=words):
        LabelSpace(**arguments)
