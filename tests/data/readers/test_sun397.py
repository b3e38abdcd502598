import numpy as np
import pytest

from gesso.data.index import Index
from tests.command_line import picture

NAMES = ("/a/abbey", "/a/apartment_building/outdoor", "/z/zoo")


def sun(folder, *, lists="", names=True, above=""):
    """Two pictures a class for each of train and test, and a second pair of lists with the roles exchanged."""
    lines = {"Training_01": [], "Testing_01": []}
    for number, name in enumerate(NAMES):
        for i, part in enumerate(("Training_01", "Testing_01", "Training_01", "Testing_01")):
            line = f"{name}/sun_{number}{i}.jpg"
            picture(folder / above / line.strip("/"), seed=number * 4 + i)
            lines[part].append(line)
    lines |= {"Training_02": lines["Testing_01"], "Testing_02": lines["Training_01"]}
    (folder / lists).mkdir(exist_ok=True)
    for part, found in lines.items():
        (folder / lists / f"{part}.txt").write_text("\n".join(found) + "\n")
    if names:
        (folder / lists / "ClassName.txt").write_text("\n".join(NAMES))


@pytest.mark.parametrize(
    ("lists", "names", "above"), [("", True, ""), ("Partitions", False, ""), ("split", True, "images")]
)
def test_the_first_split(gesso, tmp_path, lists, names, above):
    sun(tmp_path / "s", lists=lists, names=names, above=above)
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert made["format"] == "sun397" and [part["split"] for part in made["splits"]] == ["train", "test"]
    train, test = (Index.open(part["path"]) for part in made["splits"])
    assert train.label_space.names == ("abbey", "apartment_building/outdoor", "zoo")
    for index, numbers in ((train, "02"), (test, "13")):
        assert [name[-5] for name in index.names] == list(numbers) * 3
        assert [int(np.argmax(index.verified(row) == 1)) for row in range(6)] == [0, 0, 1, 1, 2, 2]
        assert all(sorted(index.verified(row)) == [1, 2, 2] for row in range(6))


def test_further_splits_by_name(gesso, tmp_path):
    sun(tmp_path / "s")
    gesso("data", "import", tmp_path / "s", "--split", "train-02", "--out", tmp_path / "i")
    assert [name[-5] for name in Index.open(tmp_path / "i").names] == list("13") * 3


def test_a_list_that_names_a_missing_picture(gesso, tmp_path):
    sun(tmp_path / "s")
    with (tmp_path / "s" / "Training_01.txt").open("a") as file:
        file.write("/a/abbey/sun_gone.jpg\n/a/abbey/sun_00.jpg\n")
    made = gesso.json("data", "import", tmp_path / "s", "--split", "train", "--out", tmp_path / "i")
    assert made["issues"] == {"picture is missing": 1, "picture stands twice in the list": 1} and made["images"] == 6
    assert len(Index.open(tmp_path / "i").verified_columns.labels) == 6


def test_mistakes(gesso, tmp_path):
    sun(tmp_path / "s")
    (tmp_path / "s" / "Training_01.txt").write_text("/a/abbey/x.jpg\n/a/abbe/x.jpg\n")
    line = gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert "Training_01.txt: line 2: unknown category 'abbe'" in line and "'abbey'" in line
    (tmp_path / "s" / "Training_01.txt").write_text("\n")
    assert "names no picture" in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert "'train-02'" in gesso.mistake(
        "data", "import", tmp_path / "s", "--split", "train-03", "--out", tmp_path / "i"
    )
