import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from gesso.data.index import Index
from gesso.data.records import IGNORE
from gesso.evaluation.ground_truth import load_ground_truth

ROWS = {
    "aachen_000000_000019": [
        (1, 10, 5, 8, 20, 24000, 10, 5, 8, 20),
        (1, 30, 5, 10, 20, 24001, 32, 5, 5, 20),
        (2, 50, 5, 8, 20, 25000, 50, 5, 8, 10),
        (0, 0, 0, 9, 9, 0, 0, 0, 9, 9),
        (5, 70, 1, 20, 30, 24002, 70, 1, 20, 30),
    ],
    "bochum_000000_000600": [(3, 10, 5, 8, 20, 24000, 10, 5, 8, 20)],
    "bochum_000000_000885": [],
}


def save(folder, rows, split="train"):
    records = np.empty((1, len(rows)), object)
    for i, (name, boxes) in enumerate(rows.items()):
        city, file = name.split("_")[0], f"{name}_leftImg8bit.png"
        bbs = np.array(boxes, np.float64).reshape(len(boxes), -1) if boxes else np.zeros((0, 0))
        records[0, i] = {"cityname": city, "im_name": file, "bbs": bbs}
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    savemat(folder / "annotations" / f"anno_{split}.mat", {f"anno_{split}_aligned": records})


def city(folder, rows=None, split="train"):
    rows = ROWS if rows is None else rows
    for name in rows:
        file = folder / "leftImg8bit" / split / name.split("_")[0] / f"{name}_leftImg8bit.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 40)).save(file)
    save(folder, rows, split)


def test_boxes_and_columns(gesso, tmp_path):
    city(tmp_path / "s")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert (made["format"], made["images"], made["boxes"], made["categories"]) == ("citypersons", 3, 6, 1)
    index = Index.open(tmp_path / "i")
    assert index.label_space.names == ("pedestrian",) and np.diff(index.offsets).tolist() == [5, 1, 0]
    assert index.boxes[:2].tolist() == [[10, 5, 18, 25], [30, 5, 40, 25]]
    assert index.flags.tolist() == [0, 0, IGNORE, IGNORE, IGNORE, IGNORE]
    columns = index.object_columns
    assert columns["height"].tolist() == [20, 20, 20, 9, 30, 20]
    assert columns["vis_ratio"].tolist() == [1, 0.5, 0.5, 1, 1, 1]
    assert columns["visible_xyxy"][1:3].tolist() == [[32, 5, 37, 25], [50, 5, 58, 15]]
    assert list(columns["kind"]) == ["pedestrian"] * 2 + ["rider", "ignore", "people group", "sitting person"]
    assert index.annotation_ids[:2].tolist() == [24000, 24001]


def test_the_miss_rate_finds_its_fields(gesso, tmp_path):
    city(tmp_path / "s")
    gesso("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    truth = load_ground_truth(tmp_path / "i", details=True)
    assert truth.details.heights.tolist() == [20, 20, 20, 9, 30, 20]
    assert truth.details.ignore.tolist() == [False] * 2 + [True] * 4
    lost = gesso.json("data", "export", tmp_path / "i", "--out", tmp_path / "e")["not_kept"]
    assert any("visible_xyxy" in line for line in lost)
    again = load_ground_truth(tmp_path / "e" / "annotations.json", details=True)
    assert sorted(again.details.heights.tolist()) == [9, 20, 20, 20, 20, 30]


def test_splits_and_a_single_file(gesso, tmp_path):
    city(tmp_path / "s")
    city(tmp_path / "s", {"munster_000000_000019": ROWS["aachen_000000_000019"]}, "val")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert [(part["split"], part["images"]) for part in made["splits"]] == [("train", 3), ("val", 1)]
    file = tmp_path / "s" / "annotations" / "anno_val.mat"
    assert gesso.json("data", "import", file, "--out", tmp_path / "j")["split"] == "val"
    (tmp_path / "far").mkdir()
    file.rename(tmp_path / "far" / "anno_val.mat")
    words = ("--images-root", tmp_path / "s", "--out", tmp_path / "k")
    assert gesso.json("data", "import", tmp_path / "far", *words)["images"] == 1


def test_one_record_and_one_row(gesso, tmp_path):
    city(tmp_path / "s", {"bochum_000000_000600": ROWS["bochum_000000_000600"]})
    assert gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")["boxes"] == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((6, 0, 0, 9, 9, 0, 0, 0, 9, 9), "record 1: a row has the class 6; there are 0 to 5"),
        ((1, 0, 0, 9, 9), "record 1: the rows of bbs have 5 numbers instead of 10"),
    ],
)
def test_rows_of_another_kind(gesso, tmp_path, row, words):
    city(tmp_path / "s", {"bochum_000000_000600": [row]})
    assert words in gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")


def test_a_wrong_mat(gesso, tmp_path):
    city(tmp_path / "s")
    file = tmp_path / "s" / "annotations" / "anno_train.mat"
    savemat(file, {"anno_train_aligned": np.arange(3)})
    line = gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert "record 1: is no structure with cityname, im_name and bbs" in line
    savemat(file, {"other": np.arange(3)})
    line = gesso.mistake("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert "the variable 'anno_train_aligned' is missing" in line
    file.rename(file.with_name("x.mat"))
    line = gesso.mistake("data", "import", file.with_name("x.mat"), "--out", tmp_path / "i")
    assert "Call it anno_train.mat" in line
