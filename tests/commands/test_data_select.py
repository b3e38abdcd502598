"""``gesso data select`` as it is called."""

import json

import pytest

from gesso.data.index import Index
from tests.command_line import coco, write

NAMES = ("Person", "SUV", "Car", "Sneakers")


@pytest.fixture
def index(gesso, tmp_path):
    """Ten pictures; picture i shows the category i modulo 4."""
    document = coco(tmp_path / "source", 10, categories=NAMES)
    for row in document["annotations"]:
        row["category_id"] = 1 + row["image_id"] % 4
    write(tmp_path / "source", document)
    gesso("data", "import", tmp_path / "source", "--out", tmp_path / "i")
    return tmp_path / "i"


def test_text_and_json_name_what_was_dropped(gesso, index, tmp_path):
    words = ("data", "select", index, "--out", tmp_path / "o", "--without-classes-of", "coco")
    text = gesso(*words).out
    assert f"{tmp_path}/o: 5 images of 10, 5 boxes of 10, 2 categories of 4" in text
    assert "kept: SUV, Sneakers" in text and "5 images that showed dropped classes alone: left out" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("Person", "Car"))] == [
        ["Person", "2", "2"],
        ["Car", "3", "3"],
    ]
    made = gesso.json(*words, "--overwrite", "--broad")
    assert made["kept"] == ["Sneakers"] and {one["name"] for one in made["dropped"]} == {"Person", "SUV", "Car"}
    made = gesso.json(*words, "--overwrite", "--keep-empty")
    assert (made["images"], made["boxes"], made["emptied"]) == (10, 5, 5)
    assert gesso.json("data", "check", tmp_path / "o")["problems"] == 0


def test_another_index_names_the_classes(gesso, index, tmp_path):
    coco(tmp_path / "other", categories=("car", "person"))
    gesso("data", "import", tmp_path / "other", "--out", tmp_path / "j")
    made = gesso.json("data", "select", index, "--out", tmp_path / "o", "--only-classes-of", tmp_path / "j", "--broad")
    assert made["kept"] == ["Person", "SUV", "Car"]


def test_names_with_spaces_and_a_draw(gesso, index, tmp_path):
    words = ("--classes", "person", "SUV", "--images", "3", "--seed", "4", "--rest", tmp_path / "r")
    text = gesso("data", "select", index, "--out", tmp_path / "o", *words).out
    assert f"2 images not drawn: {tmp_path}/r" in text and len(Index.open(tmp_path / "r")) == 2
    found = Index.open(tmp_path / "o")
    assert found.label_space.names == ("Person", "SUV") and all(found.image_path(row).is_file() for row in range(3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing is asked for"),
        (("--fraction", "2"), "--fraction 2 is outside (0, 1]"),
        (("--fraction", "ten"), "--fraction of gesso data select takes FLOAT"),
        (("--without-classes", "Preson"), "unknown category 'Preson'. Did you mean 'Person'"),
        (("--without-classes", *NAMES), "no class is left"),
        (("--without-classes-of", "cocco"), "'cocco' is neither a label space that is known by name nor an index"),
        (("--without-classes-of", "source"), "is no index"),
        (("--broad",), "--broad widens"),
        (("--keep-emtpy",), "unknown option '--keep-emtpy' of gesso data select. Did you mean '--keep-empty'"),
    ],
)
def test_mistakes_are_one_line(gesso, index, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in gesso.mistake("data", "select", index, "--out", tmp_path / "o", *words)
    assert not (tmp_path / "o").exists()


def test_json_is_one_document(gesso, index, tmp_path):
    called = gesso("data", "select", index, "--out", tmp_path / "o", "--per-class", "1", "--json")
    made = json.loads(called.out)
    assert made["images"] == 4 and made["notes"] == [] and made["rest"] is None
