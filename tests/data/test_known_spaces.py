import json

import pytest

from gesso.data.known_spaces import KNOWN, counterparts, has_broad_map, known_map, known_space, spaces_with
from gesso.errors import DataError
from gesso.label_space import LabelSpace, normalise

SIZES = {"coco": 80, "voc": 20, "objects365-v1": 365, "objects365-v2": 365}


def inverse(golden, name, key):
    """name -> target name, of a table target -> list of entries."""
    table = json.loads((golden / "objects365" / name).read_text())[key]
    return {row["name"].strip(): target for target, rows in table.items() for row in rows}


def test_spaces():
    assert set(KNOWN) == SIZES.keys()
    for name, size in SIZES.items():
        space = known_space(name)
        assert len(space) == size == len(set(space.ids)) and space.ids == tuple(sorted(space.ids))
    assert known_space("coco").ids[-1] == 90 and known_space("coco").index("toothbrush") == 79
    assert known_space("voc").names == tuple(sorted(known_space("voc").names))
    assert known_space("objects365-v1").ids == known_space("objects365-v2").ids == tuple(range(1, 366))
    assert known_space("objects365-v2").find("Monitor/TV") == known_space("objects365-v2").find("moniter/tv ") == 37
    assert len(set(known_space("objects365-v2").supercategories)) == 11


def test_they_are_those_of_the_golden_files(golden):
    for version in (1, 2):
        rows = json.loads((golden / "objects365" / f"objects365_v{version}_categories.json").read_text())
        space = known_space(f"objects365-v{version}")
        assert [(row["id"], row["name"].strip()) for row in rows] == list(zip(space.ids, space.names, strict=True))
        assert [row.get("supercategory") for row in rows] == list(space.supercategories)
        assert all(space.find(row.get("name_fixed", row["name"])) == row["id"] - 1 for row in rows)
    coco = json.loads((golden / "coco" / "instances_val2014_100_bbox.json").read_text())["categories"]
    space = known_space("coco")
    assert [(c["id"], c["name"], c["supercategory"]) for c in coco] == list(
        zip(space.ids, space.names, space.supercategories, strict=True)
    )


def test_maps_are_those_of_the_golden_files(golden):
    v2 = "objects365_v2_to_coco_voc.json"
    assert known_map("objects365-v2", "coco") == inverse(golden, v2, "coco_to_objects365_v2_strict")
    broad = inverse(golden, v2, "coco_to_objects365_v2_broad_suggested")
    assert known_map("objects365-v2", "coco", "broad") == broad
    assert known_map("objects365-v2", "voc", "broad") == inverse(golden, v2, "voc_to_objects365_v2_suggested")
    v1 = inverse(golden, "objects365_v1_to_coco.json", "coco_to_objects365_v1")
    assert known_map("objects365-v1", "coco") == v1
    # Version 1 has no broad table of its own: what it shares by name with version 2 counts as it does there.
    wide = known_map("objects365-v1", "coco", "broad")
    by_name = {normalise(name): target for name, target in broad.items()}
    assert all(wide[name] == by_name[key] for name in wide if (key := normalise(name)) in by_name)
    names = known_space("objects365-v1").names
    assert {name for name in names if normalise(name) in by_name} <= wide.keys()


@pytest.mark.parametrize("source", ["objects365-v1", "objects365-v2"])
@pytest.mark.parametrize("target", ["coco", "voc"])
def test_maps_lead_from_names_to_names(source, target):
    strict, broad = (known_map(source, target, kind) for kind in ("strict", "broad"))
    assert strict.items() < broad.items()
    assert set(broad) <= set(known_space(source).names)
    assert set(strict.values()) == set(broad.values()) == set(known_space(target).names)


def test_coco_and_voc():
    there, back = known_map("voc", "coco"), known_map("coco", "voc")
    assert len(there) == 20 and there["tvmonitor"] == "tv" and there["sofa"] == "couch" and there["dog"] == "dog"
    assert back == {name: voc for voc, name in there.items()} == known_map("coco", "voc", "broad")
    assert known_map("coco", "coco") == {name: name for name in known_space("coco").names}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("coc", "voc"), r"no label space 'coc' is known.*'coco'"),
        (("coco", "objects365-v1"), "no map from 'coco' to 'objects365-v1' is known"),
        (("coco", "voc", "wide"), "unknown kind of map 'wide'"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(DataError, match=message):
        known_map(*words)


def test_counterparts_of_spaces_that_are_parts_of_known_ones():
    own = LabelSpace.from_names(["suv", "Car", "wild bird", "sneakers"])
    assert spaces_with(own) == ("objects365-v1", "objects365-v2")
    coco = known_space("coco")
    assert counterparts(own, coco) == {"Car": "car", "wild bird": "bird"}
    assert counterparts(own, coco, "broad") == {"suv": "car", "Car": "car", "wild bird": "bird"}
    some = LabelSpace.from_names(["bird", "dog", "couch"])
    assert spaces_with(some) == ("coco", "voc")  # the couch is a synonym of VOC's sofa
    assert counterparts(own, some, "broad") == {"wild bird": "bird"}
    assert has_broad_map(own, some) and not has_broad_map(some, coco)


def test_counterparts_of_any_other_spaces_have_the_same_name():
    own = LabelSpace(names=("Dog", "thing", "auto"), synonyms={"car": "auto"})
    assert counterparts(own, known_space("coco")) == {"Dog": "dog", "auto": "car"}
    assert not has_broad_map(own, known_space("coco"))
    assert counterparts(known_space("coco"), own) == {"dog": "Dog", "car": "auto"}
