import numpy as np
import pytest
from scipy.io import savemat

from gesso.data.index import Index
from tests.command_line import picture

LABELS = (1, 102, 3, 3, 7, 1, 102, 3)
SETS = {"trnid": [1, 2, 3], "valid": [8, 4], "tstid": [5, 6, 7]}


def flowers(folder, *, labels=LABELS, **sets):
    for number in range(1, len(LABELS) + 1):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", seed=number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([ids], np.uint16) for name, ids in (SETS | sets).items()})


def found(path):
    index = Index.open(path)
    states = np.stack([index.verified(row) for row in range(len(index))])
    assert ((states == 1).sum(1) == 1).all() and (states > 0).all() and states.shape[1] == 102
    numbers = [int(name[6:11]) for name in index.names]
    assert [LABELS[number - 1] - 1 for number in numbers] == states.argmin(1).tolist()
    return numbers


def test_splits(gesso, tmp_path):
    flowers(tmp_path / "s")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert made["format"] == "flowers102" and [part["split"] for part in made["splits"]] == ["train", "test", "val"]
    assert found(tmp_path / "i" / "train") == [1, 2, 3]
    assert found(tmp_path / "i" / "val") == [4, 8]
    assert found(tmp_path / "i" / "test") == [5, 6, 7]
    gesso("data", "import", tmp_path / "s", "--split", "trainval", "--out", tmp_path / "j")
    assert found(tmp_path / "j") == [1, 2, 3, 4, 8]


def test_one_picture_in_a_split(gesso, tmp_path):
    flowers(tmp_path / "s", trnid=[5])
    gesso("data", "import", tmp_path / "s", "--split", "train", "--out", tmp_path / "i")
    assert found(tmp_path / "i") == [5]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": (1, 103)}, "imagelabels.mat: holds the class 103; there are 1 to 102"),
        ({"labels": (1, 2)}, "setid.mat: names the picture 3, but 'imagelabels.mat' holds the classes of 2"),
        ({"trnid": [0, 1]}, "setid.mat: names the picture 0"),
    ],
)
def test_files_that_do_not_fit(gesso, tmp_path, more, words):
    flowers(tmp_path / "s", **more)
    assert words in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")


def test_a_wrong_mat(gesso, tmp_path):
    flowers(tmp_path / "s")
    (tmp_path / "s" / "setid.mat").write_bytes(b"no matlab file at all, whatever it is called")
    assert "setid.mat: is no MATLAB file" in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    savemat(tmp_path / "s" / "setid.mat", {"other": 1})
    line = gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert "setid.mat: the variable 'trnid' is missing" in line
    savemat(tmp_path / "s" / "setid.mat", {"trnid": "text", "valid": [1], "tstid": [1]})
    line = gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert "something else than a list of whole numbers" in line
